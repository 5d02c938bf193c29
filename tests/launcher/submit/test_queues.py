"""A queue is one file: the command line, its help and its refusals read the table of queues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.cli import main, parser
from grads_ds.commands.next_step import next_step
from grads_ds.launcher.submit import QUEUES, queue_for


class Nomad:
    """A queue that no file here knows."""

    NAME, HELP, WAITS = "nomad", "a job's region", True
    MISPLACED = "--nomad: wanted --backend nomad"

    def outside(self) -> bool:
        return True

    def render(
        self, arguments: Sequence[str], options: Sequence[str], run_dir: Path, grace: float
    ) -> str:
        return f"job {' '.join(options)} {run_dir} {grace:g} {' '.join(arguments)}\n"

    def submit(self, job: str, run_dir: Path, wait: bool) -> int:
        print(f"queued {job}", wait)
        return 7


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(QUEUES, "nomad", Nomad())
    text = f"run_dir: {tmp_path}/run\nmodel: {{path: m}}\ndata: {{train: [a.jsonl]}}\n"
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_a_queue_of_the_table_is_rendered_and_given_the_whole_command(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", config, "--backend", "nomad", "--nomad", "at=eu", "--grace-seconds", "9"]
    assert main([*words, "--dry-run"]) == 0
    start = f"job at=eu {tmp_path}/run 9 sft {config} "
    said = capsys.readouterr().out
    assert said.startswith(start) and "--backend" not in said and "--nomad" not in said
    assert not (tmp_path / "run").exists()
    assert main([*words, "--wait"]) == 7
    assert capsys.readouterr().out == f"queued {said} True\n"
    args = parser(words).parse_args(words)
    assert next_step(args, 0).startswith("grads-ds status ")
    args.wait = True  # the job is over
    assert next_step(args, 0).startswith("grads-ds evaluate ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nomad", "a=b"], [Nomad.MISPLACED]),
        (["--backend", "local", "--kubernetes", "nodes=2"], [QUEUES["kubernetes"].MISPLACED]),
        (["--wait"], [QUEUES["slurm"].MISPLACED, Nomad.MISPLACED]),
        (["--backend", "nomad", "--hosts", "h", "--ranks", "2"], ["--hosts: ", "--ranks: "]),
        (["--backend", "kubernetes", "--detach"], ["--detach: "]),
        (["--backend", "kubernetes", "--wait"], [QUEUES["slurm"].MISPLACED, Nomad.MISPLACED]),
        (["--backend", "nomad", "--wait", "--slurm", "nodes=2"], [QUEUES["slurm"].MISPLACED]),
    ],
)
def test_what_does_not_fit_the_queue_is_refused_and_nothing_is_touched(
    config: str,
    tmp_path: Path,
    words: list[str],
    told: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", config, *words]) == 2
    problems = [line for line in capfd.readouterr().err.splitlines() if line.startswith("  - ")]
    assert len(problems) == len(told)
    assert all(line.startswith(f"  - {start}") for line, start in zip(problems, told, strict=True))
    assert not (tmp_path / "run").exists()


def test_inside_its_own_job_a_queue_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert queue_for("slurm") is QUEUES["slurm"]
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert queue_for("slurm") is None and queue_for("pdsh") is None and queue_for(None) is None


def test_the_doctor_takes_no_queue_for_what_starts_ranks(config: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", config, "--backend", "kubernetes"])
    assert left.value.code == 2


def test_no_other_source_names_a_queue() -> None:
    """slurm is a backend, too; kubernetes is a queue alone."""
    for file in [*REPO.glob("launcher/**/*.py"), *REPO.glob("grads_ds/**/*.py")]:
        if file.name != "kubernetes.py":
            assert '"kubernetes"' not in file.read_text(), f"{file} knows kubernetes"
