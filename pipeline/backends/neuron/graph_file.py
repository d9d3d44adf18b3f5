"""The file of one graph: its NEFF, and what its inputs and outputs are, as a zip of equal bytes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import GraphEntry
from pipeline.backends.neuron.boundary import Boundary
from pipeline.backends.neuron.compiler import check_neff
from pipeline.backends.neuron.module import without_booleans
from pipeline.errors import ArtifactError, reason
from pipeline.files.limits import AGAIN
from pipeline.graphs.signature import Signature, read_signature
from pipeline.graphs.spec import GraphSpec

GRAPH_FILE = "graph.neuron.zip"
NEFF, METANEFF, LAYOUT, BOUNDARY = "graph.neff", "metaneff.pb", "layout.json", "boundary.json"
UNREADABLE = (zipfile.BadZipFile, KeyError, OSError, ValueError, EOFError, RuntimeError)
"""Errors of zipfile: for members that are damaged, encrypted or of an unknown version, too."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time that a zip can store; with a constant time, equal graphs are equal bytes."""


@dataclass(frozen=True)
class Graph:
    """One graph's file, unpacked."""

    spec: GraphSpec
    io: Signature
    neff: bytes
    parts: Mapping[str, bytes]
    """The rest of the file: `BOUNDARY`, or `METANEFF` and `LAYOUT`, depending on the frontend."""

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

    def parts(self) -> dict[str, bytes]:
        """Return what a loader needs: NxD's message without the HLO in it, and the order of arguments and results.

        Flattener and packer are stored as in NxDModel.save: the text of their plain attributes.
        """
        layout = {
            "flattener": {name: str(getattr(self.flattener, name)) for name in ("layout", "exclude")},
            "packer": {name: str(getattr(self.packer, name)) for name in ("layout", "identifiers", "constants")},
        }
        meta = type(self.metaneff)()
        meta.CopyFrom(self.metaneff)
        meta.ClearField("serialized_graph_def")  # the HLO with its source files; the runtime does not read it
        metaneff = meta.SerializeToString(deterministic=True)
        return {METANEFF: metaneff, LAYOUT: json.dumps(layout, sort_keys=True).encode()}


@dataclass(frozen=True)
class StableHloTrace:
    """A graph traced through StableHLO: its spec, the HLO, and what its parameters and results are."""

    spec: GraphSpec
    hlo: Any
    boundary: Boundary

    def parts(self) -> dict[str, bytes]:
        """Return what a loader needs."""
        return {BOUNDARY: self.boundary.to_json()}


def pack(neff: bytes, program: NeuronTrace | StableHloTrace) -> bytes:
    """Return one graph as a zip whose bytes depend on its contents only."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {NEFF: neff, **program.parts()}.items():
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
            kinds = (BOUNDARY,) if BOUNDARY in archive.namelist() else (METANEFF, LAYOUT)
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ArtifactError("not a graph file: a member is compressed", where=str(path), fix=AGAIN)
            neff, parts = archive.read(NEFF), {name: archive.read(name) for name in kinds}
    except UNREADABLE as error:
        raise ArtifactError(f"not a graph file: {reason(error)}", where=str(path), fix=AGAIN) from error
    check_neff(neff, f"{path}: {NEFF}", lnc)
    signature = read_signature(root / entry.io)
    return Graph(entry.spec, without_booleans(signature), neff, parts)
