"""Sharding beside neuronx_distributed's own `shard_checkpoint`: time, peak memory, and that both write equal tensors.

    git clone https://github.com/aws-neuron/neuronx-distributed
    PYTHONPATH=. python benchmarks/shard_beside_nxd.py neuronx-distributed/src [--model 70b] [--layers 1] [--ranks 8]

Runs NxD's function on a CPU. Its sharding needs none of the closed packages that its imports name; `FakePackages`
stands in for them. Both sides read the same files, which are not in the page cache, write a file for each rank, and
sync. Keep the ranks at most the KV heads: NxD itself does not replicate heads. Memory is the peak of the whole process,
and of its part that is no file: NxD maps the checkpoint, and the system can drop those pages.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shard_large import LAYOUTS, config_json, drop_cache, models_of, opened, write_pair

from pipeline.graphs.packing import PlainPacking
from pipeline.models.families import config_of
from pipeline.models.weights import OFFSET, WeightSpec, weight_specs
from pipeline.stages.shard_files import shard_path, write_shards

PACKAGES = ("torch_neuronx", "torch_xla", "libneuronxla", "neuronxcc", "nki", "nkilib", "tenacity")
TRACER = "transformers.utils.fx"
"""Newer versions of transformers lack this module; NxD's pipeline parallelism imports it."""

SAMPLE_S = 0.02
FOLDERS = {"nxd": "nxd", "ours": "tandem"}


class FakePackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that NxD imports and that its sharding never calls."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        fake = name.partition(".")[0] in PACKAGES or name == TRACER
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if fake else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MagicMock(
            __name__=spec.name, __path__=[], __spec__=spec, HFTracer=type("HFTracer", (), {}),
            get_platform_target=lambda: "trn1", SUPPORTED_TYPES=["trn1"],
        )  # fmt: skip

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


@dataclass(frozen=True)
class Run:
    """Seconds, peak resident bytes of the process, and the peak of those that are no file."""

    seconds: float
    resident: int
    anonymous: int


class Memory(threading.Thread):
    """Samples this process's memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.anonymous = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_S):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if " kB" in line}
            self.resident = max(self.resident, sizes["VmHWM"])
            self.anonymous = max(self.anonymous, sizes["RssAnon"])


def nxd(source: Path, work: Path, config: dict[str, object], ranks: int) -> None:
    """Load the checkpoint, and call NxD's function for all ranks."""
    sys.meta_path.insert(0, FakePackages())
    sys.path.insert(0, str(source))
    torch.classes.neuron = torch.ops.neuron = MagicMock()
    from neuronx_distributed.parallel_layers import layers, parallel_state
    from neuronx_distributed.trace.functions import shard_checkpoint
    from neuronx_distributed.trace.mock_torchdist import mock_distributed

    with mock_distributed(ranks):
        torch.distributed.init_process_group(backend="xla", rank=0, world_size=ranks)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks, skip_collective_init=True)
        model = torch.nn.Module()
        for spec in weight_specs(config_of(config, "benchmark")):
            *path, _ = spec.name.split(".")
            parent = model
            for name in path[:-1]:
                if not hasattr(parent, name):
                    parent.add_module(name, torch.nn.Module())
                parent = getattr(parent, name)
            parent.add_module(path[-1], layer_of(spec, layers))
        weights: dict[str, torch.Tensor] = {}
        for file in sorted((work / "model").glob("*.safetensors")):
            weights |= load_file(file)
        shard_checkpoint(weights, model, serialize_path=str(work / FOLDERS["nxd"]))


def layer_of(spec: WeightSpec, layers: types.ModuleType) -> torch.nn.Module:
    """NxD's own layer for a weight, which names the axis that is cut."""
    if len(spec.shape) == 1:
        return torch.nn.RMSNorm(spec.shape[0], dtype=torch.bfloat16)
    rows, columns = spec.shape
    if spec.kind == "embedding":
        return layers.ParallelEmbedding(rows, columns, dtype=torch.bfloat16)
    if spec.split == "columns":
        return layers.RowParallelLinear(columns, rows, bias=False, input_is_parallel=True, dtype=torch.bfloat16)
    return layers.ColumnParallelLinear(columns, rows, bias=False, gather_output=False, dtype=torch.bfloat16)


def ours(work: Path, ranks: int) -> None:
    """The same by Tandem; a draft of no size goes with it."""
    target, draft = opened(work)
    write_shards(models_of(target, draft, ranks), target, draft, work / FOLDERS["ours"], packing=PlainPacking())


def run(action: str, given: argparse.Namespace) -> Run:
    """Run one side in this process, and sync."""
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    if action == "nxd":
        nxd(given.nxd, given.child, config_json(given.model, given.layers), given.ranks)
    else:
        ours(given.child, given.ranks)
    os.sync()
    seconds = time.perf_counter() - start
    memory.stopped.set()
    memory.join()
    return Run(seconds, memory.resident, memory.anonymous)


def compare(work: Path, ranks: int) -> int:
    """Compare every tensor of every rank; returns how many there are."""
    count = 0
    for rank in range(ranks):
        theirs = work / FOLDERS["nxd"] / f"tp{rank}_sharded_checkpoint.safetensors"
        mine = shard_path(work / FOLDERS["ours"], "target", rank, ranks)
        with safe_open(theirs, "pt") as a, safe_open(mine, "pt") as b:
            if set(a.keys()) != set(b.keys()) - {OFFSET}:
                raise SystemExit(f"rank {rank}: other tensors")
            for name in a.keys():  # noqa: SIM118 - safe_open is not a mapping
                if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                    raise SystemExit(f"rank {rank}: {name} differs")
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nxd", type=Path, help="folder `src` of a clone of aws-neuron/neuronx-distributed")
    parser.add_argument("--model", choices=LAYOUTS, default="70b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--action", choices=("nxd", "ours"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        result = run(given.action, given)
        print("\n" + json.dumps(vars(result)))  # below what NxD logs on stdout
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work = Path(name)
        size = write_pair(work, config_json(given.model, given.layers), noise=True)
        print(f"{given.model}, {given.layers} layers: {size / 1e9:.2f} GB, TP {given.ranks}", flush=True)
        runs: dict[str, list[Run]] = {"nxd": [], "ours": []}
        for _ in range(given.rounds):
            for action, found in runs.items():
                shutil.rmtree(work / FOLDERS[action], ignore_errors=True)
                drop_cache(work)
                command = [sys.executable, *sys.argv, "--child", str(work), "--action", action]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                found.append(Run(**json.loads(done.stdout.splitlines()[-1])))
        print(f"equal tensors on both sides: {compare(work, given.ranks)}")
        for action, found in runs.items():
            print(f"  {action:5} {statistics.median(r.seconds for r in found):6.1f} s  "
                  f"peak {max(r.resident for r in found) / (1 << 20):6.0f} MiB, "
                  f"of it no file {max(r.anonymous for r in found) / (1 << 20):6.0f} MiB")  # fmt: skip
        pairs = zip(runs["nxd"], runs["ours"], strict=True)
        print(f"  time of NxD relative to ours: {statistics.median(a.seconds / b.seconds for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
