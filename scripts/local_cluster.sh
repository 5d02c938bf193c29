#!/usr/bin/env bash
# Several hosts on one machine: network namespaces on a bridge, each with its own address, host
# name, processes and sshd.
#
#   scripts/local_cluster.sh up 2        two hosts; then, from here or from inside a host:
#   eval "$(scripts/local_cluster.sh env)"; grads-ds run CONFIG --hosts "$HOSTFILE"
#   scripts/local_cluster.sh exec 1 deepspeed --hostfile /tmp/local_cluster.lc/hostfile \
#       --module grads_ds probe CONFIG
#   scripts/local_cluster.sh down        leaves nothing behind
#
# commands:
#   up N [--slots S] [--rate 1gbit] [--delay 2ms]    hosts with S slots each in the hostfile
#                                                    (default 1), slower links
#   down | status
#   env                             what a shell on this machine needs to reach the hosts
#   exec HOST COMMAND...            run in host HOST (1..N), in this folder
#   kill HOST | boot HOST           the host is gone with all its processes; it is back
#   link HOST up|down               its network
#   shape [--rate R] [--delay D]    change every link; without either: as fast as it goes
#   bytes                           bytes each host has sent since it was made
#   pids                            processes of all hosts, as this machine numbers them
#
# option: --name NAME (at most 8 letters, digits; default lc): clusters of different names stand
# side by side
#
# Needs root (namespaces), iproute2 and openssh-server. All hosts share this machine's files, as
# hosts share a parallel file system, but for /run and /dev/shm. Inside a host plain `ssh <address>`
# works. Writes /tmp/local_cluster.NAME (key, hostfile). Running `up` again is done when the cluster
# already stands, and replaces one that is different or broken.
set -euo pipefail

fail() { printf 'local_cluster: %s\n' "$1" >&2; exit "${2:-1}"; }
usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

