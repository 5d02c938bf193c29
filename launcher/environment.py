"""What a rank's environment is made of: the launcher's own, whole, carried in a file only its user
can read.

Nothing of it stands in a command line or a log. Reads `os.environ` and DeepSpeed's
`.deepspeed_env`; values may hold quotes, spaces and line breaks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from grads_ds.config.errors import UserError
from grads_ds.config.text_file import text_of
from grads_ds.launcher import runners
from grads_ds.launcher.host_choice import visible_gpus

# glibc hands every large tensor back to the system and the page faults eat the time: an
# 8M-parameter training step took 4.2 s without these and 1.25 s with them (2 CPU cores, 2026-11)
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# true on one host, or for one session, only; what a runner tells one process stands in runners.OWN
_LOCAL = re.compile(
    r"HOSTNAME|PWD|OLDPWD|SHLVL|_|TERM|TERMCAP|DISPLAY|WAYLAND_DISPLAY|XAUTHORITY|LS_COLORS|TMPDIR"
    r"|WINDOWID|TMUX\w*|STY|MAIL|SSH_\w+|DBUS_\w+|SYSTEMD_\w+|INVOCATION_ID|JOURNAL_STREAM"
    r"|XDG_(?:RUNTIME_DIR|SESSION_\w+|SEAT\w*|VTNR|CURRENT_DESKTOP|MENU_PREFIX|GREETER_\w+)"
)
# what a runner itself needs; with more than this, DeepSpeed's would write every PYTHON*, NCCL*,
# UCX* into remote command lines
_RUNNER = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TMPDIR|TERM|SSH_\w+|PDSH_\w+|KRB5\w+"
    r"|LD_LIBRARY_PATH|DS_ACCELERATOR|VIRTUAL_ENV"
)


def forwarded(environment: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What every rank gets: `.deepspeed_env` < the launcher's environment < `extra`, without what
    is true here only.
    """
    local = (_LOCAL, runners.OWN)
    kept = {n: v for n, v in environment.items() if not any(p.fullmatch(n) for p in local)}
    return deepspeed_env() | kept | dict(extra)


def for_runner(environment: Mapping[str, str]) -> dict[str, str]:
    """What the process that starts the ranks gets."""
    wanted = (_RUNNER, runners.SETTINGS)
    kept = {n: v for n, v in environment.items() if any(p.fullmatch(n) for p in wanted)}
    # its values would stand in command lines and in the log
    return kept | {"DS_ENV_FILE": ".grads_ds.none"}


def write_private(path: Path, environment: Mapping[str, str]) -> None:
    """Write the environment as JSON, readable by its owner alone from the first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(dict(environment), file)


def sweep(logs: Path) -> int:
    """Remove the environment files that killed launchers have left below `logs`; how many."""
    left = list(logs.glob("*/*/environment.json"))
    for file in left:
        file.unlink(missing_ok=True)
    return len(left)


def deepspeed_env() -> dict[str, str]:
    """The variables of `.deepspeed_env` (home, then here; or $DS_ENV_FILE), which DeepSpeed's users
    keep for their ranks.

    One NAME=value a line; comments and blank lines are skipped, a value in one pair of quotes loses
    them. Raises UserError naming the line that is neither.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    variables: dict[str, str] = {}
    problems = []
    home = os.path.expanduser("~")  # stays "~" for a user id without an entry and without HOME
    for folder in (*([Path(home)] if home != "~" else []), Path()):
        path = folder / name
        if not path.is_file():
            continue
        try:
            lines = text_of(path, str(path), "lines NAME=value").splitlines()
        except UserError as error:
            problems += error.problems
            continue
        for number, raw in enumerate(lines, 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            key, equals, value = line.removeprefix("export ").partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key.strip()):
                problems.append(f"{path}:{number}: wanted NAME=value; fix or remove the line")
                continue
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            variables[key.strip()] = value[1:-1] if quoted else value
    if problems:
        raise UserError(problems)
    return variables


def of_this_kind_of_machine(ranks_here: int) -> dict[str, str]:
    """Variables every rank needs on this kind of machine, unless the user has set them."""
    wanted = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # one line per rank and call from torch and transformers otherwise
    wanted["PYTHONWARNINGS"] = "ignore::FutureWarning"
    if not visible_gpus():
        threads = str(max(1, (os.cpu_count() or 1) // ranks_here))
        wanted |= CPU_ALLOCATOR | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}
    return {key: value for key, value in wanted.items() if key not in os.environ}
