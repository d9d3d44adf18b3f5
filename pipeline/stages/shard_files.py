"""Write each rank's weights: stream both checkpoints through a small window into one safetensors file a rank and model.

The weight table and the plan decide the placement. Keeps no tensor. Besides headers, memory holds `SLOTS` windows of
`WINDOW_BYTES` (at least one block of 32 rows) as read, one as stored, and the sink's stages: at 64 ranks 32 + 8 + 96
MiB when bfloat16 becomes float32, whatever the model's size. A packing that turns matrices also needs the largest one,
of all ranks: its rows are the columns of windows.

    read (thread) -> dequantise, convert, pack and cut (here, torch) -> stage of each file -> write and hash (threads)
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import HostError, InputError, SourceError
from pipeline.files.atomic import link_or_copy
from pipeline.files.direct import BLOCK_BYTES
from pipeline.graphs.dtypes import DTYPES
from pipeline.graphs.packing import Packing
from pipeline.graphs.signature import stored_weights
from pipeline.graphs.spec import ModelsSpec, Role
from pipeline.models.config import ModelConfig
from pipeline.models.weights import (
    OFFSET,
    WeightSpec,
    local_shape,
    padded_vocab,
    vocab_offset,
)
from pipeline.progress import ByteProgress
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.packed import PackedRef, Source
from pipeline.sources.remote import RemoteFile
from pipeline.sources.tensors import Layout, layout
from pipeline.sources.weights import shared_weights, weights
from pipeline.stages.downloads import Downloads, SourceRecord
from pipeline.stages.streams import Bytes, Columns, Reader, Sink
from pipeline.stages.windows import Window, pieces, stored_sizes, windows

SLOTS = 8
LARGE_BYTES = 1 << 30
"""Shards from this size on pass by the page cache; smaller ones stay in it, since validation is about to read them."""


@dataclass(frozen=True)
class ShardFile:
    """One rank's weights of one model; `sha256` was computed while the file was written."""

    path: Path
    sha256: str
    size: int
    rank: int
    model: Role


@dataclass(frozen=True)
class _Meter:
    """Reports one model's bytes as part of the whole."""

    report: ByteProgress | None
    before: int
    total: int

    def __call__(self, written: int) -> None:
        if self.report is not None:
            self.report(self.before + written, self.total)


def shard_path(out: Path, role: Role, rank: int, ranks: int) -> Path:
    """Return the path of a rank's weights in an artifact."""
    return out / "weights" / role / f"rank-{rank}-of-{ranks}.safetensors"


