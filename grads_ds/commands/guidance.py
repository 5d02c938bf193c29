"""What `--help` ends with, and where a problem's page lies: examples, exit statuses, docs.

Data and pure functions; the examples are parsed by a test. No heavy imports.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

# command -> (arguments, what they do)
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "init": (
        ("a.jsonl b.parquet --model models/llama", "writes grads.yaml and grads_data/"),
        ("data/ --model models/llama --general chats.jsonl", "and holds general rows out"),
        ("--from axolotl.yaml", "model, data and values of another tool's configuration"),
    ),
    "run": (
        ("grads.yaml", "every stage that is due, on this machine"),
        ("grads.yaml --hosts hostfile --max-restarts 3", "on several hosts"),
        ("grads.yaml --from select --set select.budget=0.1", "another budget: no new probe"),
        ("grads.yaml --dry-run", "what would be started"),
    ),
    "prepare": (("grads.yaml", "tokens, ids and counts of every set"),),
    "probe": (("grads.yaml --ranks 2", "the score table, on two ranks of this machine"),),
    "select": (
        ("grads.yaml --preview", "what would be chosen, and why; writes nothing"),
        ("grads.yaml --set select.method=random", "another method"),
    ),
    "sft": (("grads.yaml --hosts hostfile", "fine-tune on several hosts"),),
    "evaluate": (("grads.yaml", "losses and tasks of every model that is not yet judged"),),
    "report": (("grads.yaml", "writes report.html"),),
    "compare": (
        ("runs/first runs/second", "what they chose in common, losses, time, settings"),
        ("runs/first runs/second --html compare.html", "and as a page"),
    ),
    "doctor": (
        ("grads.yaml --hosts hostfile", "every host, before anything starts"),
        ("grads.yaml --json", "for a monitoring system"),
    ),
    "plan": (
        ("grads.yaml", "the config's model on 1x8 H100"),
        ("grads.yaml --model 70B --cluster 8x8 --gpu A100-80", "needs no weights"),
    ),
    "scores": (
        ("show runs/grads", "quantiles, and the rows at both ends"),
        ("verify runs/grads --samples 32", "against one float64 backward each"),
    ),
    "scores show": (("runs/grads --by lm_head_grad_norm --samples 10", "order by one column"),),
    "scores compare": (("runs/small runs/large --top 5 25", "do two models agree?"),),
    "scores export": (("runs/grads --format csv --output scores.csv", "for a spreadsheet"),),
    "scores verify": (("runs/grads --samples 32", "32 rows, drawn by --seed"),),
    "status": (("runs/grads", "from any machine that sees the folder"),),
    "check": (("runs/grads", "every output against its record"),),
    "stop": (("runs/grads", "training writes a checkpoint first"),),
    "export": (
        ("grads.yaml --to trl --out for_trl", "rows, weights and a command to train with"),
        ("grads.yaml --to axolotl --variant random --out baseline", "a variant"),
    ),
    "merge": (
        (
            "runs/grads --alpha 0.5 --out half",
            "half way between the base model and the trained one",
        ),
        ("runs/grads --alpha 0.5 --adapter --out adapter", "its LoRA adapter, scaled"),
    ),
    "config": (("--schema > grads.schema.json", "for editors that complete YAML"),),
}
PAGES = {
    "init": "docs/start.md",
    "prepare": "docs/prepare.md",
    "probe": "docs/probe.md",
    "select": "docs/selection.md",
    "sft": "docs/sft.md",
    "evaluate": "docs/evaluate.md",
    "report": "docs/report.md",
    "compare": "docs/report.md",
    "plan": "docs/planning.md",
    "scores": "docs/probe.md",
    "export": "docs/exports.md",
    "merge": "docs/forgetting.md",
    "config": "docs/config.md",
    "check": "docs/trust.md",
}
ELSEWHERE = "docs/launcher.md"  # run, doctor, status, stop, and whatever is about hosts
_SECTIONS = {
    "model.lora": "docs/sft.md",
    "model": "docs/config.md",
    "data": "docs/prepare.md",
    "probe": "docs/probe.md",
    "select": "docs/selection.md",
    "sft": "docs/sft.md",
    "evaluate": "docs/evaluate.md",
    "deepspeed": "docs/config.md",
    "run_dir": "docs/trust.md",
}
_KEY = re.compile(rf"({'|'.join(_SECTIONS)})(?=[.:])")


def epilog(command: str, statuses: bool = False) -> str:
    """What the help of a command ends with: examples, its page, and exit statuses if asked for."""
    lines = ["examples:"]
    for arguments, meaning in EXAMPLES.get(command, ()):
        lines += [f"  grads-ds {command} {arguments}", f"      {meaning}"]
    lines += ["", f"more: {PAGES.get(command.split()[0], ELSEWHERE)}"]
    return "\n".join([*lines, *(_statuses() if statuses else [])])


def pages_for(problems: Sequence[str], command: str) -> list[str]:
    """The pages that explain these problems: of each one the page of the key that it names, else
    that of the command.
    """
    found = []
    for text in problems:
        key = _KEY.match(text)
        found.append(_SECTIONS[key[1]] if key else PAGES.get(command, ELSEWHERE))
        if ": unknown key" in text:
            found[-1] = PAGES["config"]
    return list(dict.fromkeys(found))


def _statuses() -> list[str]:
    from grads_ds.launcher.job_outcome import MEANINGS

    lines = ["", "exit statuses:"]
    for number, meaning in MEANINGS.items():
        first, *rest = textwrap.wrap(meaning, 72)
        lines += [f"  {number:<4} {first}", *(f"       {line}" for line in rest)]
    return lines
