"""Attention of a few queries over a KV cache, a small decoder's layers: our kernel beside torch's SDPA, in bfloat16.

    PYTHONPATH=. python benchmarks/cached_attention.py [--layers 30] [--keys 60 150 350 900]

Batch 1, nine query heads on three of keys, cache bucket 1,024: one query as plain decode has, 3 and 5 as verifying 2
and 4 drafts. Both read caches as inputs; ours is one AOTInductor graph, torch's runs eagerly over exactly the keys that
are seen. The two run in turns.
"""

import argparse
import time
from statistics import median

import torch
from block_linear import package

from pipeline.backends.inductor.cached_attention import cached_attention
from pipeline.models.parallel import PLAIN, attend_up_to

HEADS, KV_HEADS, DIM, LENGTH = 9, 3, 64, 1024


class Ours(torch.nn.Module):
    def forward(self, q, keys, values, last):
        return tuple(cached_attention(q, k, v, last, LENGTH) for k, v in zip(keys, values, strict=True))


def torchs(q, keys, values, last):
    attend = attend_up_to(last, int(last.max()) + 1)
    return tuple(PLAIN.attend(q, k, v, attend) for k, v in zip(keys, values, strict=True))


def main() -> None:
    from pipeline.backends.inductor import cached_attention_kernel  # noqa: F401 - tells Inductor of the kernel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--keys", type=int, nargs="+", default=[60, 150, 350, 900])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    keys, values = (
        [torch.randn(1, KV_HEADS, LENGTH, DIM).bfloat16() for _ in range(arguments.layers)] for _ in range(2)
    )
    for queries in arguments.queries:
        q = torch.randn(1, HEADS, queries, DIM)
        last = torch.zeros(1, queries, dtype=torch.int32)
        graph = package(Ours(), (q, keys, values, last))
        for seen in arguments.keys:
            last = torch.arange(seen, seen + queries, dtype=torch.int32)[None]
            took: dict[str, list[float]] = {"ours": [], "torch": []}
            for _ in range(arguments.rounds):
                started = time.perf_counter()
                graph.run([q, *keys, *values, last])
                between = time.perf_counter()
                with torch.inference_mode():
                    torchs(q.bfloat16(), keys, values, last)
                took["ours"].append(between - started)
                took["torch"].append(time.perf_counter() - between)
            ours, other = (median(times) * 1e3 for times in took.values())
            print(
                f"T={queries} keys={seen}: ours {ours:6.2f} ms, torch {other:6.2f} ms, {other / ours:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
