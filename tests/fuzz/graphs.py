"""Targets of graphs and of a host's tools: zips of both backends, signatures, `neuron-ls`, `neuronx-cc`, for vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.artifact.manifest import GraphEntry
from pipeline.backends.inductor.session import check_members
from pipeline.backends.neuron import hlo
from pipeline.backends.neuron.boundary import Boundary
from pipeline.backends.neuron.graph_file import BOUNDARY, read_graph
from pipeline.backends.neuron.support import parse_devices
from pipeline.errors import TandemError
from pipeline.graphs.signature import read_signature
from pipeline.graphs.spec import GraphSpec
from pipeline.nxdi.vllm_args import read_settings
from support.paths import ROOT

SPEC = GraphSpec("decode", 1, 1, 32)
IO = ROOT / "tests/fuzz/corpus/signature_of_graph/valid-decode.json"


def pt2_target(folder: Path) -> Callable[[bytes], object]:
    """The members of a graph's zip, checked before the loader extracts them."""
    path = folder / "graph.pt2"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_members(path)

    return read


def neff_target(folder: Path) -> Callable[[bytes], object]:
    """A graph's zip with its NEFF and its boundary."""
    (folder / "io.json").write_bytes(IO.read_bytes())
    entry = GraphEntry(spec=SPEC, key="k", file="graph.neff", io="io.json")

    def read(data: bytes) -> None:
        (folder / "graph.neff").write_bytes(data)
        graph = read_graph(folder, entry, 2)
        if BOUNDARY in graph.parts:
            Boundary.from_json(graph.parts[BOUNDARY], str(folder))

    return read


def signature_of_graph_target(folder: Path) -> Callable[[bytes], object]:
    """The signature of a graph."""
    path = folder / "io.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_signature(path)

    return read


def operators_target(folder: Path) -> Callable[[bytes], object]:
    """The compiler's list of operators."""
    return lambda data: hlo.operators(data.decode(errors="replace"))


def devices_target(folder: Path) -> Callable[[bytes], object]:
    """The devices of a host; the lines of `neuron-ls` without options follow after a NUL."""
    product = folder / "product_name"
    product.write_text("trn2.48xlarge\n")

    def read(data: bytes) -> None:
        listed, _, header = data.decode(errors="replace").partition("\0")
        parse_devices(listed, header, product)

    return read


def vllm_settings_target(folder: Path) -> Callable[[bytes], object]:
    """The settings of vLLM in an artifact of NxD Inference, and the command from them."""
    path = folder / "tandem-nxdi.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(TandemError):
            json.dumps(read_settings(path, 4).shell())
        read_settings(path, 4)

    return read
