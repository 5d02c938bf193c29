"""Records every sample's gradient norms in a plain TRL training run: an example of
GradNormCallback, to copy from.

    python scripts/examples/trainer_callback.py MODEL_FOLDER CHATS.jsonl OUT_FOLDER

Reads a Hugging Face model folder and chats ({"messages": [...]} a line); trains one epoch with
trl.SFTTrainer (`pip install trl`), on several ranks where torchrun, accelerate or deepspeed start
it; writes OUT_FOLDER/scores/table.parquet and prints the table's two ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grads_ds import GradNormCallback
from grads_ds.distributed import ranks


def main(model: str, chats: str, out: str) -> None:
    """Train and record."""
    rows = load_dataset("json", data_files=chats, split="train")
    arguments = trl.SFTConfig(
        output_dir=str(Path(out, "trainer")),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        assistant_only_loss=True,
        max_length=None,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[GradNormCallback(Path(out, "scores"), rows)],  # the one line that records
    )
    trainer.train()
    if ranks.is_main():
        table = pq.read_table(Path(out, "scores/table.parquet")).sort_by("lm_head_grad_norm")
        for row in [
            *table.slice(0, 3).to_pylist(),
            *table.slice(max(3, len(table) - 3)).to_pylist(),
        ]:
            norms = ", ".join(
                f"{name[:-10]} {row[name]:.3f}" for name in row if name.endswith("_grad_norm")
            )
            print(
                f"sample {row['sample_id']}: {norms}, loss {row['loss']:.2f},"
                f" {row['num_target_tokens']} targets"
            )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
