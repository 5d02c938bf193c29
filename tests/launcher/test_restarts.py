"""Starting again on hosts that are not back yet: it counts as a restart, and the next one finds
them.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from conftest import REPO, make_tiny_model, write_rows
from grads_ds.cli import main
from grads_ds.flow import launch
from grads_ds.launcher.job_outcome import FAILED
from tests.cluster import cluster
from tests.launcher.jobs import left_behind


@pytest.mark.cluster
@pytest.mark.slow
def test_a_host_that_is_still_down_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real hosts, one of which loses power and comes back after the first restart has looked for it
    in vain.
    """
    make_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "pool.jsonl", 8)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": "model"},
        "deepspeed": "zero3.json",
        "probe": {"epochs": 0},
        "data": {"train": ["pool.jsonl"], "max_length": 64},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # ranks that stay until they are lost, and the second time leave at once
    rank = (
        "import os, sys, time; from pathlib import Path; here = Path(sys.argv[1],"
        " os.environ['RANK'])\nagain = here.exists(); here.touch(); time.sleep(0 if again else 600)"
    )
    with cluster(2, 1) as hosts:
        monkeypatch.setenv("PATH", hosts.environment["PATH"])
        monkeypatch.setenv("PYTHONPATH", str(REPO))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(launch, "BACKOFF_SECONDS", 1.0)
        monkeypatch.setattr(
            launch, "stage_command", lambda *_: [sys.executable, "-c", rank, str(tmp_path)]
        )
        assert main(["prepare", "config.yaml"]) == 0
        log = tmp_path / "run/logs/probe.log"

        def lose_and_mend() -> None:
            while not all((tmp_path / name).exists() for name in "01"):
                time.sleep(0.05)
            hosts.control("kill", "2")
            while "restart 2 of 2" not in log.read_text():
                time.sleep(0.05)
            hosts.control("boot", "2")

        threading.Thread(target=lose_and_mend, daemon=True).start()
        words = [
            "probe",
            "config.yaml",
            "--hosts",
            str(hosts.hostfile),
            "--backend",
            "openmpi",
            "--max-restarts",
            "2",
        ]
        status = main(words)
        told = capsys.readouterr().err
        first, second, third = (
            told.index(part)
            for part in ("fell silent", "no longer as they must be", "restart 2 of 2")
        )
        assert first < second < third and hosts.addresses[1] in told[second:third]
        # the last start found both hosts; its ranks wrote no scores, which is not taken for success
        assert (
            status == FAILED and "every rank ended well, yet the stage is not done" in told[third:]
        )
        assert left_behind(str(tmp_path)) == []
