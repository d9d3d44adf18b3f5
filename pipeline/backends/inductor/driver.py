"""The library of a program: C++ that calls its subgraphs in order, linked with their object files into a `.pt2`.

AOTInductor's loader opens the package like one of Inductor's own: the container that it calls is Inductor's text, and
the model behind it is ours. A graph of 80 layers is 80 rows of a table, with one function.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch._inductor.codecache import get_device_information
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.package import package_aoti
from torch.utils import _pytree as pytree

from pipeline.backends.inductor.program import Program
from pipeline.backends.inductor.subgraph_objects import compiled, declaration

HEADER = "torch/csrc/inductor/aoti_include/cpu.h"
CHECK = "AOTI_TORCH_ERROR_CODE_CHECK"
SOURCE = """
#include <{header}>
#line 1 "driver.cpp"

extern "C" {{
{declarations}
}}

namespace {{

struct Call {{
    AOTITorchError (*run)(const AtenTensorHandle*, AtenTensorHandle*);
    uint32_t inputs, outputs, freed;
}};
const Call calls[] = {{{calls}}};
// Of each call: the values that it takes, then those that no later call takes.
const uint32_t numbers[] = {{{numbers}}};
const uint32_t returned[] = {{{returned}}};

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
    std::vector<RAIIAtenTensorHandle> values({values});
    for (size_t n = 0; n < {inputs}; ++n) values[n] = RAIIAtenTensorHandle(input_handles[n]);
    AtenTensorHandle given[{most_inputs}], results[{most_outputs}];
    const uint32_t* number = numbers;
    size_t made = {inputs};
    for (const auto& call : calls) {{
        for (size_t n = 0; n < call.inputs; ++n) given[n] = values[*number++].get();
        {check}(call.run(given, results));
        for (size_t n = 1; n < call.outputs; ++n) {{  // a result that is returned twice has one handle
            for (size_t m = 0; m < n; ++m) {{
                if (results[m] == results[n]) {check}(aoti_torch_new_tensor_handle(results[m], &results[n]));
            }}
        }}
        for (size_t n = 0; n < call.outputs; ++n) values[made++] = RAIIAtenTensorHandle(results[n]);
        for (size_t n = 0; n < call.freed; ++n) values[*number++].reset();
    }}
    for (size_t n = 0; n < {outputs}; ++n) {{  // new handles, as a value may be returned twice
        {check}(aoti_torch_new_tensor_handle(values[returned[n]].get(), &output_handles[n]));
    }}
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
    """Return the C++ of a program: tables of its calls, and the loop that makes them."""
    last_uses = {number: index for index, call in enumerate(program.calls) for number in call.inputs}
    kept = set(program.outputs)
    calls, numbers = [], []
    for index, call in enumerate(program.calls):
        ended = {n for n in call.inputs if n >= program.inputs and last_uses[n] == index and n not in kept}
        calls.append(f"{{{call.subgraph}, {len(call.inputs)}, {len(call.outputs)}, {len(ended)}}}")
        numbers += [*call.inputs, *sorted(ended)]
    used = {call.subgraph: program.subgraphs[call.subgraph] for call in program.calls}
    return SOURCE.format(
        header=HEADER,
        check=CHECK,
        declarations="\n".join(f"{declaration(subgraph)};" for subgraph in used.values()),
        calls=", ".join(calls),
        numbers=", ".join(map(str, numbers)),
        returned=", ".join(map(str, program.outputs)),
        inputs=program.inputs,
        outputs=len(program.outputs),
        values=program.inputs + sum(len(call.outputs) for call in program.calls),
        most_inputs=max((len(call.inputs) for call in program.calls), default=0) + 1,
        most_outputs=max((len(call.outputs) for call in program.calls), default=0) + 1,
        in_spec=_spec(([torch.empty(0)] * program.inputs,), {}),
        out_spec=pytree.treespec_dumps(pytree.tree_structure((0,) * len(program.outputs))),
    )


def _spec(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """Return the structure of arguments as AOTInductor stores it, for torch's own function that opens packages."""
    return pytree.treespec_dumps(pytree.tree_structure((args, kwargs)))
