"""The two trainers that scripts/bench/bench_sft.py times: this project and plain TRL.

Each trains a block of steps at a time, whenever it is asked to.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

RANKS = 2

TRAINING = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "micro_batch_size": 2,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.0,
}


def make(folder: Path, width: int, layers: int, vocabulary: int, rows: int, longest: int) -> int:
    """A random Llama with a tokenizer, rows of tokens of uneven lengths, a config and its DeepSpeed
    file; the number of parameters.
    """
    import torch
    import yaml
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=704 * width // 256,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    words = {f"w{n}": n for n in range(vocabulary - 2)} | {
        "<pad>": vocabulary - 2,
        "</s>": vocabulary - 1,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    ids = [
        draw.integers(0, vocabulary - 2, draw.integers(longest // 4, longest)).tolist()
        for _ in range(rows)
    ]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(str(folder / "rows"))
    (folder / "zero3.json").write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 3},
            }
        )
    )
    config = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero3.json"),
        "data": {"train": ["none"]},
        "sft": TRAINING,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return int(model.num_parameters())


# ---- the ranks -----------------------------------------------------------------------------------


def baton(folder: Path, block: int) -> Any:
    """A callback that trains `block` optimizer steps whenever it is asked to, and says what they
    took.
    """
    from transformers import TrainerCallback

    class Baton(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            port = int((folder / "port").read_text())
            self.line = socket.create_connection(("127.0.0.1", port)).makefile("rw")
            self.say({"side": os.environ["SIDE"]})

        def say(self, what: dict[str, Any]) -> None:
            self.line.write(json.dumps(what) + "\n")
            self.line.flush()

        def wait(self) -> None:
            assert self.line.readline() == "go\n"
            self.began, self.used = time.monotonic(), time.process_time()

        def done(self) -> None:
            self.say(
                {
                    "seconds": time.monotonic() - self.began,
                    "cpu_seconds": time.process_time() - self.used,
                }
            )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % block == 0:
                if state.global_step:
                    self.done()
                self.wait()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.done()
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.say({"losses": losses, "cpu_seconds_in_all": time.process_time()})

    return Baton()


def ours_rank(folder: Path, steps: int, block: int) -> None:
    """One rank of what `grads-ds sft` does."""
    from datasets import load_from_disk

    from grads_ds.config.load import load_config
    from grads_ds.distributed import heartbeat, ranks
    from grads_ds.training.train import TrainingJob, train_model

    heartbeat.start()
    ranks.start()
    config = load_config(folder / "config.yaml")
    rows = load_from_disk(str(folder / "rows"))
    train_model(
        TrainingJob(
            config,
            config.sft,
            rows,
            config.model.path,
            folder / "trained",
            folder / "work",
            folder / "tensorboard",
            steps,
            what="sft",
            callbacks=[baton(folder, block)],
            identity="bench",
        )
    )
    ranks.finish()


def trl_rank(folder: Path, steps: int, block: int) -> None:
    """One rank of a plain TRL script with the same settings."""
    import deepspeed
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from grads_ds.workarounds import skip_shared_memory_op

    # which nothing here uses, and a compiler would be needed
    skip_shared_memory_op(deepspeed)
    # on CPU the model is loaded before the trainer would do it
    deepspeed.init_distributed(verbose=False)
    micro = TRAINING["micro_batch_size"]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        max_steps=steps,
        warmup_steps=0,
        weight_decay=0.0,
        gradient_accumulation_steps=TRAINING["batch_size"] // RANKS // micro,
        learning_rate=TRAINING["learning_rate"],
        lr_scheduler_type=TRAINING["lr_scheduler"],
        max_grad_norm=1.0,
        deepspeed=str(folder / "zero3.json"),
        use_cpu=True,
        seed=0,
        data_seed=0,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        report_to=[],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    SFTTrainer(
        model=str(folder / "model"),
        args=arguments,
        train_dataset=load_from_disk(str(folder / "rows")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[baton(folder, block)],
    ).train()
