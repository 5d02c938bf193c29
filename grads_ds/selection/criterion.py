"""What a criterion is: (table of eligible rows, settings, seed) -> Scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.density import Density
from grads_ds.statistics import Floats


@dataclass(frozen=True)
class Scored:
    """What a criterion says of each row: `preference` (higher first, NaN: cannot judge), the
    `signal` it looks at, that signal's density where it is part of the method, and notes for
    selection.json.
    """

    preference: Floats
    signal: Floats
    density: Density | None = None
    gain: Floats | None = None  # what budget auto weighs; None: the method has no shape to adapt to
    notes: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    across_strata: bool = False  # the order is taken as it is, not in strata
    behind: NDArray[np.bool_] | None = None  # rows that come after all others, of any stratum


Criterion = Callable[[ScoreTable, SelectConfig, int], Scored]
