"""One YAML file and `key=value` overrides -> one frozen, typed, fully resolved `Config`.

Unknown keys, wrong types, keys given twice and contradictions are raised together as one
`UserError`. Writes nothing. No torch import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grads_ds.config.config import Config, variant_problems
from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.config.text_file import text_of
from grads_ds.config.training import SftConfig
from grads_ds.config.validation import validation_sentence


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `a.b=c` overrides (values in YAML), validate.

    Raises UserError listing every problem.
    """
    path = Path(path)
    text = text_of(path, str(path), "a configuration file (YAML)")
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: wanted a mapping of keys; found"
            f" {'an empty file' if tree is None else type(tree).__name__}"
        )
    problems = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {item}: wanted key=value, for instance select.budget=0.1")
            continue
        problem = _assign(tree, key.strip().split("."), value, item)
        if problem:
            problems.append(problem)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [validation_sentence(item, Config) for item in error.errors()]
        # a section with a problem has been reported already
        with contextlib.suppress(ValidationError, TypeError):
            problems += variant_problems(
                SelectConfig(**tree.get("select", {})), SftConfig(**tree.get("sft", {}))
            )
        raise UserError(problems) from None
    except UserError as error:
        raise UserError(problems + error.problems) from None
    if problems:
        raise UserError(problems)
    return config


def _assign(tree: dict[str, Any], keys: list[str], text: str, item: str) -> str | None:
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            return f"--set {item}: {key} holds a value, not a group of keys"
        node = child
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"--set {item}: the value is not valid YAML; quote it"
    return None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML's own rule; PyYAML keeps the last one
    silently).
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key!r}; remove one", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)
