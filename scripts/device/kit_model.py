"""Step `kit_model`: the kit's GGUF file -> SmolLM2-135M as a Hugging Face folder, checked."""

from __future__ import annotations

import json
import subprocess
import sys

from step import MODEL, REPO, Step, start


def run(step: Step) -> bool:
    """Made by the script that makes it anywhere; its record is the result."""
    gguf = step.kit / f"{MODEL}.gguf" if step.kit else None
    if gguf is None or not gguf.is_file():
        step.record(skipped="there is no kit, or not all of the model's parts are unpacked")
        return True
    script = REPO / "scripts/quickstart/real_model.py"
    command = [sys.executable, str(script), MODEL, "--gguf", str(gguf)]
    status = subprocess.run([*command, "--out", str(gguf.with_suffix(""))]).returncode
    if status == 0:
        step.record(**json.loads((gguf.with_suffix("") / "real_model.json").read_text()))
    return status == 0


if __name__ == "__main__":
    start(run)
