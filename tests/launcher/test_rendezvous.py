"""The port at which the ranks of a job meet is held from its choice on: no other job, connection or
process gets it, and where the user's own choice is taken that is one sentence.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.errors import UserError
from grads_ds.distributed import ranks
from grads_ds.launcher import backends
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement, describe
from grads_ds.launcher.job_outcome import DONE, WRONG_INPUT
from grads_ds.launcher.network import open_door
from grads_ds.launcher.rendezvous import agree
from tests.launcher.jobs import QUICK, left_behind, run_code
from tests.ranks import run_on_ranks

JOBS = 8
THIS_MACHINE = {"hosts": [["localhost", 1]], "devices": [None]}


def at_once(folders: list[Path], ports: tuple[int, int]) -> dict[Path, Any]:
    """What the supervisors of rank 0 of several jobs agree on, all at the same time: the ranks'
    variables, or the exception.
    """
    together, found = threading.Barrier(len(folders)), dict[Path, Any]()

    def first_rank(folder: Path) -> None:
        folder.mkdir()
        together.wait()
        try:
            found[folder] = agree(
                folder, THIS_MACHINE | {"ports": ports}, 0, True, {}, lambda: False
            )
        except UserError as error:
            found[folder] = error

    threads = [threading.Thread(target=first_rank, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def neighbouring_ports(count: int) -> tuple[int, int]:
    """The first and last of `count` ports that are free on this machine, below those that the
    system hands out by itself.
    """
    for low in range(20000, 32000 - count, count):
        with ExitStack() as held:
            try:
                for port in range(low, low + count):
                    held.enter_context(open_door("", port, port))
            except UserError:
                continue
            return low, low + count - 1
    raise AssertionError("no free ports on this machine")


def test_a_port_cannot_be_taken_between_its_choice_and_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another process wants it once it is agreed on, and before rank 0 has come so far."""
    thief = """
import socket, sys, time
for address in ("", "127.0.0.1"):
    try:
        socket.create_server((address, int(sys.argv[1])))
        print("taken", flush=True)
        time.sleep(60)
    except OSError:
        pass
print("held", flush=True)
"""
    code = f"""
import subprocess
from grads_ds.launcher.process_group import join
thief = subprocess.Popen(
    [sys.executable, "-c", {thief!r}, os.environ["MASTER_PORT"]], stdout=subprocess.PIPE, text=True
)
print("the port is", thief.stdout.readline(), flush=True)
try:
    join("gloo")
finally:
    thief.kill()
import torch.distributed as dist
dist.barrier(); dist.destroy_process_group()
"""
    assert run_code(code, tmp_path, monkeypatch, ranks=1).status == DONE
    assert "the port is held" in capfd.readouterr().out
    assert left_behind(str(tmp_path)) == []


def test_jobs_that_share_a_port_range_each_hold_a_port_of_their_own(tmp_path: Path) -> None:
    """As many jobs as ports, all at once; one job more is told what to change."""
    low, high = neighbouring_ports(16)
    folders = [tmp_path / str(number) for number in range(16)]
    found = at_once(folders, (low, high))
    assert not [error for error in found.values() if isinstance(error, UserError)]
    ports = [int(found[folder]["MASTER_PORT"]) for folder in folders]
    assert sorted(ports) == list(range(low, high + 1))
    for folder in folders:
        said = json.loads((folder / "rendezvous.json").read_text())
        assert said == {"address": "127.0.0.1", "port": int(found[folder]["MASTER_PORT"])}
    with pytest.raises(UserError) as refused:
        agree(tmp_path, THIS_MACHINE | {"ports": (low, high)}, 0, True, {}, lambda: False)
    (sentence,) = refused.value.problems
    assert f"--ports: wanted a port from {low} to {high} that is free on" in sentence
    assert "found none (Address already in use); widen --ports" in sentence
    for folder in folders:
        os.close(int(found[folder]["GRADS_DS_DOOR"]))


def test_several_jobs_at_a_time_on_one_machine_meet_at_different_ports(tmp_path: Path) -> None:
    """Through their supervisors; a job holds its port for as long as its rank is there."""
    low, high = neighbouring_ports(JOBS)
    code = f"""
import os, pathlib, sys, time
port = os.environ["MASTER_PORT"]
pathlib.Path({str(tmp_path)!r}, "port" + os.environ["JOB"]).write_text(port)
deadline = time.time() + 30
while len(list(pathlib.Path({str(tmp_path)!r}).glob("port*"))) < {JOBS}:
    assert time.time() < deadline
    time.sleep(0.02)
"""
    place = Placement([Host("localhost", 1)], "local", ports=(low, high), limits=QUICK)
    started = []
    for number in range(JOBS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(describe([sys.executable, "-c", code], place)))
        (folder / "environment.json").write_text(json.dumps({"JOB": str(number)}))
        job = backends.Job(folder, place.hosts, dict(os.environ))
        started += [
            subprocess.Popen(start.arguments, env=start.environment)
            for start in backends.load("local").commands(job)
        ]
    for supervisor in started:
        supervisor.wait(60)
    records = [json.loads((tmp_path / f"{n}/rank00000.json").read_text()) for n in range(JOBS)]
    assert [record["state"] for record in records] == ["done"] * JOBS, records
    ports = [int((tmp_path / f"port{number}").read_text()) for number in range(JOBS)]
    assert sorted(ports) == list(range(low, high + 1))
    for port in ports:  # the jobs are over and hold none
        open_door("127.0.0.1", port, port).close()


def test_a_port_of_the_users_own_that_is_taken_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = run_code("", tmp_path, monkeypatch, ports=(port, port))
    assert (outcome.status, outcome.rank, outcome.may_pass) == (WRONG_INPUT, 0, False)
    assert "\n" not in outcome.error and outcome.error.startswith(
        f"--ports: wanted port {port} that is free on {socket.gethostname()}; found none (Address"
    )
    assert left_behind(str(tmp_path)) == []


def start_at_a_taken_port() -> list[str]:
    """As deepspeed or torchrun start a rank: by MASTER_PORT, without a supervisor."""
    os.environ.pop("GRADS_DS_DOOR", None)
    with socket.create_server(("", 0)) as other:
        os.environ["MASTER_PORT"] = str(other.getsockname()[1])
        try:
            ranks.start()
        except UserError as error:
            return [os.environ["MASTER_PORT"], *error.problems]
    return []


def test_another_launchers_port_that_is_taken_is_one_sentence() -> None:
    ((port, sentence),) = run_on_ranks(1, start_at_a_taken_port, joined=False)
    assert sentence.startswith("MASTER_PORT: wanted a port that is free on")
    assert f"found {port}, at which another process listens" in sentence
    assert "another --master_port" in sentence


def meet_among_strangers() -> list[int]:
    """Rank 0 finds connections at its door that are no rank's, before the ranks and among them."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    strangers = list[socket.socket]()
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 65536):
        strangers.append(socket.create_connection(place))
        strangers[-1].sendall(said)
    with socket.create_connection(place) as gone:  # leaves with a reset
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ranks.start()
    with socket.create_connection(place) as late:
        late.sendall(b"SSH-2.0-scanner\r\n")
        time.sleep(0.1)
    ranks.barrier()
    return ranks.all_gather_object(ranks.rank())


def test_foreign_connections_to_the_door_do_no_harm() -> None:
    assert run_on_ranks(2, meet_among_strangers, joined=False) == [[0, 1]] * 2
