"""Sharding of the layouts of Llama-3.1-70B and 405B at TP 64, beside `cp` and `cat` of the same files.

    PYTHONPATH=. python benchmarks/shard_large.py [--model 70b] [--layers 4] [--ranks 64] [--rounds 3] [--data holes]

The checkpoint has the model's own names, shapes and dtype, as many layers as `--layers`, and files of 5 GB. `--data
holes` gives files that take no space and read as zeros; `--data noise` fills them. Actions run in turns, each synced
and in a process of its own, and start with the checkpoint out of the page cache. Rates are of bytes written; each line
ends with the bytes of all layers, and the time that they take at the median rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.graphs.packing import PACKINGS
from pipeline.graphs.spec import ModelsSpec
from pipeline.models.families import config_of
from pipeline.models.weights import WeightSpec, weight_specs
from pipeline.plan.estimates import weight_bytes
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve
from pipeline.sources.tensors import layout
from pipeline.stages.shard_files import write_shards

COMMON = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
LAYOUTS = {
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
DRAFT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "vocab_size": 256,
}
FILE_BYTES = 5_000_000_000
ELEMENT_BYTES = 2
COUNT_EVERY = 64
"""Windows between two counts of open files."""

NOISE_BYTES = 16 << 20
"""Noise is repeated: making it must not take longer than writing it."""


def config_json(model: str, layers: int | None = None) -> dict[str, Any]:
    """The model's own config, with another number of layers."""
    config = COMMON | LAYOUTS[model]
    return config | {"num_hidden_layers": layers or config["num_hidden_layers"]}


def files_of(specs: list[WeightSpec]) -> list[list[WeightSpec]]:
    """The specs of each file, as transformers cuts a model into files: in order, as many as fit."""
    files: list[list[WeightSpec]] = [[]]
    room = FILE_BYTES
    for spec in specs:
        size = nbytes(spec)
        if files[-1] and size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(spec)
        room -= size
    return files


def nbytes(spec: WeightSpec) -> int:
    """Bytes of a tensor in bfloat16."""
    size = ELEMENT_BYTES
    for axis in spec.shape:
        size *= axis
    return size


def write_checkpoint(root: Path, config: dict[str, Any], *, noise: bool) -> int:
    """Write a bfloat16 checkpoint, in each file sorted by name as safetensors does; returns its bytes."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files, table, total = files_of(weight_specs(config_of(config, "benchmark"))), {}, 0
    # Without the highest bits of the exponents: finite values.
    data = bytes(b & 0x3F if i % 2 else b for i, b in enumerate(os.urandom(NOISE_BYTES))) if noise else b""
    for number, specs in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        plan = layout([(s.name, "BF16", s.shape) for s in sorted(specs, key=lambda s: s.name)], {"format": "pt"})
        table |= {spec.name: name for spec in specs}
        with (root / name).open("wb") as file:
            file.write(plan.header)
            while data and (left := plan.size - file.tell()):
                file.write(memoryview(data)[: min(left, len(data))])
            file.truncate(plan.size)
        total += plan.size
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": table})
    (root / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return total


def write_pair(work: Path, config: dict[str, Any], *, noise: bool) -> int:
    """Write the checkpoint and a draft of no size, and digest them; returns the checkpoint's bytes."""
    size = write_checkpoint(work / "model", config, noise=noise)
    write_checkpoint(work / "draft", COMMON | DRAFT, noise=noise)
    opened(work)
    return size


def opened(work: Path) -> tuple[Checkpoint, Checkpoint]:
    """The pair; the memo of digests makes every opening after the first one quick."""
    target, draft = (resolve(name, base=work, cache=work / "cache") for name in ("model", "draft"))
    return target, draft


def models_of(target: Checkpoint, draft: Checkpoint, ranks: int) -> ModelsSpec:
    """Both in bfloat16, the draft whole on each rank."""
    return ModelsSpec(target.config, draft.config, "bfloat16", "bfloat16", ranks, True)


@dataclass(frozen=True)
class Run:
    """Bytes written in so many seconds, and seconds of processors; peak resident bytes, and files open at a time."""

    written: int
    seconds: float
    processor: float = 0.0
    resident: int = 0
    files: int = 0


