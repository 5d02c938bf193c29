"""Rendered Kubernetes jobs fit the schemas and hold the user's words as data.

No cluster here: nothing is started.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPO
from grads_ds.config.errors import UserError
from grads_ds.launcher.submit.kubernetes import HOSTFILE, render

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")
OPTIONS = [
    "image=registry/grads-ds:1",
    "nodes=4",
    "gpus=8",
    "claim=runs:/runs",
    "cpu=32",
    "memory=512Gi",
]
RUN_DIR = Path("runs/one")
ODD = 'a\'b "c" $HOME;touch x\n- {y: z}'


def job(*options: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(
        render(["run", "config.yaml", "--set", f"seed={ODD}"], [*OPTIONS, *options], RUN_DIR, 90)
    )
    return tree


@pytest.mark.parametrize("role", ["Launcher", "Worker"])
def test_pods_fit_kubernetes_own_schema(role: str) -> None:
    """Strict: a field that Kubernetes does not know is a fault."""
    template = job()["spec"]["mpiReplicaSpecs"][role]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, "1.31", strict=True)
    pod["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.31", strict=True)


@pytest.mark.parametrize("role", ["Launcher", "Worker"])
def test_pods_may_write_the_volume_and_have_time_for_a_last_checkpoint(role: str) -> None:
    pod = job()["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 90  # what the ranks get for a last checkpoint
    user = (REPO / "docker/Dockerfile").read_text().split("\nUSER ")[1].split()[0]
    assert pod["securityContext"] == {"fsGroup": int(user)}


def test_job_fits_the_operators_schema() -> None:
    """The mpi-operator's structural schema of kubeflow.org/v2beta1 (mpijob_schema.json says where
    it is from), unknown fields refused.
    """
    schema = json.loads(Path(__file__).with_name("mpijob_schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    tree = job()
    check.validate(tree)
    specs = tree["spec"]["mpiReplicaSpecs"]
    assert specs["Worker"]["replicas"] == 4 and tree["spec"]["slotsPerWorker"] == 8
    limits = specs["Worker"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 8, "cpu": "32", "memory": "512Gi"}
    assert "resources" not in specs["Launcher"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "where, value",
    [
        ("spec.slotsPerWorkers", 8),
        ("spec.cleanPodPolicy", "Running"),
        ("spec.slotsPerWorker", "8"),
        ("spec.mpiImplementation", "Open MPI"),
        ("spec.runPolicy.cleanPodPolicy", "running"),
        ("spec.launcherCreationPolicy", "AfterWorkers"),
        ("apiVersion", "kubeflow.org/v1"),
        ("spec.mpiReplicaSpecs.Launcher.replicas", 2),
        ("spec.mpiReplicaSpecs.Worker.restartPolicy", "Always"),
        ("spec.mpiReplicaSpecs.Master", {"template": {"spec": {"containers": [{}]}}}),
    ],
)
def test_the_schema_refuses_what_the_operator_would_drop_or_refuse(where: str, value: Any) -> None:
    """Fields of the older v1 job, misspelt ones, words for numbers."""
    schema = json.loads(Path(__file__).with_name("mpijob_schema.json").read_text())
    tree: Any = job()
    node, *path = tree, *where.split(".")
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(tree)


def test_words_of_the_command_stay_words() -> None:
    command = job()["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0][
        "command"
    ]
    assert f"seed={ODD}" in command and command[-4:] == [
        "--hosts",
        HOSTFILE,
        "--backend",
        "openmpi",
    ]


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        render(["run", "c"], ["image=a b", "nodes=0", "claim=runs", "gpu=8"], RUN_DIR, 90)
    assert [fault.split(":")[0].split()[1] for fault in caught.value.problems] == [
        "'gpu=8'",
        "image",
        "nodes",
        "claim",
    ]
