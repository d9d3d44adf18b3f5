"""Sharding against copying: `write_shards` and `cp`, the same checkpoint, the same disk, in turns, both synced.

    python benchmarks/shard_vs_cp.py [--gigabytes 2] [--rounds 5] [--folder /somewhere]

Rates are of bytes written: a sharder's run also writes its draft (one layer).
Every run starts with the checkpoint in the page cache (`warm`) or out of it (`cold`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.graphs.packing import BlockPacking, Packing, PlainPacking
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.families import config_of
from pipeline.models.weights import weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.derived import derive
from pipeline.sources.pair import resolve
from pipeline.sources.tensors import layout
from pipeline.stages.shard_files import write_shards

LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


def write_checkpoint(root: Path, size: int) -> None:
    """A bfloat16 checkpoint of about `size` random bytes in one file."""
    root.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": max(1, size // LAYER_BYTES)}
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = layout([(s.name, "BF16", s.shape) for s in weight_specs(config_of(config, "benchmark"))], {})
    with (root / "model.safetensors").open("wb") as file:
        file.write(plan.header)
        left = plan.size - len(plan.header)
        while left:
            left -= file.write(os.urandom(min(left, 16 << 20)))
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> int:
    """`cp`, then fsync of the copy and its folder; returns the bytes written."""
    target.mkdir(parents=True)
    subprocess.run(["cp", source / "model.safetensors", target], check=True)
    subprocess.run(["sync", target / "model.safetensors", target], check=True)
    return (target / "model.safetensors").stat().st_size


def shard(target: Checkpoint, out: Path, packing: Packing) -> int:
    """One rank of a target and its first layer as draft; returns the bytes written."""
    draft = derive(target, (0,))
    pair = ModelsSpec(target.config, draft.config, "bfloat16", "bfloat16", 1, True)
    return sum(file.size for file in write_shards(pair, target, draft, out, packing=packing))


def prepare(file: Path, *, warm: bool) -> None:
    """Bring the checkpoint into the page cache, or drop it, and let earlier writes settle."""
    os.sync()
    with file.open("rb") as source:
        if warm:
            while source.read(16 << 20):
                pass
        else:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(action: Callable[[Path], int], source: Path, out: Path, *, warm: bool) -> float:
    """Megabytes a second of one run."""
    prepare(source / "model.safetensors", warm=warm)
    start = time.perf_counter()
    written = action(out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return written / 1e6 / seconds


def main() -> None:
    """Generate, measure in turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = Path(name)
        write_checkpoint(work / "model", int(arguments.gigabytes * 1e9))
        target = resolve("model", base=work, cache=work / "cache")
        size = (work / "model" / "model.safetensors").stat().st_size
        actions: dict[str, Callable[[Path], int]] = {
            "cp": lambda out: copy(work / "model", out),
            "shard plain": lambda out: shard(target, out, PlainPacking()),
            "shard block32": lambda out: shard(target, out, BlockPacking()),
        }
        for warm in (True, False):
            rates: dict[str, list[float]] = {label: [] for label in actions}
            for _ in range(arguments.rounds):
                for label, action in actions.items():
                    rates[label].append(measure(action, work / "model", work / "out", warm=warm))
            median = {label: statistics.median(found) for label, found in rates.items()}
            print(f"{size / 1e9:.2f} GB, {'warm' if warm else 'cold'}, median of {arguments.rounds} (min..max):")
            for label, found in rates.items():
                spread = f"{min(found):.0f}..{max(found):.0f}"
                print(f"  {label:14} {median[label]:6.0f} MB/s  {median[label] / median['cp']:5.2f} of cp  ({spread})")


if __name__ == "__main__":
    main()
