"""Makes the plan of what a recorder measures, from the model's structure alone.

Runs once, when a recorder is made. What a forward shows later (a weight used elsewhere, rows in
another order) is `try_model.py`'s.
"""

from __future__ import annotations

from torch import nn

from grads_ds.gradnorm.groups import group_of, parse_layers
from grads_ds.gradnorm.rules import table
from grads_ds.gradnorm.sites import SitePlan


def plan_sites(model: nn.Module, layers: str | tuple[str, ...] | list[str]) -> SitePlan:
    """Finds every parameter of the requested groups and the rule for it.

    Raises ValueError for what cannot be recorded.
    """
    requested = parse_layers(layers)
    _refuse_compiled(model)
    embedding, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    head = _active(head)
    table_weight, head_weight = getattr(embedding, "weight", None), getattr(head, "weight", None)
    head_bias = getattr(head, "bias", None)
    first_name: dict[int, str] = {}
    groups: dict[str, str] = {}
    owners = []
    for path, module in model.named_modules():
        own: dict[str, str] = {}
        for local, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue  # quantised to integers: frozen, without a gradient
            name = first_name.setdefault(id(parameter), f"{path}.{local}" if path else local)
            if name not in groups:
                is_head = parameter is head_weight or parameter is head_bias or module is head
                groups[name] = group_of(name, module, parameter is table_weight, is_head)
            own[local] = name
        if own:
            owners.append((path, module, own))
    tied = table_weight is not None and table_weight is head_weight
    wanted = set(requested) | ({"embedding"} if tied and "lm_head" in requested else set())
    missing = [group for group in requested if group == "lora" and group not in groups.values()]
    if missing and "other" not in requested:
        raise ValueError(
            "layers: wanted adapters for 'lora', found none in this model; record other layers or"
            " pass the model with its adapters (peft.get_peft_model)"
        )
    sites = []
    for path, module, own in owners:
        own = {local: name for local, name in own.items() if groups[name] in wanted}
        if own:
            sites.append(table.recognise(path, module, own))
    groups = {name: group for name, group in groups.items() if group in wanted}
    ends = {"weight": head_weight, "bias": head_bias}
    head_names = {local: first_name.get(id(p), "") for local, p in ends.items() if p is not None}
    head_names = {local: name for local, name in head_names.items() if name in groups}
    return SitePlan(tuple(sites), groups, requested, embedding, head, tied, head_names)


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if (
            type(module).__name__ == "OptimizedModule"
            or getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise ValueError(
                "gradient norms are read by hooks, which torch.compile removes; pass the model"
                " before it is compiled"
            )


def _end(model: nn.Module, getter: str) -> nn.Module:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"the model must offer {getter}() as Hugging Face causal language models do;"
            f" {type(model).__name__} does not"
        )
    return found


def _active(head: nn.Module) -> nn.Module:
    """The head itself, where PEFT keeps a trained copy of it beside the original
    (modules_to_save).
    """
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    weight = getattr(head, "weight", None)
    return next((m for m in copies.values() if getattr(m, "weight", None) is weight), head)
