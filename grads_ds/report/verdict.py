"""The evaluation in words: was selecting worth it, against the base model, the full pool and
random? Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grads_ds.report.outcome import Difference, Measure, Model, Outcome
from grads_ds.run_dir.layout import MAIN


@dataclass(frozen=True)
class Sentence:
    """One statement of the verdict; tone is good, bad or even."""

    text: str
    tone: str


def verdict(outcome: Outcome, prepared: dict[str, Any] | None = None) -> list[Sentence]:
    """What the main selection's numbers say, the unwelcome ones as plainly as the others.

    `prepared` is the run's prepared.json: what it says of held-out rows in the pool comes last.
    """
    return _judged(outcome) + _leaks(outcome, prepared or {})


def _leaks(outcome: Outcome, prepared: dict[str, Any]) -> list[Sentence]:
    """Held-out sets whose loss says less about new text, as the pool holds rows of theirs."""
    said = []
    for name in outcome.sets:
        counts = prepared.get("sets", {}).get(name, {})
        same, near = counts.get("also_in_pool", 0), counts.get("near_in_pool", 0)
        if same or near:
            share = (same + near) / max(1, counts.get("kept", 0))
            said.append(
                Sentence(
                    f"The loss on {name} is worth less than it looks: {share:.1%} of its rows are"
                    f" in the pool too ({same:,} token for token, {near:,} nearly), so that"
                    " training on the pool is in part training on them.",
                    "bad",
                )
            )
    return said


def _judged(outcome: Outcome) -> list[Sentence]:
    chosen, base = outcome.model(MAIN), outcome.model("base")
    if chosen is None or base is None or not outcome.sets:
        return [
            Sentence(
                "The selected subset or the base model was not evaluated: there is no verdict.",
                "even",
            )
        ]
    full = outcome.model("full")
    said = []
    for name in outcome.domain:
        own = chosen.measures.get(name)
        if own is None or own.against_base is None:
            continue
        gap = own.against_base
        said.append(
            Sentence(
                f"On {name}, training on the {chosen.trained_on:,} selected samples "
                f"{_moved(gap.value)} the loss from "
                f"{base.measures[name].loss:.4f} (base) to {own.loss:.4f}{_sure(gap)}.",
                gap.tone,
            )
        )
        if full is not None and name in full.measures:
            other = full.measures[name].loss
            rest = own.loss - other
            said.append(
                Sentence(
                    f"The full pool ({full.trained_on:,} samples) reaches {other:.4f}: the"
                    " subset is "
                    + (
                        f"{abs(rest):.4f} {'better' if rest < 0 else 'worse'}"
                        if round(rest, 4)
                        else "level with it"
                    )
                    + ".",
                    "good" if rest <= 0 else "bad",
                )
            )
        said.append(_random_sentence(outcome, chosen, name, own))
        said += _others(outcome, name)
    for name in outcome.general:
        own = chosen.measures.get(name)
        if own is None or own.against_base is None:
            continue
        gap = own.against_base
        others = [(full, "full pool")] + [
            (outcome.model(r), f"random ({r})") for r in chosen.randoms
        ]
        compared = ", ".join(
            f"{label} {m.measures[name].against_base.value:+.4f}"  # type: ignore[union-attr]
            for m, label in others
            if m is not None and name in m.measures and m.measures[name].against_base is not None
        )
        what = "that much was forgotten" if gap.tone == "bad" else "within chance"
        what = "nothing was forgotten" if gap.value <= 0 else what
        said.append(
            Sentence(
                f"On {name}, the loss changed by {gap.value:+.4f} from the base's "
                f"{base.measures[name].loss:.4f}{_sure(gap)}: {what}."
                + (f" For comparison: {compared}." if compared else ""),
                gap.tone,
            )
        )
    return said


def _random_sentence(outcome: Outcome, chosen: Model, name: str, own: Measure) -> Sentence:
    gap = own.against_random
    if gap is None:
        return Sentence(
            f"No random subset of {chosen.trained_on:,} samples was trained: "
            "whether the selection is better than chance is not "
            "known. Add a variant with method random to select.variants and sft.variants.",
            "even",
        )
    draws = len(chosen.randoms)
    reach = np.mean(
        [
            m.measures[name].loss
            for r in chosen.randoms
            if (m := outcome.model(r)) is not None and name in m.measures
        ]
    )
    who = (
        f"A random subset of the same size reaches {reach:.4f}"
        if draws == 1
        else (f"{draws} random subsets of the same size reach {reach:.4f} on average")
    )
    if gap.tone == "good":
        text = f"{who}: selection beat random by {-gap.value:.4f}{_sure(gap)}."
    elif gap.value < 0:
        lead = f"its lead of {-gap.value:.4f} is within chance{_sure(gap)}"
        text = f"{who}: selection did not clearly beat random, {lead}."
    elif round(gap.value, 4) == 0:
        text = f"{who}: selection did not beat random, they are level{_sure(gap)}."
    else:
        text = f"{who}: selection did not beat random, it is {gap.value:.4f} worse{_sure(gap)}."
    if draws == 1:
        text += " This is one random draw; another may fall differently."
    return Sentence(text, gap.tone)


def _others(outcome: Outcome, name: str) -> list[Sentence]:
    """Each other subset against random of its size, in a line."""
    said = []
    for model in outcome.models:
        found = model.measures.get(name)
        if model.name == MAIN or found is None or found.against_random is None:
            continue
        gap = found.against_random
        word = {
            "good": "beat random",
            "bad": "did not beat random",
            "even": "did not clearly beat random",
        }[gap.tone]
        text = (
            f"{model.name} ({model.trained_on:,} samples) {word} of its size:"
            f" {gap.value:+.4f}{_sure(gap)}."
        )
        said.append(Sentence(text, gap.tone))
    return said


def _moved(gap: float) -> str:
    return "lowered" if gap < 0 else "raised" if gap > 0 else "left"


def _sure(gap: Difference) -> str:
    return (
        f" (95 % interval {gap.interval[0]:+.4f} to {gap.interval[1]:+.4f})" if gap.interval else ""
    )
