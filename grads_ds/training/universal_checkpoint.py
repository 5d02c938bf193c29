"""A checkpoint of one number of ranks, rewritten so that any number can load it, and held against
what it was made from.

    python -m grads_ds.training.universal_checkpoint SOURCE TARGET

SOURCE and TARGET lie in one checkpoint folder: global_step12 -> universal_global_step12.
DeepSpeed's own converter writes TARGET; then every weight and both moments of every trained
parameter are read back and compared, bit for bit, with SOURCE as DeepSpeed's other reader (the one
for `zero_to_fp32`) puts it together. Writes TARGET/verified last: every file's size and sha256.
Exit status 1 with what differs. The readers' functions are private to DeepSpeed
(grads_ds/workarounds.py); tests/training/test_checkpoints.py holds them to a real checkpoint. Host
memory: one parameter at a time for ZeRO-3, the whole model for stages 1 and 2.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal as converter
from deepspeed.utils import zero_to_fp32 as reader

from grads_ds.run_dir.digests import sha256
from grads_ds.run_dir.publish import publish_json, sync_tree
from grads_ds.training.checkpoint_content import tensors_alone

VERIFIED = "verified"
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
SHOWN = 5


@tensors_alone()  # DeepSpeed's own readers, too
def convert(source: Path, target: Path) -> None:
    """Write the universal checkpoint."""
    converter.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=4,
            num_merge_workers=2,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def parts(source: Path) -> dict[str, Mapping[str, Any]]:
    """By kind and parameter, what the ranks' files hold: tensors, or under ZeRO-3 what becomes one
    by `.contiguous()`.
    """
    files = reader.get_optim_files(str(source))
    models = reader.parse_model_states(reader.get_model_state_files(str(source)))
    stage, world, weights, paddings = reader.parse_optim_states(files, str(source))
    saved = [
        torch.load(file, map_location="cpu", mmap=True)["optimizer_state_dict"] for file in files
    ]
    found = {}
    for kind in KINDS:
        flat = weights
        if kind != "fp32":
            inner = [
                rank["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
                for rank in saved
            ]
            flat = [[state[group][kind] for group in sorted(state)] for state in inner]
        if stage == 3:
            found[kind] = reader._get_fp32_state_dict_from_zero3_checkpoint(
                world, flat, models, True
            )
        else:
            found[kind] = reader._get_fp32_state_dict_from_zero2_checkpoint(
                world, flat, models, True, paddings
            )
    return found


@tensors_alone()
def differences(source: Path, target: Path) -> list[str]:
    """What of TARGET is not what SOURCE holds, a line each; empty when it is all the same."""
    unequal = []
    found = parts(source)
    shapes = reader.parse_model_states(reader.get_model_state_files(str(source))[:1])[
        0
    ].param_shapes
    names = [name for group in shapes for name in group]
    if not names:
        return ["no trained parameter in it"]
    for name in names:
        for kind in KINDS:
            file = target / "zero" / name / f"{kind}.pt"
            if not file.is_file():
                unequal.append(f"{name}: no {kind}")
                continue
            read = torch.load(file, map_location="cpu")
            read = read["param"] if isinstance(read, dict) else read
            if not torch.equal(read.flatten(), found[kind][name].contiguous().flatten()):
                unequal.append(f"{name}: another {kind}")
    return unequal


def main(source: Path, target: Path) -> int:
    """Convert, compare, mark."""
    convert(source, target)
    if unequal := differences(source, target):
        more = f" and {len(unequal) - SHOWN} more" if len(unequal) > SHOWN else ""
        print(
            "the rewritten checkpoint is not the one it was made from:"
            f" {'; '.join(unequal[:SHOWN])}{more}",
            file=sys.stderr,
        )
        return 1
    sync_tree(target)
    files = {
        str(file.relative_to(target)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(target.rglob("*"))
        if file.is_file()
    }
    publish_json(target / VERIFIED, files)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
