"""One rank of an opened artifact: its weights, its state, its graphs. Does not handle requests or text."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.inductor import collectives  # noqa: F401 - graphs of several ranks call its operators by name
from pipeline.errors import CorruptError, HostError
from pipeline.files.atomic import safe_relative
from pipeline.files.temporary import prepared_folder, temporary_files, temporary_folder
from pipeline.files.unfinished import work_folder
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.shards import read_shard
from pipeline.graphs.signature import Signature, TensorSpec, is_recurrent, read_signature
from pipeline.graphs.spec import GraphSpec

GRAPH_FILE = "graph.pt2"
CACHE_DIMENSIONS = 4
"""Of keys or values: rows, heads, positions, head size. Other state has one entry for each row."""
VERIFY = "check the files with `tandem verify ARTIFACT`, then build again"


class LoadedGraph:
    """An AOTInductor package opened for execution."""

    def __init__(self, package: Path, device: str) -> None:
        check_members(package)  # the loader writes each to the path that it names
        index = -1 if device == "cpu" else torch.device(device).index
        try:
            with _extraction_folder(device) as folder, temporary_files(folder):
                self._loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index)
        except RuntimeError as error:
            raise HostError(f"cannot load the graph: {error}", where=str(package), fix=VERIFY) from error

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run on tensors in signature order; update the state tensors in place."""
        outputs: list[Tensor] = self._loader.run(list(tensors))
        return outputs


@contextmanager
def _extraction_folder(device: str) -> Iterator[Path]:
    """Yield the folder to which the loader extracts a library, and remove it when the library is loaded.

    A loaded library needs no file, and a process that is killed later leaves none. On CUDA a graph reads its kernels
    at their first launch, so its files stay until the loader is destroyed.
    """
    own = prepared_folder(temporary_folder())
    if device != "cpu":
        yield own
        return
    with work_folder("graph", own) as folder:
        yield folder


def check_members(package: Path) -> None:
    """Check that each member of a package stays in the folder to which the loader extracts it.

    Raises:
        HostError: not a package.
        CorruptError: a member with a path that leaves the folder, or that is a link.

    """
    try:
        with zipfile.ZipFile(package) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise HostError(f"cannot load the graph: {error}", where=str(package), fix=VERIFY) from error
    for member in members:
        safe_relative(member.filename.removesuffix("/"), str(package))
        if stat.S_ISLNK(member.external_attr >> 16):
            raise CorruptError(f"{member.filename} is a link", where=str(package), fix="do not use this artifact")


class Session:
    """Runs graphs of one rank. Graphs are opened on first use; weights are mapped once and shared by all graphs."""

    def __init__(self, root: Path, manifest: PairManifest, rank: int = 0) -> None:
        self.root = root
        self.manifest = manifest
        device = str(manifest.requires.get("device", "cpu"))
        self.device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self._weights = self._load_weights(rank)
        self._state: dict[str, Tensor] = {}
        self._graphs: dict[str, tuple[LoadedGraph, Signature, list[Tensor]]] = {}

    def run(self, spec: GraphSpec, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph and update its state in place; return outputs by name, on the CPU."""
        graph, io, bound = self._open(spec)
        inputs = [arguments[t.name].to(self.device) for t in io.arguments]
        outputs = graph.run([*bound, *inputs])
        return {t.name: out.cpu() for t, out in zip(io.outputs, outputs, strict=True)}

    def reset(self) -> None:
        """Zero all state."""
        for tensor in self._state.values():
            tensor.zero_()

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first positions of a row's caches, and its recurrent states, to another row."""
        for name, tensor in self._state.items():
            if is_recurrent(name):
                tensor[target] = tensor[source]
            elif tensor.dim() == CACHE_DIMENSIONS:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def state(self) -> dict[str, Tensor]:
        """Return the live state tensors by name, for tests and diagnosis."""
        return self._state

    def _open(self, spec: GraphSpec) -> tuple[LoadedGraph, Signature, list[Tensor]]:
        if spec.name not in self._graphs:
            folder = self.root / "graphs" / spec.name
            io = read_signature(folder / "io.json")
            bound = [self._weights[t.name] for t in io.weights] + [self._state_tensor(t) for t in io.state]
            graph = LoadedGraph(folder / GRAPH_FILE, self.device)
            self._graphs[spec.name] = (graph, io, bound)
        return self._graphs[spec.name]

    def _state_tensor(self, spec: TensorSpec) -> Tensor:
        """Return a state tensor, which all graphs share and which starts as zeros."""
        if spec.name not in self._state:
            self._state[spec.name] = torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype), device=self.device)
        return self._state[spec.name]

    def _load_weights(self, rank: int) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for model in ("target", "draft"):
            name = f"weights/{model}/rank-{rank}-of-{self.manifest.ranks}.safetensors"
            weights |= {f"{model}/{key}": t for key, t in read_shard(self.root / name, self.device).items()}
        return weights
