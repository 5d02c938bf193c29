"""Section `evaluate`: held-out losses, tasks, what was forgotten and how much of it is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from grads_ds.config.errors import nearest
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


class RetentionConfig(Record):
    """What of the base model's own behaviour a trained model keeps (docs/forgetting.md)."""

    prompts: int = Field(
        256, ge=4, description="general prompts that the base model answers itself, at most"
    )
    new_tokens: int = Field(64, ge=1, description="longest of its answers, in tokens")
    max_cost: float = Field(
        0.2,
        gt=0,
        description=(
            "largest work of these measures over that of the held-out losses; prompts and"
            " positions are thinned to fit"
        ),
    )


# what max_forgetting can limit, beside a task; the first two need evaluate.retention
KL, OWN_LOSS, LOSS = "kl", "own_loss", "loss"


def set_roles(sets: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the held-out sets that should improve, those that must not be forgotten), by their names:
    `domain` and `general`, else what begins so, else the first set and all others.
    """

    def named(names: Sequence[str], word: str) -> list[str]:
        return [s for s in names if s == word] or [s for s in names if s.startswith(word)]

    domain = named(sets, "domain") or list(sets[:1])
    rest = [s for s in sets if s not in domain]
    return domain, named(rest, "general") or rest


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
    retention: RetentionConfig | None = Field(
        None, description="also measure what of the base model is kept; null: held-out losses alone"
    )
    interpolate: list[float] = Field(
        default_factory=list,
        description=(
            "also evaluate base + a (trained - base) at these a, within 0 and 1, of every trained"
            " model but the frontier's"
        ),
    )
    max_forgetting: float | None = Field(
        None,
        ge=0,
        description=(
            "publish best/model: the model of the largest gain whose forgetting stays within this;"
            " null publishes none"
        ),
    )
    forgetting: str = Field(
        KL,
        description=(
            "what max_forgetting limits: kl or own_loss (nats per token, on the base model's own"
            " answers), loss (nats, on the general sets), or a name of multiple_choice (per cent)"
        ),
    )

    @field_validator("interpolate")
    @classmethod
    def _between(cls, value: list[float]) -> list[float]:
        if wrong := [a for a in value if not 0 < a < 1]:
            raise ValueError(f"wanted numbers above 0 and below 1; found {wrong[0]:g}")
        return sorted(set(value))


def forgetting_problems(settings: EvaluateConfig, sets: Sequence[str]) -> list[str]:
    """What `retention` and `max_forgetting` want of the held-out `sets` and lack."""
    problems = []
    domain, general = set_roles(sets)
    if settings.retention is not None and not general:
        problems.append(
            "evaluate.retention: wanted a general set in data.validation, whose prompts the base"
            f" model answers; found {list(sets) or 'none'}; add general: ..."
        )
    if settings.max_forgetting is None:
        return problems
    where = "evaluate.max_forgetting"
    if not domain or not general:
        problems.append(
            f"{where}: wanted a domain and a general set in data.validation; found"
            f" {list(sets) or 'none'}; add them"
        )
    known = [KL, OWN_LOSS, LOSS, *settings.multiple_choice]
    if settings.forgetting not in known:
        problems.append(
            f"evaluate.forgetting: {settings.forgetting!r} is none of"
            f" {', '.join(known)}{nearest(settings.forgetting, known)}"
        )
    if settings.forgetting in (KL, OWN_LOSS) and settings.retention is None:
        problems.append(
            f"{where}: wanted evaluate.retention, which measures {settings.forgetting}; found null;"
            " set retention: {} or another evaluate.forgetting"
        )
    return problems
