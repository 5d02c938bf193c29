"""What prepare publishes does not depend on how many processes made it, in which order they were
done, or which of them were killed; a start that was killed is gone on from.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from datasets import load_from_disk

from conftest import write_rows
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data import blocks, crew, encoding, set_parts
from grads_ds.data.blocks import Block
from grads_ds.data.encoding import Outcome
from grads_ds.data.input_files import Input
from grads_ds.data.stage import run_prepare
from tests.data import killed
from tests.data.test_prepare import answer, tree, write


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks there are."""
    monkeypatch.setattr(crew, "BLOCKS_FROM", 1000)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    """A pool of four kinds of files, of which one is packed; a held-out set that shares rows."""
    lines = write_rows(tmp_path / "lines.jsonl", 90)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as packed:
        packed.write("\n\n" + write_rows(tmp_path / "some.jsonl", 25, seed=1).read_text())
    (tmp_path / "array.json").write_text(json.dumps([answer(f"{n}", n=n) for n in range(20)]))
    (tmp_path / "plain.txt").write_text("\n\n".join(f"the sky is {n}" for n in range(9)))
    held = lines.read_text().splitlines()[::11]
    (tmp_path / "held.jsonl").write_text("\n".join(held))
    names = ("lines.jsonl", "packed.jsonl.gz", "array.json", "plain.txt")
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model)},
            "data": {
                "train": [str(tmp_path / name) for name in names],
                "validation": {"domain": str(tmp_path / "held.jsonl")},
            },
        }
    )


def prepared(config: Config, name: str, identity: str | None = None) -> dict[str, str]:
    """Run the stage into a folder of its own; the digests of what it published."""
    run = Path(config.run_dir) / name
    run_prepare(config, run, identity)
    assert not (run / "prepared.parts").exists()
    return tree(run / "prepared")


def test_a_pool_of_many_kinds_keeps_its_order_and_lines(config: Config) -> None:
    prepared(config, "whole")
    pool = load_from_disk(str(Path(config.run_dir) / "whole/prepared/pool"))
    assert pool["sample_id"] == list(range(144))
    places = [origin.rpartition("/")[2] for origin in pool["origin"]]
    assert places[:90] == [f"lines.jsonl:{n}" for n in range(1, 91)]
    assert places[90:115] == [f"packed.jsonl.gz:{n}" for n in range(3, 28)]  # behind blank lines
    assert places[135:137] == ["plain.txt:1", "plain.txt:3"]
    record = json.loads((Path(config.run_dir) / "whole/prepared/prepared.json").read_text())
    assert record["sets"]["domain"]["also_in_pool"] == 9


class Ended(BaseException):
    """In the place of a kill."""


def test_a_killed_start_is_gone_on_from_to_the_same_bytes(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 10)
    whole = prepared(config, "whole")
    made: list[Path] = []

    def make(block: Block, file: Path, known_file: Path | None) -> Outcome:
        if len(made) == 12:
            raise Ended
        made.append(file)
        return encoding.make_part(block, file, known_file)

    monkeypatch.setattr(set_parts, "make_part", make)
    run = Path(config.run_dir) / "torn"
    with pytest.raises(Ended):
        run_prepare(config, run, "first")
    assert not (run / "prepared").exists()
    left = sorted((run / "prepared.parts/pool").glob("*.arrow"))
    left[0].write_bytes(left[0].read_bytes()[:-1] + b"?")  # a disk that rots
    read = []
    opened = blocks.open_packed
    monkeypatch.setattr(blocks, "open_packed", lambda path: (read.append(path), opened(path))[1])
    before, made[:] = list(made), []
    assert prepared(config, "torn", "first") == whole
    # 1 of the held-out set, 9 + 3 + 2 + 1 of the pool; of these 12 - 1 were there and whole
    assert len(before) == 12 and len(made) == 16 - 11 and left[0] in made
    assert "10 blocks are done already; 1 were damaged" in capsys.readouterr().out
    assert not any(path.endswith("held.jsonl") for path in read)  # done: not read again
    # what was left by a start of another identity is not taken
    made[:] = []
    with pytest.raises(Ended):
        run_prepare(config, run, "second")
    made[:] = []
    monkeypatch.setattr(
        set_parts, "make_part", lambda *a, **k: (made.append(a), make_part(*a, **k))[1]
    )
    make_part = encoding.make_part
    assert prepared(config, "torn", "third") == whole and len(made) == 16


