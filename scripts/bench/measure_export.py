"""How much host memory the export of a ZeRO-3 model takes: shard by shard, beside a gather of all
of it at once.

    python scripts/bench/measure_export.py [--layers 12] [--width 512] [--shard-mb 8] [--output
    docs/results/measure_export.json]

Two ranks hold a random Llama on a ZeRO-3 engine. Growth is the peak of resident memory (VmHWM,
reset before each export) over what was resident when the export began. The ranks' allocator is told
to give freed tensors back at once (MALLOC_MMAP_THRESHOLD_): glibc otherwise keeps them for later,
here up to half a model's bytes, and resident memory would not be what is in use. Linux only. Writes
into a temporary folder, prints JSON and, with --output, writes it there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
RANKS, MB = 2, 2**20


def make(folder: Path, width: int, layers: int) -> int:
    """A random Llama with a tokenizer, a DeepSpeed file and a config; the bytes of its largest
    tensor.
    """
    import yaml
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero3.json"),
        "data": {"train": ["none"]},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return max(parameter.nbytes for parameter in model.parameters())


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def growth(export: Callable[[], Any]) -> int:
    """Bytes by which resident memory grew at most while `export` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = status("VmRSS")
    export()
    return status("VmHWM") - before


def whole(model: Any) -> None:
    """What an export that gathers everything holds on every rank, before it writes."""
    from grads_ds.engine.model import gathered_parameters

    with gathered_parameters(list(model.parameters())):
        pass


def rank(folder: Path, shard: int) -> None:
    """One rank: exports, gathers and leaves what it saw in a file of its own."""
    from grads_ds.config.load import load_config
    from grads_ds.data.tokenizer import load_tokenizer
    from grads_ds.distributed import ranks
    from grads_ds.engine import model_folder
    from grads_ds.engine.model import frozen_model

    ranks.start()
    config = load_config(folder / "config.yaml")
    load_tokenizer(config.model)  # with what it imports, which is not the export's
    model_folder.SHARD_BYTES = shard
    with frozen_model(config, config.model.path) as (model, _):
        ranks.barrier()
        found = {
            "export": growth(lambda: model_folder.save_model(model, config, folder / "exported"))
        }
        ranks.barrier()
        found["at once"] = growth(lambda: whole(model))
        ranks.barrier()
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(found))
    ranks.finish()
    sys.stdout.flush()
    os._exit(0)


def measure(width: int, layers: int, shard_mb: int) -> dict[str, Any]:
    """Megabytes of the model, of its largest tensor, of a shard, and by which each rank grew each
    way.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = make(folder, width, layers)
        variables = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MALLOC_MMAP_THRESHOLD_": "131072",
        }
        call = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={RANKS}",
        ]
        call += [str(Path(__file__).resolve()), "--rank", str(folder), "--shard-mb", str(shard_mb)]
        status = subprocess.run(call, env=os.environ | variables, stdout=sys.stderr).returncode
        if status:
            raise SystemExit(f"ranks ended with {status}")
        found = [json.loads((folder / f"rank{number}.json").read_text()) for number in range(RANKS)]
        files = sorted((folder / "exported").glob("*.safetensors"))
        return {
            "model_mb": round(sum(file.stat().st_size for file in files) / MB, 1),
            "largest_tensor_mb": round(largest / MB, 1),
            "shard_mb": shard_mb,
            "shards": len(files),
            "growth_mb": {
                way: [round(each[way] / MB, 1) for each in found] for way in ("export", "at once")
            },
        }


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--shard-mb", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.shard_mb * MB)
    found = json.dumps(measure(args.width, args.layers, args.shard_mb), indent=1)
    print(found)
    if args.output:
        args.output.write_text(found + "\n")


if __name__ == "__main__":
    main()
