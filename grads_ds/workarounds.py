"""What DeepSpeed, torch, transformers and pyarrow get wrong, and what is done about it: each with
the version it was seen with and the test that would retire it.

Those of a few lines of their own stand here, others in the file named. `warn_of_other_versions`
says once, when a job starts, that an installed version is another. No torch import until a call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Workaround:
    """One of them. It is retired when `test` passes without it; `seen` is the version it was seen
    with, compared up to its own number of parts.
    """

    what: str
    package: str
    seen: str
    where: str
    test: str


_HERE = "grads_ds/workarounds.py"
_OPS = "grads_ds/distributed/compiled_ops.py"
WORKAROUNDS = (
    Workaround(
        "a destroyed engine keeps its model alive in two private places",
        "deepspeed",
        "0.19",
        _HERE,
        "tests/test_workarounds.py",
    ),
    Workaround(
        "modules release parameters that GatheredParameters holds",
        *("deepspeed", "0.19"),
        *("grads_ds/engine/whole_model.py", "tests/engine/test_whole_model.py"),
    ),
    Workaround(
        "what a module releases is cached beyond the order of modules it was found for",
        "deepspeed",
        "0.19",
        "grads_ds/engine/module_order.py",
        "tests/plan/test_predictions.py",
    ),
    Workaround(
        "a forward alone is recorded as the order of modules, and every backward discards it",
        "deepspeed",
        "0.19",
        "grads_ds/engine/module_order.py",
        "tests/probe/test_module_order.py",
    ),
    Workaround(
        "the shared-memory collectives are compiled on CPU ranks, unused, and can hang",
        "deepspeed",
        "0.19",
        _OPS,
        "tests/distributed/test_ranks.py",
    ),
    Workaround(
        "after a universal checkpoint all parameters share one step counter",
        "deepspeed",
        "0.19",
        "grads_ds/training/checkpoints.py",
        "tests/training/test_checkpoints.py",
    ),
    Workaround(
        "Ulysses leaves its attention and its groups in the process",
        "deepspeed",
        "0.19",
        _HERE,
        "tests/training/test_sequence_parallel.py",
    ),
    Workaround(
        "below ZeRO-3 Ulysses divides gradients by groups, not ranks",
        "deepspeed",
        "0.19",
        "grads_ds/training/division.py",
        "tests/training/test_sequence_parallel.py",
    ),
    Workaround(
        "no public reader of a checkpoint's optimizer parts",
        "deepspeed",
        "0.19",
        "grads_ds/training/universal_checkpoint.py",
        "tests/training/test_checkpoints.py",
    ),
    Workaround(
        "a backward that the engine did not start leaves the embedding gathered",
        "deepspeed",
        "0.19",
        "grads_ds/engine/module_order.py",
        "tests/engine/test_frozen_pass.py",
    ),
    Workaround(
        "its shared-memory op is compiled on CPU ranks, which the compiler may fail at",
        *("deepspeed", "0.19"),
        *(_OPS, "tests/distributed/test_ranks.py"),
    ),
    Workaround(
        "architectures with a letter are no numbers to its builder",
        *("deepspeed", "0.19"),
        *(_OPS, "tests/distributed/test_compiled_ops.py"),
    ),
    Workaround(
        "extensions are linked with torch's library folder unquoted",
        "torch",
        "2.13",
        _OPS,
        "tests/distributed/test_ranks.py",
    ),
    Workaround(
        "checkpoints hold the whole model a second time",
        "transformers",
        "5.23",
        "grads_ds/training/trainer.py",
        "tests/training/test_checkpoints.py",
    ),
    Workaround(
        "the best model is loaded by a private method alone",
        "transformers",
        "5.23",
        "grads_ds/training/trainer.py",
        "tests/training/test_checkpoints.py",
    ),
    Workaround(
        "a model cannot be made whole while ZeRO-3 is set, by a public name",
        "transformers",
        "5.23",
        _HERE,
        "tests/engine/test_strict_loading.py",
    ),
    Workaround(
        "under ZeRO-3 missing and unexpected tensors are not told",
        "transformers",
        "5.23",
        "grads_ds/engine/strict_loading.py",
        "tests/engine/test_strict_loading.py",
    ),
    Workaround(
        "take copies a whole column into one array first",
        "pyarrow",
        "26.0",
        "grads_ds/selection/pool.py",
        "tests/selection/test_pool.py",
    ),
)


def other_versions() -> list[str]:
    """A sentence for every package whose installed version is not the one its faults were seen
    with.
    """
    found = []
    for package in dict.fromkeys(item.package for item in WORKAROUNDS):
        items = [item for item in WORKAROUNDS if item.package == package]
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        others = [item for item in items if not f"{installed}.".startswith(f"{item.seen}.")]
        if others:
            tests = ", ".join(dict.fromkeys(item.test for item in others))
            found.append(
                f"{package} {installed} is installed, tried is {others[0].seen}:"
                f" {len(others)} workaround{'s' * (len(others) > 1)} may not fit (pip install -c"
                f" constraints.txt . installs what was tried; else run {tests})"
            )
    return found


def warn_of_other_versions() -> None:
    """Print `other_versions` on stderr."""
    for sentence in other_versions():
        print(f"grads-ds: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def without_sharded_loading() -> Iterator[None]:
    """Models made inside are whole, also while a ZeRO-3 setting that transformers keeps in a module
    variable would shard them.
    """
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def forget_sequence_parallel(attention: str, function: Any) -> None:
    """Put `function` back as the process's attention `attention`, and let go of Ulysses's groups,
    which DeepSpeed keeps in module variables.
    """
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[attention] = function
    groups.mpu = None
    parallel_state_sp._release_sequence_parallel_groups()


def close(engine: Any) -> None:
    """Destroy an engine and whatever would keep its model alive: a list of every module ever
    sharded, and a cache of which parameters a module releases.

    The caller's own references are the caller's to drop.
    """
    from deepspeed.runtime.zero import parameter_offload

    module = engine.module
    engine.destroy()
    sharded = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    sharded[:] = [kept for kept in sharded if kept is not module]
    forget_release_plans()


def forget_release_plans() -> None:
    """Clear DeepSpeed's cache of which parameters a module releases at which step of a pass.

    It outlives the order of modules it was made for (DeepSpeed 0.19.8): after a forward without a
    backward, as in a trial, later passes gather weights again. Engines that live on refill it.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    decorated = getattr(
        PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None
    )
    for cell in getattr(decorated, "__closure__", None) or ():
        forget = getattr(cell.cell_contents, "cache_clear", None)
        if forget is not None:
            forget()