name=lc slots=1 rate='' delay=''
words=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --name | --slots | --rate | --delay)
            [ $# -ge 2 ] || fail "$1: wanted a value" 2
            printf -v "${1#--}" %s "$2"; shift 2 ;;
        *)
            words+=("$1")
            shift
            # the rest is the command's
            if [ "${words[0]}" = exec ] && [ ${#words[@]} = 2 ]; then words+=("$@"); break; fi ;;
    esac
done
set -- "${words[@]}"
command="${1:-}"
[[ "$name" =~ ^[a-z0-9]{1,8}$ ]] ||
    fail "--name: wanted at most 8 lower-case letters and digits; found '$name'" 2
[[ "$slots" =~ ^[1-9][0-9]*$ ]] || fail "--slots: wanted a whole number from 1 on; found '$slots'" 2
home="/tmp/local_cluster.$name"
bridge="$name-br"

hosts() {
    ip netns list 2> /dev/null | awk -v p="^$name-[0-9]+$" '$1 ~ p {print $1}' | sort -t- -k2n
}
is_up() { [ -n "$(ip netns pids "$1" 2> /dev/null)" ]; }
host() { # a number -> the namespace's name
    [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] && [ -e "/run/netns/$name-$1" ] ||
        fail "wanted a host's number; found '${1:-}'; there are: $(hosts | tr '\n' ' ')" 2
    printf '%s-%s' "$name" "$1"
}

boot() { # $1: namespace, whose network stands
    local ns="$1"
    # its own process tree: killing the first process is losing the host; pkill on one host does not
    # reach another
    setsid ip netns exec "$ns" \
        unshare --uts --ipc --pid --mount --mount-proc --fork --kill-child \
        bash "$home/init.sh" "$ns" \
        > "$home/$ns.log" 2>&1 < /dev/null 9<&- &
    local tries
    for tries in $(seq 100); do
        timeout 5 "$home/bin/ssh" -o ConnectTimeout=2 "$(cat "$home/$ns.address")" true \
            2> /dev/null && return 0
        sleep 0.1
    done
    fail "$ns: sshd does not answer ($tries tries): $(tail -n 3 "$home/$ns.log")"
}

shape() { # the same limit on what every host sends
    local ns
    for ns in $(hosts); do
        ip netns exec "$ns" tc qdisc del dev eth0 root 2> /dev/null || true
        [ -n "$rate$delay" ] || continue
        # shellcheck disable=SC2086
        if ! ip netns exec "$ns" tc qdisc add dev eth0 root netem \
            ${delay:+delay $delay} ${rate:+rate $rate} 2> /dev/null; then
            [ -z "$delay" ] ||
                fail "--delay: this kernel has no netem queue (module sch_netem); leave --delay out"
            ip netns exec "$ns" \
                tc qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 100ms
        fi
    done
}

up() {
    local count="$1" wanted="$1 $slots" ns number net
    [[ "$count" =~ ^[1-9][0-9]?$ ]] ||
        fail "up: wanted the number of hosts (1 to 99); found '$count'" 2
    [ "$(id -u)" = 0 ] || fail "wanted root, which network namespaces take; found user $(id -un)"
    local tool
    for tool in ip tc sshd ssh-keygen unshare nsenter; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" > /dev/null ||
            fail "wanted the command $tool; found none; run scripts/install.sh --dev"
    done
    if [ "$(cat "$home/wanted" 2> /dev/null)" = "$wanted" ]; then
        local complete=yes
        for ns in $(hosts); do is_up "$ns" || complete=; done
        if [ -n "$complete" ] && [ "$(hosts | wc -l)" = "$count" ]; then shape; return 0; fi
    fi
    down
    # shellcheck disable=SC2154
    trap 'status=$?; [ $status = 0 ] || down' EXIT # all of it or nothing
    mkdir -m 700 "$home"
    mkdir "$home/bin" "$home/ssh_config.d"
    ssh-keygen -q -t ed25519 -N '' -C "local_cluster $name" -f "$home/key"
    ssh-keygen -q -t ed25519 -N '' -C "local_cluster $name" -f "$home/host_key"

    net=
    for number in $(seq 1 250); do # the first network that no interface of this machine has
        [[ "$(ip -o -4 addr)" == *" 10.177.$number."* ]] || { net="10.177.$number"; break; }
    done
    [ -n "$net" ] || fail "no network free in 10.177.0.0/16"
    ip link add "$bridge" type bridge
    ip addr add "$net.254/24" dev "$bridge"
    ip link set "$bridge" up

    printf '127.0.0.1 localhost\n' > "$home/hosts"
    # no name server is near: without an answer at once, looking up a name takes ten seconds
    printf 'nameserver 127.0.0.1\n' > "$home/resolv.conf"
    : > "$home/hostfile"
    for number in $(seq "$count"); do
        printf '%s.%s %s-%s\n' "$net" "$number" "$name" "$number" >> "$home/hosts"
        printf '%s.%s slots=%s\n' "$net" "$number" "$slots" >> "$home/hostfile"
        printf '%s.%s\n' "$net" "$number" > "$home/$name-$number.address"
    done
    cat > "$home/ssh_config.d/local_cluster.conf" << END
Host $net.* $name-*
    IdentityFile $home/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
    printf '#!/bin/sh\nexec /usr/bin/ssh -F %s "$@"\n' \
        "$home/ssh_config.d/local_cluster.conf" > "$home/bin/ssh"
    chmod +x "$home/bin/ssh"
    cat > "$home/sshd_config" << END
HostKey $home/host_key
AuthorizedKeysFile $home/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
UseDNS no
MaxStartups 200
PidFile none
END
    cat > "$home/init.sh" << END
set -e
hostname "\$1"
mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd /run/lock
mount -t tmpfs tmpfs /dev/shm
mount --bind $home/hosts /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind $home/resolv.conf /etc/resolv.conf
mount --bind $home/ssh_config.d /etc/ssh/ssh_config.d
exec $(PATH="$PATH:/usr/sbin:/sbin" command -v sshd) -D -e -f $home/sshd_config \\
    -o "ListenAddress \$(cat $home/\$1.address)"
END
    for number in $(seq "$count"); do
        ns="$name-$number"
        ip netns add "$ns"
        ip link add "$name-v$number" type veth peer name eth0 netns "$ns"
        ip link set "$name-v$number" master "$bridge" up
        ip netns exec "$ns" sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2> /dev/null || true
        ip -n "$ns" link set lo up
        ip -n "$ns" addr add "$net.$number/24" dev eth0
        ip -n "$ns" link set eth0 up
        ip -n "$ns" route add default via "$net.254"
        boot "$ns"
    done
    shape
    printf '%s' "$wanted" > "$home/wanted"
    trap - EXIT
}

stop() { # returns when nothing of the host runs
    local pids
    while pids="$(ip netns pids "$1" 2> /dev/null)" && [ -n "$pids" ]; do
        # shellcheck disable=SC2086
        kill -KILL $pids 2> /dev/null || true
        sleep 0.05
    done
}

down() {
    local ns
    for ns in $(hosts); do
        stop "$ns"
        ip netns del "$ns"
        ip link del "$name-v${ns##*-}" 2> /dev/null || true
    done
    ip link del "$bridge" 2> /dev/null || true
    rm -rf "$home"
}

case "$command" in
    up | down | boot | kill) exec 9< /; flock 9 ;; # one change at a time on this machine
esac
case "$command" in
    up) up "${2:-}"; printf 'local_cluster: %s hosts, hostfile %s/hostfile\n' "$2" "$home" ;;
    down) down ;;
    status)
        for ns in $(hosts); do
            printf '%s %s %s\n' "$ns" "$(cat "$home/$ns.address")" \
                "$(is_up "$ns" && echo up || echo gone)"
        done ;;
    env)
        [ -e "$home/hostfile" ] || fail "no cluster $name stands; bring it up first"
        # shellcheck disable=SC2016
        printf 'export PATH=%s/bin:"$PATH"\nexport HOSTFILE=%s/hostfile\n' "$home" "$home" ;;
    exec)
        ns="$(host "${2:-}")"
        shift 2
        [ $# -gt 0 ] || fail "exec: wanted a command" 2
        first="$(ip netns pids "$ns" | while read -r pid; do
            own="$(awk '/^NSpid/ {print $NF}' "/proc/$pid/status" 2> /dev/null)"
            [ "$own" = 1 ] && echo "$pid" && break
        done)" || true
        [ -n "$first" ] || fail "$ns is gone; boot it first"
        # shellcheck disable=SC2016
        exec nsenter --target "$first" --mount --uts --ipc --net --pid -- \
            sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@" ;;
    kill)
        ns="$(host "${2:-}")"
        stop "$ns" ;;
    boot)
        ns="$(host "${2:-}")"
        is_up "$ns" || boot "$ns" ;;
    link)
        host "${2:-}" > /dev/null
        [[ "${3:-}" =~ ^(up|down)$ ]] || fail "link: wanted up or down; found '${3:-}'" 2
        ip link set "$name-v$2" "$3" ;;
    shape) shape ;;
    pids) for ns in $(hosts); do ip netns pids "$ns"; done ;;
    bytes)
        for ns in $(hosts); do
            counter="/sys/class/net/$name-v${ns##*-}/statistics/rx_bytes"
            printf '%s %s\n' "$ns" "$(cat "$counter")"
        done ;;
    *) usage >&2; fail "wanted a command; found '$command'" 2 ;;
esac
