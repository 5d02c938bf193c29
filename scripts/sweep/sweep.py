"""Hold the recorder against one float64 backward per sample on every causal language model type of
transformers, scoring and training, padded right and left.

Reads nothing; writes docs/gradnorm-types.json and docs/gradnorm-types.md (a verdict per type). Run:
    python scripts/sweep/sweep.py [--seconds 60] [--types llama,mamba]
Types already in the JSON file are not repeated unless named. Each runs in a process of its own with
a time limit. Exit status 1 when any type is wrong or fails with an error that names no way out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(Path(__file__).parent)]
RESULTS, PAGE = REPO / "docs/gradnorm-types.json", REPO / "docs/gradnorm-types.md"
CASES = ("score right", "score left", "train right", "train left")
EXACT, ONE, REFUSED = "exact", "exact, one sample at a time", "refused"
LENGTHS, PROMPTS = [9, 7, 11], [3, 1, 4]


def verdicts(kind: str) -> dict[str, str]:
    """What the recorder does with this type, by case."""
    import torch

    torch.set_num_threads(1)
    from tiny_models import tiny_model

    from gradnorm import small_models

    try:
        model = tiny_model(kind)
        true, limit = None, 0.0
        found = {}
        for case in CASES:
            batch = small_models.make_batch(LENGTHS, PROMPTS, side=case.split()[1])
            batch["input_ids"].clamp_min_(3 * batch["attention_mask"])  # no special tokens
            batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
            if true is None:
                true, limit = _truth(model, batch)
            found[case] = _verdict(model, batch, case, true, limit)
    except Exception as error:  # the type, not the recorder
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return dict.fromkeys(CASES, f"not built: {why[:150]}")
    return found


def _truth(model: Any, batch: dict[str, Any]) -> tuple[Any, float]:
    """Norms by one float64 backward per sample, and how far a norm may be off: 2e-5, or four times
    what one float32 backward per sample is off by itself.
    """
    import torch

    from gradnorm import small_models
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.gradnorm.reference import reference_norms

    plan = GradNormRecorder(model, "all").plan
    try:
        true = reference_norms(model, plan, batch)
    except RuntimeError:  # its code makes tensors of the default precision
        torch.set_default_dtype(torch.float64)
        try:
            true = reference_norms(model, plan, batch)
        finally:
            torch.set_default_dtype(torch.float32)
    if not bool(true.loss.isfinite().all()):
        raise ValueError("its loss is not finite in float64: there is no truth to hold it against")
    rounded = reference_norms(model, plan, batch, dtype=torch.float32)
    return true, max(2e-5, 4 * max(small_models.worst(rounded, true).values()))


def _verdict(model: Any, batch: dict[str, Any], case: str, true: Any, limit: float) -> str:
    from gradnorm import small_models
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.gradnorm.measure.frozen import takes
    from grads_ds.gradnorm.scoring import one_sample

    without_cache = {"use_cache": False} if takes(model, "use_cache") else {}
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        alone = stack.enter_context(_noting(one_sample, "one_sample_norms"))
        if case.startswith("train"):
            try:
                model(**batch, **without_cache).loss.backward()
                model.zero_grad()
            except Exception as error:
                return f"not built: its own step fails: {type(error).__name__}: {error}"
            batch["labels"] = _labels_as_taken(model, {**batch, **without_cache})
        try:
            recorder = GradNormRecorder(model, "all")
            if case.startswith("score"):
                norms = recorder.score(batch)
            else:
                with recorder:
                    model(**batch, **without_cache).loss.backward()
                    norms = recorder.collect()
                model.zero_grad()
        except (ValueError, RuntimeError) as error:
            model.zero_grad()
            named = _raised_here(error)
            return f"{REFUSED}: {error}" if named else f"raw: {type(error).__name__}: {error}"
        except Exception as error:
            return f"raw: {type(error).__name__}: {error}"
    wrong = max(small_models.worst(norms, true).values())
    if not wrong < limit:
        return f"wrong: {wrong:.1e}, where {limit:.1e} is rounding"
    scorer = recorder.scorer
    return ONE if alone or scorer.row_by_row else EXACT


@contextlib.contextmanager
def _noting(place: Any, name: str) -> Iterator[list[str]]:
    """The list gets the name whenever the function of that name is called."""
    calls: list[str] = []
    original = getattr(place, name)
    setattr(place, name, lambda *args: calls.append(name) or original(*args))
    try:
        yield calls
    finally:
        setattr(place, name, original)


def _labels_as_taken(model: Any, given: dict[str, Any]) -> Any:
    """The labels such that the model's own loss is that of predicting the next token: moved to the
    left where it does not move them itself, as its users do.
    """
    import torch

    from grads_ds.gradnorm.trial.label_shift import takes_labels_unshifted

    if not takes_labels_unshifted(model, model.get_output_embeddings(), given):
        return given["labels"]
    return torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)


def _raised_here(error: BaseException) -> bool:
    """Whether the error is one of this package's own, with a message that says what to do."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "grads_ds/gradnorm" in last.filename and (last.line or "").startswith("raise ")


