"""Labels sit on the assistant's words and the token that ends them, for every kind of template and
tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample
from grads_ds.data.problems import RowProblem
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder
from tests.data import twins

CHAT = [
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "It is blue é 🙂, most of the time."},
    {"role": "user", "content": "\nMore, please."},
    {"role": "assistant", "content": "The grass is green.\n"},
]
SYSTEM = {"role": "system", "content": "Be kind."}


def chat(messages: list[dict[str, Any]], **more: Any) -> Sample:
    return Sample("source", "file:1", {}, messages=messages, **more)


def encode(
    tokenizer: Any,
    sample: Sample,
    max_length: int = 2048,
    overlong: str = "truncate",
    dropped: str = "refuse",
) -> Encoded:
    (result,) = Encoder(tokenizer, max_length, overlong, dropped).encode([sample])
    if isinstance(result, RowProblem):
        raise result
    return result


def answers(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The runs of target tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[Any, ...], Any] = {}

    def load(template: str | None, spaces: str = "byte", add_bos: bool = False) -> Any:
        key = (template, spaces, add_bos)
        if key not in made:
            folder = twins.make_tokenizer(
                tmp_path_factory.mktemp("tokenizer"), template, spaces, add_bos
            )
            made[key] = load_tokenizer(ModelConfig(path=str(folder)))
        return made[key]

    return load


# ---- templates -----------------------------------------------------------------------------------

SAID = ["It is blue é 🙂, most of the time.", "The grass is green.\n"]
KINDS = {
    "chatml": (twins.CHATML, "<|im_end|>", SAID),
    "chatml-marked": (twins.CHATML_MARKED, "<|im_end|>", SAID),
    "llama3": (twins.LLAMA3, "<|eot_id|>", [SAID[0], SAID[1].strip()]),
    "plain": (None, "</s>", SAID),
}


@pytest.mark.parametrize("spaces", ["byte", "metaspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_answers_with_their_end_token(twin: Any, kind: str, spaces: str) -> None:
    template, end, said = KINDS[kind]
    tokenizer = twin(template, spaces)
    encoded = encode(tokenizer, chat([SYSTEM, *CHAT]))
    assert answers(tokenizer, encoded) == [text + end for text in said]
    # each run ends with the end token itself, not with its letters
    ends = [
        i for i, label in enumerate(encoded.labels) if label == tokenizer.convert_tokens_to_ids(end)
    ]
    assert len(ends) == 2


@pytest.mark.parametrize("spaces", ["byte", "metaspace"])
def test_blanks_inside_an_answer_are_targets(twin: Any, spaces: str) -> None:
    """Tokens of blanks alone can come without characters of their own; indentation must be learnt
    still.
    """
    code = "def sky():\n    if blue:\n        return  green   "
    tokenizer = twin(twins.CHATML, spaces)
    encoded = encode(
        tokenizer, chat([CHAT[0] | {"content": "a  b   "}, {"role": "assistant", "content": code}])
    )
    assert answers(tokenizer, encoded) == [code + "<|im_end|>"]
    # a template that ends turns with a blank: that blank is how the model stops
    bare = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '  ' }}{% endfor %}"
    tokenizer = twin(bare + "{{ 'assistant:\n' if add_generation_prompt }}", spaces)
    assert answers(tokenizer, encode(tokenizer, chat(CHAT[:2]))) == [SAID[0] + "  "]


@pytest.mark.parametrize("spaces", ["byte", "metaspace"])
def test_marks_and_derived_spans_agree(twin: Any, spaces: str) -> None:
    """The same text with and without `{% generation %}` marks must give the same labels."""
    derived = encode(twin(twins.CHATML, spaces), chat([SYSTEM, *CHAT]))
    marked = encode(twin(twins.CHATML_MARKED, spaces), chat([SYSTEM, *CHAT]))
    assert derived == marked


def test_marked_labels_are_those_of_transformers(twin: Any) -> None:
    """With marks, transformers itself can tell the assistant tokens: ours are the same."""
    tokenizer = twin(twins.CHATML_MARKED)
    theirs = tokenizer.apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = encode(tokenizer, chat(CHAT))
    assert ours.input_ids == theirs["input_ids"]
    assert [int(label != IGNORE_INDEX) for label in ours.labels] == list(theirs["assistant_masks"])


@pytest.mark.parametrize("spaces", ["byte", "metaspace"])
def test_template_without_generation_prompt_leaves_the_header_out(twin: Any, spaces: str) -> None:
    tokenizer = twin(twins.CHATML_WITHOUT_PROMPT, spaces)
    assert answers(tokenizer, encode(tokenizer, chat(CHAT))) == [
        text + "<|im_end|>" for text in SAID
    ]


def test_inst_template_and_an_opening_assistant_turn(twin: Any) -> None:
    tokenizer = twin(twins.LLAMA2)
    got = answers(tokenizer, encode(tokenizer, chat(CHAT)))
    assert [text.strip() for text in got] == [SAID[0] + " </s>", SAID[1] + " </s>"]
    opening = encode(tokenizer, chat([{"role": "assistant", "content": "Hello there!"}, *CHAT]))
    assert "".join(answers(tokenizer, opening)).count("Hello there!") == 1
    assert "[INST]" not in "".join(answers(tokenizer, opening))


def test_turns_that_a_template_words_differently_are_still_found(twin: Any) -> None:
    """The last turn is rendered with an empty reasoning block, earlier ones without: prefixes do
    not match.
    """
    tokenizer = twin(twins.REASONING)
    got = answers(
        tokenizer,
        encode(tokenizer, chat([*CHAT[:3], {"role": "assistant", "content": "It is green."}])),
    )
    assert got == [SAID[0] + "<|im_end|>", "<think>\n\n</think>\n\nIt is green.<|im_end|>"]


def test_the_next_turns_header_is_never_taken_for_an_end_token(twin: Any) -> None:
    """A template that ends only the last turn leaves earlier ones open: nothing right can be
    labelled.
    """
    open_ended = twins.CHATML.replace("<|im_end|>\n", "{{ '<|im_end|>' if loop.last else '' }}")
    tokenizer = twin(open_ended)
    assert answers(tokenizer, encode(tokenizer, chat(CHAT[:2]))) == [SAID[0] + "<|im_end|>"]
    with pytest.raises(RowProblem, match="turn 2"):
        encode(tokenizer, chat(CHAT))


def test_a_turn_that_is_not_trained_on_may_lose_its_reasoning(twin: Any) -> None:
    reasoned = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue.", "weight": 0}
    tokenizer = twin(twins.REASONING)
    sample = chat([CHAT[0], reasoned, *CHAT[2:]])
    with pytest.raises(RowProblem, match="reasoning of turn 2"):
        encode(tokenizer, sample)
    encoded = encode(tokenizer, sample, dropped="count")
    assert answers(tokenizer, encoded) == ["<think>\n\n</think>\n\n" + SAID[1] + "<|im_end|>"]
    assert encoded.left_out == {"reasoning": 1}


def test_a_template_that_drops_earlier_reasoning_is_refused(twin: Any) -> None:
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue."},
        *CHAT[2:],
    ]
    with pytest.raises(RowProblem, match="turn 2") as caught:
        encode(twin(twins.REASONING), chat(messages))
    assert "data.dropped_content: count" in caught.value.change
    counted = encode(twin(twins.REASONING), chat(messages), dropped="count")
    assert answers(twin(twins.REASONING), counted)[0] == "Blue.<|im_end|>"
    assert counted.left_out == {"reasoning": 1}


def test_a_template_that_reorders_turns_is_refused(twin: Any) -> None:
    with pytest.raises(RowProblem, match="rewrites"):
        encode(twin(twins.NEWEST_FIRST), chat(CHAT))


def test_a_template_that_refuses_a_role_says_so(twin: Any) -> None:
    with pytest.raises(RowProblem, match="only user and assistant"):
        encode(twin(twins.LLAMA2), chat([SYSTEM, *CHAT]))


def test_weight_zero_is_context(twin: Any) -> None:
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    for template in (twins.CHATML, twins.CHATML_MARKED):
        tokenizer = twin(template)
        assert answers(tokenizer, encode(tokenizer, chat(messages))) == [SAID[1] + "<|im_end|>"]


def test_tool_calls_are_targets_even_for_templates_that_know_none(twin: Any) -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "sky"}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        CHAT[3],
    ]
    tokenizer = twin(twins.CHATML)
    first, second = answers(tokenizer, encode(tokenizer, chat(messages)))
    assert first == '{"name": "search", "arguments": {"query": "sky"}}<|im_end|>'
    assert second == SAID[1] + "<|im_end|>"
    knows = twins.CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m['tool_calls'] %}CALL {{ c['function']['name'] }} {{"
        " c['function']['arguments'] | tojson }}{% endfor %}",
    )
    tokenizer = twin(knows)
    wanted = 'CALL search {"query": "sky"}<|im_end|>'
    assert answers(tokenizer, encode(tokenizer, chat(messages)))[0] == wanted
