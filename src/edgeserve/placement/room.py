"""What is said when there is no placement: at once for what no search is needed to see, or of the nearest miss of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeserve.placement.check import listed
from edgeserve.placement.errors import Unplaceable
from edgeserve.placement.evaluation import UNITS, amount, report
from edgeserve.placement.model import TOLERANCE, Flags, Group, Model
from edgeserve.placement.state import State


def check_room(model: Model) -> None:
    """Raises `Unplaceable` for what no search is needed to see: a task that fits nowhere, or demands that exceed all there is."""
    for number, group in enumerate(model.groups):
        wished = np.array(model.wished[number])
        if int(wished.sum()) < group.least:
            raise _no_choice(model, number, wished)
        if int(model.allowed[number].sum()) < group.least:
            raise _too_small(model, number, wished)
    _check_total(model)


def _who(model: Model, number: int) -> str:
    return listed([model.tasks[task].name for task in model.groups[number].tasks])


def _no_choice(model: Model, number: int, wished: Flags) -> Unplaceable:
    """Of a group for which pins and zones leave too few nodes."""
    group, problem = model.groups[number], model.problem
    names = [model.tasks[task].name for task in group.tasks]
    wishes = [f"`pins` let {name} run on {listed(problem.pins[name])}" for name in names if name in problem.pins]
    bound = {stream for task in group.tasks for stream in (model.tasks[task].name, *model.tasks[task].inputs)}
    for stream in (each for each in model.streams if each.name in bound and each.zone):
        inside = [name for name, there in zip(model.nodes, model.in_zone[stream.zone], strict=True) if there]
        wishes.append(f"{stream.name} stays in zone {model.zone_names[stream.zone]!r}, which has {listed(inside)}")
    left, missing = [name for name, there in zip(model.nodes, wished, strict=True) if there], group.least - int(wished.sum())
    because = f" ({'; '.join(wishes)}): loosen one of these" if wishes else ": add nodes, or lower `replicas_min`"
    return Unplaceable(
        f"{_who(model, number)}: may use {len(left)} of {len(model.nodes)} nodes{f', {listed(left)},' if left else ''} and needs "
        f"{group.least}{because}",
        capacity=f"nodes for {_who(model, number)}",
        short_by=missing,
        proven=True,
    )


def _too_small(model: Model, number: int, wished: Flags) -> Unplaceable:
    """Of a group for which too few nodes are large enough: by how much the one that comes nearest is not, those without a core last."""
    group, names = model.groups[number], _who(model, number)
    small = np.flatnonzero(wished & ~model.allowed[number])
    lacking = model.shortage(number)[:, small]
    relative = lacking / np.array([1.0, 1e9, *([1.0] * len(model.kinds))])[:, None]
    nearest = int(np.lexsort((relative.max(axis=0), model.cores[small] == 0))[0])
    node = model.problem.nodes[small[nearest]]
    need = [group.cpu / (group.most * node.speed), group.memory_at[-1], *model.demand[number]]
    has = [node.cores * node.max_utilisation, node.memory_bytes, *model.accelerators[:, small[nearest]]]
    kinds = ["cpu", "memory", *(f"accelerator {kind}" for kind in model.kinds)]
    lacks = []
    units = [f" cores of speed {node.speed:g}", " bytes", *([""] * len(model.kinds))]
    for kind, unit, wanted, there, short in zip(kinds, units, need, has, lacking[:, nearest], strict=True):
        if short > TOLERANCE and kind == "cpu" and not node.cores:
            lacks.append("cpu, as it has no core and only forwards")
        elif short > TOLERANCE:
            lacks.append(f"{kind} by {amount(short)}{unit} ({amount(wanted)} needed, {amount(there)} there)")
    what = int(relative[:, nearest].argmax())
    mend = "give it that, or make the task smaller" + ("" if wished.all() else ", or loosen its pins and zones")
    return Unplaceable(
        f"{names}: fits on {int(model.allowed[number].sum())} of the {int(wished.sum())} nodes that it may use, and needs "
        f"{group.least}; the next, {node.name}, is short of {' and of '.join(lacks)}: {mend}",
        capacity=f"{kinds[what]} of {node.name}",
        short_by=float(lacking[what, nearest]),
        proven=True,
    )


def _least(group: Group, each: Sequence[float]) -> float:
    """What a group needs on all its nodes together, if each of so many needs so much."""
    return min(count * each[count] for count in range(group.least, group.most + 1))


def _check_total(model: Model) -> None:
    """What all tasks need against what all nodes have that run any; a core counts as much as its speed."""
    runs = model.cores > 0
    totals = [
        ("cpu", "cores of speed 1", np.array([group.cpu for group in model.groups]), model.cores * model.cpu_limit * model.speed),
        ("memory", "bytes of memory", np.array([_least(group, group.memory_at) for group in model.groups]), model.memory[runs]),
    ]
    for kind, name in enumerate(model.kinds):
        held = np.array([_least(group, [each[kind] for each in group.held_at]) for group in model.groups])
        totals.append((f"accelerator {name}", f"of accelerator {name}", held, model.accelerators[kind, runs]))
    for name, unit, demands, capacities in totals:
        wanted, there = float(demands.sum()), float(capacities.sum())
        if wanted > there * (1 + TOLERANCE):
            most = ", ".join(f"{_who(model, int(number))} {amount(demands[number])}" for number in np.argsort(-demands, kind="stable")[:3])
            raise Unplaceable(
                f"all tasks together need {amount(wanted)} {unit} (the most: {most}), and all nodes that run tasks may give "
                f"{amount(there)}: add {amount(wanted - there)}, or take tasks away",
                capacity=f"{name} of all nodes",
                short_by=wanted - there,
                proven=True,
            )


def unplaceable(nearest: State, elapsed_s: float, proven: bool) -> Unplaceable:
    """Of a search that found none: what the placement breaks that breaks least."""
    found = report(nearest).violations
    worst = max(found, key=lambda v: v.used / v.limit if v.limit > 0 else 2.0)
    short = abs(worst.used - worst.limit)
    how = (
        "no placement keeps within all capacities"
        if proven
        else f"none was found in {elapsed_s:.3g} s, which does not prove that there is none"
    )
    wish = worst.name not in (*UNITS, "accelerator")
    mend = f"short by {amount(short)}{UNITS.get(worst.name, '')}: add as much, or take away a wish or a task"
    return Unplaceable(
        f"{how}; the nearest one breaks: {'; '.join(str(each) for each in found[:5])}. "
        f"{worst.name} of {worst.where} is {'a wish: loosen it, or add nodes' if wish else mend}",
        capacity=f"{worst.name} of {worst.where}",
        short_by=short,
        proven=proven,
    )
