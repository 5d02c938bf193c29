"""Changes a plan by what a trial forward showed: which calls use which parameter, and whether rows
belong to the samples that their place says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.sites import Site, SitePlan
from grads_ds.gradnorm.trial.call_log import Call, CallLog

_NOISE = 1e-3  # share of a change (of squares) that may fall on other samples' rows


class Checks:
    """Whether tensors of the first run changed in the second where they may, and only there."""

    def __init__(self, layout: Layout, touched_BT: Tensor, first: CallLog, second: CallLog) -> None:
        # what padding does is nobody's
        self.touched_BT = touched_BT | ~layout.real
        self.alone = layout.num_samples == 1
        again: dict[tuple[int, int], Call] = {}
        for log in (second, first):
            turns: Counter[int] = Counter()
            for call in log.calls:
                key = (id(call.module), turns[id(call.module)])
                turns[id(call.module)] += 1
                if log is second:
                    again[key] = call
                else:
                    call.again = again.get(key)
        self.counts = Counter(id(call.module) for call in first.calls)

    def right(self, call: Call, which: str, shared: bool = False) -> bool:
        """Whether the call's "inputs" or "outputs" change for the touched samples alone. shared:
        tensors that belong to no sample are allowed, if they do not change.
        """
        if call.again is None:
            return False
        before, after = getattr(call, which), getattr(call.again, which)
        if set(before) != set(after):
            return False
        return all(self._tensor(before[place], after[place], which, shared) for place in before)

    def looked_up(self, call: Call) -> bool:
        """Whether rows of a table belong to the samples by their place, or to the positions of one
        row that all samples share.
        """
        rows, length = self.touched_BT.shape
        if call.again is None or set(call.outputs) != {0} or self.alone:
            return self.alone
        before, after = call.outputs[0], call.again.outputs.get(0)
        if after is None or before.shape != after.shape:
            return False
        if before.shape == (1, length):
            return True
        if torch.equal(before, after):  # positions, the same for all samples
            return before.shape == (rows, length) and rows != length
        return self._tensor(before, after, "outputs", False)

    def _tensor(self, before: Tensor, after: Tensor, which: str, shared: bool) -> bool:
        if before.shape != after.shape:
            return False
        if self.alone:
            return True
        change = (after - before).double().square()
        moved = float(change.sum()) > 1e-9 * float(before.double().square().sum())
        owner = self._owner(before.shape)
        if owner is None:
            return shared and not moved
        if not moved:  # it depends on no sample: shared by all, unless it is nothing at all
            return which == "inputs" or not bool(before.any())
        owned = owner.reshape(owner.shape + (1,) * (change.dim() - owner.dim()))
        return float((change * ~owned).sum()) <= _NOISE * float(change.sum())

    def _owner(self, shape: torch.Size) -> Tensor | None:
        """Which leading rows of a fingerprint the touched samples own, by their place."""
        rows, length = self.touched_BT.shape
        if shape[:2] == (rows, length):
            return self.touched_BT
        if shape[:1] == (rows * length,):
            return self.touched_BT.reshape(-1)
        if len(shape) == 3 and shape[0] == rows and shape[2] == length:
            return self.touched_BT[:, None, :].expand(shape)
        return None


class _Places:
    """Where each parameter stands, in modules and in the modules around them."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.total: Counter[str] = Counter()
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.total[self.names[id(parameter)]] += 1
        self._inside: dict[int, dict[str, list[str]]] = {}

    def inside(self, module: nn.Module, name: str) -> list[str]:
        """Paths of the parameter in the module; none unless all its places are in there."""
        if id(module) not in self._inside:
            found: dict[str, list[str]] = {}
            for path, part in module.named_modules():
                for local, parameter in part._parameters.items():
                    if parameter is not None:
                        here = f"{path}.{local}" if path else local
                        found.setdefault(self.names[id(parameter)], []).append(here)
            self._inside[id(module)] = found
        paths = self._inside[id(module)].get(name, [])
        return paths if len(paths) == self.total[name] else []


def reassigned(
    model: nn.Module, plan: SitePlan, log: CallLog, checks: Checks, replaced_head: bool
) -> SitePlan:
    """The plan, with every parameter whose uses do not fit its rule measured elsewhere.

    replaced_head: the head did not run in this forward, and its own pass measures it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    modules = {id(module): module for module in model.modules()}
    places = _Places(model)
    sites_of: dict[str, list[Site]] = {}
    for site in plan.sites:
        for name in site.parameters.values():
            sites_of.setdefault(name, []).append(site)
    called = {id(call.module) for call in log.calls}
    ruled = {id(site.module): site for site in plan.sites if site.rule != "rerun"}
    moved: dict[int, list[str]] = {}  # id of a module -> parameters it is run again for
    split: dict[int, bool] = {}
    one_by_one, idle = set(), set()
    for name, sites in sites_of.items():
        calls = log.uses.get(name, [])
        if replaced_head and name in plan.of_the_head_alone():
            if calls:
                one_by_one.add(name)
            continue
        if not calls:  # unused, or used by code that cannot be watched
            own = {id(site.module) for site in sites} & called
            calls = [call for call in log.calls if id(call.module) in own]
            if not calls:
                idle.add(name)
                continue
        if all(_fits(name, call, ruled, checks) for call in calls):
            continue
        home = _home(plan, name, calls, checks, places)
        if home is None:
            one_by_one.add(name)
        else:
            moved.setdefault(id(home.module), []).append(name)
            split[id(home.module)] = checks.right(home, "inputs", shared=True)
    # experts that no token of this batch was routed to stand beside those that are run again
    for name in sorted(idle):
        around = [key for key in moved if places.inside(modules[key], name)]
        if around:
            moved[max(around, key=lambda key: len(paths[key]))].append(name)
            idle.discard(name)
    gone = one_by_one | {name for names in moved.values() for name in names}
    sites_kept = []
    for site in plan.sites:
        left = {local: name for local, name in site.parameters.items() if name not in gone}
        if left:
            sites_kept.append(replace(site, parameters=left))
    for key, names in moved.items():
        inside = {p: name for name in names for p in places.inside(modules[key], name)}
        sites_kept.append(Site(paths[key], modules[key], "rerun", inside, split[key]))
    return replace(
        plan, sites=tuple(sites_kept), one_by_one=frozenset(one_by_one), unused=frozenset(idle)
    )


def _fits(name: str, call: Call | None, ruled: dict[int, Site], checks: Checks) -> bool:
    """Whether a use is one that the rule of the module around it measures."""
    site = ruled.get(id(call.module)) if call is not None else None
    if call is None or site is None or name not in site.parameters.values():
        return False
    if site.rule == "embedding":
        return checks.looked_up(call)
    return call.single and checks.right(call, "inputs") and checks.right(call, "outputs")


def _home(
    plan: SitePlan, name: str, calls: Sequence[Call | None], checks: Checks, places: _Places
) -> Call | None:
    """The smallest call around all uses of a parameter that can be repeated by itself."""
    if any(call is None for call in calls):
        return None
    chains = [call.chain() for call in calls if call is not None]
    common = [
        steps[0] for steps in zip(*chains, strict=False) if all(call is steps[0] for call in steps)
    ]
    for call in reversed(common):
        ends = {plan.head, plan.embedding} - {call.module}
        if any(module in ends for module in call.module.modules()):
            return None  # (nearly) the whole model
        if (
            checks.counts[id(call.module)] == 1
            and call.plain
            and not call.given_out
            and call.outputs
            and places.inside(call.module, name)
            and checks.right(call, "outputs")
        ):
            return call
    return None
