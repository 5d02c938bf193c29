"""Section `select`: how the subset is chosen from the score table."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from grads_ds.config.columns import LAYER_GROUPS
from grads_ds.config.errors import nearest
from grads_ds.config.record import Record
from grads_ds.config.row_filter import Filter

GUIDED_SIMILARITY = 0.5  # of near-duplicates, where guided compares rows
COSINE = "anchor_cosine_<group> | anchor_contrast_<group>"


class SelectConfig(Record):
    """How the subset is chosen from the score table (docs/selection.md tells what each choice
    means).
    """

    # method -> the extra columns it cannot do without (" | ": either); its function stands in
    # selection/published.py, or in the file that selection/methods.py takes it from
    METHODS: ClassVar[dict[str, tuple[str, ...]]] = {
        "grads": (),
        "guided": (),
        "random": (),
        "length_matched": (),
        "loss": (),
        "perplexity_band": (),
        "length": (),
        "grand": (),
        "el2n": ("el2n",),
        "ifd": ("ifd",),
        "low_ifd": ("ifd",),
        "prompt_gain": ("prompt_gain",),
        "k_center": (),
        "snr": ("<group>_grad_norm_early",),
        "anchor_conflict": (COSINE,),
        "orthogonal": (COSINE,),
        "less": ("anchor_inner_product_<group> | anchor_contrast_<group>",),
        "hidden_nearest": ("anchor_hidden_cosine",),
        "mixture": (),
    }
    COMBINATIONS: ClassVar[tuple[str, ...]] = ("sum", "product", "l2", "zscore", "joint")

    method: str = Field(
        "grads",
        description=(
            "guided, grads, a published criterion (docs/selection.md) or the name of a plugin"
        ),
    )
    budget: float | Literal["auto"] = Field(
        0.05,
        description=(
            "fraction (0, 1] of the pool (1 is all of it), number of samples (>= 2), or auto"
        ),
    )
    budget_tokens: int | None = Field(
        None, ge=1, description="budget in tokens of the chosen samples; replaces budget"
    )
    signal: str = Field(
        "product",
        description=(
            "how norms become one: sum, product, l2, zscore, joint, or one group's name, e.g."
            " lm_head, total"
        ),
    )
    groups: list[str] = Field(
        default_factory=lambda: ["embedding", "lm_head"],
        min_length=1,
        description="parameter groups that signal combines",
    )
    scale: Literal["log", "linear"] = Field(
        "log", description="scale on which the signal's density is estimated"
    )
    standardise: Literal["robust", "none"] = Field(
        "robust", description="robust: each group's norms over their median"
    )
    length_correction: bool = Field(
        False, description="norms less their trend in the number of target tokens (log-log)"
    )
    bandwidth: Literal["silverman", "scott", "isj"] | float = Field(
        "silverman", description="kernel width: a rule, or a number in units of the signal"
    )
    boundary: Literal["auto", "mirror", "none"] = Field(
        "auto", description="mirror the density at zero; auto: on the linear scale only"
    )
    region: Literal["density", "magnitude", "mass", "band", "sample"] = Field(
        "density", description="which part of the signal's distribution is chosen"
    )
    band: tuple[float, float] = Field(
        (0.25, 0.75), description="quantiles of region band and of method perplexity_band"
    )
    forget_less: float = Field(
        0.0,
        ge=0,
        description=(
            "grads: places (share of the pool) lost per unit of conflict with the reference set"
        ),
    )
    mixture: dict[str, float] = Field(
        default_factory=dict, description="method mixture: weight of each method's rank"
    )
    filters: list[Filter] = Field(
        default_factory=list,
        description=(
            "rows that are never chosen: {column, reject, cut, by_length, against}; method guided"
            " without any finds its own"
        ),
    )
    spread: Literal["doubt", "rank", "reference", "random", "density"] = Field(
        "doubt",
        description=(
            "guided: order of what the filters leave: at random among rows that no signal doubts"
            " and then the others, by the worst rank on the signals that see, on these and nearness"
            " to probe.anchor (rows unlike its rows are rejected), at random, or drawn by density"
        ),
    )
    strata: str | None = Field(
        None,
        description=(
            "source, a data.metadata field, or length: spread the budget over its values; guided"
            " without one takes length"
        ),
    )
    strata_balance: Literal["proportional", "equal"] = Field(
        "proportional", description="each stratum's share: as in the pool, or the same for all"
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = Field(
        "auto",
        description=(
            "Jaccard similarity from which a later sample is dropped and replaced; null keeps all;"
            " auto is 0.5 for guided, and null for the others"
        ),
    )
    near_duplicate_kept: Literal["auto", "first", "likeliest", "likeliest_last"] = Field(
        "auto",
        description=(
            "which of near-duplicates stays: the one that stands first in the order, or in its"
            " place the one of lowest loss, for which all rows of the pool are compared; with _last"
            " it comes after the rows that are like no other; auto is likeliest_last for guided,"
            " and first for the others"
        ),
    )
    order: Literal["preference", "signal", "shuffled", "pool"] = Field(
        "preference", description="order of selected.jsonl"
    )
    weights: Literal["none", "inverse_density", "preference"] = Field(
        "none",
        description=(
            "column weight of selection.parquet (mean 1 over the chosen) for weighted training"
        ),
    )
    plugin_options: dict[str, Any] = Field(
        default_factory=dict, description="handed to a plugin method as it stands"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="named subsets chosen as well as the main one: settings that differ from it",
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in cls.METHODS:
            plugins = sorted(entry.name for entry in entry_points(group="grads_ds.selection"))
            if value not in plugins:
                raise ValueError(
                    f"{value!r} is not a selection method{nearest(value, [*cls.METHODS, *plugins])}"
                )
        return value

    @field_validator("signal")
    @classmethod
    def _known_signal(cls, value: str) -> str:
        known = [*cls.COMBINATIONS, *LAYER_GROUPS, "total"]
        if value not in known:
            raise ValueError(f"{value!r} is not a signal{nearest(value, known)}")
        return value

    @field_validator("groups")
    @classmethod
    def _known_groups(cls, value: list[str]) -> list[str]:
        known = [*LAYER_GROUPS, "total"]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is not a layer group{nearest(name, known)}")
        return list(dict.fromkeys(value))

    @field_validator("bandwidth")
    @classmethod
    def _positive(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError(f"wanted silverman, scott, isj or a number above 0; found {value:g}")
        return value

    @field_validator("band")
    @classmethod
    def _quantiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(
                f"wanted two quantiles, low before high, within 0 and 1; found {list(value)}"
            )
        return value

    @model_validator(mode="after")
    def _mixture_fits(self) -> SelectConfig:
        if self.method == "mixture" and not self.mixture:
            raise ValueError(
                "method mixture wants mixture: {method: weight, ...}; found none; name at least one"
                " method"
            )
        for name, weight in self.mixture.items():
            if name == "mixture":
                raise ValueError("a mixture cannot hold itself; remove mixture from select.mixture")
            type(self)._known_method(name)
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"the weight of {name} in mixture must be above 0; found {weight:g}"
                )
        if self.signal == "joint" and len(self.groups) != 2:
            raise ValueError(
                f"signal joint wants two groups; found {self.groups}; give groups: [embedding,"
                " lm_head]"
            )
        return self

    @field_validator("budget")
    @classmethod
    def _a_budget(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not (0 < value <= 1 or (value >= 2 and value % 1 == 0)):
            raise ValueError(
                "wanted a fraction above 0 and up to 1, a whole number of samples from 2 on, or"
                f" auto; found {value:g}"
            )
        return value

    def strata_field(self) -> str | None:
        """The field whose values share the budget; None for no strata."""
        return self.strata or ("length" if self.method == "guided" else None)

    def similarity(self) -> float | None:
        """The similarity of near-duplicates; None where they are kept."""
        if self.near_duplicates == "auto":
            return GUIDED_SIMILARITY if self.method == "guided" else None
        return self.near_duplicates

    def duplicate_kept(self) -> str:
        """Which of near-duplicates stays: first, likeliest or likeliest_last."""
        if self.near_duplicate_kept == "auto":
            return "likeliest_last" if self.method == "guided" else "first"
        return self.near_duplicate_kept

    def resolve(self, name: str | None) -> SelectConfig:
        """The settings of one named subset (None: the main one), without `variants`."""
        base = self.model_dump(exclude={"variants"})
        return SelectConfig(**(base | (self.variants[name] if name else {})))
