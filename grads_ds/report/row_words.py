"""The choice explained for one row, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grads_ds.config.errors import printable
from grads_ds.report.number_words import compact, percent
from grads_ds.report.read_run import Run
from grads_ds.statistics import Floats, Ints

UNPLACED = ("rank", "density")  # columns that say where a row lies by themselves


class RowWords:
    """Explains rows of one run; holds every column in order, to find a row's place in it.

    `columns`: name -> values of all rows, float64 [N], NaN where a row has none.
    """

    def __init__(self, run: Run, columns: Mapping[str, Floats]):
        self.run, self.columns = run, columns
        self._ordered = {
            name: np.sort(values[np.isfinite(values)]) for name, values in columns.items()
        }
        rank = run.subsets[0].rank
        placed = np.array([]) if rank is None else rank[rank >= 1]
        self._ranked = len(placed)
        chosen = run.subsets[0].selected
        last = np.array([]) if rank is None else rank[chosen & (rank >= 1)]
        self._last = int(last.max()) if len(last) else 0

    def explain(self, row: int) -> list[str]:
        """Why the row is in or out, where its numbers lie among all rows', and which other subsets
        have it.
        """
        said = [self._verdict(row)]
        placed = [self._placed(name, row) for name in self.columns if name not in UNPLACED]
        placed = [one for one in placed if one]
        if placed:
            said.append(f"Among all rows with such a value: {'; '.join(placed)}.")
        else:
            said.append("It has no scores.")
        others = self.run.subsets[1:]
        if others:
            inside = [printable(s.name) for s in others if s.selected[row]]
            outside = [printable(s.name) for s in others if not s.selected[row]]
            parts = [f"in {', '.join(inside)}"] * bool(inside)
            parts += [f"not in {', '.join(outside)}"] * bool(outside)
            said.append(f"Of the other subsets it is {' and '.join(parts)}.")
        return said

    def _verdict(self, row: int) -> str:
        main = self.run.subsets[0]
        chosen = bool(main.selected[row])
        reason = "" if main.reason is None else str(main.reason[row].as_py() or "")
        method = printable(str(main.report.get("method", "?")))
        said = f"{'Selected' if chosen else 'Not selected'} by {method}"
        why = printable(reason.removeprefix("in: ").removeprefix("out: "))
        said += f": {why}." if why else "; the selection gives no reason."
        if main.rank is not None and main.rank[row] >= 1:
            said += f" It is number {int(main.rank[row]):,} of {self._ranked:,} in the rule's order"
            said += f"; the last selected row is number {self._last:,}." if self._last else "."
        return said

    def _placed(self, name: str, row: int) -> str:
        value, ordered = float(self.columns[name][row]), self._ordered[name]
        if not np.isfinite(value):
            return ""
        below = int(np.searchsorted(ordered, value, "left"))
        if below == 0:
            place = "the lowest"
        elif below == len(ordered) - 1:
            place = "the highest"
        else:
            place = f"above {percent(below / len(ordered))}"
        return f"{name} {compact(value)} is {place}"


def explained(run: Run, columns: Mapping[str, Floats], rows: Ints) -> list[list[str]]:
    """The sentences of each of `rows`, int64 indices into the columns."""
    words = RowWords(run, columns)
    return [words.explain(int(row)) for row in rows]
