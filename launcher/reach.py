"""Can every host be entered by ssh without a question, and if not, what is to be done: one sentence for each host.

Asks all hosts at once; writes nothing. Used by the doctor, and by `run` before it starts anything on a hostfile.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from launcher.hosts import Host

CONNECT_SECONDS = 5
ADVICE = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
     "its host key has changed", "if it was reinstalled: ssh-keygen -R {host}, then connect once by hand"),
    (r"Host key verification failed", "its host key is not known", "connect once by hand: ssh {host}"),
    (r"Permission denied", "it wants a password or another key", "ssh-copy-id {host}, or name the key in ~/.ssh/config"),
    (r"Could not resolve|Name or service not known", "its name does not resolve", "mend the hostfile, DNS or /etc/hosts"),
    (r"Connection refused", "no sshd answers there", "start sshd, or name its port in ~/.ssh/config"),
    (r"timed out|No route to host|unreachable", "the host does not answer", "is it up? is a firewall between? else --exclude {host}"),
    (r"command not found|No such file", "it has no usable shell", "look at its login shell"),
)  # fmt: skip


def unreachable(hosts: Sequence[Host]) -> dict[str, str]:
    """Faults by host name; empty when all can be entered."""
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        told = dict(zip((host.name for host in hosts), pool.map(_enter, hosts), strict=True))
    return {name: fault for name, fault in told.items() if fault}


def _enter(host: Host) -> str | None:
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "--", host.name, "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3 * CONNECT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"hosts: {host.name}: ssh does not come to an end; is its file system or login script stuck?"
    except OSError as error:
        return f"hosts: {host.name}: wanted ssh; {error.strerror}; install openssh-client"
    if done.returncode == 0:
        return None
    said = done.stderr.strip()
    unknown = ("", f"ssh ended with status {done.returncode}", "try by hand: ssh {host} true")
    _, found, change = next((entry for entry in ADVICE if re.search(entry[0], said)), unknown)
    last = said.splitlines()[-1] if said else ""
    return f"hosts: {host.name}: wanted to enter it by ssh without a password; {found} ({last}); {change.format(host=host.name)}"
