"""Part of `tandem plan`: the buckets that fit recorded traffic, beside those of the recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import counted, value
from pipeline.measure.traffic import read_traffic
from pipeline.measure.traffic_buckets import BucketSet, Proposal, propose, room_of
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import duration
from pipeline.recipe.write import Change, change_recipe


def show_buckets(path: Path, planned: Plan, traffic: Path, budget: int, *, write: bool, as_json: bool) -> None:
    """Show the buckets that pad the requests of a file least, and write them to the recipe if asked to."""
    proposal = propose(planned, read_traffic(traffic, room_of(planned)), budget)
    buckets = {kind: list(of.buckets) for kind, of in proposal.proposed.items()}
    changed = planned.recipe.model_copy(
        update={"shapes": planned.recipe.shapes.model_copy(update={k: tuple(of) for k, of in buckets.items()})}
    )
    replanned = make_plan(changed, planned.pair.target, planned.pair.draft)
    if write:
        edit = f"write to `shapes`: prefill: {buckets['prefill']}, kv: {buckets['kv']}"
        change_recipe(path, [Change("shapes", kind, of, behind=kind) for kind, of in buckets.items()], edit)
    if as_json:
        print_json(_data(proposal, planned, replanned, budget))
        return
    print_table(_compared(proposal, planned, replanned))
    print_line(f"\n{counted(proposal.requests, 'request')} in {traffic}; at most {counted(budget, 'graph')}")
    if proposal.rejected:
        print_line(f"{counted(proposal.rejected, 'prompt')} longer than the largest prefill bucket of the recipe")
    now, then = (duration(_compile_seconds(each)) for each in (planned, replanned))
    print_line(f"to compile: now about {now}, proposed about {then} of one core if no graph is cached (estimates)")
    done = f"written to {path}; lock and build the recipe again"
    print_line(done if write else "--write writes the proposed buckets to the recipe")


def _compared(proposal: Proposal, planned: Plan, replanned: Plan) -> Table:
    rows = []
    for kind, now in proposal.now.items():
        for when, of in (("now", now), ("proposed", proposal.proposed[kind])):
            padding = "unknown" if of.padding is None else f"{of.padding:.2f}x"
            rows.append((kind, when, value(of.buckets), padding, str(of.graphs)))
    for when, each in (("now", planned), ("proposed", replanned)):
        rows.append(("all", when, "", "", str(len(each.graphs))))
    return Table(("kind", "", "buckets", "padding", "graphs"), rows, right=("padding", "graphs"))


def _data(proposal: Proposal, planned: Plan, replanned: Plan, budget: int) -> dict[str, Any]:
    """Return a proposal as plain data."""

    def sets(of: dict[str, BucketSet], plan: Plan) -> dict[str, Any]:
        kinds = {kind: asdict(each) for kind, each in of.items()}
        return {**kinds, "graphs": len(plan.graphs), "compile_core_seconds": _compile_seconds(plan)}

    return {
        "requests": proposal.requests,
        "rejected_by_recipe": proposal.rejected,
        "graph_budget": budget,
        "kv_position_cost_in_prompt_tokens": proposal.position_cost,
        "now": sets(proposal.now, planned),
        "proposed": sets(proposal.proposed, replanned),
    }


def _compile_seconds(planned: Plan) -> float:
    return sum(planned.compile_seconds(spec) for spec in planned.graphs)
