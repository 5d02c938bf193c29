"""Section `evaluate`: held-out losses and tasks."""

from __future__ import annotations

from pydantic import Field

from grads_ds.config.record import Record


class LmEvalConfig(Record):
    """Tasks of lm-evaluation-harness (the extra `eval`)."""

    tasks: list[str] = Field(
        min_length=1, description="task or group names, as the harness has them"
    )
    include_path: str | None = Field(
        None, description="folder of task files; with it only those are known, offline"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; null: as the task says"
    )
    limit: int | None = Field(
        None, ge=1, description="only so many questions per task, for a trial"
    )


class EvaluateConfig(Record):
    """Judging the base model and every trained one on the held-out sets."""

    tokens_per_microbatch: int = Field(
        16384, ge=8, description="tokens of one micro-batch per rank, padding included"
    )
    bootstrap: int = Field(1000, ge=10, description="resamples behind each confidence interval")
    multiple_choice: dict[str, str] = Field(
        default_factory=dict,
        description="JSONL files by name: question, choices, answer (index); judged by likelihood",
    )
    exact_match: dict[str, str] = Field(
        default_factory=dict,
        description="JSONL files by name: prompt, answer; judged by greedy generation",
    )
    lm_eval: LmEvalConfig | None = Field(None, description="tasks of lm-evaluation-harness")
    chat: bool = Field(False, description="put the tasks' questions through the chat template")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer, in tokens")
    generation_batch: int = Field(8, ge=1, description="prompts a rank answers at once")
