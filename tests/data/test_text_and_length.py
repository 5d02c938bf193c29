"""BOS tokens, plain text, truncation, and how the tokens of a span are found."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample
from grads_ds.data.tokens import _labels, _labels_one_by_one, num_target_tokens
from tests.data import twins
from tests.data.test_tokens import CHAT, chat, encode, twin

__all__ = ["twin"]  # a fixture


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
