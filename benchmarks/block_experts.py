"""Experts of a few tokens, by the dtype of their matrices: bfloat16, int8 and 4 bits in turns, in one run.

    PYTHONPATH=. python benchmarks/block_experts.py [--experts 128] [--chosen 8] [--inner 768] [--rows 1 3 5]

The defaults are a layer of Qwen3-30B-A3B. Each round draws other experts, so that caches hold few of them. Medians of
rounds; `read` is the time to read the matrices of the chosen experts once, at the speed of a sum over one large tensor.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.packing import BlockPacking
from pipeline.models import int4, int8
from pipeline.models.parallel import Chosen

SUMMED_BYTES = 512 << 20
STORED = {"bfloat16": ("bfloat16", None), "int8": ("int8", int8), "int4": ("uint8", int4)}
"""Dtype of the stored matrices, and what rounds them."""


class Layer(torch.nn.Module):
    """The experts of one layer."""

    def forward(self, x, chosen, shares, gate, up, down):
        return BlockedSeams().experts(x[None], Chosen(chosen[None], shares[None]), (gate, up, down))


def package(inputs):
    from pipeline.backends.inductor import block_experts_kernel  # noqa: F401 - tells Inductor of the kernel

    program = torch.export.export(Layer(), inputs)
    path = str(Path(tempfile.mkdtemp()) / "graph.pt2")
    options = {"cpp.threads": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    return LoadedGraph(Path(path), "cpu")


def stored(weight, name):
    """The matrices of experts as shards hold them: the random ones of one expert, in each place."""
    dtype, rounding = STORED[name]
    whole, scales = (weight.to(torch.bfloat16), None) if rounding is None else rounding.quantise(weight)
    shape = BlockPacking().packed_shape(tuple(weight.shape), "linear", dtype)
    out = torch.empty(shape, dtype=getattr(torch, dtype))
    BlockPacking().pack(whole, "linear", out, scales)
    return out


def timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("chosen", 8), ("inner", 768), ("hidden", 2048), ("rounds", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 3, 5])
    given = parser.parse_args()
    torch.manual_seed(0)
    shapes = ((given.inner, given.hidden), (given.inner, given.hidden), (given.hidden, given.inner))
    plain = [torch.randn(shape) * 0.05 for shape in shapes]
    matrices = {name: [torch.stack([stored(w, name)] * given.experts) for w in plain] for name in STORED}
    large = torch.ones(SUMMED_BYTES // 4)
    large.sum()
    speed = SUMMED_BYTES / median(timed(large.sum) for _ in range(9))
    for rows in given.rows:
        x = torch.randn(rows, given.hidden).bfloat16()
        graphs = {}
        for name, own in matrices.items():
            chosen, shares = draw(rows, given), torch.rand(rows, given.chosen)
            graphs[name] = package((x, chosen, shares, *own))
        took = {name: [] for name in graphs}
        for _ in range(given.rounds):
            chosen, shares = draw(rows, given), torch.rand(rows, given.chosen)
            for name, graph in graphs.items():
                took[name].append(timed(partial(graph.run, [x, chosen, shares, *matrices[name]])))
        for name, seconds in took.items():
            size = sum(m[0].numel() * m.element_size() for m in matrices[name]) * len(chosen.unique())
            ratio = median(seconds) / median(took["int8"])
            read = f"read {size / speed * 1e3:6.2f} ms"
            print(f"M={rows} {name:<9}{median(seconds) * 1e3:7.2f} ms  {ratio:5.2f} of int8  {read}", flush=True)


def draw(rows, given):
    """Other experts for each token."""
    return torch.stack([torch.randperm(given.experts)[: given.chosen] for _ in range(rows)])


if __name__ == "__main__":
    main()
