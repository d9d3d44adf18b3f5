"""Loading of weight shards beside `cat` of the same files: mapped one rank after the other, and all ranks in parallel.

    PYTHONPATH=. python benchmarks/load_shards.py [--gigabytes 4] [--ranks 4] [--rounds 5]

The shards have the tensors of a layer of Llama-3.1-70B at TP 64, as many layers as fit, and random bytes. Every run
starts with the files out of the page cache (`cold`, checked) or in it (`warm`) and ends when every page of every tensor
was read, as the first step of a model does. The actions of a round run in a random order, as a run may leave its disk
slower or faster to the next. `mapped alone` does not start to read files before their pages are needed.
`verify` compares the digests, which precedes every load of an artifact.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.artifact.manifest import FileEntry
from pipeline.artifact.verify import differences
from pipeline.files.atomic import digest_file
from pipeline.graphs.shards import read_shard
from pipeline.sources.tensors import layout

LAYER = {
    "input_layernorm": (8192,),
    "q_proj": (128, 8192),
    "k_proj": (128, 8192),
    "v_proj": (128, 8192),
    "o_proj": (8192, 128),
    "post_attention_layernorm": (8192,),
    "gate_proj": (448, 8192),
    "up_proj": (448, 8192),
    "down_proj": (8192, 448),
}
LAYER_BYTES = 2 * sum(torch.Size(shape).numel() for shape in LAYER.values())
PAGE_BYTES = 4096
TRIES = 100


def write_shards(folder: Path, ranks: int, size: int) -> list[Path]:
    """Write a file for each rank, `size` bytes together."""
    layers = max(1, size // ranks // LAYER_BYTES)
    plan = layout([(f"{n}.{name}", "BF16", shape) for n in range(layers) for name, shape in LAYER.items()], {})
    paths = [folder / f"rank-{rank}-of-{ranks}.safetensors" for rank in range(ranks)]
    for path in paths:
        with path.open("wb") as file:
            left = plan.size - file.write(plan.header)
            while left:
                left -= file.write(os.urandom(min(left, 16 << 20)))
            os.fsync(file.fileno())
    return paths


def cat(paths: list[Path]) -> None:
    """The files one after the other."""
    with Path(os.devnull).open("wb") as nowhere:
        subprocess.run(["cat", *paths], stdout=nowhere, check=True)


def map_only(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a mapped file, whose pages are read on first use."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a mapping


def load(paths: list[Path], read: Callable[[Path], dict[str, torch.Tensor]] = read_shard) -> None:
    """Map each file, and read a byte of each page."""
    for path in paths:
        for tensor in read(path).values():
            tensor.view(torch.uint8).flatten()[::PAGE_BYTES].sum()


def load_apart(paths: list[Path]) -> None:
    """The same in a process for each rank, forked before: ranks are processes, which load in parallel."""
    children = []
    for path in paths:
        child = os.fork()
        if child == 0:
            load([path])
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("a rank failed")


def prepare(paths: list[Path], *, warm: bool) -> None:
    """Bring the files into the page cache, or drop them."""
    if warm:
        cat(paths)
        return
    for path in paths:
        for _ in range(TRIES):  # pages that another process has in hand stay
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_pages(path):
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"{path} stays in the page cache")


def cached_pages(path: Path) -> int:
    """The number of pages of a file that are in the page cache."""
    size = path.stat().st_size
    found = (ctypes.c_ubyte * -(-size // PAGE_BYTES))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
        del start  # else the mapping cannot be closed
    return sum(page & 1 for page in bytes(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        paths = write_shards(Path(name), given.ranks, int(given.gigabytes * 1e9))
        digests = {path.name: digest_file(path) for path in paths}
        entries = {name: FileEntry(sha256=found.sha256, size=found.size) for name, found in digests.items()}
        size = sum(entry.size for entry in entries.values())
        actions: dict[str, Callable[[list[Path]], object]] = {
            "cat": cat,
            "mapped alone": lambda paths: load(paths, map_only),
            "one rank after the other": load,
            "ranks in parallel": load_apart,
            "verify": lambda paths: differences(paths[0].parent, entries),
        }
        for warm in (False, True):
            rates: dict[str, list[float]] = {label: [] for label in actions}
            for _ in range(given.rounds):
                for label, action in random.sample([*actions.items()], len(actions)):
                    prepare(paths, warm=warm)
                    start = time.perf_counter()
                    action(paths)
                    rates[label].append(size / 1e6 / (time.perf_counter() - start))
            print(f"{size / 1e9:.2f} GB, {given.ranks} ranks, {'warm' if warm else 'cold'}, "
                  f"medians of {given.rounds} rounds (min to max):", flush=True)  # fmt: skip
            for label, found in rates.items():
                ratio = statistics.median(a / b for a, b in zip(found, rates["cat"], strict=True))
                print(f"  {label:25} {statistics.median(found):6.0f} MB/s  ({min(found):.0f} to {max(found):.0f})  "
                      f"{ratio:5.2f} of cat")  # fmt: skip
        sys.stdout.flush()


if __name__ == "__main__":
    main()
