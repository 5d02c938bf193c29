#!/usr/bin/env bash
# Make this checkout runnable: system packages where they are missing, then a virtual environment in
# .venv.
#
#   bash scripts/install.sh             what running needs
#   bash scripts/install.sh --cluster   and what jobs over several hosts need (ssh, pdsh, MPI)
#   bash scripts/install.sh --dev       and what the tests, the linter and the type checker need
#
# The one install script: the quickstart, the tests, the Docker image and a bare machine all use it.
# Reads pyproject.toml and constraints.txt; writes .venv. A second run compares a stamp and is done;
# an install that was interrupted is finished. Plain pip: any torch build of the pinned version will
# do, so machines with GPUs get the CUDA one.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/grads_ds.stamp"

# command : Debian package that brings it
build_tools="g++:g++ ninja:ninja-build"
cluster_tools="ssh:openssh-client sshd:openssh-server pdsh:pdsh mpirun:openmpi-bin"
test_tools="sshd:openssh-server pdsh:pdsh ip:iproute2 ping:iputils-ping mpirun:openmpi-bin"
test_tools="$test_tools mpiexec.hydra:mpich slurmctld:slurm-wlm"

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

dev=
cluster=
for argument in "$@"; do
    case "$argument" in
        --dev) dev=yes ;;
        --cluster) cluster=yes ;;
        -h | --help) sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *)
            printf 'install: wanted --cluster, --dev or nothing; found %s\n' "$argument" >&2
            exit 2 ;;
    esac
done

# ---- system packages -----------------------------------------------------------------------------

missing_packages() { # "command:package ..." -> the packages whose command is not there
    local pair
    for pair in $1; do
        PATH="${PATH:-}:/usr/sbin:/sbin" command -v "${pair%%:*}" > /dev/null ||
            printf '%s ' "${pair##*:}"
    done
}

apt_install() { # status 1 when this machine has no apt or the user may not use it
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || return 1
    say "system packages: $*"
    local log
    log="$(mktemp)"
    # RUNLEVEL=1 keeps Debian from starting the daemons that come with the packages
    if { apt-get -o DPkg::Lock::Timeout=300 update -qq &&
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install \
            -y -qq --no-install-recommends "$@"; } > "$log" 2>&1 < /dev/null; then
        rm -f "$log"
    else
        tail -n 5 "$log" >&2
        rm -f "$log"
        return 1
    fi
}

system_packages() { # $1: pairs, $2: what goes without them
    local packages
    packages="$(missing_packages "$1")"
    [ -n "$packages" ] || return 0
    # shellcheck disable=SC2086  # one word per package
    apt_install $packages ||
        say "missing, so that $2: ${packages}(as root: apt-get install -y ${packages% })"
}

system_packages "$build_tools" "DeepSpeed cannot compile its extensions (optimizer offload)"
[ -z "$cluster" ] ||
    system_packages "$cluster_tools" "jobs over several hosts cannot start from here"
[ -z "$dev" ] || system_packages "$test_tools" "the tests that need them are skipped"

# ---- Python --------------------------------------------------------------------------------------

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} \
        python3.11 python3.12 python3.13 python3 python3.14 /usr/bin/python3; do
        if command -v "$name" > /dev/null && fits "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

python="$(find_python)" || {
    apt_install python3 python3-venv || true
    python="$(find_python)" || {
        found="$(python3 --version 2> /dev/null || echo none)"
        fail "wanted Python 3.11 or newer; found $found; install one (Debian 12: apt-get install -y\
 python3 python3-venv) or set PYTHON to its path"
    }
}

# one install at a time in one checkout (a shell without flock goes on without the lock)
exec 9< "$root"
if command -v flock > /dev/null && ! flock -n 9; then
    say "waiting for another install of this checkout"
    flock 9
fi

# ---- the virtual environment ---------------------------------------------------------------------

works() { # whether the environment finds these modules
    "$venv/bin/python" -c "import importlib.util as u, sys
sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))" "$@"
}

wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
found="$(cat "$stamp" 2> /dev/null || true)"
if { [ "$found" = "$wanted" ] && [ -z "$dev" ] || [ "$found" = "$wanted dev" ]; } &&
    grep -qF " $venv" "$venv/pyvenv.cfg" &&
    works pip torch deepspeed grads_ds ${dev:+pytest mypy} 2> /dev/null; then
    say "skipped, .venv is up to date"
    exit 0
fi
[ "$found" != "$wanted dev" ] || dev=yes  # a repair keeps what was there
rm -f "$stamp"

# a virtual environment holds its own path: one that was moved, or left half made, is made again
whole() { # whether the environment stands where it was made and runs
    grep -qsF " $venv" "$venv/pyvenv.cfg" && fits "$venv/bin/python" && works pip
}
if [ -e "$venv" ] && ! whole 2> /dev/null; then
    say "making .venv again (the one there is incomplete or was moved)"
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
        apt_install "$package" || fail "wanted Python's venv and ensurepip; $python has none; as\
 root: apt-get install -y $package"
    fi
    "$python" -m venv "$venv"
fi

say "Python packages into .venv, with $("$venv/bin/python" --version) (minutes; the CUDA build of\
 torch is some gigabytes)"
quiet=-qq
[ ! -t 1 ] || quiet=
began=$SECONDS
(cd "$root" && "$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
    -c constraints.txt -e ".[scripts${dev:+,dev,mpi}]") ||
    fail "pip could not install the packages (above); fix that and start again: what is there is\
 kept"
printf '%s\n' "$wanted${dev:+ dev}" > "$stamp.new"
mv "$stamp.new" "$stamp"
say "done in $((SECONDS - began)) s"
