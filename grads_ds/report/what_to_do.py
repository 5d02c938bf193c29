"""What to do, in plain words and with its numbers: train on all of it, a random part is as good,
this subset, stop earlier. Pure.

With a limit to forgetting the advice is what the limit chose. Without one it follows from paired
intervals (95 %, the same held-out rows redrawn for both models): the whole pool when it gains more
than the subset and forgets no more; the subset when it gains more than random rows of its number,
or forgets less than random at the same gain; random rows otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grads_ds.evaluate.candidates import Candidate, Rows
from grads_ds.report.forgetting import Forgetting
from grads_ds.report.outcome import same_size
from grads_ds.run_dir.layout import MAIN
from grads_ds.statistics import bootstrap_interval

PORTIONS = {0.5: "half", 1 / 3: "third", 0.25: "quarter", 0.1: "tenth", 0.05: "twentieth"}


@dataclass(frozen=True)
class Advice:
    """headline: what to do; tone: good, bad or even; reasons: sentences with the numbers."""

    headline: str
    tone: str
    reasons: list[str]


@dataclass(frozen=True)
class Gap:
    """One model's mean less another's, and its paired 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f})"


def advice(found: Forgetting) -> Advice:
    """What the run's numbers say."""
    if found.choice is not None:
        return _within_limit(found, found.choice)
    return _without_limit(found)


def _within_limit(found: Forgetting, choice: dict[str, Any]) -> Advice:
    what, unit, limit = choice["what"], choice["unit"], choice["limit"]
    chosen, largest = choice["chosen"], choice["unlimited"]
    if chosen is None:
        nearest = min(
            choice["candidates"], key=lambda c: float("inf") if c["bound"] is None else c["bound"]
        )
        return Advice(
            "Nothing fits: no model is published.",
            "bad",
            [
                f"No model that has learned keeps forgetting ({what}) within {limit:g} {unit}."
                f" Nearest is {nearest['name']}: {_told(nearest['forgetting'])}, at most"
                f" {_told(nearest['bound'])} on other prompts, gain {nearest['gain']:+.4f} nats.",
                f"Without the limit, {largest['name']} gains {largest['gain']:+.4f} nats at a"
                f" forgetting of {_told(largest['forgetting'])}.",
            ],
        )
    audit, cost = choice["audit"], choice["cost_in_gain"]
    low, high = audit["ci95"]
    kept = "the promise holds there" if audit["within"] else "the promise is broken there"
    reasons = [
        f"{chosen['name']} gains most, {chosen['gain']:+.4f} nats, of the models whose forgetting"
        f" ({what}) stays within {limit:g} {unit}: {chosen['forgetting']:.4f}, at most"
        f" {chosen['bound']:.4f} on other prompts. It is published as best/model.",
        f"On the audit half, {audit['rows']:,} prompts that took no part in the choice, it forgets"
        f" {audit['forgetting']:.4f} (95 % interval {low:.4f} to {high:.4f}): {kept}.",
    ]
    if largest["name"] == chosen["name"]:
        reasons.append("The limit costs nothing: no model gains more.")
    else:
        low, high = cost["ci95"]
        reasons.append(
            f"The limit costs {cost['value']:.4f} nats of gain (95 % interval {low:.4f} to"
            f" {high:.4f}): without it, {largest['name']} gains {largest['gain']:+.4f} at a"
            f" forgetting of {_told(largest['forgetting'])}."
        )
    model = found.candidates.model(chosen["name"])
    if model is None:  # of another evaluation
        return Advice(f"Take {chosen['name']}.", "good" if audit["within"] else "bad", reasons)
    reasons += _to_random(found, model)
    return Advice(_headline(found, model), "good" if audit["within"] else "bad", reasons)


def _headline(found: Forgetting, model: Candidate) -> str:
    return {
        "full": "Train on all of it.",
        "random": f"Train on a random {_portion(found, model)}.",
        "subset": f"Train on this subset: {model.name}.",
        "checkpoint": f"Stop earlier: {model.name}.",
        "interpolation": f"Go part of the way: {model.name}, a merge of the base model and"
        f" {model.of}.",
    }[model.kind]


