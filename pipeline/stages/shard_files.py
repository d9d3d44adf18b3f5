"""Write each rank's weights: stream both checkpoints through a small window into one safetensors file a rank and model.

The weight table and the plan decide the placement. Keeps no tensor. Besides headers, memory holds `SLOTS` windows of
`WINDOW_BYTES` (at least one block of 32 rows) as read, one as stored, and the sink's stages: at 64 ranks 32 + 8 + 96
MiB when bfloat16 becomes float32, whatever the model's size. A packing that turns matrices also needs the largest one,
of all ranks: its rows are the columns of windows. Of matrices that are one, parts may lie in two files of a checkpoint
or have another tensor between them: up to `MOST_OPEN` are collected at a time, so that each part is read in its turn.

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
from pipeline.models.rank_slices import local_shape, padded_vocab, vocab_offset
from pipeline.models.weights import OFFSET, WeightSpec
from pipeline.progress import ByteProgress
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.packed import PackedRef, Source
from pipeline.sources.remote import RemoteFile
from pipeline.sources.tensors import Layout, layout
from pipeline.sources.weights import shared_weights, weights
from pipeline.stages.downloads import Downloads, SourceRecord
from pipeline.stages.streams import Bytes, Columns, Place, Reader, Sink
from pipeline.stages.windows import Window, pieces, stored_sizes, windows

SLOTS = 8
MOST_OPEN = 3
"""Fused matrices that wait for a part: two where a file of the checkpoint begins and ends inside of one, and the next.
The parts of others are read with their last one, out of turn."""

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
        return (window for number in range(len(self.tensors)) for group in self.groups(number) for window in group)

    def groups(self, number: int, part: int | None = None) -> Iterator[list[Window]]:
        """Yield the windows of a weight that are written together: those of a matrix that is turned; others alone.

        `part`: those of one part of a fused matrix.
        """
        spec, sources = self.tensors[number]
        stored = DTYPES[self.models.stored_dtype(self.role, spec)].short
        found = [
            windows(one, source, stored, self.config, self.split, place)
            for one, source, place in zip(spec.parts, sources, self._places(spec), strict=True)
        ]
        if part is not None:
            yield list(found[part])
        elif spec.fused:
            yield [window for one in found for window in one]
        elif self.packing.turns(spec.kind):
            yield from map(list, found)
        else:
            yield from ([window] for one in found for window in one)

    def _places(self, spec: WeightSpec) -> Iterator[Place | None]:
        """Yield the place of each part of a weight: in one matrix, in a matrix of its own, or None."""
        if not self.packing.turns(spec.kind):
            yield from (None for _ in spec.parts)
            return
        item = DTYPES[self.models.stored_dtype(self.role, spec)].size_bytes
        row_bytes, first = local_shape(spec, self.config, self.split)[-2] * item, 0
        for part in spec.parts:
            yield Place(spec.name if spec.fused else part.name, row_bytes, first)
            first += local_shape(part, self.config, self.split)[0] * item if spec.fused else 0

    @property
    def reading(self) -> list[tuple[int, int | None]]:
        """Weights by number, and parts of fused ones (else None), in the order of the checkpoint's files.

        The order in which they become whole is that of the layout, which has fused ones by their last parts.
        """
        units = sorted(
            (*_place(spec, source), number, part)
            for number, (spec, sources) in enumerate(self.tensors)
            for part, source in enumerate(sources if spec.fused else sources[:1])
        )
        left = [len(sources) if spec.fused else 1 for spec, sources in self.tensors]
        waiting: set[int] = set()
        order: list[tuple[int, int | None]] = []
        for *_, number, part in units:
            left[number] -= 1
            is_first = left[number] + 1 == len(self.tensors[number][1])
            if is_first and left[number] and len(waiting) < MOST_OPEN:
                waiting.add(number)
            if number in waiting:
                order.append((number, part))
            elif not left[number]:
                order.append((number, None))
            if not left[number]:
                waiting.discard(number)
        return order

    @property
    def remote(self) -> list[RemoteFile]:
        """Files of the tensors that stay in a store."""
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
    last = {spec.name: max(_place(spec, sources[part.name]) for part in spec.fused or spec.parts[:1]) for spec in own}
    specs = sorted(own, key=lambda spec: last[spec.name])
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
                if window.place:
                    columns.put(piece, ranks, window.place)
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
    """Yield the windows that some file lacks, in the order of the checkpoint's files; the others are passed over."""
    kept = _kept(job, sink)
    for number, part in job.reading:
        for group, is_kept in zip(job.groups(number, part), kept[number], strict=True):
            if not is_kept:
                yield from group


def _kept(job: _Job, sink: Sink) -> list[list[bool]]:
    """Return for each group of each weight whether all files have it, and pass over those."""
    left, numbers = sink.kept(), range(len(job.tensors))
    return [[_is_kept(group, left, job.packing, sink) for group in job.groups(number)] for number in numbers]


def _is_kept(group: Sequence[Window], left: list[int], packing: Packing, sink: Sink) -> bool:
    """Return whether all files have a group, of their bytes that are `left`, which then are fewer; pass over it."""
    sizes: Counter[int] = Counter()
    for window in group:
        sizes.update(dict(stored_sizes(window, packing)))
    is_kept = all(left[rank] >= size for rank, size in sizes.items())
    for rank, size in sizes.items():
        left[rank] = left[rank] - size if left[rank] >= size else 0
        if is_kept:
            sink.skip(size, rank)
    return is_kept


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
