"""Can every host be entered by ssh without a question, and what does it say of itself: an answer or
one sentence for each host.

Asks all hosts at once; writes nothing. Used by the doctor, and by `run` before it starts anything
on a hostfile.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grads_ds.launcher.hosts import Host

CONNECT_SECONDS = 5
ASK_SECONDS = 60  # to the end of an answer, which reads pieces of model and data
ADVICE = (
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
        "mend the hostfile, DNS or /etc/hosts",
    ),
    (
        r"Connection refused",
        "no sshd answers there",
        "start sshd, or name its port in ~/.ssh/config",
    ),
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
    hosts: Sequence[Host], words: Sequence[str], question: str
) -> dict[str, Mapping[str, Any] | str]:
    """What `words` answer (a line of JSON) on each host when given `question`; or, as text, why
    there is no answer.
    """
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        told = dict(
            zip(
                (host.name for host in hosts),
                pool.map(lambda h: _enter(h, words, question + "\n"), hosts),
                strict=True,
            )
        )
    return {name: fault or _answer(name, said) for name, (fault, said) in told.items()}


def ask_by_slurm(
    hosts: Sequence[Host], words: Sequence[str], question: str
) -> dict[str, Mapping[str, Any] | str]:
    """The same inside a Slurm allocation: a step on each host, since srun mixes and breaks long
    lines of several tasks.
    """

    def ask(host: Host) -> Mapping[str, Any] | str:
        call = [
            "srun",
            f"--nodelist={host.name}",
            "--nodes=1",
            "--ntasks=1",
            "--overlap",
            "--export=ALL",
        ]
        try:
            done = subprocess.run(
                [*call, *words],
                input=question + "\n",
                capture_output=True,
                text=True,
                timeout=ASK_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return (
                f"hosts: {host.name}: srun gave no answer within {ASK_SECONDS} s; is its file"
                " system stuck?"
            )
        except OSError as error:
            return f"hosts: {host.name}: wanted srun; {error.strerror}; install slurm-client"
        return _answer(host.name, done.stdout or done.stderr)

    with ThreadPoolExecutor(max_workers=min(16, len(hosts))) as pool:
        return dict(zip((host.name for host in hosts), pool.map(ask, hosts), strict=True))


def _answer(name: str, said: str) -> Mapping[str, Any] | str:
    try:
        answer = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return (
            f"hosts: {name}: wanted what the host is like; found {said.strip()[-200:]!r}; is the"
            " shared file system mounted?"
        )
    return (
        answer
        if isinstance(answer, dict)
        else f"hosts: {name}: wanted a JSON object; found {said.strip()[-200:]!r}"
    )


def _enter(host: Host, words: Sequence[str], question: str) -> tuple[str | None, str]:
    """(why `words` could not be run on the host, or None; what they printed)."""
    command = [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_SECONDS}",
        "--",
        host.name,
        shlex.join(words),
    ]
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=ASK_SECONDS
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
