"""Stacks of many ranks become one sentence that names the odd one."""

from __future__ import annotations

from grads_ds.launcher.stacks import sentence

_WAIT = """Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
Current thread 0x00007f0000000002 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 4159 in {name}
  File "/x/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/grads_ds/train.py", line 77 in step
  File "/home/me/grads_ds/cli.py", line 5 in main
"""
_READ = """Current thread 0x00007f0000000002 (most recent call first):
  File "/x/site-packages/datasets/arrow.py", line 12 in read
  File "/home/me/grads_ds/data/readers.py", line 40 in next_row
"""
_BACKWARD = """Thread 0x00007f0000000001 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 1 in all_gather_into_tensor
  File "/x/site-packages/deepspeed/comm/torch.py", line 2 in all_gather_into_tensor
Current thread 0x00007f0000000002 (most recent call first):
  File "/x/site-packages/torch/autograd/graph.py", line 865 in _engine_run_backward
  File "/home/me/grads_ds/train.py", line 80 in step
"""
HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


def test_the_rank_that_does_not_wait_comes_first() -> None:
    wait = _WAIT.format(name="all_reduce")
    told = sentence({0: wait, 1: wait, 2: _READ, 3: wait}, HOSTS)
    assert told.startswith(
        "rank 2 on b is in read (data/readers.py:40 in next_row); ranks 0, 1, 3 are waiting in"
        " all_reduce"
    )


def test_ranks_in_different_collectives_are_told_apart_the_fewest_first() -> None:
    some, other = _WAIT.format(name="all_reduce"), _WAIT.format(name="barrier")
    assert sentence({0: some, 1: some, 2: some, 3: other}, HOSTS).startswith(
        "rank 3 on b is waiting in barrier"
    )


def test_a_collective_inside_a_backward_pass_is_found_in_its_own_thread() -> None:
    assert "waiting in all_gather_into_tensor" in sentence({0: _BACKWARD}, HOSTS)


def test_only_the_last_dump_counts_and_silence_is_said() -> None:
    assert "waiting in barrier" in sentence({0: _READ + _WAIT.format(name="barrier")}, HOSTS)
    assert (
        "rank 1 on a is gave no stack" not in (told := sentence({0: _READ, 1: ""}, HOSTS))
        and "rank 1 on a gave no stack" in told
    )
    assert sentence({0: "", 1: ""}, HOSTS) == "no rank answered with its stack"
