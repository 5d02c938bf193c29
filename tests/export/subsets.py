"""Chosen subsets to export, with and without tool calls, and how their files are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.export.subset import export_subset

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "what is the sky"},
            {"role": "assistant", "content": "blue “quoted”"},
        ]
    },
    {"instruction": "color of grass", "input": "", "output": "green"},
    {"conversations": [{"from": "human", "value": "yes"}, {"from": "gpt", "value": "no"}]},
]


TURNS = [("what is the sky", "blue “quoted”"), ("color of grass", "green"), ("yes", "no")]


def write(run: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "selection/selected.jsonl").write_text(text, encoding="utf-8")


def export(run: Path, tool: str) -> Path:
    config = Config(run_dir=str(run), model={"path": "m"}, data={"train": ["d"]})
    out = run / tool
    export_subset(config, run, "selected", tool, out)
    return out


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def turns(rows: Any) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in row["messages"]) for row in rows]  # type: ignore[misc]


CALLING = """{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>
{% generation %}{{ m['content'] }}\
{% for c in m.get('tool_calls') or [] %}{{ c['function'] | tojson }}{% endfor %}\
</s>{% endgeneration %}
{% else %}<|{{ m['role'] }}|>
{{ m['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""  # a chat template that knows tool calls


def called(name: str, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool(name: str, **fields: str) -> dict[str, Any]:
    properties = {field: {"type": kind} for field, kind in fields.items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


ASKED, ANSWERED = (
    {"role": "user", "content": "what is the sky"},
    {"role": "assistant", "content": "blue"},
)


RESULT = {"role": "tool", "content": "red"}


# two calls whose arguments have nothing in common, the second as OpenAI's API writes them
CALLS: list[dict[str, Any]] = [
    {
        "messages": [ASKED, called("look", {"color": 1}), RESULT, ANSWERED],
        "tools": [tool("look", color="number")],
    },
    {"messages": [ASKED, called("see", '{"grass": "no"}')], "tools": [tool("see", grass="string")]},
    {"messages": [ASKED, ANSWERED]},
]


MASKED: list[dict[str, Any]] = [
    {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"weight": 1}]},
    {"messages": [{"role": "system", "content": "yes"}, ASKED, ANSWERED, ASKED, ANSWERED]},
    {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
]
