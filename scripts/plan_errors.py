"""What `grads-ds plan` predicts against what this project's own stages take: memory at the peak of
a step, bytes on the wire.

    python scripts/plan_errors.py [--only WORDS] [--output docs/plan_errors.json]
    python scripts/plan_errors.py --times           adds the times of a few cases to the output, as
                                                    far as they can be told here

Every case trains (grads_ds/training/train.py) or records (grads_ds/engine/frozen_pass.py) a random
Llama for a few steps on 1 or 2 ranks (gloo, CPU) and counts the bytes of all tensors alive, at
most, within one step of the rank that needs most, and what goes into its collectives. Prints
predicted, measured and the error of each; ends with status 1 if one is off by 10 % or more. About
ten minutes on two cores. `--times` runs on one rank without counting, in processor time: a step (or
micro-batch) against what the rate that grads_ds/plan/calibrate.py finds in the same process
predicts. No limit stands on these.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
LIMIT = 0.10
# arguments of each collective: (where its whole tensor stands, how often (N-1)/N of it passes a
# rank)
COLLECTIVES = {
    "all_gather_into_tensor": (0, "output_tensor", 1),
    "reduce_scatter_tensor": (1, "input", 1),
    "all_reduce": (0, "tensor", 2),
    "all_to_all_single": (1, "input", 1),
}
SMALL_LIMITS = {
    "reduce_bucket_size": 2_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 4_000_000,
    "stage3_max_reuse_distance": 0,
}


@dataclass(frozen=True)
class Case:
    """`what`: sft or probe. `zero`: settings of zero_optimization.

    `config`: dotted settings of the configuration.
    """

    what: str
    ranks: int
    zero: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        """In words."""
        extra = [f"{key.split('.')[-1]} {value}" for key, value in self.config.items()] + (
            [self.note] if self.note else []
        )
        return ", ".join([self.what, f"stage {self.zero['stage']}", f"{self.ranks} ranks", *extra])


def stage(number: int, **limits: Any) -> dict[str, Any]:
    """Settings of ZeRO; stage 3's limits in proportion to so small a model, unless others are
    given.
    """
    defaults = SMALL_LIMITS if number == 3 else {"reduce_bucket_size": 2_000_000}
    return {"stage": number, "overlap_comm": False, **defaults, **limits}


CHECKPOINTED = {"sft.gradient_checkpointing": True}
LORA = {"model.lora": {"r": 8}}
CASES = [
    *(
        Case("sft", ranks, stage(number), kept)
        for number in (2, 3)
        for ranks in (1, 2)
        for kept in ({}, CHECKPOINTED)
    ),
    *(Case("sft", ranks, stage(number), LORA) for number in (2, 3) for ranks in (1, 2)),
    Case("sft", 2, stage(3), LORA | CHECKPOINTED),
    Case("sft", 2, stage(3), {"model.dtype": "bfloat16"}),
    Case("sft", 2, stage(2), {"model.dtype": "bfloat16"}),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000),
        note="reuse 40 % of the model, live 15 %",
    ),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        note="reuse 40 % of the model, live all",
    ),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        CHECKPOINTED,
        note="reuse 40 % of the model, live all",
    ),
    Case(
        "sft",
        2,
        stage(
            3,
            stage3_max_reuse_distance=10**9,
            stage3_max_live_parameters=10**9,
            stage3_prefetch_bucket_size=10**9,
        ),
        note="no limits",
    ),
    Case("sft", 2, stage(3), {"sft.sequence_parallel": 2}),
    Case("sft", 2, stage(3), {"sft.sequence_parallel": 2} | CHECKPOINTED),
    *(Case("probe", ranks, stage(number)) for number in (2, 3) for ranks in (1, 2)),
    Case("probe", 2, stage(3), {"probe.layers": "all"}),
    Case("probe", 2, stage(3), {"model.dtype": "bfloat16"}),
    Case(
        "probe",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        note="reuse 40 %, live all",
    ),
    Case("probe", 2, stage(3), {"probe.extras": ["anchor"], "probe.anchor": "general"}),
    Case(
        "probe",
        1,
        stage(2),
        {"probe.extras": ["anchor"], "probe.anchor": "general", "probe.layers": "all"},
    ),
]


@dataclass(frozen=True)
class Size:
    """The model, and the rows."""

    layers: int = 6
    width: int = 512
    vocabulary: int = 6000
    length: int = 256
    micro: int = 2


def make(folder: Path, case: Case, size: Size) -> Path:
    """Write model, rows and configuration for `case` into `folder`; the configuration's path."""
    import torch
    import yaml
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=8 * size.width // 3 // 64 * 64,
            num_hidden_layers=size.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
        )
    )
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": ["rows"], "validation": {"general": "rows"}, "max_length": size.length},
        "sft": {
            "batch_size": 2 * size.micro * case.ranks,
            "micro_batch_size": size.micro,
            "epochs": 1,
        },
        "probe": {"epochs": 0, "tokens_per_microbatch": size.micro * size.length},
        "select": {"budget": 1.0},
        "deepspeed": str(folder / "zero.json"),
    }
    for key, value in case.config.items():
        section, name = key.split(".")
        tree[section][name] = value
    model.to(getattr(torch, tree["model"]["dtype"])).save_pretrained(folder / "model")
    vocabulary = {f"w{i}": i for i in range(size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1"
    ).save_pretrained(folder / "model")
    settings = {
        "zero_optimization": case.zero,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (folder / "zero.json").write_text(json.dumps(settings))
    ids = torch.randint(2, size.vocabulary, (8 * size.micro * case.ranks, size.length)).tolist()
    rows = [
        {"sample_id": i, "input_ids": row, "labels": row, "sample_hash": str(i)}
        for i, row in enumerate(ids)
    ]
    for name in ("pool", "general"):
        Dataset.from_list(rows).save_to_disk(str(folder / "run/prepared" / name))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def rank(folder: Path) -> None:
    """One rank of a case: run it, write what it took to `folder`/rank<N>.json."""
    import torch.distributed as dist

    moved = {"bytes": 0.0}

    def counted(original: Any, place: int, keyword: str, times: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs[keyword] if keyword in kwargs else args[place]
            count = dist.get_world_size(kwargs.get("group"))
            moved["bytes"] += whole.numel() * whole.element_size() * times * (count - 1) / count
            return original(*args, **kwargs)

        return call

    for name, (place, keyword, times) in COLLECTIVES.items():  # before DeepSpeed looks them up
        setattr(dist, name, counted(getattr(dist, name), place, keyword, times))

    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.plan.live_bytes import LiveBytes

    ranks.start()
    config = load_config(folder / "config.yaml")
    counter = LiveBytes("cpu")
    timed = (folder / "timed").exists()
    rate = 0.0
    if timed:
        import torch

        from grads_ds.plan.calibrate import calibrate
        from grads_ds.plan.shapes import model_config

        rows = config.sft.micro_batch_size
        rate = calibrate(
            model_config(config.model.path),
            torch.float32,
            rows,
            config.data.max_length,
            time.process_time,
        )
    with contextlib.nullcontext() if timed else counter:
        found = (_train if (folder / "sft").exists() else _record)(config, folder, counter, moved)
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(found | {"rate": rate}))
    ranks.barrier()
    ranks.finish()
    sys.stdout.flush()
    os._exit(0)


def _train(config: Any, folder: Path, counter: Any, moved: dict[str, float]) -> dict[str, float]:
    from datasets import load_from_disk
    from transformers import TrainerCallback

    from grads_ds.training.train import TrainingJob, train_model

    seen: dict[str, float] = {}

    class Window(TrainerCallback):
        """The third step: the second still allocates, and DeepSpeed learns the modules' order in
        the first two.
        """

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counter.peak, moved["bytes"] = counter.now, 0.0
            self.began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spent = time.process_time() - self.began
            seen.update(
                peak=counter.peak,
                bytes=moved["bytes"],
                seconds=min(spent, seen.get("seconds", spent)),
            )

    rows = load_from_disk(str(folder / "run/prepared/pool")).select_columns(["input_ids", "labels"])
    train_model(
        TrainingJob(
            config,
            config.sft,
            rows,
            config.model.path,
            folder / "out",
            folder / "work",
            folder / "logs",
            3,
            "sft",
            callbacks=[Window()],
            sequence=config.sft.sequence_parallel,
            identity="test",
        )
    )
    return seen


def _record(config: Any, folder: Path, counter: Any, moved: dict[str, float]) -> dict[str, float]:
    from functools import partial

    from datasets import load_from_disk

    from grads_ds.data.batches import plan_batches
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import lengths_of, score_plan
    from grads_ds.probe.extra_columns import ExtraColumns

    pool = load_from_disk(str(folder / "run/prepared/pool"))
    lengths = lengths_of(pool)
    plan = plan_batches(lengths, ranks.world(), config.probe.tokens_per_microbatch, config.seed)
    beside = partial(ExtraColumns, config, folder / "run", "key") if config.probe.extras else None
    found: list[dict[str, float]] = []
    began = time.process_time()
    for _ in score_plan(
        config,
        config.model.path,
        pool,
        plan,
        lengths,
        config.probe.layers,
        "mean",
        "probe",
        None,
        beside,
    ):
        now = time.process_time()
        found.append({"peak": counter.peak, "bytes": moved["bytes"], "seconds": now - began})
        began = now
        counter.peak, moved["bytes"] = counter.now, 0.0
    # the first peak holds the anchor's gradient being taken, or else the loading of the model
    found[-1]["seconds"] = min(f["seconds"] for f in found)
    return found[-1] | ({"peak": max(f["peak"] for f in found)} if config.probe.extras else {})


def measured(case: Case, folder: Path) -> dict[str, float]:
    """Run `case`, made in `folder`; what its heaviest rank took."""
    if case.what == "sft":
        (folder / "sft").touch()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={case.ranks}",
    ]
    command += [str(Path(__file__).resolve()), "--rank", str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    files = sorted(folder.glob("rank*.json"))
    if len(files) != case.ranks:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-6000:])
    each = [json.loads(file.read_text()) for file in files]
    return {key: max(found[key] for found in each) for key in each[0]}


