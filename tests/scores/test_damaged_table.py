"""No flipped bit of the score table's pages is read as a number: the file itself tells, also where
it is read without the run's record.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds import scores
from grads_ds.run_dir.storage import STORAGE, storage_status
from grads_ds.scores.read import arrow_table
from tests.scores.test_merge import RECORDING, write

FLIPS = 200


def test_no_flipped_bit_of_a_page_is_read_silently(tmp_path: Path) -> None:
    write(tmp_path / "s", list(range(50)), list(range(50, 90)))
    scores.merge(tmp_path / "s", RECORDING.key, np.arange(90), {})
    table = tmp_path / "s/table.parquet"
    whole, content = arrow_table(table), table.read_bytes()
    pages = pages_of(content)
    draw = np.random.default_rng(0)
    refused = 0
    for place in draw.choice(pages, FLIPS, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        table.write_bytes(damaged)
        found = read(table)
        if isinstance(found, Exception):
            refused += 1
            assert "CRC" not in str(found) or storage_status(found) == STORAGE
        else:
            assert found.equals(whole), f"byte {place} was read as it is"
    assert refused > 0.8 * FLIPS  # a page's header has room that nobody reads


def read(table: Path) -> pa.Table | Exception:
    """The table, or why it is not read."""
    try:
        return arrow_table(table)
    except (OSError, ValueError) as error:
        return error


def pages_of(content: bytes) -> list[int]:
    """The places of the bytes of all pages."""
    found: list[int] = []
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        found += range(start, start + column.total_compressed_size)
    return found
