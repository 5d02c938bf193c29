"""Faults of the user's data: collected in the order found, raised together as one UserError."""

from __future__ import annotations

from dataclasses import dataclass, field

from grads_ds.config.errors import UserError

SHOWN = 20  # faults printed in full; the rest are counted


@dataclass
class Faults:
    """Everything found wrong, in the order found; `raise_if_any` turns it into one UserError."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, wanted: str, found: str, change: str) -> None:
        """Note one fault. Only the first SHOWN keep their text."""
        self.add_text(f"{where}: wanted {wanted}; found {found}; {change}")

    def add_text(self, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(text)

    def raise_if_any(self) -> None:
        """Raise UserError with the faults shown and the number of those left out."""
        if self.count:
            more = self.count - len(self.shown)
            raise UserError(
                self.shown + ([f"... and {more:,} more of this kind or another"] if more else [])
            )


class RowFault(Exception):
    """One row does not fit: what was wanted, what was found, what to change."""

    def __init__(self, wanted: str, found: str, change: str):
        self.wanted, self.found, self.change = wanted, found, change
        super().__init__(f"wanted {wanted}; found {found}; {change}")
