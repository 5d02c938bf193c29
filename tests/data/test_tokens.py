"""Labels sit on the assistant's words and the token that ends them, for every kind of template and
tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.config.errors import UserError
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample, load_samples
from grads_ds.data.problems import Faults, RowFault
from grads_ds.data.tokenizer import PLAIN_TEMPLATE, fingerprint, load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder, _labels, _labels_one_by_one, num_target_tokens
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
    if isinstance(result, RowFault):
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
    with pytest.raises(RowFault, match="turn 2"):
        encode(tokenizer, chat(CHAT))


def test_a_turn_that_is_not_trained_on_may_lose_its_reasoning(twin: Any) -> None:
    reasoned = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue.", "weight": 0}
    tokenizer = twin(twins.REASONING)
    sample = chat([CHAT[0], reasoned, *CHAT[2:]])
    with pytest.raises(RowFault, match="reasoning of turn 2"):
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
    with pytest.raises(RowFault, match="turn 2") as caught:
        encode(twin(twins.REASONING), chat(messages))
    assert "data.dropped_content: count" in caught.value.change
    counted = encode(twin(twins.REASONING), chat(messages), dropped="count")
    assert answers(twin(twins.REASONING), counted)[0] == "Blue.<|im_end|>"
    assert counted.left_out == {"reasoning": 1}


def test_a_template_that_reorders_turns_is_refused(twin: Any) -> None:
    with pytest.raises(RowFault, match="rewrites"):
        encode(twin(twins.NEWEST_FIRST), chat(CHAT))


def test_a_template_that_refuses_a_role_says_so(twin: Any) -> None:
    with pytest.raises(RowFault, match="only user and assistant"):
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


# ---- BOS, text, truncation -----------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, twins.LLAMA3, twins.CHATML])
@pytest.mark.parametrize("add_bos", [False, True])
def test_never_two_bos(twin: Any, template: str | None, add_bos: bool) -> None:
    tokenizer = twin(template, "byte", add_bos)
    ids = encode(tokenizer, chat(CHAT)).input_ids
    wanted = {None: int(add_bos), twins.LLAMA3: 1, twins.CHATML: 0}[template]
    assert ids.count(tokenizer.bos_token_id) == wanted
    if wanted:
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_rows_are_all_target_as_the_tokenizer_writes_them(twin: Any, add_bos: bool) -> None:
    tokenizer = twin(None, "byte", add_bos)
    encoded = encode(tokenizer, Sample("s", "f:1", {}, text="The sky is blue."))
    assert encoded.input_ids == encoded.labels == tokenizer("The sky is blue.").input_ids
    # nothing comes before the first token
    assert num_target_tokens(encoded.labels) == len(encoded.labels) - 1


def test_number_of_targets_counts_what_the_shifted_loss_sees() -> None:
    torch = pytest.importorskip("torch")
    labels = [7, IGNORE_INDEX, 5, 6, IGNORE_INDEX, 3]
    logits = torch.zeros(1, 6, 11)
    losses = torch.nn.functional.cross_entropy(
        logits[0, :-1], torch.tensor(labels[1:]), ignore_index=IGNORE_INDEX, reduction="none"
    )
    assert num_target_tokens(labels) == int((losses > 0).sum()) == 3


def test_truncation_keeps_a_target_or_drops_the_row(twin: Any) -> None:
    tokenizer = twin(twins.CHATML)
    whole = encode(tokenizer, chat(CHAT[:2]))
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    kept = encode(tokenizer, chat(CHAT[:2]), max_length=first + 1)
    assert kept.input_ids == whole.input_ids[: first + 1]
    assert num_target_tokens(kept.labels) == 1 and kept.cut == len(whole.input_ids) - first - 1
    assert (
        encode(tokenizer, chat(CHAT[:2]), max_length=first).dropped
        == "no target left within max_length"
    )
    assert encode(tokenizer, chat(CHAT[:2]), first + 1, "drop").dropped == "longer than max_length"
    exact = encode(tokenizer, chat(CHAT[:2]), len(whole.input_ids), "drop")
    assert exact.dropped is None and exact.cut == 0


def test_rows_without_content_are_dropped_with_a_reason(twin: Any) -> None:
    tokenizer = twin(twins.CHATML)
    assert (
        encode(tokenizer, chat([CHAT[0], {"role": "assistant", "content": " "}])).dropped
        == "every answer is empty"
    )
    assert encode(tokenizer, Sample("s", "f:1", {}, text=" \n")).dropped == "empty text"


# ---- loading -------------------------------------------------------------------------------------


def test_configured_template_replaces_the_tokenizers_own(twin: Any, tmp_path: Path) -> None:
    folder = twins.make_tokenizer(tmp_path / "t", twins.CHATML)
    (tmp_path / "mine.jinja").write_text(twins.LLAMA3)
    tokenizer = load_tokenizer(
        ModelConfig(path=str(folder), chat_template=str(tmp_path / "mine.jinja"))
    )
    assert tokenizer.chat_template == twins.LLAMA3
    assert fingerprint(tokenizer) != fingerprint(load_tokenizer(ModelConfig(path=str(folder))))
    assert fingerprint(load_tokenizer(ModelConfig(path=str(folder)))) == fingerprint(
        twin(twins.CHATML)
    )


def test_tokenizer_faults_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="wanted a tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match="none that loads"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "broken")))
    good = twins.make_tokenizer(tmp_path / "good")
    with pytest.raises(UserError, match="Jinja file"):
        load_tokenizer(ModelConfig(path=str(good), chat_template=str(tmp_path / "none.jinja")))


def test_a_sentencepiece_model_alone_is_enough(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join("\n".join(twins.CORPUS).splitlines() * 20))
    folder = tmp_path / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = encode(tokenizer, Sample("s", "f:1", {}, text="The sky is blue."))
    assert encoded.input_ids == pieces.encode("The sky is blue.")
    got = answers(tokenizer, encode(tokenizer, chat(CHAT)))
    assert got == [SAID[0] + "</s>", SAID[1] + "</s>"]


# ---- real tokenizers -----------------------------------------------------------------------------

REAL = {
    "tokenizers/gpt2": "<|endoftext|>",
    "tokenizers/pythia": "<|endoftext|>",
    "tokenizers/llama2-32k": "</s>",
    "tokenizers/qwen": "<|im_end|>",
    "tokenizers/llama3": "<|eot_id|>",
    "models/base-8M": "<|end|>",
    "models/stories260K-hf": "</s>",
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_label_real_rows(material: Path, name: str) -> None:
    """On rows nobody made for it, the target text is the answer and its end token, turn by turn."""
    tokenizer = load_tokenizer(ModelConfig(path=str(material / name)))
    faults = Faults()
    files = [
        "general_glaive_multiturn.jsonl",
        "medicine_medquad6k.jsonl",
        "sharegpt_format_plain.json",
    ]
    for file in files:
        samples = [
            s
            for s, _ in zip(
                load_samples([str(material / "data" / file)], "auto", faults),
                range(15),
                strict=False,
            )
        ]
        # these templates know no tools
        encoder = Encoder(tokenizer, 10**6, dropped_content="count")
        for sample, encoded in zip(samples, encoder.encode(samples), strict=True):
            assert isinstance(encoded, Encoded)
            said = [m["content"] for m in sample.messages or [] if m["role"] == "assistant"]
            got = answers(tokenizer, encoded)
            assert [_plain(text) for text in got] == [_plain(text) + REAL[name] for text in said]
            bos = tokenizer.bos_token_id
            if bos is not None and bos != tokenizer.eos_token_id:
                assert encoded.input_ids.count(bos) <= 1
    assert not faults.count


def _plain(text: str) -> str:
    return "".join(text.split())


def test_the_plain_template_is_the_default(material: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(material / "tokenizers/llama2-32k")))
    assert tokenizer.chat_template == PLAIN_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=30),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5),
)
def test_targets_found_by_bisection_are_those_found_one_by_one(
    steps: list[tuple[int, int]], drawn: list[tuple[int, int]]
) -> None:
    """Offsets with gaps, of no width, and shared by the bytes of one character."""
    at, offsets = 0, []
    for gap, width in steps:
        offsets.append((at + gap, at + gap + width))
        at += gap + width
        if width == 4:
            offsets.append(offsets[-1])
    at, spans = 0, []
    for gap, width in drawn:
        spans.append((at + gap, at + gap + width))
        at += gap + width
    ids = list(range(len(offsets)))
    assert _labels(ids, offsets, spans) == _labels_one_by_one(ids, offsets, spans)
