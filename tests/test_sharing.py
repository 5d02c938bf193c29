"""Workers that share the tests wait and compute beside each other."""

from __future__ import annotations

from types import SimpleNamespace

from tests import sharing


class Worker:
    """A worker of which only the files matter that it is sent."""

    def __init__(self, name: str, collected: list[str]) -> None:
        self.gateway, self.collected = SimpleNamespace(id=name), collected
        self.files: list[str] = []
        self.shutting_down = False

    def send_runtest_some(self, numbers: list[int]) -> None:
        self.files += dict.fromkeys(self.collected[n].partition("::")[0] for n in numbers)

    def shutdown(self) -> None:
        self.shutting_down = True


def test_one_worker_takes_what_waits_and_the_others_what_computes() -> None:
    """A file is a worker's as a whole, and every file is somebody's."""
    files = [f"{number}.py" for number in range(9)]
    collected = [f"{file}::test_{letter}" for file in files for letter in "abcd"]
    option = SimpleNamespace(loadscopereorder=False)
    config = SimpleNamespace(getvalue=lambda name: ["popen"] * 3, option=option)
    shared = sharing.FromBothEnds(config)
    workers = [Worker(name, collected) for name in ("waits", "one", "two")]
    for worker in workers:
        shared.add_node(worker)
        shared.add_node_collection(worker, collected)
    shared.schedule()
    assert [worker.files for worker in workers] == [["0.py"], ["8.py"], ["7.py"]]
    for worker in workers * len(collected):  # in turn, each a test
        units = shared.assigned_work[worker].values()
        left = [test for unit in units for test, done in unit.items() if not done]
        if left:
            shared.mark_test_complete(worker, collected.index(left[0]))
    waits, one, two = (worker.files for worker in workers)
    assert waits == sorted(waits) and one == sorted(one, reverse=True)
    assert sorted([*waits, *one, *two]) == files and shared.tests_finished


def test_what_waits_stands_in_front_and_what_is_quick_in_the_middle() -> None:
    def item(file: str, *marks: str) -> SimpleNamespace:
        named = [SimpleNamespace(name=mark) for mark in marks]
        return SimpleNamespace(path=sharing.LAUNCHER.parent / file, iter_markers=lambda: named)

    items = [
        item("data/test_quick.py"),
        item("plan/test_computes.py", "slow"),
        item("plan/test_computes.py"),
        item("launcher/test_waits.py"),
        item("launcher/test_hosts_quick.py", "cluster"),
        item("training/test_hosts_long.py", "parametrize"),
        item("training/test_hosts_long.py", "cluster", "slow"),
    ]
    sharing.sort(items)  # type: ignore[arg-type]
    assert [entry.path.name for entry in items] == [
        "test_hosts_long.py",
        "test_hosts_long.py",
        "test_hosts_quick.py",
        "test_waits.py",
        "test_quick.py",
        "test_computes.py",
        "test_computes.py",
    ]