def test_problems_of_all_blocks_come_together_in_order(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text, whatever the blocks: problems of every file, with their lines, and how many
    are not shown.
    """
    good = [json.dumps(answer(str(n))) for n in range(40)]
    one = [*good[:5], "{", *good[5:30], '{"messages": [{"role": "user"}]}', *good[30:]]
    (tmp_path / "one.jsonl").write_text("\n".join(one))
    two = write(tmp_path / "two.jsonl", [answer("\ud83d"), *({"text": str(n)} for n in range(25))])
    (tmp_path / "held.jsonl").write_text("[]")
    data = config.data.model_dump() | {"train": [str(tmp_path / "one.jsonl"), two]}
    broken = Config.model_validate(config.model_dump() | {"data": data})
    found = []
    for rows in (4, 8192):
        monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
        with pytest.raises(UserError) as caught:
            run_prepare(broken, tmp_path / f"run-{rows}")
        found.append(caught.value.problems)
        assert not list((tmp_path / f"run-{rows}").iterdir())
    assert found[0] == found[1] and len(found[0]) == 21
    assert [text.split(": ")[0].rpartition("/")[2] for text in found[0][:4]] == [
        "one.jsonl:6",
        "one.jsonl:32",
        "two.jsonl:1",
        "two.jsonl:2",
    ]
    assert found[0][-1].startswith("... and 9 more")


def kill_one(folder: Path, ended: list[int]) -> None:
    """Kill one of this process's workers with SIGKILL once the first part of the pool is there."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not list(folder.glob("pool/*.arrow")):
        time.sleep(0.01)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    if workers:
        os.kill(workers[0].pid, signal.SIGKILL)
        ended.append(workers[0].pid)


def test_blocks_of_a_killed_process_are_done_again_in_order(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "BLOCKS_FROM", 0)
    monkeypatch.setattr(crew, "start", killed.no_start)
    monkeypatch.setattr(crew.os, "sched_getaffinity", lambda pid: {0, 1})
    item = Input(".jsonl", str(tmp_path / "once"), "once")
    jobs = [(Path(f"0-{n}"), Block(item, "text", False, n, (b"",)), killed.once) for n in range(9)]
    with crew.Crew(config, None) as workers:
        done = list(workers.run(iter(jobs)))
    assert [(file.name, outcome.counts["read"]) for file, outcome in done] == [
        (f"0-{n}", n) for n in range(9)
    ]
    assert (tmp_path / "once").exists()
    monkeypatch.setattr(crew, "TRIES", 1)
    with crew.Crew(config, None) as workers, pytest.raises(RuntimeError, match="killed 2 times"):
        list(workers.run((file, block, killed.always) for file, block, _ in jobs))


@pytest.mark.slow
@pytest.mark.long
def test_processes_write_what_one_writes_also_when_one_is_killed(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real work; the test above is its twin."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 3)
    whole = prepared(config, "whole")
    monkeypatch.setattr(crew, "BLOCKS_FROM", 0)
    monkeypatch.setattr(crew.os, "sched_getaffinity", lambda pid: {0, 1})
    ended: list[int] = []
    folder = Path(config.run_dir) / "torn/prepared.parts"
    thread = threading.Thread(target=kill_one, args=(folder, ended))
    thread.start()
    together: dict[str, Any] = prepared(config, "torn")
    thread.join()
    assert ended and "a process was killed" in capsys.readouterr().out
    assert together == whole