def predicted(case: Case, config_file: Path, rate: float = 1e12) -> dict[str, float]:
    """What the plan says of the same configuration, on ranks that compute at `rate`."""
    from grads_ds.config.load import load_config
    from grads_ds.plan.forecast import Cluster, forecasts
    from grads_ds.plan.shapes import model_config

    config = load_config(config_file)
    cluster = Cluster(1, case.ranks, 2.0**40, rate, 1e9)
    found = {
        item.stage: item
        for item in forecasts(config, model_config(config.model.path), cluster, 1e6)
    }
    item = found["sft" if case.what == "sft" else "recording"]
    step = {"peak": item.memory.device, "bytes": item.traffic.step(item.micro_batches)}
    return step | {"seconds": item.seconds_per_step}


def compare(case: Case, size: Size) -> list[dict[str, Any]]:
    """One line for memory and one for traffic: predicted, measured, error in percent."""
    with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
        config_file = make(Path(name), case, size)
        said, found = predicted(case, config_file), measured(case, Path(name))
    lines = []
    for what, label in (("peak", "bytes of memory"), ("bytes", "bytes received")):
        if not found[what] and not said[what]:
            continue
        error = 100 * (said[what] / found[what] - 1) if found[what] else float("inf")
        line = {
            "case": case.name,
            "what": label,
            "predicted": round(said[what]),
            "measured": round(found[what]),
            "error %": round(error, 1),
        }
        print(
            f"{case.name}: {label}: predicted {said[what]:,.0f}, measured {found[what]:,.0f},"
            f" {error:+.1f} %",
            flush=True,
        )
        lines.append(line)
    return lines


