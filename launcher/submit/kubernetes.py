"""A whole run as a Kubernetes job: `grads-ds run CONFIG --backend kubernetes` renders an MPIJob and
hands it to kubectl.

Kubeflow's mpi-operator (v2beta1) starts the worker pods, writes their names into a hostfile and
starts a launcher pod, in which the same command runs with that hostfile and Open MPI. Pods enter
one another by the keys that docker/node.sh makes on the shared volume. The tests hold what is
rendered against the schemas of Kubernetes and of the operator; not run where this was written (no
cluster). There is no PyTorchJob: the operator that ran them is no longer developed (its code was
removed in February 2025), and it gives no hostfile to a launcher.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config.errors import UserError
from grads_ds.run_dir.publish import publish_text

HOSTFILE = "/etc/mpi/hostfile"  # where the operator puts it
NAME, WAITS = "kubernetes", False
HELP = (
    "for --backend kubernetes: image=..., nodes=2, gpus=8, claim=NAME:/runs, namespace=...,"
    " shared_memory=16Gi"
)
MISPLACED = "--kubernetes: wanted --backend kubernetes; found another one; leave it out"
USER = 10001  # whom docker/Dockerfile makes
NODE = "/opt/grads_ds/docker/node.sh"  # in the image of docker/Dockerfile
DEFAULTS = {
    "name": "grads-ds",
    "namespace": "default",
    "image": "",
    "nodes": "",
    "gpus": "0",
    "claim": "",
    "shared_memory": "8Gi",
    "cpu": "",
    "memory": "",
}
_RULES = {
    "name": r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?",
    "namespace": r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
    "image": r"[A-Za-z0-9][\w./:@-]*",
    "nodes": r"[1-9][0-9]{0,4}",
    "gpus": r"[0-9]{1,3}",
    "claim": r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?:/[\w./-]+",
    "shared_memory": r"[0-9]+(Mi|Gi)",
    "cpu": r"([0-9]+m?)?",
    "memory": r"([0-9]+(Mi|Gi))?",
}
_WANTED = {
    "image": "the image of docker/Dockerfile",
    "nodes": "a number of worker pods",
    "claim": "NAME:/PATH of a shared volume's claim",
}


def outside() -> bool:
    """Always: in the job's launcher pod the backend is Open MPI."""
    return True


def render(arguments: Sequence[str], options: Sequence[str], run_dir: Path, grace: float) -> str:
    """The manifest that runs `grads-ds ARGUMENTS`; `options` are KEY=VALUE. The run directory
    stands in the arguments alone.

    Raises UserError with every problem.
    """
    chosen, problems = dict(DEFAULTS), []
    for option in options:
        key, _, value = option.partition("=")
        if key not in DEFAULTS:
            problems.append(
                f"--kubernetes {option!r}: wanted one of {', '.join(DEFAULTS)} before the equals"
                " sign"
            )
        else:
            chosen[key] = value
    for key, value in chosen.items():
        if not re.fullmatch(_RULES[key], value):
            found = f"found {value!r}" if value else "found none"
            problems.append(
                f"--kubernetes {key}: wanted {_WANTED.get(key, 'another value')}; {found}; give"
                f" --kubernetes {key}=..."
            )
    if problems:
        raise UserError(problems)
    slots = max(1, int(chosen["gpus"]))
    command = ["grads-ds", *arguments, "--hosts", HOSTFILE, "--backend", "openmpi"]
    launcher = _pod("launcher", [NODE, "join", *command], chosen, grace, gpus=0)
    worker = _pod("worker", [NODE, "serve"], chosen, grace, gpus=int(chosen["gpus"]))
    job = {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": chosen["name"], "namespace": chosen["namespace"]},
        "spec": {
            "slotsPerWorker": slots,
            "mpiImplementation": "OpenMPI",
            "launcherCreationPolicy": "WaitForWorkersReady",
            # not used: node.sh brings keys and strict host checking
            "sshAuthMountPath": "/etc/mpi-operator-ssh",
            # a finished job keeps its launcher for the log; a failed one is started again by its
            # own --max-restarts
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0},
            "mpiReplicaSpecs": {
                "Launcher": {"replicas": 1, "restartPolicy": "Never", "template": launcher},
                "Worker": {"replicas": int(chosen["nodes"]), "template": worker},
            },
        },
    }
    return yaml.safe_dump(job, sort_keys=False)


def _pod(
    name: str, command: list[str], chosen: dict[str, str], grace: float, *, gpus: int
) -> dict[str, Any]:
    claim, path = chosen["claim"].split(":", 1)
    limits: dict[str, Any] = {"nvidia.com/gpu": gpus} if gpus else {}
    if name == "worker":
        limits |= {key: chosen[key] for key in ("cpu", "memory") if chosen[key]}
    container: dict[str, Any] = {
        "name": name,
        "image": chosen["image"],
        "command": command,
        "workingDir": path,  # paths of the config are relative to the shared volume
        "env": [{"name": "SSH_FOLDER", "value": f"{path.rstrip('/')}/.grads_ds_ssh"}],
        "volumeMounts": [
            {"name": "runs", "mountPath": path},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if limits:
        container["resources"] = {"limits": limits}
    return {
        "spec": {
            # ranks write a last checkpoint in `grace`; then what they hold is put away
            "terminationGracePeriodSeconds": ceil(grace) + 30,
            "securityContext": {"fsGroup": USER},  # the volume is writable to the image's user
            "containers": [container],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
                {
                    "name": "shared-memory",
                    "emptyDir": {"medium": "Memory", "sizeLimit": chosen["shared_memory"]},
                },
            ],
        }
    }


def submit(job: str, run_dir: Path, wait: bool) -> int:
    """Keep the manifest under `logs/` and create it with kubectl, which does not wait; kubectl's
    status.
    """
    path = run_dir / "logs" / f"kubernetes-{time.strftime('%Y-%m-%dT%H.%M.%S')}.yaml"
    publish_text(path, job)
    try:
        return subprocess.run(["kubectl", "create", "-f", str(path)]).returncode
    except OSError as error:
        raise UserError(
            f"--backend kubernetes: wanted kubectl; {error.strerror}; install it, or create {path}"
            " elsewhere"
        ) from None
