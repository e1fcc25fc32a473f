"""What `edgeserve plan` says: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgeserve.cli.output import Output
from edgeserve.cli.planinputs import Inputs, maker
from edgeserve.cli.planning import Case, edges, elsewhere
from edgeserve.placement import Evaluation, Plan, Problem, Reason, Source, simulate
from edgeserve.placement.model import Model

_BROKEN = 4  # violations that are told of each placement
_LIVED_MESSAGES, _LIVED_RESULTS = (10_000, 100_000), 200
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


class Report:
    """What is said of a plan beside other placements, and of those that a change of the cluster would lead to."""

    def __init__(self, inputs: Inputs, problem: Problem, plan: Plan, case: Case, others: Sequence[Case], changes: Sequence[Case]) -> None:
        self._inputs, self._problem, self._plan, self._case = inputs, problem, plan, case
        self._others, self._changes = others, changes
        self._now = next((other for other in others if other.name == "current"), None)
        self._why = {name: self._reason(name, plan.why[name]) for name in case.assignment}
        self._gap = max(case.evaluation.objective - plan.lower_bound, 0.0) / max(case.evaluation.objective, 1e-12)

    # --- for people -------------------------------------------------------------------------------------------------

    def show(self, out: Output) -> None:
        """Writes it as tables and sentences."""
        found, topology = self._case.evaluation, self._inputs.topology
        head = f"plan for {self._inputs.graph['pipeline']} on {topology.file}: objective {_number(found.objective)}"
        out.line(f"{head}, {self._bound()}", "bold")
        out.line("")
        now = self._now
        out.table(
            ["TASK", *(["NOW"] if now else []), "RUNS ON", "WHY"],
            [
                [name, *([_names(now.assignment[name])] if now else []), _names(nodes), self._why[name]["why"]]
                for name, nodes in self._case.assignment.items()
            ],
        )
        out.line("")
        out.table(["FROM", "TO", "TRAVELS", "MESSAGES/S", "BYTES"], [list(row.values()) for row in self._edges()])
        for line in self._notes():
            out.line(line)
        out.line("")
        self._compare(out)
        out.line("")
        out.table(
            ["NODE", "BUSY CORES", "OF", "LOAD", "MEMORY", "OF"],
            [
                [n.name, _number(load.cores), n.cores, _part(load.utilisation), _bytes(load.memory_bytes), _bytes(n.memory_bytes)]
                for n in self._problem.nodes
                for load in (found.nodes[n.name],)
            ],
        )
        if self._problem.links:
            out.line("")
            out.table(
                ["LINK", "CARRIES", "OF", "LOAD"],
                [
                    [
                        k.name,
                        f"{_bytes(found.link_bytes_s[k.name])}/s",
                        f"{_bytes(k.bandwidth_bytes_s)}/s",
                        _part(found.link_utilisation[k.name]),
                    ]
                    for k in self._problem.links
                ],
            )
        if self._changes:
            out.line("")
            sinks = list(found.latency_ms)
            out.table(
                ["WHAT IF", "OBJECTIVE", *(f"LATENCY {sink}" for sink in sinks), "MOVES"],
                [
                    [
                        change.name,
                        _change(change.evaluation.objective, found.objective),
                        *(_change(change.evaluation.latency_ms[sink], found.latency_ms[sink], _ms) for sink in sinks),
                        "; ".join(self._moves(change)) or "nothing",
                    ]
                    for change in self._changes
                ],
            )

    def _bound(self) -> str:
        if not math.isfinite(self._plan.lower_bound):
            return "and nothing proven of how good the best can be"
        proven = "no placement has a lower one" if self._gap < 1e-6 else f"at most {_part(self._gap)} above the lowest there can be"
        return f"{proven} (lower bound {_number(self._plan.lower_bound)})"

    def _reason(self, name: str, reason: Reason) -> dict[str, Any]:
        """Why a task is where it is, by what would be otherwise where it would go next."""
        pins, other, said = self._problem.pins.get(name), None, ""
        if reason.next_best is not None:
            other = elsewhere(self._problem, self._case, name, reason.next_best).evaluation
        if ">" in name:
            said = "hands on what is made there"
        elif pins is not None and len(pins) <= len(reason.nodes):
            said = "pinned"
        elif other is None or reason.next_best is None:
            said = "no room elsewhere"
        else:
            said = f"on {_names(reason.next_best)} {self._otherwise(other)}"
        if reason.limited_by is not None and ">" not in name:
            there, _, what = reason.limited_by.partition(": ")
            said += f"; {there} would be cheaper, but for {what}"
        extra = None if other is None else other.objective - self._case.evaluation.objective
        return {"nodes": reason.nodes, "next_best": reason.next_best, "extra": extra, "limited_by": reason.limited_by, "why": said}

    def _otherwise(self, other: Evaluation) -> str:
        """What would differ most: the objective, the latency of a sink, the load of a link or a node."""
        here = self._case.evaluation
        told = [f"the objective would be {_change(other.objective, here.objective)}"]
        sink = max(here.latency_ms, key=lambda name: other.latency_ms[name] - here.latency_ms[name])
        if other.latency_ms[sink] > here.latency_ms[sink]:
            told.append(f"{sink} would come after {_ms(other.latency_ms[sink])}, not {_ms(here.latency_ms[sink])}")
        then = {**other.link_utilisation, **{node: load.utilisation for node, load in other.nodes.items()}}
        now = {**here.link_utilisation, **{node: load.utilisation for node, load in here.nodes.items()}}
        fullest = max(then, key=lambda name: then[name] - now[name])
        if then[fullest] - now[fullest] > 0.01:
            told.append(f"{fullest} would be {_part(then[fullest])} busy, not {_part(now[fullest])}")
        return ", ".join(told)

    def _rates(self) -> dict[str, float]:
        """Messages per second of each stream."""
        return {stream.name: stream.rate for stream in Model(self._problem).streams}

    def _edges(self) -> list[dict[str, Any]]:
        rates = self._rates()
        sizes = {made.name: made.bytes if isinstance(made, Source) else made.output_bytes for made in self._problem.made}
        return [
            {
                "from": stream,
                "to": taker,
                "travels": self._case.routing[maker(stream)],
                "messages_s": round(rates[stream], 3),
                "bytes": round(sizes[stream]),
            }
            for stream, taker in edges(self._problem)
        ]

    def _notes(self) -> Iterable[str]:
        """What nodes cannot do as it was computed."""
        other = [f"{a} -> {b}" for (a, b), mode in self._plan.routing.items() if mode != self._case.routing[maker(a)]]
        worse = self._case.evaluation.objective / max(self._plan.objective, 1e-12) - 1
        if other and worse > 5e-4:
            yield (
                f"note: nodes send what a source or task makes to all in one way, and below 64 KiB always eagerly; so {', '.join(other)} "
                f"travel{'s' if len(other) == 1 else ''} otherwise than computed ({_signed(worse)})"
            )

    def _compare(self, out: Output) -> None:
        cases = [self._case, *self._others]
        rows: list[list[object]] = [["objective", *(_number(case.evaluation.objective) for case in cases)]]
        rows += [
            [f"latency of {sink}", *(_ms(case.evaluation.latency_ms[sink]) for case in cases)] for sink in self._case.evaluation.latency_ms
        ]
        rows.append(["busiest node", *(_most({n: load.utilisation for n, load in case.evaluation.nodes.items()}) for case in cases)])
        rows.append(["busiest link", *(_most(case.evaluation.link_utilisation) for case in cases)])
        rows.append(["bytes on links", *(f"{_bytes(sum(case.evaluation.link_bytes_s.values()))}/s" for case in cases)])
        kept = [", ".join(dict.fromkeys(each.name for each in case.evaluation.violations)) for case in cases]
        rows.append(["breaks", *(each or "nothing" for each in kept)])
        out.table(["", *(case.name.upper() for case in cases)], rows)
        for case in cases:
            broken = case.evaluation.violations
            more = f" and {len(broken) - _BROKEN} more" if len(broken) > _BROKEN else ""
            if broken:
                out.line(f"{case.name} breaks {'; '.join(map(str, broken[:_BROKEN]))}{more}")

    def _moves(self, change: Case) -> list[str]:
        return [
            f"{name} to {_names(nodes)}"
            for name, nodes in change.assignment.items()
            if set(nodes) != set(self._case.assignment[name]) and ">" not in name
        ]

    def _lived_s(self) -> float:
        """How long placements are simulated: for results enough of the sink that has the fewest, and not for too many messages."""
        rates = self._rates()
        least_s, most_s = (count / sum(rates.values()) for count in _LIVED_MESSAGES)
        rarest = min((rates[sink.input] for sink in self._problem.sinks if rates[sink.input]), default=1.0)
        return min(max(_LIVED_RESULTS / rarest, least_s), most_s)

    def _lived(self, case: Case, duration_s: float) -> dict[str, Any]:
        """What comes of a placement in the simulator, with queues, phases and limits of rate: quantiles, which no formula gives. Null where
        latency grows for ever, or no result comes in the time that is simulated."""
        found = simulate(self._problem, case.assignment, case.modes(self._problem), duration_s=duration_s)
        grows = {sink for sink, ms in case.evaluation.latency_ms.items() if not math.isfinite(ms)}
        return {
            "simulated_ms": {
                sink: {str(q): None if sink in grows else _finite(ms) for q, ms in each.items()} for sink, each in found.latency_ms.items()
            }
        }

    # --- for programs -----------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """All of it as JSON; what is infinite is null."""
        seconds = self._lived_s()
        cases = {case.name.replace(" ", "_"): _as_json(case) | self._lived(case, seconds) for case in (self._case, *self._others)}
        return {
            "pipeline": self._inputs.graph["pipeline"],
            "objective": self._case.evaluation.objective,
            "lower_bound": _finite(self._plan.lower_bound),
            "gap": _finite(self._gap),
            "edges": self._edges(),
            "notes": list(self._notes()),
            "why": self._why,
            "placements": cases,
            "what_if": [{"change": change.name, "moves": self._moves(change), **_as_json(change)} for change in self._changes],
        }


def _as_json(case: Case) -> dict[str, Any]:
    found = case.evaluation
    return {
        "assignment": case.assignment,
        "routing": case.routing,
        "objective": found.objective,
        "terms": found.terms,
        "latency_ms": {sink: _finite(ms) for sink, ms in found.latency_ms.items()},
        "nodes": {
            name: {"cores": load.cores, "memory_bytes": load.memory_bytes, "utilisation": load.utilisation}
            for name, load in found.nodes.items()
        },
        "link_bytes_s": found.link_bytes_s,
        "link_utilisation": found.link_utilisation,
        "violations": [str(each) for each in found.violations],
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(nodes)


def _number(number: float) -> str:
    return f"{number:.3g}" if math.isfinite(number) else "-"


def _ms(number: float) -> str:
    return f"{number:.3g} ms" if math.isfinite(number) else "grows for ever"


def _part(part: float) -> str:
    return f"{100 * part:.0f} %" if part == 0 or part >= 0.1 else f"{100 * part:.1g} %"


def _signed(part: float) -> str:
    return "+0 %" if abs(part) < 5e-4 else f"{100 * part:+,.0f} %" if abs(part) >= 0.095 else f"{100 * part:+.1g} %"


def _change(then: float, now: float, shown: Any = _number) -> str:
    return f"{shown(then)} ({_signed(then / now - 1)})" if math.isfinite(then) and math.isfinite(now) and now else str(shown(then))


def _most(loads: Mapping[str, float]) -> str:
    name = max(loads, key=loads.__getitem__, default="")
    return f"{name} {_part(loads[name])}" if name else "-"


def _bytes(number: float) -> str:
    unit, scale = next((unit for unit in _UNITS if number >= unit[1]), _UNITS[-1])
    return f"{number / scale:.3g} {unit}"


__all__ = ("Report",)
