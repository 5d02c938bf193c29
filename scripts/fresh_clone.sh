#!/usr/bin/env bash
# Prove the README's two commands: clone HEAD into an empty folder with a space in its path, with an
# empty environment and home, run both, the quickstart and the installation a second time, look at
# the artefacts, print timings.
#
#   bash scripts/fresh_clone.sh            both commands (20 to 40 minutes)
#   KEEP=1 bash scripts/fresh_clone.sh     and leave the clone for a look
#   MATERIAL=FOLDER bash scripts/fresh_clone.sh     with that folder beside the clone, as `shared`:
#                                                   tests that need it run as well
#   ONLY=quickstart bash scripts/fresh_clone.sh     one of: quickstart, test
#
# Only what pip itself may need on this network is passed on (PIP_*, SSL_*, *_proxy). Exit status 0
# when every command answered 0, every artefact is there and the second runs were quick.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
place="$(mktemp -d "${TMPDIR:-/tmp}/grads ds fresh.XXXXXX")"
trap '[ -n "${KEEP:-}" ] || rm -rf "$place"' EXIT
clone="$place/a clone"
mkdir "$place/home"
[ -z "${MATERIAL:-}" ] || ln -s "$(cd "$MATERIAL" && pwd -P)" "$place/shared"
git clone --quiet "$root" "$clone"
printf 'fresh clone of %s in %s\n' "$(git -C "$clone" rev-parse --short HEAD)" "$clone"

passed=()
allowed='^(PIP_|SSL_|https?_proxy$|no_proxy$|HTTPS?_PROXY$|NO_PROXY$)'
while IFS= read -r name; do
    passed+=("$name=${!name}")
done < <(compgen -e | grep -E "$allowed" || true)

failures=0
summary=""
timed() { # label, most seconds (0: no limit), command...
    local label="$1" most="$2" began=$SECONDS status=0 spent verdict=ok
    shift 2
    printf '\n---- %s\n' "$label"
    (cd "$clone" && env -i PATH="$PATH" HOME="$place/home" TERM=dumb "${passed[@]}" "$@") ||
        status=$?
    spent=$((SECONDS - began))
    [ "$status" = 0 ] || verdict="FAILED with status $status"
    [ "$most" = 0 ] || [ "$spent" -le "$most" ] || verdict="$verdict, too slow: at most $most s"
    [ "$verdict" = ok ] || failures=$((failures + 1))
    summary+="$(printf '%-24s %5s s  %s' "$label" "$spent" "$verdict")"$'\n'
}

if [ "${ONLY:-quickstart}" = quickstart ]; then
    timed "install" 0 bash scripts/install.sh
    timed "quickstart" 300 bash scripts/quickstart.sh
    timed "quickstart, again" 45 bash scripts/quickstart.sh
    run="$clone/runs/quickstart/run"
    for artefact in resolved.yaml prepared/pool prepared/domain prepared/general probe/model \
        scores/table.parquet scores/manifest.json selection/selected.jsonl \
        selection/selection.parquet selection/selection.json sft/model sft/variants/full/model \
        sft/variants/random_5/model evaluation.json report.html tensorboard logs; do
        [ -s "$run/$artefact" ] || {
            summary+="missing: $artefact"$'\n'
            failures=$((failures + 1))
        }
    done
    [ -z "$(git -C "$clone" status --porcelain)" ] || {
        stray="$(git -C "$clone" status --porcelain | head -3 | tr '\n' ' ')"
        summary+="files outside the ignored folders: $stray"$'\n'
        failures=$((failures + 1))
    }
fi
if [ "${ONLY:-test}" = test ]; then
    timed "tests" 0 bash scripts/test.sh
    timed "install for tests, again" 30 bash scripts/install.sh --dev
fi

printf '\n%s' "$summary"
[ "$failures" = 0 ] && printf 'fresh clone: all good\n' || {
    printf 'fresh clone: %s problems\n' "$failures"
    exit 1
}
