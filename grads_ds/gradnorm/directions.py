"""Reference gradients that samples are compared with, and what the comparison gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from grads_ds.gradnorm.sites import SitePlan

ONLY = ""  # the name of a reference that is set alone


@dataclass(frozen=True)
class Direction:
    """Each sample's gradient against one reference gradient: group -> float64 [S]."""

    inner_products: dict[str, Tensor]
    cosines: dict[str, Tensor]


@dataclass(frozen=True)
class References:
    """Reference gradients by parameter name, and the norm of each group made of them; `names` of
    the references, in the order of both.
    """

    names: tuple[str, ...] = ()
    gradients: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: SitePlan, named: Mapping[str, Mapping[str, Tensor]]) -> References:
        """Checks them against the plan.

        Raises ValueError for unknown names, for groups given in part, and for references of
        different parameters.
        """
        for gradients in named.values():
            _check_reference(plan, gradients)
        first = next(iter(named.values()), {})
        if any(gradients.keys() != first.keys() for gradients in named.values()):
            raise ValueError(
                "references must be of the same parameters; found"
                f" {', '.join(f'{name}: {len(of)}' for name, of in named.items())} parameters"
            )
        squares: dict[str, list[float]] = {}
        for parameter in first:
            sums = squares.setdefault(plan.groups[parameter], [0.0] * len(named))
            for at, gradients in enumerate(named.values()):
                sums[at] += float((gradients[parameter].double() ** 2).sum())
        return cls(
            tuple(named),
            {parameter: tuple(of[parameter] for of in named.values()) for parameter in first},
            {group: [value**0.5 for value in sums] for group, sums in squares.items()},
        )

    def directions(
        self, inner: Mapping[str, Tensor], norms: Mapping[str, Tensor]
    ) -> dict[str, Direction]:
        """Inner products by group, [K, S], and the samples' norms, [S] -> each reference's."""
        return {
            name: Direction(
                {group: value_KS[at] for group, value_KS in inner.items()},
                {
                    group: value_KS[at] / (norms[group] * self.norms[group][at]).clamp_min(1e-300)
                    for group, value_KS in inner.items()
                },
            )
            for at, name in enumerate(self.names)
        }


def _check_reference(plan: SitePlan, gradients: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(gradients) - set(plan.groups))
    if unknown:
        raise ValueError(
            f"reference gradients of parameters that are not recorded: {', '.join(unknown[:5])}"
        )
    given = {plan.groups[name] for name in gradients}
    missing = [
        name for name, group in plan.groups.items() if group in given and name not in gradients
    ]
    if missing:
        raise ValueError(
            f"a reference must hold every parameter of a group; missing: {', '.join(missing[:5])}"
        )
