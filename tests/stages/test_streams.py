"""The sharder's streams: bytes come out as they went in, whichever way they reach the disk."""

from __future__ import annotations

import hashlib
import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.sources.tensors import TensorRef
from pipeline.stages.downloads import Downloads
from pipeline.stages.streams import STAGE_BYTES, Reader, Sink


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("files", [1, 3])
def test_sink_writes_and_hashes_what_was_put(tmp_path: Path, direct: bool, files: int) -> None:
    draw = random.Random(0)
    expected = [b""] * files
    with ExitStack() as stack:
        outputs = [stack.enter_context((tmp_path / str(i)).open("a+b")) for i in range(files)]
        sink = Sink(outputs, stack, direct=direct)
        for size in (7744, 1, STAGE_BYTES + 5, STAGE_BYTES, 100_000, 3):
            data, ranks = draw.randbytes(size), sorted(draw.sample(range(files), draw.randint(1, files)))
            sink.put(np.frombuffer(data, dtype=np.uint8), ranks)
            expected = [old + data if i in ranks else old for i, old in enumerate(expected)]
        digests = sink.finish()
    assert [(tmp_path / str(i)).read_bytes() for i in range(files)] == expected
    assert digests == [hashlib.sha256(data).hexdigest() for data in expected]
    assert sink.written == sum(map(len, expected))


def test_sink_keeps_what_a_file_has(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * 4096 + 5)
    (tmp_path / "f").write_bytes(data[:8192])
    with ExitStack() as stack:
        file = stack.enter_context((tmp_path / "f").open("a+b"))
        file.seek(0, 2)
        sink = Sink([file], stack, direct=True)
        assert sink.kept() == [8192]
        for start, end in ((0, 100), (100, 9000), (9000, len(data))):
            sink.put(np.frombuffer(data[start:end], dtype=np.uint8), [0])
        assert sink.finish() == [hashlib.sha256(data).hexdigest()]
    assert (tmp_path / "f").read_bytes() == data
    assert sink.written == len(data)


def test_reader_fills_what_lies_past_the_tensor_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    buffer = bytearray(b"\xff" * 8)
    with ExitStack() as stack:
        reader = Reader(stack, Downloads(stack, lambda file: None), drop_cache=True)
        reader.start(TensorRef(tmp_path / "f", "F32", (1,), 10, 4), memoryview(buffer)).result()
        assert buffer == bytes([10, 11, 12, 13, 0, 0, 0, 0])
        with pytest.raises(SourceError, match="at byte 100"):
            reader.start(TensorRef(tmp_path / "f", "F32", (2,), 96, 8), memoryview(buffer)).result()
