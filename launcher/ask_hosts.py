"""Can every host be entered without a question, and what does it say of itself: an answer or
one sentence for each host.

Asks all hosts at once; writes nothing. The backends choose the way in; used by the doctor, and by
`run` before it starts anything.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grads_ds.launcher.hosts import Host

CONNECT_SECONDS = 5
ASK_SECONDS = 60  # to the end of an answer, which reads pieces of model and data
MARK = "grads-ds-host:"  # begins the line that is the answer
Answer = Mapping[str, Any] | str
Answers = dict[str, Answer]
ADVICE = (
    (
        r"No user exists for uid|unknown user",
        "ssh asks for a passwd entry that this user id has not",
        "give the container one (docker run --user NAME, or nss_wrapper)",
    ),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "its host key has changed",
        "if it was reinstalled: ssh-keygen -R {host}, then connect once by hand",
    ),
    (
        r"Host key verification failed",
        "its host key is not known",
        "connect once by hand: ssh {host}",
    ),
    (
        r"Permission denied",
        "it wants a password or another key",
        "ssh-copy-id {host}, or name the key in ~/.ssh/config",
    ),
    (
        r"Could not resolve|Name or service not known",
        "its name does not resolve",
        "fix the hostfile, DNS or /etc/hosts",
    ),
    (r"Connection refused", "no sshd answers there", "start sshd, or name its port: --ssh-port"),
    (
        r"timed out|No route to host|unreachable",
        "the host does not answer",
        "is it up? is a firewall between? else --exclude {host}",
    ),
    (
        r"command not found|No such file|account is currently not available|nologin",
        "it has no usable shell",
        "look at its login shell",
    ),
)


def ask_by_ssh(
    hosts: Sequence[Host], words: Sequence[str], question: str, port: int | None = None
) -> Answers:
    """What `words` answer (a line of JSON behind MARK) on each host when given `question`; or, as
    text, why there is no answer. `port` is sshd's where it is not ~/.ssh/config's.
    """

    def ask(host: Host) -> Answer:
        problem, output = _enter(host, words, question + "\n", port)
        return problem or _answer(host.name, "ssh", output)

    return _ask_each(hosts, ask, 64)


def ask_by_slurm(
    hosts: Sequence[Host], words: Sequence[str], question: str, port: int | None = None
) -> Answers:
    """The same inside a Slurm allocation: a step on each host, since srun mixes and breaks long
    lines of several tasks.
    """
    step = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL"]

    def ask(host: Host) -> Answer:
        return _run_and_read(host, [*step, f"--nodelist={host.name}", *words], question, "srun")

    return _ask_each(hosts, ask, 16)


def ask_here(
    hosts: Sequence[Host], words: Sequence[str], question: str, port: int | None = None
) -> Answers:
    """The same on this machine."""
    return {h.name: _run_and_read(h, list(words), question, words[0]) for h in hosts}


def _ask_each(hosts: Sequence[Host], ask: Callable[[Host], Answer], at_once: int) -> Answers:
    with ThreadPoolExecutor(max_workers=min(at_once, len(hosts))) as pool:
        return dict(zip((host.name for host in hosts), pool.map(ask, hosts), strict=True))


def _run_and_read(host: Host, call: list[str], question: str, program: str) -> Answer:
    try:
        done = subprocess.run(
            call,
            input=question + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return (
            f"hosts: {host.name}: {program} gave no answer within {ASK_SECONDS} s; is its file"
            " system stuck?"
        )
    except OSError as error:
        return f"hosts: {host.name}: wanted {program}; {error.strerror}; install it"
    return _answer(host.name, program, done.stdout, done.stderr)


def _answer(name: str, by: str, output: str, errors: str = "") -> Answer:
    """The answer in what a host printed; login scripts may print before, after and beside it."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            answer, _ = json.JSONDecoder().raw_decode(line.partition(MARK)[2])
            if isinstance(answer, dict):
                return answer
    found = (output.strip() or errors.strip())[-200:]
    return (
        f"hosts: {name}: wanted what the host is like, by {by}; found {found!r}; do its login"
        " scripts end the session, or is it another version of grads_ds?"
    )


def _enter(
    host: Host, words: Sequence[str], question: str, port: int | None
) -> tuple[str | None, str]:
    """(why `words` could not be run on the host, or None; what they printed)."""
    command = [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_SECONDS}",
        *(["-p", str(port)] if port is not None else []),
        "--",
        host.name,
        shlex.join(words),
    ]
    try:
        done = subprocess.run(
            command,
            input=question,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        stuck = (
            f"does not come to an end within {ASK_SECONDS} s; is its file system or login script"
            " stuck?"
        )
        return f"hosts: {host.name}: ssh {stuck}", ""
    except OSError as error:
        return f"hosts: {host.name}: wanted ssh; {error.strerror}; install openssh-client", ""
    if done.returncode == 0:
        return None, done.stdout
    said = done.stderr.strip() or done.stdout.strip()
    last = said.splitlines()[-1] if said else ""
    if done.returncode != 255 and "not available" not in said:
        change = (
            "every host needs the same checkout and environment at the same path"
            " (scripts/install.sh), or a shared one"
        )
        return (
            (
                f"hosts: {host.name}: wanted {words[0]} to look at the host; found"
                f" {last or done.returncode}; {change}"
            ),
            "",
        )
    unknown = ("", f"ssh ended with status {done.returncode}", "try by hand: ssh {host} true")
    _, found, change = next((entry for entry in ADVICE if re.search(entry[0], said)), unknown)
    return (
        (
            f"hosts: {host.name}: wanted to enter it by ssh without a password; {found} ({last});"
            f" {change.format(host=host.name)}"
        ),
        "",
    )