def write_shards(
    models: ModelsSpec,
    target: Checkpoint,
    draft: Checkpoint,
    out: Path,
    *,
    packing: Packing,
    progress: ByteProgress | None = None,
) -> list[ShardFile]:
    """Write `weights/{target,draft}/rank-<r>-of-<n>.safetensors` under `out`, a folder that no other process reads.

    Continues the files of a killed call with the same arguments. `sources.json` records the digests of the files that
    were read in a store.

    Raises:
        SourceError: a checkpoint that cannot be read to its end, a digest that differs, or a value that the dtype
            cannot hold; `out` then has no files of that model.
        HostError: not enough space, or a store that cannot be read.

    """  # fmt: skip
    if models.draft.draft_vocab is not None and not models.draft_replicated and models.tp > 1:
        what = "a draft with a reduced vocabulary cannot be sharded: head and embedding would need two offsets"
        raise InputError(what, where="draft.placement", fix="write placement: replicated")
    jobs = [_job("target", models, target, target, packing), _job("draft", models, draft, target, packing)]
    total = sum(job.layout.size * job.copies for job in jobs)
    kept = sum(path.stat().st_size for path in out.glob("weights/*/*"))
    _check_space(out, sum(job.layout.size * len(job.ranks) for job in jobs) - kept)
    done, files, record = 0, [], SourceRecord(out)
    with _one_thread():
        for job in jobs:
            files += _write(job, out, record, _Meter(progress, done, total))
            done += job.layout.size * job.copies
    return files


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: more would spin while this pipeline reads, hashes and writes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Job:
    """One model's files: the same layout on each rank, cut differently."""

    role: Role
    models: ModelsSpec
    layout: Layout
    tensors: tuple[tuple[WeightSpec, tuple[Source, ...]], ...]
    """Each weight with the checkpoint's tensors that it holds in a row."""
    packing: Packing

    @property
    def config(self) -> ModelConfig:
        return self.models.config_of(self.role)

    @property
    def split(self) -> int:
        """Ranks that the model is split over."""
        return self.models.tp_of(self.role)

    @property
    def ranks(self) -> range:
        return range(self.models.tp)

    @property
    def copies(self) -> int:
        """Files that are written; the files of a replicated model are one file, linked."""
        return self.split

    @property
    def windows(self) -> Iterator[Window]:
        """Every window, in the order in which the files are written."""
        return (window for together in self.together for window in together)

    @property
    def together(self) -> Iterator[list[Window]]:
        """The windows of each matrix that is turned; any other window alone."""
        for spec, sources in self.tensors:
            stored = DTYPES[self.models.stored_dtype(self.role, spec)].short
            turns = self.packing.turns(spec.kind)
            across = local_shape(spec, self.config, self.split)[-2] if turns else 0
            found = [
                windows(part, source, stored, self.config, self.split, across)
                for part, source in zip(spec.parts, sources, strict=True)
            ]
            if spec.fused:
                yield [window for part in found for window in part]
            elif turns:
                yield from map(list, found)
            else:
                yield from ([window] for part in found for window in part)

    @property
    def remote(self) -> list[RemoteFile]:
        """Files of the tensors that stay in a store, in the order in which they are read."""
        stored = (source for _, sources in self.tensors for source in sources)
        refs = (ref for source in stored for ref in (source.refs if isinstance(source, PackedRef) else (source,)))
        files = (ref.file for ref in refs)
        return list(dict.fromkeys(file for file in files if isinstance(file, RemoteFile)))

    def offset(self, rank: int) -> bytes:
        """Return `rank.vocab_offset`: the first vocabulary id of a rank's slice."""
        rows = padded_vocab(self.config.vocab, self.split) // self.split
        return vocab_offset(rows, rank if self.split > 1 else 0).to_bytes(4, "little")


def _job(role: Role, models: ModelsSpec, checkpoint: Checkpoint, target: Checkpoint, packing: Packing) -> _Job:
    """Find every tensor, and lay out the files in the order of the checkpoint's, which are then read from start to end.

    Index tensors and the offset go last, so that weights stay aligned.
    """
    sources = dict(weights(checkpoint))
    config, split = models.config_of(role), models.tp_of(role)
    sources |= shared_weights(checkpoint, target)
    own = stored_weights(models, role, fused=packing.fuses)
    specs = sorted(own, key=lambda spec: _place(spec, sources[spec.parts[0].name]))
    entries = []
    for spec in specs:
        dtype = models.stored_dtype(role, spec)
        shape = packing.packed_shape(local_shape(spec, config, split), spec.kind, dtype)
        entries.append((spec.name, DTYPES[dtype].short, shape))
    file = layout([*entries, (OFFSET, DTYPES["int32"].short, (1,))], {"format": "pt", "packing": packing.name})
    tensors = tuple((spec, tuple(sources[part.name] for part in spec.parts)) for spec in specs)
    return _Job(role, models, file, tensors, packing)


def _place(spec: WeightSpec, source: Source) -> tuple[bool, str, int]:
    """Return a key by which tensors are in the order of the checkpoint's files, and index tensors last."""
    return spec.kind == "index", str(source.file), source.offset