def times(size: Size) -> list[dict[str, Any]]:
    """Processor seconds of a step on one rank, predicted from the rate that its own process
    reached.
    """
    lines = []
    for case in CASES:
        if case.ranks > 1 or case.zero["stage"] < 3 or case.config not in ({}, CHECKPOINTED):
            continue
        with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
            config_file = make(Path(name), case, size)
            Path(name, "timed").touch()
            found = measured(case, Path(name))
            said = predicted(case, config_file, found["rate"])
        error = round(100 * (said["seconds"] / found["seconds"] - 1), 1)
        lines.append(
            {
                "case": case.name,
                "predicted": round(said["seconds"], 3),
                "measured": round(found["seconds"], 3),
                "error %": error,
            }
        )
        print(f"{case.name}: seconds of a step: {lines[-1]}", flush=True)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """As Markdown, in megabytes: the table of docs/planning.md."""
    rows = [
        "| case | memory: predicted | measured | error | received: predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(line["case"] for line in lines):
        cells = [case]
        for what in ("bytes of memory", "bytes received"):
            found = next(
                (line for line in lines if (line["case"], line["what"]) == (case, what)), None
            )
            cells += (
                ["", "", ""]
                if found is None
                else [
                    f"{found['predicted'] / 1e6:.1f}",
                    f"{found['measured'] / 1e6:.1f}",
                    f"{found['error %']:+.1f} %",
                ]
            )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--predict", action="store_true", help="say what is predicted and measure nothing"
    )
    parser.add_argument(
        "--times", action="store_true", help="measure times alone, and put them into the output"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        rank(options.rank)
        return 0
    size = Size()
    if options.predict:
        for case in CASES:
            if options.only in case.name:
                with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
                    print(case.name, predicted(case, make(Path(name), case, size)))
        return 0
    if options.times:
        found = times(size)
        if options.output:
            options.output.write_text(
                json.dumps(json.loads(options.output.read_text()) | {"times": found}, indent=1)
                + "\n"
            )
        return 0
    lines = [line for case in CASES if options.only in case.name for line in compare(case, size)]
    worst = max(abs(line["error %"]) for line in lines)
    print(f"{len(lines)} comparisons, the worst {worst:.1f} % off")
    if options.output:
        import deepspeed
        import torch

        about = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        options.output.write_text(
            json.dumps(about | {"model": vars(size), "comparisons": lines}, indent=1) + "\n"
        )
    return 1 if worst >= 100 * LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
