"""Linear layers of a small decoder, a few rows: our kernel, torch's product on the same blocks, torch's plain product.

    PYTHONPATH=. python benchmarks/block_linear.py [--dtype bfloat16] [--layers 30] [--rows 1 5 20 64] [--live 8]

Every contender runs over the same weights, which are inputs and far larger than the caches. `ours` runs what reads the
same rows in one loop, as the decoder does; `single` is the same kernel in a loop for each weight. Medians of rounds in
turns. In float32 each is one AOTInductor graph; in bfloat16, int8 and int4 torch's plain product is bfloat16 and runs
eagerly, since Inductor declares one accumulator twice there (torch 2.13). The limit is how fast the weights can be read
once: measured by a sum over one large tensor. With `--live`, `ours` also runs with so many of the rows live.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from pipeline.backends.inductor.block_linear import block_linear, block_swiglu
from pipeline.backends.inductor.session import LoadedGraph
from pipeline.graphs.packing import BlockPacking
from pipeline.models import int4, int8

SUMMED_BYTES = 512 << 20
NARROW = {"int8": "int8", "int4": "uint8"}
"""How weights that are narrower than activations are stored."""
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


def single(x, weight, live=None):
    return block_linear(x, [weight], live).to(x.dtype)


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


class Ours(torch.nn.Module):
    """The same, four loops a layer, of all rows or of those that are live."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, weights, live=None):
        for layer in range(self.layers):
            q, k, v, o, gate, up, down = weights[layer * 7 : layer * 7 + 7]
            q, k, v = block_linear(x, [q, k, v], live).to(x.dtype).split([HIDDEN, 192, 192], dim=-1)
            x = x + single(q + torch.cat([k, v, v], -1), o, live)
            x = x + single(block_swiglu(x, gate, up, live), down, live)
            x = torch.nn.functional.rms_norm(x, (HIDDEN,))
        return single(x, weights[-1], live)


def package(module, inputs):
    from pipeline.backends.inductor import block_linear_kernel  # noqa: F401 - tells Inductor of the kernel

    program = torch.export.export(module, inputs)
    path = str(Path(tempfile.mkdtemp()) / "graph.pt2")
    options = {"cpp.threads": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    return LoadedGraph(Path(path), "cpu")


def timed(run, rounds):
    run()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return median(found)


def stored(weight, name):
    """A weight as shards hold it."""
    whole, scales = {"int8": int8, "int4": int4}[name].quantise(weight) if name in NARROW else (weight, None)
    dtype = NARROW.get(name, name)
    shape = BlockPacking().packed_shape(tuple(weight.shape), "linear", dtype)
    out = torch.empty(shape, dtype=getattr(torch, dtype))
    BlockPacking().pack(whole, "linear", out, scales)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8", "int4"], default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--live", type=int, nargs="+", default=[], help="numbers of live rows")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.dtype in NARROW else getattr(torch, arguments.dtype)
    flat = [(torch.randn(shape) * 0.05).to(dtype) for shape in [*SHAPES * arguments.layers, (VOCAB, HIDDEN)]]
    packed = [stored(weight, arguments.dtype) for weight in flat[:-1]]
    packed.append(stored(flat[-1], "int8" if arguments.dtype == "int4" else arguments.dtype))  # as recipes store it
    size = sum(weight.numel() * weight.element_size() for weight in packed)
    large = torch.ones(SUMMED_BYTES // 4)
    speed = SUMMED_BYTES / timed(large.sum, arguments.rounds)
    limit = size / speed
    print(f"{size / 1e6:.0f} MB of {arguments.dtype}; read once: {limit * 1e3:.1f} ms at {speed / 1e9:.1f} GB/s")
    for rows in arguments.rows:
        x = torch.randn(rows, HIDDEN).to(dtype)
        modules = {"ours": (Ours(arguments.layers), packed), "single": (Layers(single, arguments.layers), packed)}
        if dtype == torch.float32:
            modules |= {"blocks": (Layers(blocks, arguments.layers), packed)}
            modules |= {"plain": (Layers(plain, arguments.layers), flat)}
        runs = {name: partial(package(one, (x, ws)).run, [x, *ws]) for name, (one, ws) in modules.items()}
        masks = {count: torch.arange(rows) < count for count in arguments.live if count < rows}
        if masks:
            graph = package(Ours(arguments.layers), (x, packed, masks[min(masks)]))
            runs |= {f"{count} live": partial(graph.run, [x, *packed, live]) for count, live in masks.items()}
        if dtype != torch.float32:
            runs["plain"] = partial(Layers(plain, arguments.layers), x, flat)
        took = {name: [] for name in runs}
        with torch.no_grad():
            for _ in range(arguments.rounds):
                for name, run in runs.items():
                    took[name].append(timed(run, 1))
        for name, seconds in took.items():
            typical = median(seconds)
            print(f"  M={rows} {name:<8}{typical * 1e3:7.1f} ms  {typical / limit:5.2f} of reading once", flush=True)


if __name__ == "__main__":
    main()
