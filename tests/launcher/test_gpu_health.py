"""GPUs that have begun to fail are told of with their host, before every start and restart."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from grads_ds.cli import main
from grads_ds.commands import doctor
from grads_ds.commands.watching import watched
from grads_ds.config.config import Config
from grads_ds.flow import launch
from grads_ds.flow.stages import STAGES
from grads_ds.launcher.doctor.findings import Finding
from grads_ds.launcher.doctor.gpu_health import FIELDS, ailing, gpu_health
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement
from grads_ds.launcher.job_outcome import FAILED, LOST, Outcome

WELL = {"uncorrected": "0", "remap_pending": "No", "remap_failed": "No", "too_hot": "Not Active"}
# what nvidia-smi prints of the second GPU -> level and words
AILING = {
    "memory errors": ({"uncorrected": "2"}, "problem", "GPU 1 has had 2 memory errors"),
    "a failed remap": ({"remap_failed": "Yes"}, "problem", "GPU 1 could not remap rows"),
    "a pending remap": ({"remap_pending": "1"}, "warning", "wait to be remapped"),
    "heat": ({"too_hot": "Active"}, "warning", "GPU 1 is slowed down by heat"),
}


def smi(folder: Path, rows: list[dict[str, str]], status: int = 0) -> dict[str, str]:
    """An environment in which a stand-in `nvidia-smi` prints these rows."""
    script = folder / "nvidia-smi"
    lines = "\n".join(", ".join(row[key] for key in FIELDS) for row in rows)
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {status}\n")
    script.chmod(0o755)
    return dict(os.environ) | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("case", AILING)
def test_an_ailing_gpu_is_told_of_with_advice(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, level, words = AILING[case]
    environment = smi(tmp_path, [{"index": "0", **WELL}, {"index": "1", **WELL, **changes}])
    monkeypatch.setenv("PATH", environment["PATH"])
    ((found_level, found, advice),) = ailing({"gpu_health": gpu_health(environment)})
    assert found_level == level and words in found and advice


@pytest.mark.parametrize("absent", ["N/A", "[N/A]", "[Not Supported]"])
def test_what_a_gpu_does_not_have_is_no_finding(absent: str) -> None:
    assert ailing({"gpu_health": [{"index": "0", **dict.fromkeys(WELL, absent)}]}) == []
    assert ailing({}) == []  # of a host with an older checkout


def test_gpus_that_the_run_may_not_use_are_not_looked_at() -> None:
    health = [{"index": "1", **WELL, "uncorrected": "2"}]
    assert ailing({"gpu_health": health, "visible_devices": "0,2"}) == []
    assert len(ailing({"gpu_health": health, "visible_devices": "1"})) == 1
    assert len(ailing({"gpu_health": health, "visible_devices": "GPU-1f2e"})) == 1


def test_a_driver_that_knows_a_field_not_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = smi(tmp_path, [{"index": "0", **WELL}], status=2)
    monkeypatch.setenv("PATH", environment["PATH"])
    assert gpu_health(environment) == []


BAD = Finding("GPU health", "b", "problem", "GPU 1 could not remap rows", "replace it")


@pytest.mark.parametrize("elastic", [True, False])
def test_hosts_are_looked_at_again_before_a_restart(
    elastic: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A host whose GPU fails with the first attempt is not started on again: left out with
    --elastic, else the run ends with its name.
    """
    looks = iter([({}, []), ({}, [BAD]), ({}, [BAD])])
    started: list[list[str]] = []

    def run_job(name: str, command: Any, place: Placement, log_dir: Path) -> Outcome:
        started.append([host.name for host in place.hosts])
        return Outcome(FAILED, "failed first on rank 1")

    monkeypatch.setattr(launch, "glance", lambda *_: next(looks))
    monkeypatch.setattr(launch, "run_job", run_job)
    monkeypatch.setattr(launch, "check_upstream", lambda *_: None)
    monkeypatch.setattr(launch, "BACKOFF_SECONDS", 0.0)
    config = Config.model_validate(
        {"run_dir": str(tmp_path), "model": {"path": "m"}, "data": {"train": ["a"]}}
    )
    args = argparse.Namespace(max_restarts=1, elastic=elastic, config="c.yaml", set=[])
    place = Placement([Host("a", 1), Host("b", 1)], "pdsh")
    status = launch.launch(STAGES[1], config, args, place)
    said = capsys.readouterr().err
    assert "GPU 1 could not remap rows" in said
    if elastic:
        assert started == [["a", "b"], ["a"]] and status == FAILED
    else:
        assert started == [["a", "b"]] and status == LOST


def test_the_doctor_watches_without_starting_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}/m}}\ndata: {{train: [a.jsonl]}}\n"
    )
    fine = Finding("disk", "a", "ok", "free")
    looks = iter([({}, [fine]), ({}, [fine]), ({"b": "hosts: b: no answer"}, [fine, BAD])])

    def glance(*_: Any) -> Any:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(doctor, "glance", glance)
    monkeypatch.setattr(doctor, "examine", None)
    monkeypatch.setattr(doctor, "watched", lambda look, _: watched(look, 0.2))
    words = ["doctor", str(tmp_path / "c.yaml"), "--watch", "--ranks", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("checks that are fine: 1") == 2  # the second look was like the first
    assert "PROBLEM  hosts: b: no answer\nPROBLEM  b: GPU health: GPU 1 could not remap" in said
