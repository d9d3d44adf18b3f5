"""A recurrent layer (gated delta net) beside one of full attention, compiled, and beside transformers' own layers.

    OMP_NUM_THREADS=1 PYTHONPATH=. taskset -c 0 python -W ignore benchmarks/recurrent.py [--intermediate 3584]

Layers of the sizes of Qwen3.5-0.8B with random weights, more of them than caches of the processor hold: recurrent ones
and one of full attention, and as many of full attention alone. The time of a layer of full attention is a share of the
second, that of a recurrent layer a share of what the first has left. Each pass reads T tokens after `--position` cached
ones, batch 1: 1 as decode does, 5 as verifying four drafts, a prompt chunk. Ours is a `score` graph of the inductor
backend, with a vocabulary of 64, whose rows can return by as many tokens as K=4 needs. Transformers' layers run eagerly
in inference mode, with their torch path, over a cache of as many tokens. With `--intermediate 64` a layer is little
more than what mixes tokens. All run in turns, on one thread; medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DRAFTS = 4
REPLAYED = DRAFTS + 3
"""Tokens by which a row can return with so many drafts, as the plan has them."""

LINEAR, FULL = "linear_attention", "full_attention"
SIZES = {
    "vocab_size": 64, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
WARM = 2
"""Turns before the ones that count."""
SPREAD = 0.02
"""Standard deviation of random weights, as transformers initialises them."""

Run = Callable[[], Tensor]
"""One pass of all layers; a tensor that it computed last."""
Types = tuple[str, ...]
"""The kind of each layer."""


def ours(types: Types, options: argparse.Namespace) -> dict[int, Run]:
    """Compile a graph of each T for layers of these types; they share weights and state."""
    from pipeline.backends.inductor.backend import InductorBackend
    from pipeline.backends.inductor.session import LoadedGraph
    from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
    from pipeline.models.families import config_of
    from pipeline.recipe.backend_settings import InductorSettings
    from support.graphs import compile_graph

    target = config_of({"model_type": "qwen3_5_text", **fields_of(types, options)}, "config.json")
    models = ModelsSpec(target, target, options.dtype, options.dtype, tp=1, draft_replicated=False)
    length = options.position + max(options.tokens) + 1
    pair = PairSpec(models, rows=1, length=length, replayed=REPLAYED if LINEAR in types else 0)
    backend, tensors, runs = InductorBackend(InductorSettings()), {}, {}
    for tokens in options.tokens:
        traced = backend.trace(GraphSpec("score", 1, tokens, length - 1, model="target"), pair)
        with tempfile.TemporaryDirectory() as work:
            compile_graph(backend, traced, Path(work))
            graph = LoadedGraph(Path(work) / backend.graph_file, "cpu")
        for spec in (*traced.signature.weights, *traced.signature.state):
            tensors.setdefault(spec.name, random_tensor(spec))
        bound = [tensors[spec.name] for spec in (*traced.signature.weights, *traced.signature.state)]
        runs[tokens] = pass_of(graph, bound, tensors, arguments(traced.signature.arguments, options.position, tokens))
    return runs


def fields_of(types: Types, options: argparse.Namespace) -> dict[str, object]:
    """Return the fields of a config."""
    own = {"intermediate_size": options.intermediate, "num_hidden_layers": len(types), "layer_types": list(types)}
    return SIZES | own


def random_tensor(spec) -> Tensor:
    """Return random weights or state of the entry of a signature; integers are zeros."""
    from pipeline.graphs.dtypes import torch_dtype

    dtype = torch_dtype(spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(spec.shape, dtype=dtype)
    return (torch.randn(spec.shape) * SPREAD).to(dtype)


def arguments(specs, position: int, tokens: int) -> list[Tensor]:
    """Return the arguments of a `score` graph that reads `tokens` tokens at a position."""
    values = {"tokens": torch.arange(tokens)[None] % 64, "position": [position], "lengths": [tokens]}
    return [torch.as_tensor(values[spec.name], dtype=torch.int32) for spec in specs]


def pass_of(graph, bound: list[Tensor], tensors: dict[str, Tensor], given: list[Tensor]) -> Run:
    """Return a function that runs a graph at its position, wherever the pass before it ended."""
    base = tensors.get("target/base")
    position = int(given[1])

    def run() -> Tensor:
        if base is not None:
            base.fill_(position - REPLAYED)
        return graph.run([*bound, *given])[0]

    return run


def theirs(types: Types, options: argparse.Namespace) -> dict[int, Run]:
    """Return passes of transformers' layers of these types over a cache that holds as many tokens."""
    from transformers import DynamicCache, Qwen3_5TextConfig
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    config = Qwen3_5TextConfig(**fields_of(types, options))
    config._attn_implementation = "sdpa"
    dtype = getattr(torch, options.dtype)
    layers = [modeling.Qwen3_5DecoderLayer(config, number) for number in range(len(types))]
    for layer in layers:
        for parameter in layer.to(dtype).eval().parameters():
            torch.nn.init.normal_(parameter, std=SPREAD)
    rotary, cache = modeling.Qwen3_5TextRotaryEmbedding(config), DynamicCache(config=config)

    def read(first: int, x: Tensor) -> Tensor:
        places = torch.arange(first, first + x.shape[1])
        turns = rotary(x, places[None])
        sees = torch.arange(first + x.shape[1]) <= places[:, None]
        for layer in layers:
            mask = None if layer.block_type == LINEAR else sees[None, None]
            x = layer(x, position_embeddings=turns, attention_mask=mask, position_ids=places[None], cache=cache)
        return x

    def run_of(x: Tensor) -> Run:
        def run() -> Tensor:
            with torch.inference_mode():
                out = read(options.position, x)
                for kept, kind in zip(cache.layers, types, strict=True):
                    if kind == FULL:
                        kept.crop(-x.shape[1])
            return out

        return run

    with torch.inference_mode():
        read(0, torch.randn(1, options.position, config.hidden_size, dtype=dtype))
    return {n: run_of(torch.randn(1, n, config.hidden_size, dtype=dtype)) for n in options.tokens}


