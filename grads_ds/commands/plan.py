"""`grads-ds plan CONFIG`: memory of a GPU, bytes on the wire, hours, before any of it is rented."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grads_ds.commands.run import add_config
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.launcher.hosts import read_hostfile


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    add_config(command)
    command.add_argument(
        "--model",
        metavar="SHAPE",
        help="7B, 13B, 34B, 70B or 405B instead of model.path; needs no weights",
    )
    command.add_argument("--hosts", metavar="HOSTFILE", help="take hosts and slots from a hostfile")
    command.add_argument(
        "--cluster",
        metavar="HOSTSxGPUS",
        help="or say them (default: 1 host with the GPUs that are here, or with 8)",
    )
    command.add_argument(
        "--gpu", help="A100-40, A100-80, H100, H200, A10, L40S (default: what is here, or H100)"
    )
    command.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="instead of the named GPU's"
    )
    command.add_argument(
        "--tflops",
        type=float,
        metavar="T",
        help="what one rank really computes (default: 40 %% of the GPU's peak)",
    )
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="measure that on this host, by one layer of the model",
    )
    command.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/S",
        help="of one host to the others (default: %(default)g)",
    )
    command.add_argument(
        "--inside",
        type=float,
        metavar="GB/S",
        help="that a rank receives from the others of its host (default: 80 %% of the GPU's links)",
    )
    command.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="tokens of the pool (default: the prepared pool's, else its files' bytes over 4)",
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Predict and print; 0 when everything fits, 2 when something does not."""
    config = load_config(args.config, args.set)
    # torch: only once the input is read
    from grads_ds.first_config.machine import this_machine
    from grads_ds.plan.cluster import GPUS, LINK_SHARE, USUAL_SHARE, Cluster
    from grads_ds.plan.forecast import forecasts
    from grads_ds.plan.shapes import model_config

    if args.gpu and args.gpu not in GPUS:
        raise UserError(
            f"--gpu: wanted one of {', '.join(GPUS)}; found {args.gpu}; else give --gpu-memory and"
            " --tflops"
        )
    assumed, here = "", this_machine()
    gpu = args.gpu or _named(here.gpu, here.gib, GPUS)
    if gpu is None:
        gpu = "H100"
        others = "--gpu, --cluster; --calibrate measures this host"
        assumed = f"; assumed, as here is {here.words()} ({others})"
    hosts, ranks = _cluster(args, here.gpus or 8)
    peak, memory, links = GPUS[gpu]
    model = model_config(args.model or config.model.path)
    if args.calibrate:
        import torch

        from grads_ds.plan.calibrate import calibrate

        rate = calibrate(
            model,
            getattr(torch, config.model.dtype),
            config.sft.micro_batch_size,
            config.data.max_length,
        )
        print(f"this host trains at {rate / 1e12:.3g} TFLOP/s", file=sys.stderr)
    else:
        rate = args.tflops * 1e12 if args.tflops else peak * USUAL_SHARE
    cluster = Cluster(
        hosts,
        ranks,
        (args.gpu_memory or memory) * 2**30,
        rate,
        args.network * 1e9,
        args.inside * 1e9 if args.inside else LINK_SHARE * links,
        0.0 if args.calibrate or args.tflops else peak,
    )
    tokens, whence = (args.tokens, "") if args.tokens else _pool_tokens(config)
    found = forecasts(config, model, cluster, tokens)
    if args.json:
        told = [asdict(item) | {"peak_bytes": item.memory.device} for item in found]
        print(json.dumps(told, indent=1))
    else:
        print(
            f"{args.model or config.model.path} on {hosts} host{'s' * (hosts > 1)} with {ranks}"
            f" {gpu}{' each' * (hosts > 1)}{assumed}\n{tokens:,.0f} tokens in the pool{whence}"
        )
        for item in found:
            _print(item, cluster.memory)
    return 0 if all(item.fits for item in found) else 2


def _named(name: str, gib: float, known: Mapping[str, tuple[float, float, float]]) -> str | None:
    """The known GPU that a device's name and memory are of; None for none or another."""
    for gpu, (_, memory, _) in known.items():
        family = gpu.partition("-")[0]
        if re.search(rf"\b{family}\b", name) and abs(gib - memory) < 0.2 * memory:
            return gpu
    return None


def _cluster(args: argparse.Namespace, gpus: int) -> tuple[int, int]:
    if args.hosts:
        hosts = read_hostfile(args.hosts)
        return len(hosts), max(host.slots for host in hosts)
    if args.cluster is None:
        return 1, gpus
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.cluster)
    if not found:
        raise UserError(f"--cluster: wanted HOSTSxGPUS, e.g. 4x8; found {args.cluster!r}")
    return int(found[1]), int(found[2])


def _pool_tokens(config: Config) -> tuple[float, str]:
    """Tokens of the pool, and how they are known: prepared, by its files' bytes, or not at all."""
    record = Path(config.run_dir) / "prepared/prepared.json"
    try:
        return float(json.loads(record.read_text())["sets"]["pool"]["num_tokens"]), ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    places = [Path(source) for source in config.data.train]
    files = [
        file for place in places for file in ([place] if place.is_file() else place.rglob("*"))
    ]
    bytes_ = sum(file.stat().st_size for file in files if file.is_file())
    if not bytes_:
        return 1e9, ", assumed: its rows are not here (--tokens)"
    return bytes_ / 4, ", by the bytes of its files over 4; exact once it is prepared"


def _print(item: Any, budget: float) -> None:
    from grads_ds.plan.stage_time import duration

    gib = {key: value / 2**30 for key, value in asdict(item.memory).items()}
    parts = ", ".join(
        f"{key} {value:.1f}" for key, value in gib.items() if key != "host" and value >= 0.05
    )
    total = item.memory.device / 2**30
    print(
        f"\n{item.stage}: {'fits' if item.fits else 'DOES NOT FIT'}: {total:.1f} of"
        f" {budget / 2**30:.0f} GiB a GPU ({parts})"
    )
    if gib["host"]:
        print(f"  host memory {gib['host']:.0f} GiB a host")
    again = f", {item.recomputed} layers computed again" if item.recomputed else ""
    print(
        f"  micro-batch {item.micro_batch} x {item.micro_batches} accumulation steps{again};"
        f" parameters over {item.shards} ranks"
    )
    step = item.traffic.step(item.micro_batches) / 1e9
    between = item.traffic.between_step(item.micro_batches) / 1e9
    print(
        f"  {step:.1f} GB received by a rank in one step, {between:.1f} GB of them over a host's"
        " links"
    )
    reached = f", {item.share_of_peak:.0%} of the GPU's peak" if item.share_of_peak else ""
    print(
        f"  {item.tokens_per_second:,.0f} tokens/s, {duration(3600 * item.hours)}; bound by"
        f" {'' if item.binds == 'arithmetic' else 'the '}{item.binds}{reached}"
    )
    for line in item.advice:
        print(f"  -> {line}")
