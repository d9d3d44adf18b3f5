"""The backend: torch.export traces a graph, AOTInductor compiles it to one shared library, a loader runs it."""

from __future__ import annotations

import hashlib
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks, Toolchain, Traced, TracedSubgraph
from pipeline.backends.inductor.collectives import c_functions
from pipeline.backends.inductor.compiler import explained, from_environment, use
from pipeline.backends.inductor.program import Program, program_of
from pipeline.backends.inductor.ranks import ManyRanks, OneRank
from pipeline.backends.inductor.scratch import (
    no_input_checks,
    own_headers,
    scratch,
    whole_headers,
)
from pipeline.backends.inductor.seams import BlockedSeams, PlainRankedSeams, RankedSeams
from pipeline.backends.inductor.session import GRAPH_FILE
from pipeline.backends.inductor.subgraphs import SubgraphTracer
from pipeline.errors import HostError, Problem
from pipeline.files.temporary import prepared_folder, problems, temporary_files, temporary_folder
from pipeline.graphs.module import GraphModule, empty
from pipeline.graphs.packing import PACKINGS, Packing
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.parallel import Seams
from pipeline.recipe.backend_settings import InductorSettings

HERE = Path(__file__).parent
KERNELS = (*sorted(HERE.glob("*_kernel.py")), HERE / "vectors.py", *sorted(HERE.glob("include/*")))
KERNEL_DIGEST = hashlib.sha256(b"".join(file.read_bytes() for file in KERNELS)).hexdigest()[:12]
"""Digest of our own C++, which the traced graph refers to by name only."""

CONTAINER = "container"
"""Name of the subgraph that every graph on a CPU has: what the loader calls."""

WRAPPER_LEVEL = "O1"
"""Optimisation level of the C++ that calls kernels and subgraphs: at O0 a step of a model of 135 M weights, whose
kernels are short, takes 3% longer, and a graph's file is four times as large."""

