"""Numbers that select the same rows on every machine: rounding, keyed draws, shares of ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grads_ds.statistics import Floats, Ints, splitmix

_STEPS = float(2**32)


def rounded(values: Floats, unit: float = 1.0) -> Floats:
    """`values` rounded to multiples of unit / 2^32 (unit: a power of two, or a size that all
    machines agree on).
    """
    # in place: at ten million rows a fresh array costs more than the arithmetic
    scale = _STEPS / unit
    out = values * scale
    np.rint(out, out=out)
    out /= scale
    return out


def rounded_scalar(value: float) -> float:
    """A positive number kept to 32 significant bits."""
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.rint(mantissa * _STEPS) / _STEPS, exponent))


def random_keys(sample_id: Ints, seed: int, purpose: int = 0) -> NDArray[np.uint64]:
    """One well-mixed 64-bit key per sample (splitmix64 of seed, purpose and id). Uniform,
    independent of row order.
    """
    with np.errstate(over="ignore"):
        start = splitmix(
            np.array([seed], dtype=np.uint64)
            + np.uint64(0x632BE59BD9B4E019) * np.uint64(purpose + 1)
        )
        keys = sample_id.astype(np.uint64)
        keys += start
        return splitmix(keys)


def uniforms(keys: NDArray[np.uint64]) -> Floats:
    """Keys as numbers strictly between 0 and 1, exact in float64."""
    out = (keys >> np.uint64(12)).astype(np.float64)
    out += 0.5
    out /= float(2**52)
    return out