def shard(work: Path, ranks: int, packing: str) -> Run:
    """Shard, in this process."""
    (target, draft), most, calls = opened(work), 0, 0
    models = models_of(target, draft, ranks)

    def count(done: int, total: int) -> None:
        nonlocal most, calls
        del done, total
        calls += 1
        if calls % COUNT_EVERY == 0:
            most = max(most, len(list(Path("/proc/self/fd").iterdir())))

    start = time.perf_counter()
    shards = write_shards(models, target, draft, work / "out", packing=PACKINGS[packing], progress=count)
    seconds = time.perf_counter() - start
    written = sum(file.size for file in shards)
    return Run(written, seconds, resident=peak_resident_bytes(), files=most)


def peak_resident_bytes() -> int:
    """Of this program alone: `getrusage` also counts the process it was started from, until its exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def shard_apart(work: Path, ranks: int, packing: str) -> Run:
    """Shard in a process of its own, whose memory is that of nothing else."""
    command = [sys.executable, __file__, "--child", str(work), "--ranks", str(ranks), "--packing", packing]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return Run(**json.loads(done.stdout))


def copy(work: Path, command: list[str]) -> Run:
    """Copy the files one after the other, each synced; holes become zeros, as the sharder writes them."""
    out, start = work / "out", time.perf_counter()
    out.mkdir()
    for path in sorted((work / "model").glob("*.safetensors")):
        subprocess.run(["sh", "-c", " ".join(command), "copy", path, out / path.name], check=True)
        subprocess.run(["sync", out / path.name, out], check=True)
    seconds = time.perf_counter() - start
    return Run(sum(path.stat().st_size for path in out.iterdir()), seconds)


def drop_cache(work: Path) -> None:
    """Let earlier writes settle, and drop the checkpoint from the page cache."""
    os.sync()
    for path in (work / "model").glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(work: Path, name: str, ranks: int) -> Run:
    drop_cache(work)
    before = os.times()
    if name in PACKINGS:
        run = shard_apart(work, ranks, name)
    else:
        run = copy(work, {"cp": ["cp", "--sparse=never", '"$1"', '"$2"'], "cat": ["cat", '"$1"', ">", '"$2"']}[name])
    after = os.times()
    shutil.rmtree(work / "out")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return replace(run, processor=spent)


def whole(model: str, ranks: int) -> tuple[int, int]:
    """Bytes of the whole model, and bytes of its shards in the plain layout."""
    config = config_of(config_json(model), "benchmark")
    models = ModelsSpec(config, config, "bfloat16", "bfloat16", ranks, False)
    return sum(map(nbytes, weight_specs(config))), ranks * weight_bytes(models, "target", PACKINGS["plain"])


def show(name: str, runs: list[Run], beside: list[Run], bytes_of_all: int) -> None:
    rates = [run.written / run.seconds / 1e6 for run in runs]
    ratios = [rate / (run.written / run.seconds / 1e6) for rate, run in zip(rates, beside, strict=True)]
    rate, peak = statistics.median(rates), max(run.resident for run in runs) / (1 << 20)
    processor = statistics.median(run.processor / run.written * 1e9 for run in runs)
    memory = f"peak {peak:.0f} MiB, {max(run.files for run in runs)} files open" if peak else ""
    print(f"  {name:8} {runs[0].written / 1e9:6.2f} GB  {statistics.median(run.seconds for run in runs):6.1f} s  "
          f"{rate:5.0f} MB/s ({min(rates):.0f} to {max(rates):.0f})  {statistics.median(ratios):5.2f} of cp  "
          f"{processor:.2f} CPU s/GB  {memory:34}  "
          f"all layers: {bytes_of_all / 1e9:.0f} GB, {bytes_of_all / 1e6 / rate / 60:.0f} min")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LAYOUTS, default="70b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", choices=("holes", "noise"), default="holes")
    parser.add_argument("--packing", choices=PACKINGS, help="only this layout")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(vars(shard(given.child, given.ranks, given.packing))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work = Path(name)
        size = write_pair(work, config_json(given.model, given.layers), noise=given.data == "noise")
        files = len(list((work / "model").glob("*.safetensors")))
        print(f"{given.model}, {given.layers} layers: {size / 1e9:.2f} GB in {files} files of {given.data}, "
              f"TP {given.ranks}, medians of {given.rounds} rounds", flush=True)  # fmt: skip
        names = ["cp", "cat", *([given.packing] if given.packing else PACKINGS)]
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for _ in range(given.rounds):
            for name in names:
                runs[name].append(measure(work, name, given.ranks))
        read, written = whole(given.model, given.ranks)
        for name in names:
            show(name, runs[name], runs["cp"], written if name in PACKINGS else read)


if __name__ == "__main__":
    main()
