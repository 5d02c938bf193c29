"""What `grads-ds status` and the metrics say comes from the files of a run alone, while it works
and afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grads_ds.cli import main
from grads_ds.launcher import reporting
from grads_ds.launcher.job_outcome import FAILED
from grads_ds.launcher.job_status import snapshot
from grads_ds.launcher.metrics import prometheus
from grads_ds.launcher.status_text import status_text
from grads_ds.run_dir.lock import lock
from grads_ds.run_dir.units import mark_done
from tests.launcher.jobs import REPO, run_code


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose probe is at step 40 of 100 on two hosts, one of which has been silent for a
    minute.
    """
    mark_done(tmp_path, "prepare", {}, [], 3.0)
    folder = tmp_path / "logs/probe/2026-01-01T00.00.00"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"hosts": [["a", 1], ["b", 1]]}))
    now = time.time()
    work = {
        "doing": "recording",
        "first": 0,
        "since": now - 80,
        "done": 40,
        "total": 100,
        "time": now,
    }
    for rank, (host, age) in enumerate((("a", 0), ("b", 60))):
        record = {
            "rank": rank,
            "host": host,
            "state": "running",
            "time": now - age,
            "progress": work | {"time": now - age},
            "memory": {"resident": (rank + 1) * 2**30, "resident_most": 3 * 2**30},
            "losses": [[30, 2.5], [40, 2.25]],
        }
        (folder / f"rank{rank:05d}.json").write_text(json.dumps(record))
    mark = tmp_path / "sft/checkpoints/checkpoint-7/complete"
    mark.parent.mkdir(parents=True)
    mark.touch()
    os.utime(mark, (now - 300, now - 300))
    return tmp_path


def test_stage_progress_time_left_lag_and_checkpoint(run: Path) -> None:
    with lock(run, "grads-ds run"):
        told = status_text(snapshot(run), ("prepare", "probe", "sft"))
    assert "grads-ds run on" in told and "prepare in 3 s" in told
    assert "recording, step 40 of 100 (40 %), 120 s left".replace("120 s", "2 min") in told
    assert "rank 1 on b lags by 60 s" in told and "rank 1 on b silent for 60 s" in told
    assert "last checkpoint: step 7, 5 min ago" in told


def test_rate_memory_and_last_losses_of_the_job_at_hand(run: Path) -> None:
    with lock(run, "grads-ds run"):
        told = status_text(snapshot(run), ("probe",), "about 9 min left")
    assert "rate      2.0 s/step" in told
    assert "memory    2.0 GiB on rank 1 (b), the most of any now; at most 3.0 GiB so far" in told
    assert "loss      2.500 2.250 (the last at step 40)" in told
    assert "all stages about 9 min left" in told
    alone = status_text(snapshot(run), ("probe",), "about 9 min left")
    assert "  memory" not in alone and "9 min left" not in alone  # nobody is at work


def test_forty_columns_are_enough(run: Path) -> None:
    with lock(run, "grads-ds run"):
        seen = snapshot(run)
    lines = status_text(seen | {"run_dir": "runs/medicine"}, ("prepare", "probe"), "", 40)
    # a path has no place to break at
    assert all(len(line) <= 40 or "/" in line for line in lines.split("\n"))
    assert "recording, step 40" in lines and "(40 %)" in lines


def test_a_job_tells_its_memory_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "for step in range(7):\n    heartbeat.logged(step, 3.0 - step)\n"
        "heartbeat.beat('steps', 7, 9)\ntime.sleep(1.5)"
    )
    run_code(code, tmp_path, monkeypatch)
    (folder,) = (tmp_path / "logs/stage").glob("*")
    record = json.loads((folder / "rank00000.json").read_text())
    assert record["losses"] == [[step, 3.0 - step] for step in range(2, 7)]
    memory = record["memory"]
    assert 2**20 < memory["resident"] <= memory["resident_most"] < 2**33


def test_metrics_are_in_prometheus_text_format(run: Path) -> None:
    """Read as Prometheus reads them."""
    samples = metrics_of(run)
    assert samples["grads_ds_step"] == [({"run": str(run), "stage": "probe"}, 40.0)]
    assert samples["grads_ds_loss"][0][1] == 2.25
    assert samples["grads_ds_resident_bytes"][0][1] == 2**31
    states = {labels["state"]: value for labels, value in samples["grads_ds_ranks_in_state"]}
    assert states["running"] == 2 and states["failed"] == 0
    # the first, of these two, has a holder that is gone
    assert samples["grads_ds_busy"][0][1] == 0 and samples["grads_ds_orphaned_ranks"][0][1] == 1


@pytest.mark.parametrize("name", ["é", 'a"b', "back\\slash", "line\nend", "\udce9"])
def test_a_run_of_any_name_gives_metrics_that_a_scraper_reads(name: str, tmp_path: Path) -> None:
    (tmp_path / name / "logs").mkdir(parents=True)
    ((labels, _),) = metrics_of(tmp_path / name)["grads_ds_busy"]
    assert labels["run"] == str(tmp_path / name).replace("\udce9", "?")


def metrics_of(run: Path) -> dict[str, list[tuple[dict[str, str], float]]]:
    """(labels, value) of every sample, by metric."""
    text = prometheus(snapshot(run)).encode().decode()
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }


def test_a_job_leaves_events_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.5)
    code = (
        "for step in range(4):\n    heartbeat.beat('steps', step, 4)\n   "
        " time.sleep(0.6)\nos._exit(3 * rank)"
    )
    outcome = run_code(code, tmp_path, monkeypatch)
    assert outcome.status == FAILED
    events = [
        json.loads(line) for line in (tmp_path / "logs/events.jsonl").read_text().splitlines()
    ]
    assert [events[0]["event"], events[-1]["event"], events[-1]["status"]] == [
        "start",
        "end",
        FAILED,
    ]
    assert any(
        event["event"] == "progress" and event["doing"] == "steps" and event["total"] == 4
        for event in events
    )
    assert 'stage="stage"} 1.0' in next(
        line
        for line in (tmp_path / "metrics.prom").read_text().splitlines()
        if "exit_status{" in line
    )
    assert "ended with status 1: failed first on rank 1" in status_text(
        snapshot(tmp_path), ("stage",)
    )


def test_the_command_answers_quickly_without_torch_and_refuses_what_is_no_run(
    run: Path, tmp_path: Path
) -> None:
    code = (
        f"import sys; from grads_ds.cli import main; s = main(['status', {str(run)!r}, '--json']);"
        " sys.exit(s or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"]["done"] == 40
    assert main(["status", str(tmp_path / "nowhere")]) == 2
