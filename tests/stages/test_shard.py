"""The sharder against slices that are computed here, from tensors that safetensors wrote and reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import HostError, InputError, SourceError
from pipeline.graphs.packing import WIDE, BlockPacking, PlainPacking
from pipeline.models.weights import D2T, EMBEDDING, HEAD, OFFSET
from pipeline.sources.derived import derive
from pipeline.stages.shard import shard as build_shards
from pipeline.stages.shard_files import write_shards
from pipeline.stages.windows import WINDOW_BYTES
from support.checkpoints import random_weights, write_checkpoint
from support.paths import PYTHONPATH, TESTS
from support.shards import expected_slice, opened, pair_of

PACKINGS = [PlainPacking(), BlockPacking()]


def unpacked(stored: Tensor, rows: int) -> Tensor:
    """Undo blocks [N/32, K, 32] and [N/32, K/2, 32, 2]."""
    if stored.dim() == 4:
        return stored.transpose(1, 2).reshape(len(stored) * 32, -1)[:rows]
    return stored.transpose(1, 2).reshape(-1, stored.shape[1])[:rows] if stored.dim() == 3 else stored


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.name)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_write_shards_each_rank_holds_its_slice(tmp_path: Path, tp: int, packing: BlockPacking, stored: str) -> None:
    whole = write_checkpoint(tmp_path / "m", files=3, dtype=torch.bfloat16, attention_bias=True)
    target = opened(tmp_path / "m", tmp_path)
    pair = pair_of(target, target, tp=tp, dtype=stored, replicated=False)
    for shard in write_shards(pair, target, target, tmp_path / "out", packing=packing):
        found = load_file(shard.path)
        assert found.pop(OFFSET).tolist() == [shard.rank * (96 if tp == 1 else -(-70 // (32 * tp)) * 32)]
        assert set(found) == set(whole)
        for name, tensor in found.items():
            want = expected_slice(name, whole[name], shard.rank, tp, kv_heads=2, head_dim=16)
            assert tensor.dtype == getattr(torch, stored)
            assert torch.equal(unpacked(tensor, want.shape[0]).float(), want.float()), (name, shard.rank)


@pytest.mark.parametrize("rows", [64, 70])
@pytest.mark.parametrize("columns", [WIDE - 1, WIDE + 6])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_pack_narrow_and_wide(rows: int, columns: int, stored: torch.dtype) -> None:
    """Also a slice of columns, which is not contiguous."""
    whole = torch.randn(rows, 2 * columns).bfloat16()
    for weight in (whole[:, :columns], whole[:, columns:]):
        name = str(stored).removeprefix("torch.")
        shape = BlockPacking().packed_shape((rows, columns), "linear", name)
        assert len(shape) == (4 if stored == torch.bfloat16 and columns % 2 == 0 else 3)
        out = torch.full(shape, torch.nan, dtype=stored)
        BlockPacking().pack(weight, "linear", out)
        assert torch.equal(unpacked(out, rows), weight.to(stored))
        assert not unpacked(out, out.shape[0] * 32)[rows:].any()


def test_write_shards_offset_of_a_single_rank_is_zero(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    shards = write_shards(pair_of(target, target), target, target, tmp_path / "out", packing=PlainPacking())
    assert [load_file(s.path)[OFFSET].tolist() for s in shards] == [[0], [0]]


def test_write_shards_digest_and_size_are_the_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (1,))
    seen: list[tuple[int, int]] = []
    pair = pair_of(target, draft, tp=2)
    shards = write_shards(
        pair, target, draft, tmp_path / "out", packing=BlockPacking(), progress=lambda *now: seen.append(now)
    )
    names = [str(s.path.relative_to(tmp_path / "out")) for s in shards]
    assert names == [f"weights/{m}/rank-{r}-of-2.safetensors" for m in ("target", "draft") for r in (0, 1)]
    for shard in shards:
        data = shard.path.read_bytes()
        assert (shard.sha256, shard.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(s.size for s in shards[:3])  # the second draft file is a link to the first
    again = write_shards(pair, target, draft, tmp_path / "again", packing=BlockPacking())
    assert [s.sha256 for s in again] == [s.sha256 for s in shards]


def test_write_shards_says_its_packing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    shards = write_shards(pair_of(target, target), target, target, tmp_path / "out", packing=BlockPacking())
    with safe_open(shards[0].path, "pt") as file:
        assert file.metadata()["packing"] == "block32-pairs"


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.name)
def test_write_shards_tensor_of_several_windows(tmp_path: Path, packing: BlockPacking) -> None:
    vocab = 2 * WINDOW_BYTES // (32 * 4) + 1000
    whole = write_checkpoint(tmp_path / "m", vocab_size=vocab, tie_word_embeddings=True)
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (0,))
    shards = write_shards(pair_of(target, draft, tp=2), target, draft, tmp_path / "out", packing=packing)
    rows = -(-vocab // 64) * 32
    for rank in (0, 1):
        found = unpacked(load_file(shards[rank].path)[EMBEDDING], rows)
        mine = whole[EMBEDDING][rank * rows : (rank + 1) * rows]
        assert torch.equal(found[: len(mine)], mine)
        assert not found[len(mine) :].any()


def test_write_shards_fused_projections_are_split(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "plain")
    fused = dict(whole)
    for layer in (0, 1):
        for new, block, parts in (("qkv_proj", "self_attn", "qkv"), ("gate_up_proj", "mlp", ("gate", "up"))):
            names = [f"model.layers.{layer}.{block}.{part}_proj.weight" for part in parts]
            fused[f"model.layers.{layer}.{block}.{new}.weight"] = torch.cat([fused.pop(name) for name in names])
    write_checkpoint(tmp_path / "fused", fused)
    found = []
    for name in ("plain", "fused"):
        target = opened(tmp_path / name, tmp_path)
        pair = pair_of(target, target, tp=2, replicated=False)
        shards = write_shards(pair, target, target, tmp_path / "out" / name, packing=PlainPacking())
        found.append([load_file(s.path) for s in shards])
    for left, right in zip(*found, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_write_shards_tied_weight_is_stored_once(tmp_path: Path) -> None:
    weights = random_weights({**_config(tmp_path), "tie_word_embeddings": True})
    write_checkpoint(tmp_path / "m", weights | {HEAD: weights[EMBEDDING].clone()}, tie_word_embeddings=True)
    target = opened(tmp_path / "m", tmp_path)
    shards = write_shards(pair_of(target, target), target, target, tmp_path / "out", packing=PlainPacking())
    assert HEAD not in load_file(shards[0].path)


def _config(tmp_path: Path) -> dict[str, object]:
    write_checkpoint(tmp_path / "config-only")
    return dict(json.loads((tmp_path / "config-only" / "config.json").read_text()))


@pytest.mark.parametrize(("tp", "replicated", "stored"), [(1, True, False), (2, True, True), (2, False, False)])
def test_write_shards_shared_embedding_is_stored_where_the_target_has_another_slice(
    tmp_path: Path, tp: int, replicated: bool, stored: bool
) -> None:
    whole = write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (1,))
    pair = pair_of(target, draft, tp=tp, replicated=replicated)
    found = load_file(write_shards(pair, target, draft, tmp_path / "out", packing=PlainPacking())[-1].path)
    assert (EMBEDDING in found) == stored
    if stored:
        assert torch.equal(found[EMBEDDING], whole[EMBEDDING])
    if replicated:
        layer = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(found[layer.format(0)], whole[layer.format(1)])


def test_write_shards_reduced_vocabulary_keeps_offsets_as_int32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    draft_config = {**_config(tmp_path), "draft_vocab_size": 33}
    weights = random_weights(draft_config)
    del weights[EMBEDDING]
    write_checkpoint(tmp_path / "d", weights, draft_vocab_size=33)
    target = opened(tmp_path / "m", tmp_path)
    draft = opened(tmp_path / "d", tmp_path, role="draft")
    shards = write_shards(pair_of(target, draft), target, draft, tmp_path / "out", packing=BlockPacking())
    found = load_file(shards[1].path)
    assert found[D2T].dtype == torch.int32
    assert found[D2T].tolist() == list(range(33))
    assert tuple(found[HEAD].shape) == (2, 32, 32)
    assert torch.equal(unpacked(found[HEAD], 33), weights[HEAD])
    assert not found[HEAD][1, :, 1:].any()
    with pytest.raises(InputError, match="reduced vocabulary"):
        write_shards(
            pair_of(target, draft, tp=2, replicated=False), target, draft, tmp_path / "no", packing=PlainPacking()
        )


def test_write_shards_source_that_shrinks_while_it_is_read_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", vocab_size=8 * WINDOW_BYTES // 128, tie_word_embeddings=True)
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (0,))
    file = tmp_path / "m" / "model.safetensors"
    with pytest.raises(SourceError, match="file ends inside"):
        write_shards(
            pair_of(target, draft), target, draft, tmp_path / "out", packing=PlainPacking(),
            progress=lambda done, total: os.truncate(file, 4096),
        )  # fmt: skip
    assert [path for path in tmp_path.glob("out/**/*") if path.is_file()] == []


def test_write_shards_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    weights = random_weights(_config(tmp_path))
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_checkpoint(tmp_path / "m", weights)
    target = opened(tmp_path / "m", tmp_path)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        write_shards(pair_of(target, target, dtype="float16"), target, target, tmp_path / "out", packing=BlockPacking())
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_write_shards_more_than_the_disk_holds_is_refused_before_writing(tmp_path: Path) -> None:
    vocab = 2 * shutil.disk_usage(tmp_path).free // (32 * 4)
    write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    target = opened(tmp_path / "m", tmp_path)
    _make_sparse(tmp_path / "m", vocab)
    huge = dataclasses.replace(target, config=dataclasses.replace(target.config, vocab=vocab))
    with pytest.raises(HostError, match="do not fit"):
        write_shards(pair_of(huge, huge), huge, huge, tmp_path / "out", packing=PlainPacking())
    assert not (tmp_path / "out").exists()


def _make_sparse(root: Path, vocab: int) -> None:
    """Grow the embedding of a checkpoint to `vocab` rows that take no space."""
    file = root / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header[EMBEDDING] = {"dtype": "F32", "shape": [vocab, 32], "data_offsets": [end, end + vocab * 128]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end + vocab * 128)


@pytest.mark.slow
def test_write_shards_memory_is_bounded_for_a_checkpoint_of_8_gb(tmp_path: Path) -> None:
    """Peak resident memory of a whole process, imports included, stays under 1 GiB."""
    script = TESTS / "support" / "shard_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["checkpoint_bytes"] > 8e9
        assert report["peak_bytes"] < 1 << 30, report
        assert report["intact"]
    finally:
        shutil.rmtree(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.graphs.packing import BlockPacking
from pipeline.sources.derived import derive
from pipeline.stages import streams
from pipeline.stages.shard import shard
from support.shards import opened, pair_of

def stop(label, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

streams.STAGE_BYTES = 1 << 18
work = Path(sys.argv[1])
target = opened(work / "m", work)
draft = derive(target, (0,))
shard(pair_of(target, draft, tp=2), (target, draft), BlockPacking(), work / "cache", lambda line: None, stop)
"""


def test_shard_killed_build_is_continued(tmp_path: Path) -> None:
    """A killed build leaves the start of every file; the next one reads only the rest of the checkpoint."""
    write_checkpoint(tmp_path / "m", vocab_size=100_000)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, env=environment)
    assert done.returncode == -9
    (partial,) = (tmp_path / "cache" / "shards").glob("*.partial")
    kept = {path.name: path.stat().st_size for path in partial.rglob("*.safetensors")}
    assert sum(kept.values()) > 4 << 20
    target = opened(tmp_path / "m", tmp_path)
    draft = derive(target, (0,))
    models, seen = pair_of(target, draft, tp=2), []
    made = build_shards(
        models, (target, draft), BlockPacking(), tmp_path / "cache", lambda line: None,
        lambda _, done, total: seen.append(done) if total > 1 << 20 else None,
    )  # fmt: skip
    assert seen[0] > 4 << 20
    assert not partial.exists()
    whole = write_shards(models, target, draft, tmp_path / "out", packing=BlockPacking())
    assert [file.sha256 for file in made.files] == [file.sha256 for file in whole]
    assert all((made.root / file.path).stat().st_size == file.size for file in made.files)
