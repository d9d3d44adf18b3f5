"""Compile a subgraph to an object file with one C function.

Inductor generates the code of a subgraph as for a graph of its own: kernels, and a function that allocates buffers and
calls them. These are compiled under names of their own; what an AOTInductor model has beside them (constants, inputs
by name, a container) a subgraph does not need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa

from pipeline.backends.inductor.subgraphs import Subgraph

HEADER = "tandem_subgraph.h"
"""Header of a subgraph, in `scratch.INCLUDE`."""
RUN = re.compile(r"^void AOTInductorModel::run_impl\(.*?^\} // AOTInductorModel::run_impl$", re.M | re.S)
"""Inductor's function that allocates buffers and calls kernels."""
CACHED = re.compile(r"^CACHE_TORCH_\w+\(.*\);$", re.M)
"""Its constants of torch's dtypes and devices."""
TAKEN = re.compile(r"steal_from_raw_handles_to_raii_handles\(input_handles, \d+\)")
"""Where it takes its inputs over."""
CHECKS = re.compile(r"^ *(if \(_check_aoti_|__check_inputs_outputs|\[\[maybe_unused\]\] auto& kernels).*\n", re.M)
"""Its lines that need a whole model."""
PREFIX = "cpp_fused_"
"""Start of the name of every kernel."""

SOURCE = """
#include <{header}>
#line 1 "{name}.cpp"

{kernels}

namespace {{

using namespace torch::aot_inductor;
{cached}

struct Subgraph {{
    int32_t device_idx_ = -1;
    void run_impl(AtenTensorHandle*, AtenTensorHandle*, DeviceStreamType, AOTIProxyExecutorHandle);
}};

{run}

}}

extern "C" __attribute__((visibility("hidden"))) {declaration} {{
    try {{
        Subgraph().run_impl(const_cast<AtenTensorHandle*>(given), results, nullptr, nullptr);
    }} catch (const std::exception& error) {{
        std::cerr << "Error: " << error.what() << '\\n';
        return AOTI_TORCH_FAILURE;
    }}
    return AOTI_TORCH_SUCCESS;
}}
"""


class GeneratedCode(Exception):  # noqa: N818 - ends Inductor's compiler early, and is no error
    """Inductor's code for a subgraph."""

    def __init__(self, wrapper: str, kernels: str) -> None:
        super().__init__()
        self.wrapper, self.kernels = wrapper, kernels


def generated(subgraph: Subgraph) -> GeneratedCode:
    """Return Inductor's code for a subgraph."""
    try:
        with _code_only():
            torch._inductor.aot_compile(subgraph.module, tuple(meta.empty() for meta in subgraph.inputs))
    except torch._inductor.exc.InductorError as error:
        if not isinstance(error.inner_exception, GeneratedCode):
            raise
        return error.inner_exception
    except GeneratedCode as code:
        return code
    raise AssertionError("Inductor compiled no code")


@contextmanager
def _code_only() -> Iterator[None]:
    """Let Inductor end where it would compile its code."""

    def stop(graph: Any, wrapper: str, kernels: str, extern_nodes: str | None, **_: Any) -> None:
        assert extern_nodes is None, extern_nodes  # calls through a model's executor, which a subgraph has not
        assert not graph.constants, list(graph.constants)
        raise GeneratedCode(wrapper, kernels)

    original = codecache.AotCodeCompiler.compile
    codecache.AotCodeCompiler.compile = stop
    try:
        yield
    finally:
        codecache.AotCodeCompiler.compile = original


def source(subgraph: Subgraph, code: GeneratedCode) -> str:
    """Return the C++ of a subgraph."""
    run = RUN.search(code.wrapper)
    assert run is not None, "Inductor's function has another form"
    borrowing, count = TAKEN.subn("tandem::Inputs{input_handles}", run[0])
    assert count == bool(subgraph.inputs), "Inductor's function takes its inputs in another way"
    text = SOURCE.format(
        header=HEADER,
        name=subgraph.name,  # in the place of the file's path, which checks would carry into the library
        kernels=code.kernels,
        cached="\n".join(CACHED.findall(code.wrapper)),
        run=CHECKS.sub("", borrowing.replace("AOTInductorModel::", "Subgraph::")),
        declaration=declaration(subgraph),
    )
    return text.replace(PREFIX, f"{subgraph.name}_")


def declaration(subgraph: Subgraph) -> str:
    """Return the C declaration of a subgraph's function."""
    return f"AOTITorchError {subgraph.name}(const AtenTensorHandle* given, AtenTensorHandle* results)"


def object_file(subgraph: Subgraph, code: GeneratedCode, folder: Path) -> Path:
    """Compile a subgraph in `folder`; return the object file."""
    return compiled(source(subgraph, code), folder / f"{subgraph.name}.cpp", HEADER, optimised=True)


def compiled(text: str, file: Path, header: str, *, optimised: bool) -> Path:
    """Compile C++ as Inductor compiles kernels (`optimised`) or their callers; return the object file.

    The text's first include, `header`, is precompiled.
    """
    file.write_text(text, encoding="utf-8")
    facts: dict[str, Any] = {"aot_mode": True, "device_type": "cpu", "vec_isa": pick_vec_isa()}
    options = CppTorchDeviceOptions(compile_only=True, min_optimize=not optimised, **facts)
    command = repr(CppBuilder(name="o", sources="i", BuildOption=CppTorchDeviceOptions(**facts)).get_command_line())
    header_facts = facts | {"min_optimize": not optimised}
    if torch._inductor.config.cpp_cache_precompile_headers:
        options.precompiled_header = codecache._precompile_header(header, command, **header_facts)
    builder = CppBuilder(name=file.stem, sources=str(file), output_dir=str(file.parent), BuildOption=options)
    builder.build()
    return Path(builder.get_target_file_path())
