"""The promise on drawn conversations: what is given is in the tokens, in order; targets are the
answers to be learned with their ends; what a template cannot carry is refused or counted. Through
every format of rows and six templates.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.problems import RowProblem
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoded
from tests.data import twins
from tests.data.rows import encode
from tests.data.test_carried import NO_SYSTEM_MARKED, thinking
from tests.data.test_carried_tools import TOOLS

TOOLS_MARKED = TOOLS.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}",
).replace(
    "{% endfor %}<|im_end|>\n{% endfor %}",
    "{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}",
)
# (template, kinds of what it cannot carry, whether it knows calls)
TEMPLATES = {
    "plain": (twins.CHATML, {"tool schema", "reasoning"}, False),
    "marked": (twins.CHATML_MARKED, {"tool schema", "reasoning"}, False),
    "tools": (TOOLS, {"reasoning"}, True),
    "tools marked": (TOOLS_MARKED, {"reasoning"}, True),
    "stripping": (thinking(False, False), {"tool schema", "earlier reasoning"}, False),
    "no system": (
        NO_SYSTEM_MARKED,
        {"system prompt", "tool schema", "reasoning", "tool result"},
        False,
    ),
}

# texts that a template could mistake: blanks, quotes, markup, its own words, half its tokens
ALPHABET = st.sampled_from(
    ["a", "Z", "é", "🙂", "\u2028", " ", "\n", "\t", '"', "\\", "<", "|", "{{"]
)
TEXT = st.one_of(
    st.sampled_from(["user", "assistant", "s", "im", "\\n", "[1]", '{"a": 1}', "<call>", "Yes."]),
    st.lists(ALPHABET, min_size=1, max_size=12).map("".join).filter(lambda text: text.strip()),
)
VALUE = st.recursive(
    st.one_of(TEXT, st.integers(-5, 5), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def conversations(draw: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages in canonical form, tools)."""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    calls = draw(st.booleans())
    if calls:
        properties = draw(st.dictionaries(st.sampled_from("pqr"), st.just({"type": "string"})))
        function = {"name": "look", "description": draw(TEXT), "parameters": {
            "type": "object", "properties": properties}}  # fmt: skip
        tools = [{"type": "function", "function": function}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        said: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.integers(0, 3)) == 0:
            said["reasoning_content"] = "thought " + draw(TEXT).strip()
        if calls and draw(st.booleans()):
            arguments = draw(st.dictionaries(st.sampled_from("xyz"), VALUE, max_size=2))
            said["tool_calls"] = [
                {"type": "function", "function": {"name": "look", "arguments": arguments}}
            ]
            messages += [said, {"role": "tool", "content": draw(TEXT)}]
            said = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.integers(0, 3)) == 0:
            said["weight"] = 0
        messages.append(said)
    return messages, tools


def rows_of(messages: list[dict[str, Any]], tools: list[Any]) -> list[dict[str, Any]]:
    """The same conversation in every shape that can say it."""
    beside = {"tools": tools} if tools else {}
    rows = [{"messages": messages} | beside]
    body = messages[1:] if messages[0]["role"] == "system" else messages
    system = {"system": messages[0]["content"]} if body is not messages else {}
    rows.append({"messages": body} | beside | system)
    rows.append(
        {"messages": [parted(m) for m in messages], "functions": [t["function"] for t in tools]}
    )
    rows.append(
        {"conversations": [sharegpt(m) for m in body], **system} | {"tools": json.dumps(tools)}
    )
    rows.append({"messages": json.dumps(messages), "tools": json.dumps(tools)})  # a cell of csv
    learned = [n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    if learned == [len(messages) - 1]:
        rows.append({"prompt": messages[:-1], "completion": messages[-1:]} | beside)
    plain = [set(m) <= {"role", "content"} and m["role"] != "tool" for m in messages]
    if all(plain) and not tools:
        said = [m["content"] for m in body]
        if len(said) == 2:
            rows.append({"prompt": said[0], "completion": said[1], **system})
            rows.append({"instruction": said[0], "input": "", "output": said[1], **system})
        pairs = [said[i : i + 2] for i in range(0, len(said) - 2, 2)]
        alpaca = {"instruction": said[-2], "output": said[-1], "history": pairs}
        rows.append(alpaca | system)
    return rows


def parted(message: dict[str, Any]) -> dict[str, Any]:
    turn = dict(message) | {"content": [{"type": "text", "text": message["content"]}]}
    if "reasoning_content" in turn:
        turn["thinking"] = turn.pop("reasoning_content")
    if "weight" in turn:
        turn["train"] = bool(turn.pop("weight"))
    if "tool_calls" in turn:
        (call,) = turn.pop("tool_calls")
        function = call["function"]
        turn["function_call"] = function | {"arguments": json.dumps(function["arguments"])}
    return turn


def sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turn = {"from": names.get(message["role"], message["role"]), "value": message["content"]}
    return turn | {key: message[key] for key in message if key not in ("role", "content")}


def in_json(text: str, whole: str, at: int) -> int:
    """Where a text ends in `whole` at or behind `at`, as it is or as JSON writes it; -1 where it is
    not there.
    """
    for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]):
        if (place := whole.find(form, at)) >= 0:
            return place + len(form)
    return -1


def check(base: Any, encoded: Encoded, messages: list[Any], tools: list[Any], calls: bool) -> None:
    """What was given, looked for in the decoded tokens."""
    text = base.decode(encoded.input_ids)
    at = 0
    for message in messages:
        if message["role"] == "system" and "system prompt" in encoded.left_out:
            continue
        if message["role"] == "tool" and "tool result" in encoded.left_out:
            continue
        at = in_json(message["content"].strip(), text, at)
        assert at >= 0, message
        for call in message.get("tool_calls", ()):
            written = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            assert written in text
    for tool in tools if "tool schema" not in encoded.left_out else ():
        assert json.dumps(tool, ensure_ascii=False) in text
    # targets: each learned answer with its end, and no more runs than these
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    said = [base.decode(run) for run in runs if run]
    learned = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    assert len(said) == len(learned) == len(encoded.ends)
    for run, message in zip(said, learned, strict=True):
        answer = message["content"].strip()
        assert run.endswith("<|im_end|>") and answer in run
        if not message.get("tool_calls") and "reasoning_content" not in message:
            assert run.strip().removesuffix("<|im_end|>").strip() == answer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = twins.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=conversations())
def test_what_is_given_is_what_is_trained_on(base: Any, name: str, drawn: Any) -> None:
    messages, tools = drawn
    template, lacking, calls = TEMPLATES[name]
    learned = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    asked = {
        "tool schema": bool(tools),
        "system prompt": messages[0]["role"] == "system",
        "tool result": any(m["role"] == "tool" for m in messages),
        "reasoning": any("reasoning_content" in m for m in messages),
        "earlier reasoning": any("reasoning_content" in m for m in messages[:-1]),
    }
    lost = {kind for kind in lacking if asked[kind]}
    results = []
    for row in rows_of(messages, tools):
        if lost and learned:
            with pytest.raises(RowProblem, match=r"keep the (tool|system|reasoning)"):
                encode(base, template, row)
        results.append(encode(base, template, row, "count"))
    if not learned:
        assert all(result.dropped == "no answer is to be learned" for result in results)
        return
    assert all(result == results[0] for result in results)
    assert set(results[0].left_out) == {kind.removeprefix("earlier ") for kind in lost}
    check(base, results[0], messages, tools, calls)
