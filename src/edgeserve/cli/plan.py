"""`edgeserve plan`: where the tasks of a pipeline run best on a cluster, what that gains, why, and what would change it."""

from __future__ import annotations

from pathlib import Path

import click

from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.pipelines import APP, look_at

_INVALID = 2
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)


@command("plan", "{app}")
@click.argument("app", type=APP)
@click.option("--topology", type=_FILE, required=True, metavar="FILE", help="The cluster, in YAML.")
@click.option("--costs", type=_FILE, required=True, metavar="FILE", help="What `edgeserve profile` has measured.")
@click.option("--current", type=_FILE, metavar="FILE", help="The assignment that runs now, to compare with.")
@click.option("--apply", "applied", type=_NEW, metavar="FILE", help="Write the assignment for `edgeserve run --assignment`.")
@click.option("--svg", type=_NEW, metavar="FILE", help="Draw the plan.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to look for a better plan.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same one gives the same plan.")
def plan(
    out: Output,
    app: Path,
    topology: Path,
    costs: Path,
    current: Path | None,
    applied: Path | None,
    svg: Path | None,
    time_limit: float,
    seed: int,
) -> None:
    """Compute where the tasks of the pipeline in APP run best on a cluster, and how its streams travel.

    Shows the plan beside other placements, priced alike, why each task is where it is, and what a faster link or one more node would
    change.
    The status is 2 when a file is wrong, and 1 when no placement keeps within the cluster's capacities; then no assignment is written.
    """
    # Here: no other command needs what a plan does.
    from edgeserve.cli import planning
    from edgeserve.cli.planinputs import Inputs
    from edgeserve.cli.planpicture import picture
    from edgeserve.cli.planreport import Report
    from edgeserve.pipeline import InvalidPipeline
    from edgeserve.pipeline.assignment import check_assignment, read_assignment, write_assignment
    from edgeserve.pipeline.costs import InvalidCosts, read_costs
    from edgeserve.pipeline.topology import read_topology
    from edgeserve.placement import Unplaceable, solve

    graph = look_at(app)[1].json
    try:
        inputs = Inputs(graph, str(app), read_costs(costs), str(costs), read_topology(topology))
        problem = inputs.problem()
        others = []
        with inputs.located():
            if current is not None:
                now = read_assignment(current)
                names = [part["name"] for part in graph["nodes"] if part["kind"] != "relay"]
                check_assignment(now, graph["pipeline"], names, str(current))
                others.append(planning.current(problem, inputs.on_nodes(now, str(current))))
            others = [planning.centralised(problem), planning.at_source(problem), *others]
            found = solve(problem, time_limit_s=time_limit, seed=seed)
    except InvalidPipeline as exc:
        raise CommandError(exc.reason, str(exc.where), exc.suggestion, exit_code=_INVALID) from exc
    except InvalidCosts as exc:
        raise CommandError(str(exc), str(costs), "measure the pipeline anew: edgeserve profile", exit_code=_INVALID) from exc
    except Unplaceable as exc:
        what, _, to_do = str(exc).rpartition(": ")
        raise CommandError(what, str(topology), to_do) from exc
    case = planning.as_run("plan", problem, found.assignment, found.routing)
    changes = list(planning.what_ifs(problem, found, case, time_limit_s=time_limit / 4, seed=seed))
    report = Report(inputs, problem, found, case, others, changes)
    if out.as_json:
        out.document(report.document())
    else:
        report.show(out)
    if svg is not None:
        svg.write_text(picture(graph, problem, case))
    if not case.evaluation.feasible:
        what = f"as nodes run it, the plan breaks {'; '.join(map(str, case.evaluation.violations[:4]))}"
        raise CommandError(what, str(topology), "give the cluster more there: payloads cannot travel as the plan wants")
    if applied is not None:
        assignment = planning.to_apply(inputs, problem, case)
        write_assignment(applied, assignment)
        if not out.as_json:
            hosts = ", ".join(sorted({host for places in assignment.places.values() for host in places}))
            out.line(f"\nwritten: {applied}. On each of {hosts}: edgeserve run {app} --assignment {applied} --host NAME")


__all__ = ("plan",)
