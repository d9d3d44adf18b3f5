"""The file of one graph: its NEFF, its metaneff, and how arguments and results are packed, as a zip of equal bytes."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import AGAIN, GraphEntry
from pipeline.backends.neuron.compiler import check_neff
from pipeline.errors import ArtifactError, reason
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec

GRAPH_FILE = "graph.neuron.zip"
NEFF, METANEFF, LAYOUT = "graph.neff", "metaneff.pb", "layout.json"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time that a zip can store; with a constant time, equal graphs are equal bytes."""


@dataclass(frozen=True)
class Graph:
    """One graph's file, unpacked."""

    spec: GraphSpec
    io: Signature
    neff: bytes
    metaneff: bytes
    layout: dict[str, dict[str, str]]

    def get_neff_bytes(self) -> bytes:
        """Return the NEFF: NxDModel's interface of compilation artifacts."""
        return self.neff


@dataclass(frozen=True)
class NeuronTrace:
    """A traced graph: its spec, the HLO, and NxD's trace artifacts, which a loader needs."""

    spec: GraphSpec
    hlo: Any
    metaneff: Any
    flattener: Any
    packer: Any


def pack(neff: bytes, program: NeuronTrace) -> bytes:
    """Return one graph as a zip whose bytes depend on its contents only.

    Flattener and packer are stored as in NxDModel.save: the text of their plain attributes.
    """
    flattener, packer = program.flattener, program.packer
    layout = {
        "flattener": {name: str(getattr(flattener, name)) for name in ("layout", "exclude")},
        "packer": {name: str(getattr(packer, name)) for name in ("layout", "identifiers", "constants")},
    }
    metaneff = program.metaneff.SerializeToString(deterministic=True)
    parts = {NEFF: neff, METANEFF: metaneff, LAYOUT: json.dumps(layout, sort_keys=True).encode()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
    return buffer.getvalue()


def read_graph(root: Path, entry: GraphEntry, lnc: int) -> Graph:
    """Unpack a graph's file and check its NEFF's header.

    Raises:
        ArtifactError: damaged, truncated, or for other logical cores.

    """
    path = root / entry.file
    try:
        with zipfile.ZipFile(path) as archive:
            neff, metaneff, layout = (archive.read(part) for part in (NEFF, METANEFF, LAYOUT))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ArtifactError(f"not a graph file: {reason(error)}", where=str(path), fix=AGAIN) from error
    check_neff(neff, f"{path}: {NEFF}", lnc)
    signature = Signature.from_json(json.loads((root / entry.io).read_text(encoding="utf-8")))
    return Graph(entry.spec, signature, neff, metaneff, json.loads(layout))
