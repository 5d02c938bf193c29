"""A checkpoint rewritten for other numbers of ranks, looked at from outside."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from grads_ds.training import universal_checkpoint


def check_universal(checkpoint: Path) -> None:
    """Rewriting passes its own comparison, and one that went wrong anywhere does not."""
    source = next(checkpoint.glob("global_step*"))
    target = checkpoint / "universal_copy"
    assert (
        universal_checkpoint.main(source, target) == 0
        and (target / universal_checkpoint.VERIFIED).exists()
    )
    names = sorted(
        file.parent.relative_to(target / "zero") for file in (target / "zero").rglob("exp_avg.pt")
    )
    assert len(names) > len(universal_checkpoint.KINDS)
    for number, kind in enumerate(universal_checkpoint.KINDS):
        file = target / "zero" / names[number] / f"{kind}.pt"
        whole = torch.load(file, weights_only=False)
        tensor = whole["param"] if isinstance(whole, dict) else whole
        tensor.data.view(-1)[-1] += 1e-3  # one element of one parameter
        torch.save(whole, file)
    (target / "zero" / names[3] / "exp_avg.pt").unlink()
    told = universal_checkpoint.differences(source, target)
    wanted = [
        f"{name}: another {kind}"
        for name, kind in zip(names[:3], universal_checkpoint.KINDS, strict=True)
    ]
    assert sorted(told) == sorted([*wanted, f"{names[3]}: no exp_avg"])
    shutil.rmtree(target)
    (checkpoint / "latest_universal").unlink()
