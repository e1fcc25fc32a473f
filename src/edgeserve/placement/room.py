"""What no search is needed to see: a task that fits nowhere, or demands that exceed all there is."""

from __future__ import annotations

import numpy as np

from edgeserve.placement.errors import Unplaceable
from edgeserve.placement.model import TOLERANCE, Model


def check_room(model: Model) -> None:
    """Raises `Unplaceable` for what no search is needed to see: a task that fits nowhere, or demands that exceed all there is."""
    for number, group in enumerate(model.groups):
        names = ", ".join(model.tasks[task].name for task in group.tasks)
        wished = np.array(model.wished[number])
        if int(model.allowed[number].sum()) >= group.least:
            continue
        if int(wished.sum()) < group.least:
            missing = group.least - int(wished.sum())
            raise Unplaceable(
                f"{names}: pins and zones leave {int(wished.sum())} nodes, and {group.least} are needed: allow {missing} more",
                capacity=f"nodes for {names}",
                short_by=missing,
                proven=True,
            )
        lacking = model.shortage(number)[:, wished & ~model.allowed[number]]
        scale = np.array([1.0, 1e9, *([1.0] * len(model.kinds))])[:, None]
        nearest = int((lacking / scale).max(axis=0).argmin())
        node = np.flatnonzero(wished & ~model.allowed[number])[nearest]
        what = int((lacking[:, nearest] / scale[:, 0]).argmax())
        kind = ["cpu", "memory", *(f"accelerator {kind}" for kind in model.kinds)][what]
        unit = ["cores", "bytes"][what] if what < 2 else "of them"
        short = float(lacking[what, nearest])
        raise Unplaceable(
            f"{names} fits on {int(model.allowed[number].sum())} nodes, and {group.least} are needed: the nearest other one, "
            f"{model.nodes[node]!r}, is short of {kind} by {short:g} {unit}",
            capacity=f"{kind} of {model.nodes[node]}",
            short_by=short,
            proven=True,
        )
    _check_total(model)


def _check_total(model: Model) -> None:
    totals = [
        ("cpu", "cores", sum(g.cpu for g in model.groups) / float(model.speed.max()), float((model.cores * model.cpu_limit).sum())),
        ("memory", "bytes", sum(g.memory * g.least for g in model.groups), float(model.memory.sum())),
    ]
    least = np.array([group.least for group in model.groups], dtype=float)
    for kind, name in enumerate(model.kinds):
        totals.append((f"accelerator {name}", "of them", float(model.demand[:, kind] @ least), float(model.accelerators[kind].sum())))
    for name, unit, wanted, there in totals:
        if wanted > there * (1 + TOLERANCE):
            raise Unplaceable(
                f"all tasks together need {wanted:g} {unit} of {name}, and all nodes together have {there:g}: add {wanted - there:g}",
                capacity=f"{name} of all nodes",
                short_by=wanted - there,
                proven=True,
            )
