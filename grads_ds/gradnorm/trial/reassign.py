"""Changes a plan by what a trial forward showed: which calls use which parameter, and whether rows
belong to the samples that their place says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from grads_ds.gradnorm.sites import Site, SitePlan
from grads_ds.gradnorm.trial.call_log import Call, CallLog
from grads_ds.gradnorm.trial.row_checks import Checks


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
    shared: dict[int, list[str]] = {}
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
        common = None if home else _shared_home(name, calls, checks, places)
        if common is not None:
            shared.setdefault(id(common.module), []).append(name)
        elif home is None:
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
    elsewhere = [name for names in (*moved.values(), *shared.values()) for name in names]
    gone = one_by_one | set(elsewhere)
    sites_kept = []
    for site in plan.sites:
        left = {local: name for local, name in site.parameters.items() if name not in gone}
        if left:
            sites_kept.append(replace(site, parameters=left))
    for key, names in moved.items():
        inside = {p: name for name in names for p in places.inside(modules[key], name)}
        sites_kept.append(Site(paths[key], modules[key], "rerun", inside, split[key]))
    for key, names in shared.items():
        inside = {p: name for name in names for p in places.inside(modules[key], name)}
        sites_kept.append(Site(paths[key], modules[key], "shared", inside))
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
    if site.rule == "experts":
        given = checks.right(call, "inputs") and checks.right(call, "outputs")
        return given or (not site.details.routed and checks.repeated(call))
    return (
        (call.single or site.rule == "scale")
        and checks.right(call, "inputs")
        and checks.right(call, "outputs")
    )


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


def _shared_home(
    name: str, calls: Sequence[Call | None], checks: Checks, places: _Places
) -> Call | None:
    """The largest call around all uses of a parameter whose one output all samples share."""
    if any(call is None for call in calls):
        return None
    chains = [call.chain() for call in calls if call is not None]
    for steps in zip(*chains, strict=False):
        call = steps[0]
        if (
            all(other is call for other in steps)
            and checks.counts[id(call.module)] == 1
            and checks.one_for_all(call)
            and places.inside(call.module, name)
        ):
            return call
    return None
