"""The columns of the score table: the one list of their names, who records each, and how to ask for
it.

Everything that knows a column by name reads this list: the config's `probe.extras`, the table's
schema, the recorder, the requirements of selection methods and the messages. It lies with the
config because the config checks names against it. `<group>` in a name stands for each recorded
layer group. To add a column, add a line here and its value to `probe/extra_columns.py`; a setting
of its own goes into `config/probe.py` and, by name, into `KEYS_OF_EXTRAS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LAYER_GROUPS = ("embedding", "lm_head", "attention", "mlp", "norm", "lora")
GROUP = "<group>"
NORM_SUFFIX = "_grad_norm"
STATUSES = ("ok", "no_target", "nonfinite")
REFERENCE = "reference"  # the kind of control that is right: rows of probe.anchor
TOKEN_LOSSES = "token_losses"  # a list for each row, in the parts alone
STEP = "step"  # in tables recorded while training: the optimizer step whose model gave the row

# (name, Arrow type) of the columns that every table holds, before and after the float32 ones
FIRST = (
    ("sample_id", "int64"),
    ("sample_hash", "string"),
    ("num_tokens", "int32"),
    ("num_target_tokens", "int32"),
    ("loss", "float32"),
)
LAST = (("status", "string"),)


@dataclass(frozen=True)
class ExtraColumn:
    """A column that the probe records on request: the item of `probe.extras` that asks for
    it, what it holds, and whether it is taken against `probe.anchor`.
    """

    name: str
    extra: str
    about: str
    reference: bool = False

    def names(self, groups: Iterable[str]) -> list[str]:
        """The column's names in a table that records these groups."""
        if GROUP not in self.name:
            return [self.name]
        return [self.name.replace(GROUP, group) for group in groups]

    def matches(self, name: str) -> bool:
        """Whether `name` is this column of some group."""
        before, group, after = self.name.partition(GROUP)
        if not group:
            return name == self.name
        return (
            name.startswith(before)
            and name.endswith(after)
            and name[len(before) : len(name) - len(after)] in (*LAYER_GROUPS, GROUP)
        )


EXTRA_COLUMNS = (
    ExtraColumn("ifd", "ifd", "loss with the prompt over loss without it"),
    ExtraColumn("el2n", "el2n", "mean length of softmax less one-hot over the targets"),
    ExtraColumn("surprise", "surprise", "mean loss less mean entropy over the targets"),
    ExtraColumn(
        "conflict", "surprise", "mean of max(0, loss - entropy) (1 - entropy / log vocabulary)"
    ),
    ExtraColumn("prompt_gain", "prompt_gain", "mean loss under other rows' prompts less own"),
    ExtraColumn("el2n_gain", "prompt_gain", "EL2N under other rows' prompts less own"),
    ExtraColumn("norm_gain", "prompt_gain", "head's norm under other rows' prompts less own"),
    ExtraColumn(
        "anchor_inner_product_<group>", "anchor", "inner product with the reference gradient", True
    ),
    ExtraColumn("anchor_cosine_<group>", "anchor", "cosine with the reference gradient", True),
    ExtraColumn(
        "anchor_contrast_<group>",
        "contrast",
        "cosine with the reference gradient less cosine with the pool's mean gradient",
        True,
    ),
    ExtraColumn(
        "anchor_hidden_cosine",
        "hidden",
        "cosine of mean hidden states with the reference set's, both less the pool's mean",
        True,
    ),
    ExtraColumn(
        "row_fisher", "fisher", "squared head-row norms, weighted by the reference set's", True
    ),
    ExtraColumn(TOKEN_LOSSES, TOKEN_LOSSES, "each target token's loss, which the report shades"),
    ExtraColumn("<group>_grad_norm_early", "early", "the norm before the preliminary training"),
)
EXTRAS = tuple(dict.fromkeys(column.extra for column in EXTRA_COLUMNS))
# key of section probe -> the extras that it is for. The recording depends on a key that is not
# here whatever is asked for.
KEYS_OF_EXTRAS = {
    "anchor": tuple(dict.fromkeys(column.extra for column in EXTRA_COLUMNS if column.reference)),
    "other_prompts": ("prompt_gain",),
    "contrast_rows": ("contrast", "hidden"),
}
DRAWING = ("contrast", "hidden", "prompt_gain")  # extras that also look at drawn rows of the pool


def norm_columns(layers: Iterable[str] | str) -> list[str]:
    """Names of the norm columns for the recorded groups; `total` only when all are recorded."""
    names = [*LAYER_GROUPS, "other"] if layers == "all" else list(layers)
    return [name + NORM_SUFFIX for name in names] + (
        ["total" + NORM_SUFFIX] if layers == "all" else []
    )


def compared_groups(layers: Iterable[str] | str) -> list[str]:
    """The groups of columns with `<group>`: those recorded, less what no group names."""
    return list(LAYER_GROUPS) if layers == "all" else list(layers)


def extra_columns(extras: Iterable[str], layers: Iterable[str] | str) -> list[str]:
    """Names of the columns that these items of `probe.extras` record, in the table's order."""
    asked, groups = set(extras), compared_groups(layers)
    return [
        name for column in EXTRA_COLUMNS if column.extra in asked for name in column.names(groups)
    ]


def how_to_record(name: str) -> str:
    """What to change in the config so that the probe records the column `name`."""
    for column in EXTRA_COLUMNS:
        if column.matches(name):
            anchor = " and name its set in probe.anchor" if column.reference else ""
            return f"add {column.extra} to probe.extras{anchor}"
    if name.endswith(NORM_SUFFIX):
        return "add the group to probe.layers"
    return "no item of probe.extras gives it"


def idle_keys(extras: Iterable[str]) -> set[str]:
    """Keys of section probe that are for other extras than these."""
    asked = set(extras)
    return {key for key, extras_of in KEYS_OF_EXTRAS.items() if not asked & set(extras_of)}


def wants_reference(extras: Iterable[str]) -> bool:
    """Whether any of these extras is taken against `probe.anchor`."""
    asked = set(extras)
    return any(column.reference and column.extra in asked for column in EXTRA_COLUMNS)
