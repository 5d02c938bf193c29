"""Tool calls and schemas reach the tokens in whichever form a row writes them, or the row is
refused, or the loss is counted.
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.problems import RowProblem
from grads_ds.data.tokenizer import load_tokenizer
from tests.data import twins
from tests.data.rows import encode, targets, text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = twins.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(ModelConfig(path=str(folder)))


TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ {'name': c.function.name, 'arguments':"
    " c.function.arguments} | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "whether it rains",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Bern"]}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Oslo"}


def calling(**call: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "rain in Oslo?"},
            {"role": "assistant", "content": "I look.", **call},
            {"role": "tool", "content": "Oslo: wet"},
            {"role": "assistant", "content": "Yes."},
        ]
    }


OBJECT = {"name": "rain", "arguments": ARGUMENTS}


def _written(arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": "rain", "arguments": arguments}}]}


FORMS: dict[str, dict[str, Any]] = {
    "object": {"tool_calls": [{"type": "function", "function": OBJECT}]},
    "JSON text": _written('{"city":  "Oslo"}'),
    "JSON text twice": _written('"{\\"city\\": \\"Oslo\\"}"'),
    "pairs": _written([["city", "Oslo"]]),
    "key and value": _written([{"key": "city", "value": "Oslo"}]),
    "bare": {"tool_calls": [OBJECT]},
    "parameters": {"tool_calls": [{"name": "rain", "parameters": ARGUMENTS}]},
    "list as text": {"tool_calls": '[{"name": "rain", "arguments": {"city": "Oslo"}}]'},
    "function_call": {"function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}},
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_in_every_form_give_the_same_tokens(base: Any, form: str) -> None:
    encoded = encode(base, TOOLS, calling(**FORMS[form]) | {"tools": [SCHEMA]})
    call = 'I look.<call>{"name": "rain", "arguments": {"city": "Oslo"}}</call><|im_end|>'
    assert targets(base, encoded) == call + "Yes.<|im_end|>"


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [SCHEMA]},
        {"tools": [SCHEMA["function"]]},
        {"functions": [SCHEMA["function"]]},
        {"tools": str(SCHEMA).replace("'", '"').join("[]")},
        {"tools": [str(SCHEMA).replace("'", '"')]},
    ],
    ids=["tools", "bare", "functions", "text", "texts"],
)
def test_schemas_in_every_form_give_the_same_tokens(base: Any, tools: dict[str, Any]) -> None:
    row = calling(**FORMS["object"])
    assert encode(base, TOOLS, row | tools) == encode(base, TOOLS, row | {"tools": [SCHEMA]})
    inside = {"messages": [{"role": "system", "content": "Be kind.", **tools}, *row["messages"]]}
    assert '"enum": ["Oslo", "Bern"]' in text(base, encode(base, TOOLS, inside))


@pytest.mark.parametrize("template", [twins.CHATML, twins.CHATML_MARKED], ids=["plain", "marked"])
def test_schemas_for_a_template_without_tools_are_refused_or_counted(
    base: Any, template: str
) -> None:
    row = calling(**FORMS["object"]) | {"tools": [SCHEMA]}
    with pytest.raises(RowProblem, match="tool schema"):
        encode(base, template, row)
    counted = encode(base, template, row, "count")
    assert counted.left_out == {"tool schema": 1} and len(counted.notes) == 1
    wanted = 'I look.\n{"name": "rain", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert targets(base, counted).startswith(wanted)


def test_a_schema_of_which_the_template_writes_names_alone_is_refused(base: Any) -> None:
    """Though the words it leaves out stand in the conversation."""
    names = TOOLS.replace("{{ t | tojson }}", "{{ t.function.name }}: {{ t.function.description }}")
    with pytest.raises(RowProblem, match="tool schema"):
        encode(base, names, calling(**FORMS["object"]) | {"tools": [SCHEMA]})


def test_a_call_or_the_text_beside_it_is_not_lost(base: Any) -> None:
    either = TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    with pytest.raises(RowProblem, match="answer of turn 2"):
        encode(base, either, calling(**FORMS["object"]), "count")
    without = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:0]")
    with pytest.raises(RowProblem, match="tool call of turn 2"):
        encode(base, without, calling(**FORMS["object"]))


def test_an_argument_in_json_is_not_taken_for_a_later_turn(base: Any) -> None:
    """The call stands escaped in the text; the answer after it has the same words as they are."""
    row = calling(
        tool_calls=[{"function": {"name": "rain", "arguments": {"x": '{"a": "\u00e9"}'}}}]
    )
    answer = '{"a": "\u00e9"}'
    row["messages"] += [
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": answer},
    ]
    assert targets(base, encode(base, TOOLS, row)).endswith(f"{answer}<|im_end|>")


def test_a_template_that_wants_arguments_as_text_gets_text(base: Any) -> None:
    """By concatenation, which fails on an object, or printed, which would be Python's notation."""
    joined = TOOLS.replace(
        "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}",
        "{{ c.function.name + ' ' + c.function.arguments }}",
    )
    printed = joined.replace("+ ' ' + c.function.arguments", "}} {{ c.function.arguments")
    for template in (joined, printed):
        encoded = encode(base, template, calling(**FORMS["object"]))
        assert '<call>rain {"city": "Oslo"}</call>' in targets(base, encoded)