def _write(job: _Job, out: Path, record: SourceRecord, progress: _Meter) -> list[ShardFile]:
    """Write one model's files, all ranks at once, so that the checkpoint is read once."""
    paths = [shard_path(out, job.role, rank, len(job.ranks)) for rank in job.ranks]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    record.restore(job.remote)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(paths[rank].open("a+b")) for rank in range(job.copies)]
            for file in files:
                _keep(file, job.layout)
            digests = _stream(job, files, record, progress)
            for file in files:
                os.fsync(file.fileno())
    except SourceError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    for path in paths[job.copies :]:
        path.unlink(missing_ok=True)
        link_or_copy(paths[0], path)
    return [
        ShardFile(path, digests[min(rank, job.copies - 1)], job.layout.size, rank, job.role)
        for rank, path in enumerate(paths)
    ]


def _keep(file: IO[bytes], planned: Layout) -> None:
    """Keep whole blocks of a file that a killed call began, if it has the planned header; the position is its end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    same = file.read(len(planned.header)) == planned.header
    if not same or size != planned.size:
        file.truncate(size - size % BLOCK_BYTES if same and size < planned.size else 0)
    file.seek(0, os.SEEK_END)


def _stream(job: _Job, files: Sequence[IO[bytes]], record: SourceRecord, progress: _Meter) -> list[str]:
    """Stream all windows into the files; returns their sha256."""
    read, stored = (max(getattr(window, name) for window in job.windows) for name in ("read_bytes", "stored_bytes"))
    slots, out = torch.empty(SLOTS, read, dtype=torch.uint8), torch.empty(stored, dtype=torch.uint8)
    large = job.layout.size * len(files) >= LARGE_BYTES
    with ExitStack() as stack:
        downloads = Downloads(stack, record.add)
        reader = Reader(stack, downloads, drop_cache=large)
        sink = Sink(files, stack, direct=large)
        sink.put(_bytes(job.layout.header), range(len(files)))
        columns = Columns(sink)
        for window, data in _read_ahead(_unwritten(job, sink), slots, reader):
            for piece, ranks in pieces(window, data, out, job.packing):
                if window.across:
                    columns.put(piece, ranks, window.across_bytes)
                else:
                    sink.put(piece, ranks)
            progress(sink.written)
        for file in job.remote:  # the last one, and those whose tensors a killed call had written
            downloads.read(file, file.size, memoryview(b""))
        downloads.finish()
        for rank in range(len(files)):
            sink.put(_bytes(job.offset(rank)), (rank,))
        digests = sink.finish()
    assert sink.written == job.layout.size * len(files)
    progress(sink.written)
    return digests


def _unwritten(job: _Job, sink: Sink) -> Iterator[Window]:
    """Yield the windows that some file lacks; the others are passed over."""
    left = sink.kept()
    for together in job.together:
        sizes: Counter[int] = Counter()
        for window in together:
            sizes.update(dict(stored_sizes(window, job.packing)))
        kept = all(left[rank] >= size for rank, size in sizes.items())
        for rank, size in sizes.items():
            left[rank] = left[rank] - size if left[rank] >= size else 0
            if kept:
                sink.skip(size, rank)
        if not kept:
            yield from together


def _read_ahead(found: Iterator[Window], slots: Tensor, reader: Reader) -> Iterator[tuple[Window, Tensor]]:
    """Yield each window with its bytes, which stay until the next one; others are being read into the other slots."""
    waiting: deque[tuple[Window, Tensor, Future[None]]] = deque()
    for number, window in enumerate(found):
        data = slots[number % len(slots), : window.read_bytes]
        waiting.append((window, data, reader.start(window.source, data.numpy().data)))
        if len(waiting) == len(slots):
            yield _ready(*waiting.popleft())
    while waiting:
        yield _ready(*waiting.popleft())


def _ready(window: Window, data: Tensor, read: Future[None]) -> tuple[Window, Tensor]:
    read.result()
    return window, data


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, dtype=np.uint8)


def _check_space(out: Path, size_bytes: int) -> None:
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        what = f"{size_bytes / 1e9:.1f} GB of weights do not fit, {free / 1e9:.1f} GB are free"
        raise HostError(what, where=str(out), fix="free space, or build into a folder on another disk")
