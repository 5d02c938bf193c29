"""The token that ends an answer is a target, wherever the template puts it; where none ends it,
that is counted.
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import ENDLESS
from tests.data import twins
from tests.data.rows import chat, encode, targets


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = twins.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(ModelConfig(path=str(folder)))


MARK = "{% generation %}{{ m.content }}{% endgeneration %}"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
REST = "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OUTSIDE = HEAD + MARK + "<|im_end|>\n" + REST + PROMPT  # the EOS token is </s>
BEHIND_BLANKS = HEAD + MARK + " \n<|im_end|>\n" + REST + PROMPT
TRAILING = HEAD + MARK.replace("{% end", "<|im_end|>\n{% end") + REST + PROMPT
TWO = HEAD + "{{ m.content }}<|im_end|>\n{{ '</s>' if loop.last }}" + REST + PROMPT
# the next role's marker is all that ends a turn
OPEN = HEAD + MARK + REST.replace("<|im_end|>\n", "") + PROMPT


@pytest.mark.parametrize(
    ("template", "between"),
    [(OUTSIDE, ""), (BEHIND_BLANKS, " \n"), (TRAILING, ""), (TWO, "")],
    ids=["outside", "blanks", "inside", "two"],
)
def test_the_end_is_learned_once_and_nothing_behind_it(
    base: Any, template: str, between: str
) -> None:
    encoded = encode(base, template, chat("Hi", "Yo", "More", "No"))
    assert targets(base, encoded) == f"Yo{between}<|im_end|>No{between}<|im_end|>"
    assert base.convert_ids_to_tokens(list(encoded.ends)) == ["<|im_end|>"] * 2
    assert not encoded.notes


def test_a_role_marker_is_no_end_and_the_lack_of_one_is_counted(base: Any) -> None:
    encoded = encode(base, OPEN, chat("Hi", "Yo", "More", "No"))
    assert targets(base, encoded) == "YoNo"
    assert encoded.ends == () and encoded.notes == {ENDLESS: 2}


def test_an_end_of_several_ordinary_tokens_is_counted_as_none(base: Any) -> None:
    worded = twins.CHATML.replace("<|im_end|>", "<|finis|>")
    encoded = encode(base, worded, chat("Hi", "Yo"))
    assert targets(base, encoded) == "Yo<|finis|>" and encoded.notes == {ENDLESS: 1}


def test_a_call_and_an_answer_may_end_with_different_tokens(base: Any) -> None:
    both = OUTSIDE.replace(
        MARK + "<|im_end|>",
        "{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
        "{% endfor %}{% endgeneration %}{{ '<|eot_id|>' if m.tool_calls else '<|im_end|>' }}",
    )
    row = chat("Hi", "", "wet", "Yes.")
    row["messages"][1]["tool_calls"] = [{"name": "rain", "arguments": {"city": "Oslo"}}]
    row["messages"][2]["role"] = "tool"
    encoded = encode(base, both, row)
    assert base.convert_ids_to_tokens(list(encoded.ends)) == ["<|eot_id|>", "<|im_end|>"]


def test_the_end_is_a_target_where_it_is_the_padding_too(base: Any) -> None:
    pad = base.pad_token
    base.pad_token = "<|im_end|>"
    encoded = encode(base, twins.CHATML, chat("Hi", "Yo"))
    base.pad_token = pad
    assert targets(base, encoded) == "Yo<|im_end|>"


def test_a_completion_as_text_is_learned_with_the_eos_token(base: Any) -> None:
    row = {"prompt": "The sky is", "completion": " blue."}
    encoded = encode(base, twins.CHATML, row, style="prompt_completion_text")
    assert base.decode(encoded.input_ids) == "The sky is blue.</s>"
    assert targets(base, encoded) == " blue.</s>"
    assert base.convert_ids_to_tokens(list(encoded.ends)) == ["</s>"]
