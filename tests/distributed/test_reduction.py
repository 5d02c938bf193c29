"""Sums over ranks: the same through torch.distributed and mpi4py, and mpi4py is asked for where MPI
started the job alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import REPO, TORCH_VARIABLES
from grads_ds.distributed import ranks
from grads_ds.distributed.reduction import all_reduce_sum, reduction_backend
from ranks import run_on_ranks

MANY = 2**63 - 5  # wraps around when it is added up


def arrays(rank: int) -> list[np.ndarray]:
    return [
        np.array([rank + 1, MANY], np.int64),
        np.array([[0.1 * (rank + 1)]], np.float64),
        np.array([np.nan, np.inf, rank], np.float32),
    ]


def summed() -> tuple[str, list[list[float]], bool]:
    own = arrays(ranks.rank())
    found = [all_reduce_sum(values) for values in own]
    untouched = all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(own, arrays(ranks.rank()), strict=True)
    )
    return (
        reduction_backend(),
        [values.ravel().tolist() for values in found],
        untouched and "mpi4py" not in sys.modules,
    )


def check(found: list[list[float]]) -> None:
    with np.errstate(over="ignore"):
        wrapped = int(np.array([MANY], np.int64)[0] + np.array([MANY], np.int64)[0])
    assert found[0] == [3, wrapped]
    assert found[1] == pytest.approx([0.3], abs=1e-15)
    assert np.isnan(found[2][0]) and found[2][1:] == [np.inf, 1]


def test_through_torch_without_mpi() -> None:
    for library, found, clean in run_on_ranks(2, summed):
        assert library == "torch.distributed" and clean
        check(found)


def test_through_mpi_in_a_job_that_mpi_started(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun (scripts/install.sh --dev)")
    code = (
        "import json, sys; from grads_ds.distributed import ranks; ranks.start();"
        " from test_reduction import summed; found = summed();"
        f" json.dump(found[:2], open(r'{tmp_path}/' + str(ranks.rank()), 'w')); ranks.finish()"
    )
    environment = os.environ | {
        "PYTHONPATH": f"{REPO}:{REPO / 'tests'}:{REPO / 'tests/distributed'}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
    }
    environment |= {
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    for name in TORCH_VARIABLES:
        environment.pop(name, None)
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        library, found = json.loads((tmp_path / str(rank)).read_text())
        assert library == "mpi4py"
        check(found)


def test_a_job_of_one_rank_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_reduce_sum(np.array([1, 2])).tolist() == [1, 2]
    # MPI's variables are there, its library is not: no reason to stop
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert (
        all_reduce_sum(np.array([1.5])).tolist() == [1.5]
        and reduction_backend() == "torch.distributed"
    )
