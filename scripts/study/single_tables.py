"""Tables of docs/STUDY.md and README.md that answer one question each.

Reads docs/results/study_*.json.
"""

from __future__ import annotations

from scripts.study import probes
from scripts.study.design import method_and_budget, subsets, variant
from scripts.study.page_tables import results
from scripts.study.tables import Measure, content, difference, forgetting, gain, spread


def pooled_table() -> str:
    """The methods of both draws, over all their noisy pools at 25 % and equal epochs, to random."""
    runs = [run for name in ("main", "noise") for run in results(name)["runs"]]
    runs = [run for run in runs if run["equal"] == "epochs" and run["noise"] > 0]
    measures: dict[str, Measure] = {
        "domain gain": gain,
        "content gain": content,
        "forgetting": forgetting,
    }
    lines = [
        f"| subset ({len(runs)} pools) | " + " | ".join(measures) + " |",
        "|" + "---|" * (len(measures) + 1),
    ]
    for method in (
        name
        for name in results("noise")["study"]["footings"]["epochs"]["methods"]
        if name != "random"
    ):
        cells = [
            difference(measure, runs, f"{method}_25", "random_25") for measure in measures.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lengths_table() -> str:
    """The default and what goes by general text, to random rows of the default's lengths and to the
    default.
    """
    runs = results("published")["runs"]
    lines = ["| difference | domain gain | content gain | forgetting |", "|---|---|---|---|"]
    pairs = [
        ("density", "length_matched"),
        ("forget_less", "density"),
        ("orthogonal", "density"),
        ("snr", "density"),
    ]
    for one, other in pairs:
        cells = [
            difference(measure, runs, variant(one, 0.25), variant(other, 0.25))
            for measure in (gain, content, forgetting)
        ]
        lines.append(f"| {one} to {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replay_table() -> str:
    """The same pools with one general row in five beside the training rows and without: gain and
    forgetting, and what replay changed.
    """
    having = results("replay")["runs"]
    plain = {
        (run["domain"], run["noise"], run["seed"], run["equal"]): run
        for run in results("budgets")["runs"]
    }
    lines = [
        (
            f"| model ({len(having) // 2} pools) | domain gain | with replay | change | forgetting"
            " | with replay | change |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for equal in dict.fromkeys(run["equal"] for run in having):
        pairs = [
            (plain[run["domain"], run["noise"], run["seed"], equal], run)
            for run in having
            if run["equal"] == equal
        ]
        whole = [] if len(lines) > 2 else ["full"]  # the same model on every footing
        for model in [*whole, *(variant(*which) for which in subsets(pairs[0][1]["models"]))]:
            cells = []
            for measure in (gain, forgetting):
                before, after = (
                    [measure(run, model) for run in side] for side in zip(*pairs, strict=True)
                )
                cells += [f"{sum(before) / len(before):+.3f}", f"{sum(after) / len(after):+.3f}"]
                cells.append(spread([y - x for x, y in zip(before, after, strict=True)], bold=True))
            name = model if model == "full" else f"{method_and_budget(model)[0]}, 25 %"
            lines.append(f"| {name}, equal {equal} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table() -> str:
    """The road from probe to model against training on everything, in FLOPs and in seconds of one
    run.
    """
    runs = results("cost")["runs"]
    lines = [
        "| road | FLOPs | share | seconds | share | domain loss to everything |",
        "|---|---|---|---|---|---|",
    ]
    rows = [("everything", runs[0], "everything", "full"), ("own", runs[0], "own", "own")]
    for name, run, road, model in [*rows, *((run["probe"], run, "other", "other") for run in runs)]:
        spent = [
            (run[kind][road], run[kind][road] / run[kind]["everything"]) for kind in probes.COSTS
        ]
        loss = run["models"][model]["domain"]["loss"] - run["models"]["full"]["domain"]["loss"]
        (flops, of_flops), (seconds, of_seconds) = spent
        lines.append(
            f"| {name} | {flops:.2e} | {of_flops:.2f} | {seconds:.0f} | {of_seconds:.2f} |"
            f" {loss:+.3f} |"
        )
    return "\n".join(lines)


def kept_table() -> str:
    """The share of planted noise in each subset of the noisy pools, beside the pool's own."""
    main = results("main")
    lines = [
        "| subset of 25 % | clean | wrong answers | near-duplicates | off-domain |",
        "|---|---|---|---|---|",
    ]
    runs = [run for run in main["runs"] if run["equal"] == "epochs" and run["noise"] > 0]
    kinds = ("clean", "wrong_answer", "near_duplicate", "off_domain")
    for name in dict.fromkeys(name for run in runs for name in run["kept"]):
        total = {kind: sum(run["kept"][name].get(kind, 0) for run in runs) for kind in kinds}
        share = [total[kind] / sum(total.values()) for kind in kinds]
        lines.append(
            f"| {method_and_budget(name)[0]} | " + " | ".join(f"{x:.1%}" for x in share) + " |"
        )
    return "\n".join(lines)
