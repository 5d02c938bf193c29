#!/usr/bin/env bash
# Install what is missing, then run every check: linter, type checker, tests.
#
#   bash scripts/test.sh                      what a change has to pass (ten minutes on two cores)
#   bash scripts/test.sh tests/gradnorm -x    arguments go to pytest
#   bash scripts/test.sh -m "not gpu"         the long ones too (before a release)
#   bash scripts/test.sh -m gpu               those that need a GPU
#
# Three workers share the tests, since some wait (-n 0: none). Tests that need a system package this
# machine lacks are skipped with the reason. The last line is pytest's own summary. Exit status: 0
# when everything passed, else that of the first check that failed; all of them run in any case.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# the command line has a limit of its own, so that a test that hangs where pytest's timeout cannot
# reach ends too
limit="${GRADS_DS_TEST_SECONDS:-4800}"

bash scripts/install.sh --dev
python="$PWD/.venv/bin/python"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

status=0
check() { # name, command...
    local name="$1" this=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || this=$?
    [ "$this" = 0 ] || printf '%s: failed with status %s\n' "$name" "$this"
    [ "$status" != 0 ] || status=$this
}

check "ruff" "$python" -m ruff check --output-format concise .
check "ruff format" "$python" -m ruff format --check --quiet --diff .
types() {
    local found this=0
    found="$(timeout 300 "$python" -m mypy 2>&1)" || this=$?
    printf '\n== mypy\n%s\n' "$found"
    [ "$this" = 0 ] || printf 'mypy: failed with status %s\n' "$this"
    return "$this"
}

# beside all tests, which take minutes and wait now and then; before a few
types &
checker=$!
typed=
settle_types() {
    [ -z "$typed" ] || return 0
    typed=0
    wait "$checker" || typed=$?
    [ "$status" != 0 ] || status=$typed
}
[ $# = 0 ] || settle_types
case " $* " in
    *" -m "*) selection=() ;;
    *) selection=(-m "not gpu and not long") ;;
esac
printf '\n== pytest\n'
[ "$status" = 0 ] ||
    printf 'an earlier check failed (above); the exit status will be %s\n' "$status"
tests=0
# a file's tests stay with one worker; tests/sharing.py says which worker takes which file
share=(-n 3 --dist loadfile --no-loadscope-reorder)
timeout --kill-after=30 "$limit" "$python" -m pytest -q "${share[@]}" "${selection[@]}" "$@" ||
    tests=$?
[ "$tests" != 124 ] ||
    printf 'pytest: stopped after %s seconds (GRADS_DS_TEST_SECONDS)\n' "$limit" >&2
settle_types
[ "$status" != 0 ] || status=$tests
exit "$status"
