"""The image and the compose cluster: linted, agreeing with each other, and their start script
entered by a real ssh.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from grads_ds.launcher.hosts import read_hostfile

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"
TOOLS = Path(sys.executable).parent
USER = 10001


def lint(tool: str, *arguments: Path | str) -> None:
    command = TOOLS / tool
    if not command.exists():
        pytest.skip(f"needs {tool} (scripts/install.sh --dev)")
    result = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def compose() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return tree


def targets(node: dict[str, Any]) -> list[str]:
    """Where a node's volumes that it may write to are mounted."""
    return [item.split(":")[1] for item in node["volumes"] if not item.endswith(":ro")]


def as_user(home: Path) -> list[str]:
    """What runs the words behind it as the image's user, who lives in `home`."""
    for name, line in (("passwd", f"x:{USER}:{USER}::{home}:/bin/bash"), ("shadow", "*:::::::")):
        (home / name).write_text(f"grads:{line}\n" + Path("/etc", name).read_text())
    os.chown(home, USER, USER)
    mounts = 'mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/shadow" /etc/shadow'
    enter = f'{mounts} && HOME="$0" exec setpriv --reuid={USER} --regid={USER} --clear-groups "$@"'
    return ["unshare", "--mount", "bash", "-c", enter, str(home)]


def test_dockerfile_is_clean() -> None:
    lint("hadolint", DOCKER / "Dockerfile")


def test_shell_scripts_are_clean() -> None:
    lint(
        "shellcheck",
        "--severity=warning",
        *sorted(DOCKER.glob("*.sh")),
        *sorted((REPO / "scripts").glob("*.sh")),
    )


def test_image_is_built_by_the_install_script_alone() -> None:
    """A package named in the Dockerfile would be one that a bare machine lacks."""
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    *runs, user = [line for line in lines if line.startswith("RUN ")]
    assert runs and all(line.startswith("RUN bash scripts/install.sh --cluster") for line in runs)
    assert user.startswith("RUN useradd ")
    assert "pip install" not in "".join(lines) and "apt-get" not in "".join(lines)


def test_image_runs_as_a_user_who_owns_what_a_node_writes() -> None:
    """The id is a number: Kubernetes' runAsNonRoot can tell nothing from a name."""
    text = (DOCKER / "Dockerfile").read_text()
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == [str(USER)] and text.index("USER ") > text.rindex("RUN ")
    assert f"useradd --uid {USER} " in text
    written = {target for node in compose()["services"].values() for target in targets(node)}
    owned = re.search(r"install -d -o grads -g grads .*", text)
    assert owned is not None and written <= set(owned.group().split())


def test_what_the_image_copies_is_there() -> None:
    for line in (DOCKER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((REPO / name).exists() for name in line.split()[1:-1]), line


def test_compose_and_hostfile_name_the_same_nodes() -> None:
    services = compose()["services"]
    assert [host.name for host in read_hostfile(DOCKER / "hostfile")] == list(services)
    assert [node["hostname"] for node in services.values()] == list(services)


def test_nodes_share_keys_and_runs_and_have_room_to_communicate() -> None:
    tree = compose()
    for node in tree["services"].values():
        assert (
            {item.split(":")[0] for item in node["volumes"]}
            >= {"ssh", "runs"}
            <= set(tree["volumes"])
        )
        assert node["shm_size"] != "64mb" and node["ulimits"]["memlock"] == -1
        assert (DOCKER / node["build"]["context"]).resolve() == REPO
        assert (REPO / node["build"]["dockerfile"]).is_file()


def test_gpu_override_covers_every_node() -> None:
    override = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert list(override["services"]) == list(compose()["services"])
    for node in override["services"].values():
        assert node["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_image_leaves_environments_and_runs_of_this_machine_out() -> None:
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs"} <= set(ignored)


@pytest.mark.parametrize("who", ["root", "the image's user"])
def test_start_script_makes_a_node_that_ssh_enters_without_questions(who: str) -> None:
    """Keys made on the spot, strict host keys, no password; a command given instead of `serve` runs
    as it is. The image's user is made with a passwd of the test's own, in a mount namespace.
    """
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    root = who == "root"
    if sshd is None or os.geteuid() != 0:
        pytest.skip("needs sshd and root (scripts/install.sh --dev)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # sshd refuses keys below a folder that everyone may write, as /tmp is, if it is not the home
    home = Path(tempfile.mkdtemp(prefix="a node ", dir=pwd.getpwuid(0).pw_dir if root else None))
    shutil.copy(DOCKER / "node.sh", home)
    environment = os.environ | {
        "SSH_FOLDER": str(home / "shared"),
        "SSH_PORT": str(port),
        "SSH_HOME": str(home / "keys"),
    }
    prefix = [] if root else as_user(home)
    script = [*prefix, str(home / "node.sh")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=20)

    told = run(*script, "echo", "as it is")
    assert told.stdout == "as it is\n", told.stderr
    node = subprocess.Popen([*script, "serve"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        ssh = ["ssh", "-F", str(home / "keys/config"), "127.0.0.1", "id -u; echo entered"]
        for _ in range(50):
            result = run(*prefix, *ssh)
            if result.returncode == 0:
                break
            time.sleep(0.1)
        assert result.stdout == f"{0 if root else USER}\nentered\n", result.stderr
        joined = run(*script, "join", *ssh)
        assert joined.stdout == result.stdout, joined.stderr
    finally:
        node.terminate()
        node.wait(timeout=10)
        shutil.rmtree(home)
