"""Shard a generated checkpoint of 8 GB in a process of its own and report its peak memory as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pipeline.files.atomic import sha256_file
from pipeline.graphs.packing import BlockPacking
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.families import config_of
from pipeline.models.weights import weight_specs
from pipeline.sources.derived import derive
from pipeline.sources.pair import resolve
from pipeline.sources.tensors import layout
from pipeline.stages.shard_files import write_shards

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


def write_large(root: Path) -> int:
    """A bfloat16 checkpoint of 8.2 GB in four files of repeated random bytes; returns its size."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(CONFIG))
    specs = [(s.name, "BF16", s.shape) for s in weight_specs(config_of(CONFIG, "test"))]
    # Random bytes with the top exponent bits cleared: finite bfloat16 values.
    noise = bytes(b & 0x3F if i % 2 else b for i, b in enumerate(os.urandom(1 << 20)))
    table, written = {}, 0
    for number in range(4):
        mine, name = specs[number::4], f"model-{number}.safetensors"
        plan = layout(mine, {"format": "pt"})
        table |= {tensor: name for tensor, _, _ in mine}
        with (root / name).open("wb") as file:
            file.write(plan.header)
            left = plan.size - len(plan.header)
            while left:
                left -= file.write(noise[: min(left, len(noise))])
        written += plan.size
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return written


def peak_resident_bytes() -> int:
    """Of this program alone: `getrusage` also counts the process it was started from, until its exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def main(work: Path) -> None:
    """Generate, shard, report."""
    size = write_large(work / "model")
    target = resolve("model", base=work, cache=work / "cache")
    draft = derive(target, (0,))
    pair = ModelsSpec(target.config, draft.config, "bfloat16", "bfloat16", 1, True)
    shards = write_shards(pair, target, draft, work / "out", packing=BlockPacking())
    peak = peak_resident_bytes()
    intact = all(sha256_file(shard.path) == shard.sha256 for shard in shards)
    sys.stdout.write(json.dumps({"checkpoint_bytes": size, "peak_bytes": peak, "intact": intact}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
