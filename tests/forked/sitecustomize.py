"""Python imports this as it starts where tests/forked_ranks.py has put it on the path: a rank
(`python -m grads_ds STAGE ...` or a script that a launcher has given a RANK), DeepSpeed's launcher
(`python -m deepspeed.launcher...`), and with FORK_ALL in the environment every script and module,
is then run by a process forked from a server that has done the imports, and this one stands for
it. The interpreter of forked_ranks.py, which needs no path, takes DeepSpeed's launcher alone.

It hands over its arguments, environment and open files, forwards signals, dies as the fork dies,
and the fork dies with it. What the server does not take is run here, as is all else.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_SOCKET = os.path.join(_HERE, "socket")


def _words() -> list[str]:
    """`-m MODULE` or a script, and its arguments; nothing where this process is to run itself."""
    words = sys.orig_argv[1:]
    if words[:1] == ["-u"]:
        words = words[1:]
    if "LD_PRELOAD" in os.environ:  # a fork has no library of its own
        return []
    if words[:1] == ["-m"] and words[1].startswith("deepspeed.launcher."):
        return words
    if _HERE not in os.environ.get("PYTHONPATH", "").split(":"):
        return []
    ours = words[:2] == ["-m", "grads_ds"] or (bool(words) and words[0].endswith(".py"))
    if "FORK_ALL" in os.environ:
        return words if ours or words[:1] == ["-m"] else []
    return words if ours and "RANK" in os.environ else []


def _files() -> list[int]:
    """What is open here and stays so: the streams and what a supervisor has handed down."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.get_inheritable(number):
                found.append(number)
        except OSError:  # the listing's own
            continue
    return found


def _stand_in(words: list[str]) -> None:
    import json
    import signal
    import socket

    try:
        line = socket.socket(socket.AF_UNIX)
        line.connect(_SOCKET)
    except OSError:
        return
    files = _files()
    ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
    forwarded = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    for number in (getattr(signal, name) for name in forwarded):
        if number not in ignored:
            signal.signal(number, lambda number, frame: line.send(bytes([number])))
    place = {"cwd": os.getcwd(), "path": sys.path, "environment": dict(os.environ)}
    place |= {"executable": sys.executable}
    told = json.dumps(
        place | {"words": words, "files": files, "ignored": [int(n) for n in ignored]}
    ).encode()
    socket.send_fds(line, [len(told).to_bytes(8, "big")], files)
    line.sendall(told)
    answer = line.recv(4)
    if len(answer) < 4:  # the server is gone, and what it ran for this process with it
        os._exit(1)
    status = int.from_bytes(answer, "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


if _rank := _words():
    _stand_in(_rank)
