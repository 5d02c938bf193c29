"""What a row says is in the tokens it becomes, or the row is refused, or the loss is counted: for
marked templates and others.
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.problems import RowProblem
from grads_ds.data.tokenizer import load_tokenizer
from tests.data import twins
from tests.data.rows import chat, encode, targets, text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = twins.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(ModelConfig(path=str(folder)))


USER = "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}"
NO_SYSTEM = (
    "{% for m in messages %}"
    + USER
    + "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM_MARKED = NO_SYSTEM.replace(
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}",
)


# ---- system prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [NO_SYSTEM, NO_SYSTEM_MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("prompt", ["Answer in French.", "user", "s", "a"])
@pytest.mark.parametrize("key", ["role", "system", "system_prompt", "developer"])
def test_a_lost_system_prompt_is_refused_or_counted(
    base: Any, template: str, prompt: str, key: str
) -> None:
    """Also where the prompt's letters stand in the rendered text by accident."""
    row = chat("Hi user, a system", "Salut")
    if key in ("role", "developer"):
        role = "system" if key == "role" else key
        row["messages"].insert(0, {"role": role, "content": prompt})
    else:
        row[key] = prompt
    with pytest.raises(RowProblem, match="system prompt"):
        encode(base, template, row)
    counted = encode(base, template, row, "count")
    assert counted.left_out == {"system prompt": 1}
    assert targets(base, counted) == "Salut<|im_end|>"


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_any_format_leads_the_conversation(base: Any, name: str) -> None:
    rows = [
        chat("Hi", "Yo"),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"instruction": "Hi", "output": "Yo"},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": chat("Hi")["messages"], "completion": [{"role": "assistant", "content": "Yo"}]},
    ]
    wanted = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    for row in rows:
        encoded = encode(base, twins.CHATML, row | {name: "Be kind."})
        assert text(base, encoded).startswith(wanted) and targets(base, encoded) == "Yo<|im_end|>"
    with pytest.raises(RowProblem, match="one system prompt"):
        own = [{"role": "system", "content": "Be rude."}, *chat("Hi", "Yo")["messages"]]
        encode(base, twins.CHATML, {"messages": own, name: "Be kind."})


def test_a_later_system_turn_that_the_template_ignores_is_refused(base: Any) -> None:
    first_alone = NO_SYSTEM.replace(
        "{% for m", "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m", 1,
    )  # fmt: skip
    row = chat("Hi", "Yo", "More", "No")
    leading = {"messages": [{"role": "system", "content": "Be kind."}, *row["messages"]]}
    assert "Be kind." in text(base, encode(base, first_alone, leading))
    row["messages"].insert(2, {"role": "system", "content": "Be kind."})
    with pytest.raises(RowProblem, match="system prompt of turn 3"):
        encode(base, first_alone, row)


def test_a_system_prompt_that_the_template_puts_later_is_carried(base: Any) -> None:
    later = NO_SYSTEM.replace(
        "<|im_start|>user\n",
        "<|im_start|>user\n{% if loop.index == messages | length - 1 and messages[0].role =="
        " 'system' %}{{ messages[0].content }}\n\n{% endif %}",
    )
    row = chat("Hi", "Yo", "More", "No", system="Be kind.")
    encoded = encode(base, later, row)
    assert "<|im_start|>user\nBe kind.\n\nMore" in text(base, encoded) and not encoded.left_out


# ---- reasoning -----------------------------------------------------------------------------------

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}GEN"
    "{% set c = m.content.split('</think>')[-1].strip() %}"
    "{% set r = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip()"
    " if '</think>' in m.content or m.reasoning_content else '' %}"
    "{% if r and (KEEP or loop.last) %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "<|im_end|>END{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def thinking(keep: bool, marked: bool) -> str:
    gen, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return THINKS.replace("GEN", gen).replace("END", end).replace("KEEP", str(keep).lower())


def reasoned(form: str) -> dict[str, Any]:
    turns = []
    for thought, answer in (("FIRST", "56"), ("SECOND", "36")):
        said: dict[str, Any] = {"role": "assistant", "content": answer}
        if form == "content":
            said["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        elif form == "parts":
            said["content"] = [
                {"type": "thinking", "thinking": thought},
                {"type": "text", "text": answer},
            ]
        else:
            said[form] = thought
        turns += [{"role": "user", "content": "7*8?"}, said]
    return {"messages": turns}


REASONED = ["content", "parts", "reasoning_content", "thinking", "reasoning"]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", REASONED)
def test_reasoning_in_every_form_is_learned(base: Any, form: str, marked: bool) -> None:
    encoded = encode(base, thinking(True, marked), reasoned(form))
    block = "<think>\n{}\n</think>\n\n{}<|im_end|>".format
    assert targets(base, encoded) == block("FIRST", "56") + block("SECOND", "36")


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("form", REASONED)
def test_stripped_reasoning_is_refused_or_counted(base: Any, form: str, marked: bool) -> None:
    template = thinking(False, marked)
    with pytest.raises(RowProblem, match="reasoning of turn 2"):
        encode(base, template, reasoned(form))
    counted = encode(base, template, reasoned(form), "count")
    assert counted.left_out == {"reasoning": 1}
    assert targets(base, counted) == "56<|im_end|><think>\nSECOND\n</think>\n\n36<|im_end|>"


def test_reasoning_for_a_template_without_reasoning_is_refused(base: Any) -> None:
    for template in (twins.CHATML, twins.CHATML_MARKED):
        with pytest.raises(RowProblem, match="reasoning of turn 2"):
            encode(base, template, reasoned("thinking"))
        # as text of the answer it is carried like any other
        assert "FIRST" in targets(base, encode(base, template, reasoned("content")))


# ---- marks ---------------------------------------------------------------------------------------


def test_marks_around_more_or_less_than_the_answers_are_refused(base: Any) -> None:
    row = chat("Hi", "Yo", "More", "No")
    around_all = twins.CHATML.replace(
        "{% for m in messages %}", "{% generation %}{% for m in messages %}"
    ).replace("{% endfor %}", "{% endfor %}{% endgeneration %}", 1)
    with pytest.raises(RowProblem, match="around answers alone"):
        encode(base, around_all, row)
    headed = twins.CHATML.replace("<|im_start|>{{ m['role'] }}", "HEAD", 1)
    headed = headed.replace(
        "HEAD\n{{ m['content'] }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% endif %}",
    )
    with pytest.raises(RowProblem, match="begin with the answer"):
        encode(base, headed, row)
    last_alone = twins.CHATML_MARKED.replace(
        "{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' and loop.last %}"
    )
    with pytest.raises(RowProblem, match="around every answer"):
        encode(base, last_alone, row)
    row["messages"][1]["weight"] = 0
    assert targets(base, encode(base, twins.CHATML_MARKED, row)) == "No<|im_end|>"


def test_an_empty_answer_among_others_is_no_target(base: Any) -> None:
    for template in (twins.CHATML, twins.CHATML_MARKED):
        encoded = encode(base, template, chat("Hi", "", "More", "No"))
        assert targets(base, encoded) == "No<|im_end|>"
        assert encoded.notes == {"empty answers among others are not learned": 1}
