"""The score table: parts written while the probe goes, merged into one table that holds every
sample exactly once.

`rows` its columns and the rows of a micro-batch, `totals` what ranks add up, `parts` what ranks
append, `merge` parts -> `scores/table.parquet` and `scores/manifest.json`, `read` a finished table,
`token_losses` the losses that only parts have. gradnorm/scoring computes what is recorded. No torch
import.
"""

from grads_ds.scores.merge import IncompleteScores, merge
from grads_ds.scores.parts import PartWriter, Recording, finished, prepare_parts
from grads_ds.scores.rows import make_rows, schema
from grads_ds.scores.totals import Totals, summed_columns

__all__ = [
    "IncompleteScores",
    "PartWriter",
    "Recording",
    "Totals",
    "finished",
    "make_rows",
    "merge",
    "prepare_parts",
    "schema",
    "summed_columns",
]