def _without_limit(found: Forgetting) -> Advice:
    models = found.candidates.models
    best = max(models, key=lambda model: model.gain.mean)
    if best.gain.mean <= 0:
        return Advice(
            "Train on none of it.",
            "bad",
            [f"No model learned the domain: the best, {best.name}, gains {best.gain.mean:+.4f}."],
        )
    main, full = found.candidates.model(MAIN), found.candidates.model("full")
    if main is None:
        return Advice(_headline(found, best), "even", [_numbers(found, best)])
    reasons = [_numbers(found, main)]
    more = None
    if full is not None:
        more = _gap(found, full.gain, main.gain)
        lost = _gap(found, full.forgetting, main.forgetting)
        reasons.append(
            f"{_numbers(found, full)} Against the subset: gain {more}, forgetting {lost}."
        )
        if more.low > 0 and lost.low <= 0:
            return Advice("Train on all of it.", "even", reasons + _to_random(found, main))
    earlier = _earlier(found, main)
    random = _random_like(found, main)
    if random is None:
        headline = "Train on this subset, or on random rows: no random subset of its size tells."
        verdict = Advice(headline, "even", reasons + _to_random(found, main))
    else:
        ahead = _gap(found, main.gain, random.gain)
        reasons.append(f"{_numbers(found, random)} Gain of the subset against it: {ahead}.")
        line = found.frontier.excess[MAIN] if found.frontier is not None else None
        less = line is not None and line.interval is not None and line.interval[1] < 0
        reasons += _to_random(found, main)
        if less or (ahead.low > 0 and not _forgets_more(found, main, random)):
            verdict = Advice("Train on this subset.", "good", reasons)
        else:
            headline = f"A random {_portion(found, random)} is as good."
            verdict = Advice(headline, "even", reasons)
    if more is not None and more.low > 0:
        reasons.append("All of it gains more still, and forgets more: set evaluate.max_forgetting.")
    if earlier is not None:
        reasons.insert(0, _numbers(found, earlier))
        return Advice(_headline(found, earlier), "good", reasons)
    return verdict


def _earlier(found: Forgetting, main: Candidate) -> Candidate | None:
    """A checkpoint of the main model that gains no less, within chance, and forgets less beyond
    it; of several the one that forgets least.
    """
    fitting = [
        model
        for model in found.candidates.models
        if model.kind == "checkpoint"
        and model.of == main.name
        and _gap(found, model.gain, main.gain).high >= 0
        and _gap(found, model.forgetting, main.forgetting).high < 0
    ]
    return min(fitting, key=lambda model: model.forgetting.mean, default=None)


def _random_like(found: Forgetting, main: Candidate) -> Candidate | None:
    models = found.candidates.models
    like = [m for m in models if m.kind == "random" and same_size(m.samples, main.samples)]
    return like[0] if like else None


def _forgets_more(found: Forgetting, one: Candidate, other: Candidate) -> bool:
    return _gap(found, one.forgetting, other.forgetting).low > 0


def _to_random(found: Forgetting, model: Candidate) -> list[str]:
    """The model against random's line at its own gain."""
    line = found.frontier
    if line is None or model.name not in line.excess:
        return []
    excess = line.excess[model.name]
    if excess.value is None:
        return [f"{model.name} gains more than every random subset: there is no line to compare."]
    sure = ""
    word = "as much as"
    if excess.interval is not None:
        low, high = excess.interval
        sure = f" (95 % interval {low:+.4f} to {high:+.4f})"
        word = "less than" if high < 0 else "more than" if low > 0 else "as much as, within chance,"
    return [
        f"At the same gain {model.name} forgets {word} random rows:"
        f" {excess.value:+.4f} {found.candidates.unit}{sure}."
    ]


def _numbers(found: Forgetting, model: Candidate) -> str:
    trained = f", trained on {model.samples:,} samples," if model.samples else ""
    return (
        f"{model.name}{trained} gains {model.gain.mean:+.4f} nats and forgets"
        f" {model.forgetting.mean:+.4f} {found.candidates.unit}."
    )


def _portion(found: Forgetting, model: Candidate) -> str:
    """A share of the pool in words; the number of samples where the pool was not trained on."""
    full = found.candidates.model("full")
    if full is None or not full.samples or not model.samples:
        return f"subset of {model.samples:,}" if model.samples else "subset"
    share = model.samples / full.samples
    word = next((w for s, w in PORTIONS.items() if abs(s - share) < 0.02 * s), None)
    return word or f"{100 * share:.3g} % of it"


def _gap(found: Forgetting, one: Rows, other: Rows) -> Gap:
    low, high = bootstrap_interval(
        one.values - other.values, found.resamples, found.seed, one.weights
    )
    return Gap(one.mean - other.mean, low, high)


def _told(value: float | None) -> str:
    """A number, or that the held-out rows are too few for one."""
    return "not known (too few prompts)" if value is None else f"{value:.4f}"