def milliseconds(runs: dict[str, dict[Types, Run]], rounds: int) -> dict[str, list[float]]:
    """Run all in turns after a warm-up; return median times of a recurrent layer and of one of full attention.

    Raises:
        ValueError: an output that is not finite.

    """
    took: dict[str, list[list[float]]] = {who: [] for who in runs}
    for turn in range(rounds + WARM):
        for who, passes in runs.items():
            both = [timed(run, who) for run in passes.values()]
            if turn >= WARM:
                took[who].append(both)
    medians = {who: [median(times) for times in zip(*turns, strict=True)] for who, turns in took.items()}
    return {who: of_layers(took_ms, runs[who]) for who, took_ms in medians.items()}


def timed(run: Run, who: str) -> float:
    """Return the milliseconds of a pass."""
    started = time.perf_counter()
    out = run()
    took_ms = (time.perf_counter() - started) * 1e3
    if not out.float().isfinite().all():
        raise ValueError(f"{who}: outputs are not finite")
    return took_ms


def of_layers(took_ms: list[float], passes: dict[Types, Run]) -> list[float]:
    """Return the time of a recurrent layer and of one of full attention, from passes of both kinds and of one."""
    mixed_ms, full_ms = took_ms
    layers = len(next(iter(passes)))
    of_full = full_ms / layers
    return [(mixed_ms - of_full) / (layers - 1), of_full]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--position", type=int, default=512, help="cached tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, DRAFTS + 1, 256])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kinds = [(*[LINEAR] * (options.layers - 1), FULL), (FULL,) * options.layers]
    makers = {"Tandem": ours, "transformers": theirs}
    made = {who: {types: make(types, options) for types in kinds} for who, make in makers.items()}
    print("| T | recurrent, ms | full attention, ms | transformers, ms | full attention, ms | ratio | full attention |")
    print("|" + " --- |" * 7)
    for tokens in options.tokens:
        passes = {who: {types: runs[tokens] for types, runs in of.items()} for who, of in made.items()}
        own, other = milliseconds(passes, options.rounds).values()
        ratios = [theirs_ms / ours_ms for ours_ms, theirs_ms in zip(own, other, strict=True)]
        print(f"| {tokens} | " + " | ".join(f"{number:.2f}" for number in (*own, *other, *ratios)) + " |", flush=True)


if __name__ == "__main__":
    main()
