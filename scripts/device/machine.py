"""Step `machine`: what this machine is, and which of the packages the project imports it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import tomllib
from typing import Any

from step import REPO, Step, first_line, start

SHOWN = ("torch", "transformers", "deepspeed", "triton", "accelerate", "peft", "datasets", "numpy")


def missing_packages() -> list[str]:
    """The required packages of pyproject.toml that are not installed."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]]  # type: ignore[index]
    return [name for name in names if version_of(name) is None]


def version_of(name: str) -> str | None:
    """The installed version, if it is."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_facts() -> dict[str, Any]:
    """Name, memory, driver, CUDA, NCCL and cuDNN as torch and nvidia-smi see them."""
    import torch

    device = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "name": device.name,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "capability": f"{device.major}.{device.minor}",
        "nvidia_smi": smi.stdout.strip(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }


def matmul_rate(step: Step) -> float:
    """TFLOP/s of a square bf16 product, the roof that the other steps' rates stand under."""
    import torch
    from step import synchronised_clock

    size, times = (256, 2) if step.cpu else (8192, 20)
    left, right = (torch.randn(size, size, device=step.device).bfloat16() for _ in range(2))
    left @ right
    began = synchronised_clock(step.device)
    for _ in range(times):
        left @ right
    return 2 * size**3 * times / (synchronised_clock(step.device) - began) / 1e12


def run(step: Step) -> bool:
    """Facts in the order of what may fail."""
    step.record(
        python=platform.python_version(),
        cores=os.cpu_count(),
        versions={name: version_of(name) for name in SHOWN},
        missing=missing_packages(),
    )
    if step.found["missing"]:
        return False
    if not step.cpu:
        step.record(gpu=gpu_facts())
    step.record(matmul_tflops=round(matmul_rate(step), 3))
    try:
        import deepspeed
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        accelerator = deepspeed.accelerator.get_accelerator()
        step.record(
            deepspeed_accelerator=accelerator.current_device_name(),
            collectives=accelerator.communication_backend_name(),
            compatible_ops=sorted(
                n for n, op in ALL_OPS.items() if op.is_compatible(verbose=False)
            ),
        )
    except Exception as error:
        step.record(deepspeed_error=first_line(error))
        return False
    return True


if __name__ == "__main__":
    start(run)