MARCH = {"native": "native", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
VECTOR_BITS = {"native": None, "avx2": 256, "avx512": 512}
NO_VECTORS = 1
MISSING = "missing"
"""Version of what a host lacks, by which a lock recognises that this host compiles nothing."""

BASE_MARCH = {"x86_64": "x86-64", "aarch64": "armv8-a"}
"""Instruction set that every processor of an architecture has."""


class InductorBackend:
    """AOTInductor for the CPU (default) or CUDA."""

    graph_file = GRAPH_FILE

    def __init__(self, settings: InductorSettings) -> None:
        self.device: str = settings.device
        self.isa: str = settings.isa
        self.cxx = settings.cxx
        self.packing: Packing = PACKINGS[settings.packing]
        # With Triton, which a GPU needs, this import starts processes of its own.
        self.preload = ("torch._inductor.compile_fx",) if settings.device == "cpu" else ()

    def toolchain(self) -> Toolchain:
        """Return versions of torch and the C++ compiler, and what `native` is on this host: instruction set or GPU."""
        versions = {"torch": str(torch.__version__), "cxx": from_environment().fact()}
        versions["machine"] = platform.machine()
        if self.device == "cpu":
            versions["isa"] = self.requires()["isa"]
        else:
            versions["cuda"] = torch.version.cuda or MISSING
            versions["compute_capability"] = self.requires().get("compute_capability", MISSING)
        return Toolchain("inductor", versions)

    def flags(self) -> dict[str, str]:
        """Return the settings that change the generated code."""
        return {
            "device": self.device,
            "isa": self.isa,
            "kernel": KERNEL_DIGEST,
            "wrapper": WRAPPER_LEVEL,
            **_compiler_flags(),
            **{name: str(value) for name, value in self.settings().items()},
        }

    def settings(self) -> dict[str, Any]:
        """Return Inductor's configuration."""
        common: dict[str, Any] = {
            "aot_inductor.enable_line_tables": False,
            # Inductor writes a thread count into its loops, by default that of the compiling process: one graph would
            # compile to different programs under one key.
            "cpp.threads": 1,
        }
        if self.device == "cpu":
            return common | {"cpp.simdlen": VECTOR_BITS[self.isa], "cpp.march": MARCH[self.isa]}
        # The C++ of a GPU artifact only launches kernels. By default it would need the build host's instruction set.
        return common | {"cpp.simdlen": NO_VECTORS, "cpp.march": BASE_MARCH.get(platform.machine(), "native")}

    def requires(self) -> dict[str, str]:
        """Return the machine and the instruction set of a CPU artifact, or the compute capability of a GPU artifact."""
        return self.host() if self.isa == "native" else self.host() | {"isa": self.isa}

    def host(self) -> dict[str, str]:
        """Return this host's values of the keys of `requires`; a host without a GPU has the device `cpu`."""
        machine = platform.machine()
        if self.device == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return {"device": "cuda", "machine": machine, "compute_capability": f"{major}.{minor}"}
        isa = torch.backends.cpu.get_cpu_capability().lower()
        return {"device": "cpu", "machine": machine, "isa": isa}

    def preflight(self) -> list[Problem]:
        """Check for a C++ compiler of the recipe's version, a folder for its files, and what a GPU needs."""
        return [*self._compiler_problems(), *problems(), *(_gpu_problems() if self.device == "cuda" else ())]

    def _compiler_problems(self) -> list[Problem]:
        try:
            compiler = from_environment()
        except HostError as error:
            return list(error.problems)
        version = compiler.identity().version
        if (found := compiler.problems()) or self.cxx is None or f"{version}.".startswith(f"{self.cxx}."):
            return found
        what = f"the recipe requires C++ compiler {self.cxx}; {shlex.join(compiler.words)!r} is version {version}"
        return [Problem("backend.cxx", what, "set CXX to that version, or change backend.cxx")]

    def seams(self, tp: int, subgraphs: SubgraphTracer | None = None) -> Seams:
        """Return layouts and collectives of a model split over `tp` ranks."""
        if self.device == "cpu":
            return BlockedSeams(subgraphs) if tp == 1 else RankedSeams(tp, subgraphs)
        return Seams() if tp == 1 else PlainRankedSeams(tp)

    def trace(self, spec: GraphSpec, pair: PairSpec) -> Traced:
        """Trace the graph to ATen operators on tensors without values.

        On a CPU a graph is a program of subgraphs. On a GPU it is exported whole: a GPU needs few launches.
        """
        io = signature(spec, pair, self.packing)
        if self.device != "cpu":
            # Fake tensors: on a GPU even uninitialised ones take memory, those of all weights and caches per worker.
            with FakeTensorMode(), torch.no_grad():
                module = GraphModule(spec, pair, io, self.seams)
                whole = torch.export.export(module, (empty(io.inputs, self.device),), strict=False)
            return Traced(canonical(whole).encode(), io, whole)
        tracer = SubgraphTracer(graph_text)
        module = GraphModule(spec, pair, io, partial(self.seams, subgraphs=tracer))
        program = program_of(module, tracer, empty(io.inputs), graph_text)
        return Traced(program.text().encode(), io, program, tuple(_subgraphs(program)))

    def compile_subgraph(self, subgraph: TracedSubgraph, work: Path) -> bytes:
        """Compile a subgraph of graphs; return the object file."""
        # Not at the top: they import Inductor.
        from pipeline.backends.inductor.driver import container_object
        from pipeline.backends.inductor.subgraph_objects import generated, object_file

        with self.inductor(subgraph.ir):
            if subgraph.name == CONTAINER:
                return container_object(subgraph.ir.decode(), work).read_bytes()
            return object_file(subgraph.program, generated(subgraph.program), work).read_bytes()

    def compile(self, traced: Traced, work: Path, objects: Path | None = None) -> bytes:
        """Link a program, or lower a whole graph to C++ (or Triton); return the `.pt2` package.

        `objects` is the folder with the object files of its subgraphs.
        """
        package = work / self.graph_file
        with self.inductor(traced.ir):
            if objects is None:
                torch._inductor.aoti_compile_and_package(traced.program, package_path=str(package))
            else:
                from pipeline.backends.inductor import driver  # not at the top: it imports Inductor

                files = tuple(objects / f"{subgraph.name}.o" for subgraph in traced.subgraphs)
                driver.package(traced.program, files, work, package)
        return package.read_bytes()

    @contextmanager
    def inductor(self, ir: bytes) -> Iterator[None]:
        """Prepare Inductor for a graph: its configuration, folders, headers and compiler."""
        settings = self.settings() | {
            "compile_threads": 1,
            # The instruction set is known; Inductor's probes for it take seconds to compile.
            "cpp.vec_isa_ok": True,
            "aot_inductor.compile_wrapper_opt_level": WRAPPER_LEVEL,
        }
        if self.device == "cpu":
            settings["aot_inductor.custom_ops_to_c_shims"] = c_functions()
        # Registers our kernels. Not at the top: it imports Inductor, which takes seconds and only compiling needs.
        from pipeline.backends.inductor import (  # noqa: F401
            block_experts_kernel,
            block_linear_kernel,
            cached_attention_kernel,
            sample_all_kernel,
        )

        flags = repr(sorted(self.flags().items())).encode()
        headers, graph = (hashlib.sha256(data).hexdigest()[:16] for data in (flags, flags + ir))
        compiler, parent = from_environment(), temporary_folder()
        own = prepared_folder(parent)
        folders = scratch(own / graph), whole_headers(own / "headers" / headers), temporary_files(parent)
        use(compiler, own / "compilers")
        patched = torch._inductor.config.patch(settings), own_headers(), no_input_checks(), explained(compiler)
        with folders[0], folders[1], folders[2], patched[0], patched[1], patched[2], patched[3]:
            yield

    def open(self, root: Path, manifest: PairManifest) -> Ranks:
        """Open one rank in this process, or several in a process each, on a GPU each.

        Raises:
            HostError: fewer GPUs than ranks.

        """
        if self.device == "cuda" and torch.cuda.device_count() < manifest.ranks:
            what = f"the artifact has {manifest.ranks} ranks, this host has {torch.cuda.device_count()} GPUs"
            raise HostError(what, where=str(root), fix="use a host with a GPU for each rank")
        return OneRank(root, manifest) if manifest.ranks == 1 else ManyRanks(root, manifest)


def _gpu_problems() -> Iterator[Problem]:
    if not torch.cuda.is_available():
        yield Problem("backend.device", "device is cuda, but no GPU is available", "use device: cpu")
        return
    if find_spec("triton") is None:
        yield Problem("packages", "not installed: triton", "pip install triton")
    if not _has_cuda_headers():
        what = "no headers of the CUDA toolkit (cuda.h, cuda_runtime.h), which the C++ of a graph includes"
        yield Problem("CUDA_HOME", what, f"install the toolkit of CUDA {torch.version.cuda}, and set CUDA_HOME")


def _has_cuda_headers() -> bool:
    """Return whether the headers are where Inductor looks."""
    from torch.utils import cpp_extension  # not at the top: it imports setuptools, which only a GPU needs

    try:
        folders = cpp_extension.include_paths("cuda")
    except OSError:  # CUDA_HOME is not set, and there is no nvcc
        return False
    return any(Path(folder, "cuda_runtime.h").is_file() for folder in (*folders, "/usr/include"))


def _subgraphs(program: Program) -> Iterator[TracedSubgraph]:
    """Yield the container and the subgraphs of a program."""
    interface = Path(torch.__file__).parent / "_inductor/codegen/aoti_runtime/interface.cpp"
    yield TracedSubgraph(CONTAINER, interface.read_bytes())
    for name in dict.fromkeys(call.subgraph for call in program.calls):
        yield TracedSubgraph(name, program.subgraphs[name].ir, program.subgraphs[name])


def canonical(program: torch.export.ExportedProgram) -> str:
    """Return the graph as text, equal on two machines: operators, arguments, shapes, dtypes; no metadata or paths."""
    return f"{graph_text(program.graph)}\n{program.graph_signature}"


def graph_text(graph: torch.fx.Graph) -> str:
    """Return the nodes of a graph as text, numbered: torch's names differ between equal graphs."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}

    def line(node: torch.fx.Node) -> str:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda other: _Name(numbers[other]))
        target = "" if node.op in ("placeholder", "output") else node.target
        return f"{numbers[node]} = {node.op} {target} {args} {kwargs} : {_value(node.meta.get('val'))}"

    return "\n".join(map(line, graph.nodes))


class _Name(str):
    """Text whose representation has no quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device.type}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_value(v) for v in value) + ")"
    return str(value)


def _compiler_flags() -> dict[str, str]:
    """Return the flags in `CXX`; none, as of most builds, is no entry."""
    flags = from_environment().flags
    return {"cxx": shlex.join(flags)} if flags else {}
