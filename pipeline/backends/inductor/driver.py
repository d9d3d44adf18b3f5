"""The library of a program: C++ that calls its subgraphs in order, linked with their object files into a `.pt2`.

AOTInductor's loader opens the package like one of Inductor's own: the container that it calls is Inductor's text, and
the model behind it is ours. A graph of 80 layers is 80 calls of one function.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor.codecache import get_device_information
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.package import package_aoti
from torch.utils import _pytree as pytree

from pipeline.backends.inductor.program import Call, Program
from pipeline.backends.inductor.subgraph_objects import compiled, declaration

HEADER = "torch/csrc/inductor/aoti_include/cpu.h"
CHECK = "AOTI_TORCH_ERROR_CODE_CHECK"
SOURCE = """
#include <{header}>
#line 1 "driver.cpp"

extern "C" {{
{declarations}
}}

// Constants in the library: none.
uint8_t _binary_constants_bin_start[1], _binary_constants_bin_end[1];

namespace torch::aot_inductor {{

AOTInductorModel::AOTInductorModel(
    std::shared_ptr<ConstantMap> constants_map, std::shared_ptr<std::vector<ConstantHandle>> constants_array,
    const std::string& device_str, std::optional<std::string> cubin_dir)
    : AOTInductorModelBase({inputs}, {outputs}, 0, device_str, std::move(cubin_dir), true) {{
    for (size_t n = 0; n < {inputs}; ++n) inputs_info_[n].name = "input";
    for (size_t n = 0; n < {outputs}; ++n) outputs_info_[n].name = "output";
    update_constants_map(std::move(constants_map));
    update_constants_array(std::move(constants_array));
    in_spec_ = R"({in_spec})";
    out_spec_ = R"({out_spec})";
}}

std::unordered_map<std::string, AtenTensorHandle> AOTInductorModel::const_run_impl(
    DeviceStreamType, AOTIProxyExecutorHandle, bool) {{
    return {{}};
}}

void AOTInductorModel::_const_run_impl(std::vector<AtenTensorHandle>&, DeviceStreamType, AOTIProxyExecutorHandle) {{}}

void AOTInductorModel::run_impl(
    AtenTensorHandle* input_handles, AtenTensorHandle* output_handles, DeviceStreamType, AOTIProxyExecutorHandle) {{
    const auto inputs = steal_from_raw_handles_to_raii_handles(input_handles, {inputs});
    std::vector<RAIIAtenTensorHandle> values({values});
    const auto input = [&](size_t n) {{ return inputs[n].get(); }};
    const auto value = [&](size_t n) {{ return values[n].get(); }};
    AtenTensorHandle results[{most}];
    const auto keep = [&](size_t first, size_t count) {{
        for (size_t n = 0; n < count; ++n) values[first + n] = RAIIAtenTensorHandle(results[n]);
    }};
{calls}
{returned}
}}

}}
"""


def container_object(interface: str, folder: Path) -> Path:
    """Compile the container, torch's text `interface`, in `folder`; return the object file."""
    text = f'#include <{HEADER}>\n#line 1 "container.cpp"\n{interface}'
    return compiled(text, folder / "container.cpp", HEADER, optimised=False)


def package(program: Program, objects: tuple[Path, ...], folder: Path, out: Path) -> None:
    """Compile and link a program in `folder`, and write the package `out`."""
    name = "model"
    driver = compiled(source(program), folder / "driver.cpp", HEADER, optimised=False)
    options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", aot_mode=True)
    files = [str(file) for file in (driver, *objects)]
    library = CppBuilder(name=name, sources=files, output_dir=str(folder), BuildOption=options)
    library.build()
    facts = folder / f"{name}_metadata.json"
    facts.write_text(json.dumps({"AOTI_DEVICE_KEY": "cpu", **get_device_information("cpu")}), encoding="utf-8")
    package_aoti(str(out), [library.get_target_file_path(), str(facts)])


def source(program: Program) -> str:
    """Return the C++ of a program."""
    last_uses = {number: index for index, call in enumerate(program.calls) for number in call.inputs}
    kept = set(program.outputs)
    lines = []
    for index, call in enumerate(program.calls):
        freed = [n for n in call.inputs if n >= program.inputs and last_uses[n] == index and n not in kept]
        lines += _lines(program, call, sorted(set(freed)))
    used = {call.subgraph: program.subgraphs[call.subgraph] for call in program.calls}
    count = program.inputs + sum(len(call.outputs) for call in program.calls)
    returned = [_returned(program, place, number) for place, number in enumerate(program.outputs)]
    return SOURCE.format(
        header=HEADER,
        declarations="\n".join(f"{declaration(subgraph)};" for subgraph in used.values()),
        inputs=program.inputs,
        outputs=len(program.outputs),
        values=count - program.inputs,
        most=max((len(call.outputs) for call in program.calls), default=0) + 1,
        calls="\n".join(f"    {line}" for line in lines),
        returned="\n".join(f"    {line}" for line in returned),
        in_spec=_spec(([torch.empty(0)] * program.inputs,), {}),
        out_spec=pytree.treespec_dumps(pytree.tree_structure((0,) * len(program.outputs))),
    )


def _spec(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """Return the structure of arguments as AOTInductor stores it, for torch's own function that opens packages."""
    return pytree.treespec_dumps(pytree.tree_structure((args, kwargs)))


def _lines(program: Program, call: Call, freed: Sequence[int]) -> list[str]:
    """Return the C++ of one call."""
    arguments = [_handle(program, number) for number in call.inputs]
    arguments += [f"&results[{n}]" for n in range(len(call.outputs))]
    lines = [f"{CHECK}({call.subgraph}({', '.join(arguments)}));"]
    if call.outputs:
        lines.append(f"keep({call.outputs[0] - program.inputs}, {len(call.outputs)});")
    return lines + [f"values[{number - program.inputs}].reset();" for number in freed]


def _handle(program: Program, number: int) -> str:
    return f"input({number})" if number < program.inputs else f"value({number - program.inputs})"


def _returned(program: Program, place: int, number: int) -> str:
    """Return the C++ that hands a value over: a new handle, as a value may be returned twice."""
    return f"{CHECK}(aoti_torch_new_tensor_handle({_handle(program, number)}, &output_handles[{place}]));"
