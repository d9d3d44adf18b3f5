"""What each graph of a Neuron recipe costs, counted on its HLO: `tandem plan --costs`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.cli.console import Console
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import size
from pipeline.errors import InputError
from pipeline.extras import require
from pipeline.plan.plan import Plan
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.chips import CHIPS


def show_costs(planned: Plan, console: Console, *, as_json: bool) -> None:
    """Trace every graph through StableHLO, which needs no SDK, and print what it costs on one rank.

    Raises:
        InputError: the recipe is for another backend.
        HostError: the extra `stablehlo` is not installed.

    """
    settings = planned.recipe.backend
    if not isinstance(settings, NeuronSettings):
        what = f"found backend {settings.name}; costs are counted on the HLO of Neuron graphs"
        raise InputError(what, where="--costs", fix="omit --costs")
    require(["stablehlo"], "--costs")
    from pipeline.backends.neuron import costs  # here and below: torch, which other plans do not need
    from pipeline.backends.neuron.backend import NeuronBackend

    backend = NeuronBackend(settings.model_copy(update={"frontend": "stablehlo"}))
    core, found = CHIPS[settings.target].cores[settings.lnc], []
    for spec in planned.graphs:
        console.log(f"trace {spec.name}")
        counted = costs.costs(backend.trace(spec, planned.pair).program.hlo)
        found.append((spec.name, counted, costs.floor_s(counted, core)))
    if as_json:
        print_json({name: {**asdict(counted), "floor_s": floor} for name, counted, floor in found})
        return
    print_table(Table(HEADINGS, [_row(*one) for one in found], right=HEADINGS[1:]))
    print_line(f"\nfloor: {settings.target}, lnc={settings.lnc}: {core.flops / 1e12:.0f} TFLOPS and "
               f"{core.bytes_per_s / 1e9:.0f} GB/s on a core; the larger of products and reads\n"
               "transposes: of weights and caches")  # fmt: skip


HEADINGS = ("graph", "GFLOP", "reads", "transposes", "largest", "peak", "collectives", "floor")


def _row(name: str, counted: Any, floor: float) -> tuple[str, ...]:
    flops = sum(counted.dot_flops.values()) / 1e9
    sent = sum(counted.collective_bytes.values())
    sizes = (size(value) for value in (counted.largest.bytes, counted.peak_bytes, sent))
    reads = (size(counted.read_bytes), str(counted.transposes))
    return (name, f"{flops:.1f}", *reads, *sizes, f"{1000 * floor:.2f} ms")
