"""The GPU check: its dry run is right, no step loses another's result, pieces come whole."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import REPO
from tests import forked_ranks

DEVICE = REPO / "scripts/device"
sys.path.append(str(DEVICE))  # where a step's script runs, its neighbours are found


def load(name: str) -> ModuleType:
    """A script of the kit as a module."""
    spec = importlib.util.spec_from_file_location(f"device_{name}", DEVICE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check, pack, unpack = load("check"), load("pack"), load("unpack")
study_cells = load("study_cells")


def check_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DEVICE / "check.sh"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(REPO)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_dry_run_on_a_cpu_passes_and_says_what_it_left_out(tmp_path: Path) -> None:
    """Its steps' processes are forked from one that has done their imports."""
    variables = {"PYTHONPATH": forked_ranks.python_path(), "FORK_ALL": "1"}
    done = check_sh("--cpu", "--out", str(tmp_path), "--minutes", "9", **variables)
    assert done.returncode == 0, done.stdout + (tmp_path / "device.log").read_text()[-3000:]
    steps = json.loads((tmp_path / "device.json").read_text())["steps"]
    assert list(steps) == [limit.name for limit in check.STEPS]
    assert steps["machine"]["found"]["missing"] == []
    exact = steps["exactness"]["found"]["float32, tied"]
    assert 0 < max(exact["error"].values()) <= exact["limit"] == 1e-5
    assert steps["zero3_nccl"]["found"]["training, float32"]["ok"]
    assert steps["throughput"]["found"]["modes"]["ours: all layers"]["tokens_per_second"] > 0
    assert steps["stages"]["found"]["planned"]["recording"] > 0
    assert steps["capacity"]["found"]["recomputed"]["largest"]["layers"] > 4
    assert steps["kit_model"]["status"] == "skipped"
    assert "there is no kit" in steps["kit_model"]["why"]
    assert "a dry run" in steps["study_cells"]["why"]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of steps that is all there is: write one in it and it is run."""
    folder = tmp_path / "steps"
    folder.mkdir()
    monkeypatch.setattr(check, "HERE", folder)
    return folder


def run_check(
    steps: Path, out: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 1, **bodies: str
) -> dict[str, dict[str, object]]:
    """device.json's steps after a check of scripts with these bodies, each given one second."""
    for name, body in bodies.items():
        (steps / f"{name}.py").write_text(
            f"import os, subprocess, sys, time\nout = open(sys.argv[2], 'w')\n{body}\n"
        )
    monkeypatch.setattr(check, "STEPS", [check.Limit(name, 1, 1) for name in bodies])
    out.mkdir()
    args = argparse.Namespace(cpu=True, out=out, minutes=minutes, kit=None, only=list(bodies))
    good = check.check(args, steps)
    found: dict[str, dict[str, object]] = json.loads((out / "device.json").read_text())["steps"]
    assert good == all(entry["status"] in ("ok", "skipped") for entry in found.values())
    return found


