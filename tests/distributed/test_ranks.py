"""Ranks start without a compiler, and what rank 0 finds or refuses is what every rank finds or
refuses.
"""

from __future__ import annotations

import os

import pytest

from ranks import run_on_ranks


def share() -> tuple[str, list[int], list[str]]:
    from grads_ds.config.errors import UserError
    from grads_ds.distributed import ranks

    try:
        ranks.from_main(refuse)
        refused = []
    except UserError as error:
        refused = error.problems
    return (
        ranks.from_main(lambda: f"found by {ranks.rank()}"),
        ranks.all_gather_object(ranks.rank()),
        refused,
    )


def refuse() -> None:
    from grads_ds.config.errors import UserError

    raise UserError(["one fault", "another"])


def test_what_the_first_rank_finds_is_shared() -> None:
    assert run_on_ranks(2, share) == [("found by 0", [0, 1], ["one fault", "another"])] * 2


def test_cpu_ranks_start_without_compiling(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with DeepSpeed 0.19.8: init_distributed compiles an op unless its table of usable ops
    says no.
    """
    import deepspeed

    from grads_ds.distributed.compiled_ops import SHARED_MEMORY_OP

    assert SHARED_MEMORY_OP in deepspeed.ops.__compatible_ops__, (
        f"renamed in DeepSpeed {deepspeed.__version__}: see grads_ds/workarounds.py"
    )
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_on_ranks(1, share)
    assert os.listdir(str(tmp_path)) == []


def test_ops_link_where_torch_lies_below_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.utils.cpp_extension (torch 2.13.0) hands its library folder to the shell as it is."""
    import shlex

    import torch
    from torch.utils import cpp_extension

    from grads_ds.distributed.compiled_ops import quote_torch_lib_path

    flags = cpp_extension._prepare_ldflags([], False, False, False, False)
    assert f"-L{cpp_extension.TORCH_LIB_PATH}" in flags, (
        "torch no longer makes its linker flags this way: look again"
    )
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/some where/torch/lib")
    monkeypatch.setattr(torch, "__path__", ["/some where/torch"])
    quote_torch_lib_path()
    flags = cpp_extension._prepare_ldflags([], False, False, False, False)
    assert shlex.split(" ".join(flags))[0] == "-L/some where/torch/lib"
