"""Problems of the user's data: collected in the order found, raised together as one UserError."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from grads_ds.config.errors import UserError

SHOWN = 20  # problems printed in full; the rest are counted


@dataclass
class Problems:
    """Everything found wrong, in the order found; `raise_if_any` turns it into one UserError."""

    shown: list[str] = field(default_factory=list)
    count: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Note what is no problem and yet has to be said, once."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, where: str, wanted: str, found: str, change: str) -> None:
        """Note one problem. Only the first SHOWN keep their text."""
        self.add_text(f"{where}: wanted {wanted}; found {found}; {change}")

    def add_text(self, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(text)

    def take(self, others: Problems) -> None:
        """Add what another list holds, behind what is there."""
        self.count += others.count
        self.shown += others.shown[: SHOWN - len(self.shown)]
        for text in others.notes:
            self.note(text)

    def raise_if_any(self) -> None:
        """Raise UserError with the problems shown and the number of those left out."""
        if self.count:
            more = self.count - len(self.shown)
            raise UserError(
                self.shown + ([f"... and {more:,} more of this kind or another"] if more else [])
            )


class RowProblem(Exception):
    """One row does not fit: what was wanted, what was found, what to change."""

    def __init__(self, wanted: str, found: str, change: str):
        self.wanted, self.found, self.change = wanted, found, change
        super().__init__(f"wanted {wanted}; found {found}; {change}")


def found_text(value: Any) -> str:
    """A value as a message shows it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