def _child(kind: str, pipe: Any) -> None:
    pipe.send(verdicts(kind))


def limited(kind: str, seconds: float) -> dict[str, str]:
    """`verdicts` in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return dict(ours.recv())
        return dict.fromkeys(CASES, f"not built: no answer in {seconds:g} s")
    except EOFError:
        return dict.fromkeys(CASES, "not built: the process died")
    finally:
        process.kill()
        process.join()


def write(results: dict[str, dict[str, str]]) -> None:
    """The JSON file and the page made of it."""
    from tiny_models import kinds

    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    lines = [
        "# Gradient norms by model type",
        "",
        "Made by `scripts/sweep/sweep.py`: every causal language model type of transformers, tiny",
        "and random, all layers, against one float64 backward per sample: 2e-5 relative, or four",
        "times what one float32 backward per sample is off by. Three samples of different lengths,",
        "padded right and left. Training steps have labels moved one to the left where the type's",
        "own loss does not move them (BART). `one`: exact, one sample at a time; `refused`: with a",
        "message that says why and what to do; `-`: no tiny model of the type was measured, for",
        "the reason below.",
        "",
        f"{len(results)} of {len(kinds())} types have been run.",
        "",
        "| | " + " | ".join(CASES) + " |",
        "| --- |" + " --- |" * len(CASES),
    ]
    for word in ("exact", "one", "refused", "wrong", "raw", "-"):
        counts = [sum(_word(row[case]) == word for row in results.values()) for case in CASES]
        lines.append(f"| **{word}** | " + " | ".join(map(str, counts)) + " |")
    for kind, row in sorted(results.items()):
        lines.append(f"| {kind} | " + " | ".join(_word(row[case]) for case in CASES) + " |")
    why = {kind: row[CASES[0]] for kind, row in sorted(results.items())}
    unbuilt = {kind: text for kind, text in why.items() if text.startswith("not built: ")}
    lines += ["", "No tiny model was measured of:", ""] if unbuilt else []
    for kind, text in unbuilt.items():
        lines += textwrap.wrap(
            f"- {kind}: {text.removeprefix('not built: ')}", 100, subsequent_indent="  "
        )
    PAGE.write_text("\n".join(lines) + "\n")


def _word(verdict: str) -> str:
    first = verdict.split(":")[0]
    return {ONE: "one", "not built": "-"}.get(first, first)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit per type")
    parser.add_argument("--types", help="names, separated by commas (default: all)")
    options = parser.parse_args()
    from tiny_models import kinds

    # once, before the processes fork
    from gradnorm import small_models
    from grads_ds.gradnorm import GradNormRecorder

    GradNormRecorder(small_models.make_model("llama")).score(small_models.make_batch([5], [1]))

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in options.types.split(",") if options.types else kinds():
        if options.types or kind not in results:
            results[kind] = limited(kind, options.seconds)
            print(f"{kind:24}", *(results[kind][case][:60] for case in CASES), sep="  ", flush=True)
            write(results)
    bad = [
        k for k, row in results.items() if any(_word(v) in ("wrong", "raw") for v in row.values())
    ]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
