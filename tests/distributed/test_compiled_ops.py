"""DeepSpeed's ops compile where the environment names architectures with a letter (seen with
DeepSpeed 0.19.8 on an H200 whose image says 9.0a).
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.distributed.compiled_ops import VARIABLE, drop_letters


def what_deepspeed_reads() -> str:
    """The list as DeepSpeed leaves it when an op is to be compiled."""
    import os

    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    class Op(CUDAOpBuilder):
        def absolute_name(self) -> str:
            return "op"

        def sources(self) -> list[str]:
            return []

    builder: Any = Op("op")
    builder.jit_mode = True
    builder.compute_capability_args()
    return os.environ[VARIABLE]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("9.0a", "9.0+PTX"),
        ("8.0 9.0a", "8.0;9.0+PTX"),
        ("9.0a;10.0f+PTX", "9.0;10.0+PTX"),
        ("8.6;9.0+PTX", "8.6;9.0+PTX"),
    ],
)
def test_letters_of_architectures_are_dropped(
    given: str, read: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, given)
    lettered = any(letter in given for letter in "af")
    if lettered:  # without it the op is not compiled; when this passes, the workaround can go
        with pytest.raises(ValueError, match="invalid literal"):
            what_deepspeed_reads()
    drop_letters()
    said = capsys.readouterr().err
    assert (f"{VARIABLE} is {given}" in said) == lettered
    assert what_deepspeed_reads() == read


def test_an_unset_list_stays_unset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    monkeypatch.delenv(VARIABLE, raising=False)
    drop_letters()
    assert VARIABLE not in os.environ and capsys.readouterr().err == ""
