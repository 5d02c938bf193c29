"""Losses by token: the text is whole, each piece has its own tokens' loss, and what cannot be shown
is said.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from grads_ds import scores
from grads_ds.report.read_run import Run, read_run
from grads_ds.report.shaded_tokens import pieces, shaded_rows
from tests.report.synthetic_run import make_run, write_json

TEXT = "Why?\u202e F\u00fc\u00dfe \u6f22\u5b57 </b>"


def bytes_tokenizer() -> Tokenizer:
    """One token a byte: characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_piece_is_whole_characters_with_the_mean_of_their_losses() -> None:
    tokenizer = bytes_tokenizer()
    ids = np.array(tokenizer.encode(TEXT).ids)
    first = len(b"Why?")
    labels = np.where(np.arange(len(ids)) < first, -100, ids)
    losses = np.arange(len(ids) - first, dtype=float)
    found = pieces(tokenizer, ids, labels, losses)
    assert found[0] == ["Why?", None]
    assert "".join(text for text, _ in found) == TEXT.replace("\u202e", "\\u202e")
    place = 0
    for text, loss in found[1:]:
        size = len(text.replace("\\u202e", "\u202e").encode())
        assert loss == pytest.approx(np.mean(losses[place : place + size]), rel=1e-2)
        place += size
    assert place == len(losses)


def test_long_rows_are_cut_around_the_first_target() -> None:
    tokenizer = bytes_tokenizer()
    ids = np.array(tokenizer.encode("a" * 500 + "b" * 500).ids)
    labels = np.where(np.arange(1000) < 500, -100, ids)
    found = pieces(tokenizer, ids, labels, np.ones(500), most=100)
    assert found[0] == ["…", None] and found[-1] == ["…", None]
    assert found[1] == ["a" * 25, None] and len(found) == 3 + 75


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose parts hold the losses of the tokens of rows 0 and 1; row 1 was prepared anew."""
    config = make_run(tmp_path_factory.mktemp("tokens"), n=20, variants=False)
    folder = Path(config.run_dir)
    recording = scores.Recording({"model": "m"})
    schema = scores.schema(["token_losses"])
    writer = scores.PartWriter(folder / "scores", 0, recording, schema)
    samples = {"sample_id": [0, 1], "sample_hash": ["a", "b"], "num_tokens": [3, 3]}
    losses = [np.array([0.5, 2.0]), np.array([1.0])]
    writer.add(scores.make_rows(samples, np.ones(2), np.full(2, 2), {}, {"token_losses": losses}))
    writer.flush()
    write_json(folder / "scores/manifest.json", {"key": recording.key})
    model = folder / "probe/model"
    model.mkdir(parents=True)
    tokenizer = bytes_tokenizer()
    tokenizer.save(str(model / "tokenizer.json"))
    ids = tokenizer.encode("abc").ids
    pool = folder / "prepared/pool"
    for file in json.loads((pool / "state.json").read_text())["_data_files"]:
        path = pool / file["filename"]
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            table = reader.read_all()
        n = len(table)
        table = table.append_column("input_ids", pa.array([ids] * n, pa.list_(pa.int32())))
        table = table.append_column(
            "labels", pa.array([[-100, *ids[1:]]] * n, pa.list_(pa.int32()))
        )
        with pa.ipc.new_stream(path, table.schema) as out:
            out.write_table(table)
    return read_run(config, folder)


def test_recorded_losses_are_read_from_the_parts(recorded: Run) -> None:
    shaded, missing = shaded_rows(recorded, [0, 1, 2])
    assert shaded == {0: [["a", None], ["b", 0.5], ["c", 2.0]]} and missing == ""


def test_why_no_losses_are_shown_is_said(recorded: Run, tmp_path: Path) -> None:
    assert "name token_losses in probe.extras" in shaded_rows(recorded, [5])[1]
    assert "prepared anew" in shaded_rows(recorded, [1])[1]
    elsewhere = dataclasses.replace(recorded, run_dir=tmp_path)
    assert "not recorded" in shaded_rows(elsewhere, [0])[1]
    (recorded.run_dir / "probe/model/tokenizer.json").unlink()
    assert "tokenizer.json" in shaded_rows(recorded, [0])[1]