def test_a_crash_or_a_hang_keeps_what_was_found_and_the_rest_runs(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = "out.write('{\"x\": 1}'); out.flush()"
    found = run_check(
        steps,
        tmp_path / "out",
        monkeypatch,
        crash=f"{write}; print('just before', flush=True); os.kill(os.getpid(), 11)",
        hang=f"{write}; subprocess.Popen(['sleep', '987.125']); time.sleep(60)",
        fine="out.write('{\"y\": 2}')",
    )
    assert found["crash"]["status"] == "failed with status -11"
    assert found["crash"]["last_lines"] == ["just before"]
    assert found["hang"]["status"] == "stopped after 1 s"
    assert found["crash"]["found"] == found["hang"]["found"] == {"x": 1}
    assert (found["fine"]["status"], found["fine"]["found"]) == ("ok", {"y": 2})
    time.sleep(0.2)
    left = [
        pid
        for pid in Path("/proc").glob("[0-9]*/cmdline")
        if pid.exists() and b"987.125" in pid.read_bytes()
    ]
    assert not left, "what a stopped step had started runs on"
    assert "just before" in (tmp_path / "out/device.log").read_text()


def test_a_step_for_which_no_time_is_left_is_said_to_be_skipped(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_check(steps, tmp_path / "out", monkeypatch, minutes=0.05, late="")
    assert found["late"] == {"status": "skipped", "why": "3 s were left"}


def test_wrong_arguments_end_with_status_2_and_say_what_was_wanted() -> None:
    piece_alone = check_sh("--piece", "somewhere")
    assert (piece_alone.returncode, "--kit" in piece_alone.stderr) == (2, True)
    assert check_sh("--kit").returncode == 2
    assert check_sh("--only", "nothing").returncode == 2


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {item}" for item in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip can fetch: alpha needs beta in its second version and, elsewhere, gamma."""
    folder = tmp_path / "registry"
    folder.mkdir()
    write_wheel(folder, "alpha", "1.0", "beta>=2", "gamma; sys_platform == 'win32'", "delta")
    write_wheel(folder, "beta", "2.0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(pack, "roots", lambda: [Requirement("alpha")])
    return folder


def test_wheels_are_those_that_the_machine_has_not_in_a_fitting_version(
    registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    machine = {"beta": "1.9", "delta": None}
    wheels = pack.missing_wheels(tmp_path / "cache", machine, "3.12")
    assert [wheel.name.split("-py3")[0] for wheel in wheels] == ["alpha-1.0", "beta-2.0"]
    for file in registry.iterdir():
        file.unlink()
    assert pack.missing_wheels(tmp_path / "cache", machine, "3.12") == wheels  # nothing is fetched
    wheels[0].unlink()
    with pytest.raises(pack.UserError, match=r"alpha.*wanted a wheel for Python 3.12"):
        pack.missing_wheels(tmp_path / "cache", machine, "3.12")


def test_pieces_keep_their_size_and_make_the_kit_in_any_order(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    wheels = pack.missing_wheels(tmp_path / "cache", {"delta": None}, "3.12")
    model = tmp_path / "small.gguf"
    model.write_bytes(os.urandom(2_500_000))
    limit = pack.MIB + 20_000
    pieces = pack.cut(wheels, model, limit)
    pack.write(pieces, tmp_path)
    assert len(pieces) == 3
    assert all(sum(len(data) for _, data in piece) <= limit for piece in pieces)
    for number in (3, 1, 2):
        monkeypatch.setattr(
            sys, "argv", ["unpack", "--kit", f"{tmp_path}/kit", f"{tmp_path}/piece-{number}"]
        )
        unpack.main()
    assert (tmp_path / "kit/small.gguf").read_bytes() == model.read_bytes()
    assert (tmp_path / "kit/site/beta.py").read_text() == "version = '2.0'\n"


def test_a_piece_that_came_broken_is_refused(tmp_path: Path) -> None:
    pack.write([[("a.whl", b"whole"), ("b.whl", b"whole")]], tmp_path)
    (tmp_path / "piece-1/a.whl").write_bytes(b"half")
    (tmp_path / "piece-1/b.whl").unlink()
    command = [sys.executable, str(DEVICE / "unpack.py"), "--kit", str(tmp_path / "kit")]
    done = subprocess.run([*command, str(tmp_path / "piece-1")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "a.whl, b.whl" in done.stderr
    assert not (tmp_path / "kit").exists()


def test_the_studys_material_is_links_that_can_be_made_again(tmp_path: Path) -> None:
    for name in ("model", "rows"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows/a.jsonl").write_text("{}")
    for _ in range(2):
        place = study_cells.material(tmp_path / "m", tmp_path / "model", tmp_path / "rows")
    assert (place / "data/a.jsonl").is_file() and (place / "models" / study_cells.MODEL).is_dir()
    for name in study_cells.STUDIES:
        text = (REPO / f"configs/study/{name}.yaml").read_text()
        assert f"docs/results/study_{name}.json" in text


def test_runs_of_every_study_come_home_without_weights_and_check_passes_them_on(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for study in ("real", "forgetting", "one_of_tomorrow"):
        run = tmp_path / "runs/study" / study / "law/plain"
        for name, size in (
            ("scores/table.parquet", 10),
            ("config.yaml", 10),
            ("evaluation/own_answers/base.parquet", 10),
            ("best/choice.json", 10),
            ("best/model/vocab.json", 10),
            ("sft/snapshots/0.5/config.json", 10),
            ("sft/model.safetensors", 10),
            ("sft/tokenizer.json", study_cells.LARGE),
            ("sft/checkpoints/a.json", 10),
        ):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(b"x" * size)
    monkeypatch.setattr(study_cells, "REPO", tmp_path)
    sizes = study_cells.packed(steps / "study_cells.json")
    assert list(sizes) == ["forgetting", "one_of_tomorrow", "real"]
    archives = [steps / f"study_cells.{study}.runs.tar.xz" for study in sizes]
    for study, archive in zip(sizes, archives, strict=True):
        with tarfile.open(archive) as tar:
            files = {item.name for item in tar if item.isfile()}
        wanted = ("scores/table.parquet", "config.yaml", "best/choice.json")
        wanted += ("evaluation/own_answers/base.parquet",)
        assert files == {f"runs/study/{study}/law/plain/{name}" for name in wanted}
        assert archive.stat().st_size == sizes[study]
    run_check(steps, tmp_path / "out", monkeypatch, study_cells="out.write('{}')")
    assert all((tmp_path / "out" / a.name).read_bytes() == a.read_bytes() for a in archives)


def test_what_the_machine_lacks_has_a_tested_version() -> None:
    image, pinned = pack.pins(DEVICE / "image.txt"), pack.pins(REPO / "constraints.txt")
    lacking = {canonicalize_name(r.name) for r in pack.roots() if not pack.there(r, image)}
    assert "deepspeed" in lacking
    assert lacking <= set(pinned)
