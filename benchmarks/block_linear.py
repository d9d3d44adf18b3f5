"""Linear layers of a small decoder, a few rows: our kernel, torch's product on the same blocks, torch's plain product.

Every contender is one AOTInductor graph over the same weights, which are inputs and far larger than the caches. The
limit is how fast the weights can be read once: measured by a sum over them. In bfloat16 the other two do not compile
with torch 2.13: Inductor declares one accumulator twice.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from pipeline.backends.inductor.backend import LoadedGraph
from pipeline.backends.inductor.block_linear import block_linear
from pipeline.backends.packing import BlockPacking

HIDDEN, WIDE, VOCAB = 576, 1536, 49152
SHAPES = [
    (HIDDEN, HIDDEN),
    (192, HIDDEN),
    (192, HIDDEN),
    (HIDDEN, HIDDEN),
    (WIDE, HIDDEN),
    (WIDE, HIDDEN),
    (HIDDEN, WIDE),
]


def ours(x, weight):
    return block_linear(x, weight).to(x.dtype)


def blocks(x, weight):
    return torch.matmul(x[None], weight).permute(1, 0, 2).reshape(x.shape[0], -1)


def plain(x, weight):
    return torch.nn.functional.linear(x, weight)


class Layers(torch.nn.Module):
    """All products of the layers, then the head; every weight is read."""

    def __init__(self, product, layers):
        super().__init__()
        self.product, self.layers = product, layers

    def forward(self, x, weights):
        for layer in range(self.layers):
            q, k, v, o, gate, up, down = weights[layer * 7 : layer * 7 + 7]
            heads = self.product(x, q) + torch.cat([self.product(x, k), self.product(x, v), self.product(x, v)], -1)
            x = x + self.product(heads, o)
            x = x + self.product(torch.nn.functional.silu(self.product(x, gate)) * self.product(x, up), down)
            x = torch.nn.functional.rms_norm(x, (HIDDEN,))
        return self.product(x, weights[-1])


def compiled(product, layers, x, weights):
    from pipeline.backends.inductor import block_linear_kernel  # noqa: F401 - tells Inductor of the kernel

    program = torch.export.export(Layers(product, layers), (x, weights))
    package = str(Path(tempfile.mkdtemp()) / "graph.pt2")
    options = {"cpp.threads": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    return LoadedGraph(package, -1)


def timed(run, rounds):
    run()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    shapes = [*SHAPES * arguments.layers, (VOCAB, HIDDEN)]
    flat = [(torch.randn(shape) * 0.05).to(dtype) for shape in shapes]
    packed = [BlockPacking().pack(weight, "linear") for weight in flat]
    size = sum(weight.numel() * weight.element_size() for weight in flat)
    words = [weight.view(torch.int64 if weight.numel() % 4 == 0 else torch.int16) for weight in flat]
    limit = timed(lambda: [word.sum() for word in words], arguments.rounds)
    print(f"{size / 1e6:.0f} MB of {arguments.dtype}; read once: {limit * 1e3:.1f} ms, {size / limit / 1e9:.1f} GB/s")
    for rows in arguments.rows:
        x = torch.randn(rows, HIDDEN).to(dtype)
        graphs = {
            p.__name__: compiled(p, arguments.layers, x, packed if p is not plain else flat)
            for p in (ours, blocks, plain)
        }
        for name, graph in graphs.items():
            weights = flat if name == "plain" else packed
            took = timed(lambda graph=graph, given=[x, *weights]: graph.run(given), arguments.rounds)
            print(f"  M={rows} {name:<7}{took * 1e3:7.1f} ms  {took / limit:5.2f} of reading once", flush=True)


if __name__ == "__main__":
    main()
