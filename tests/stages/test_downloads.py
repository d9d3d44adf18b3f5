"""Shards of weights that stay in a store: the bytes of a local build, each fetched once, checked, and resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import HostError, InputError, SourceError
from pipeline.graphs.packing import BlockPacking
from pipeline.plan.lock import Lock, LockedSource, with_weights
from pipeline.sources import remote
from pipeline.sources.checkpoint import Checkpoint, require_local
from pipeline.sources.derived import derive
from pipeline.sources.kinds import current_revision, moving
from pipeline.sources.pair import resolve
from pipeline.stages import streams, windows
from pipeline.stages.downloads import PART_BYTES
from pipeline.stages.shard import shard
from pipeline.stages.shard_files import ShardFile, write_shards
from support.checkpoints import write_checkpoint
from support.hub_server import FakeHub, Repo
from support.hub_server import running as running_hub
from support.range_s3 import Bucket
from support.range_s3 import running as running_s3
from support.shards import opened, pair_of

VOCAB = 100_000
"""Makes a file of two parts of the embedding alone."""


@dataclass
class Model:
    """A checkpoint of two files in a folder, and its weight files by name."""

    root: Path
    files: dict[str, bytes]

    @property
    def weights(self) -> dict[str, bytes]:
        return {name: data for name, data in self.files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("downloads") / "m"
    write_checkpoint(root, files=2, vocab_size=VOCAB)
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    assert max(map(len, files.values())) > PART_BYTES
    return Model(root, files)


@pytest.fixture
def hub(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("TANDEM_STREAM", "1")
    with running_hub() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
        state.repos["org/m"] = Repo(dict(model.files))
        yield state


@pytest.fixture
def s3(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with running_s3() as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        bucket.objects |= {f"models/m/{name}": data for name, data in model.files.items()}
        yield bucket


def written(target: Checkpoint, out: Path, **options: object) -> list[ShardFile]:
    draft = derive(target, (1,))
    pair = pair_of(target, draft, tp=4, dtype="bfloat16")
    return write_shards(pair, target, draft, out, packing=BlockPacking(), **options)  # type: ignore[arg-type]


def local(model: Model, tmp_path: Path) -> list[str]:
    """The digests of the shards of the same files in a folder."""
    return [file.sha256 for file in written(opened(model.root, tmp_path), tmp_path / "local")]


def resolved(source: str, tmp_path: Path) -> Checkpoint:
    return resolve(source, base=tmp_path, cache=tmp_path / "cache")


def fetched(bucket: Bucket) -> Counter[str]:
    """The bytes that were fetched of each weight file."""
    count: Counter[str] = Counter()
    for key, _, size in bucket.ranges:
        if key.endswith(".safetensors"):
            count[key.rpartition("/")[2]] += size
    return count


def test_write_shards_from_the_hub_equal_those_of_a_folder(model: Model, hub: FakeHub, tmp_path: Path) -> None:
    target = resolved("hf://org/m", tmp_path)
    assert [file.sha256 for file in written(target, tmp_path / "out")] == local(model, tmp_path)
    assert not any(path.suffix == ".safetensors" for path in target.root.iterdir())
    assert target.files == opened(model.root, tmp_path).files


def test_write_shards_from_s3_fetches_each_byte_once(model: Model, s3: Bucket, tmp_path: Path) -> None:
    target, draft = resolved("s3://bucket/models/m", tmp_path), opened(model.root, tmp_path)
    pair = pair_of(target, draft, tp=4, dtype="bfloat16", replicated=False)
    shards = write_shards(pair, target, draft, tmp_path / "out", packing=BlockPacking())
    assert fetched(s3) == {name: len(data) for name, data in model.weights.items()}
    again = write_shards(pair, draft, draft, tmp_path / "local", packing=BlockPacking())
    assert [file.sha256 for file in shards] == [file.sha256 for file in again]


def test_write_shards_derived_draft_reads_only_its_own_bytes_again(model: Model, s3: Bucket, tmp_path: Path) -> None:
    target = resolved("s3://bucket/models/m", tmp_path)
    assert [file.sha256 for file in written(target, tmp_path / "out")] == local(model, tmp_path)
    whole = sum(map(len, model.weights.values()))
    embedding_and_head = 2 * VOCAB * 32 * 4  # a replicated draft stores both whole
    assert whole <= fetched(s3).total() < whole + embedding_and_head + 100_000


def test_write_shards_digest_mismatch_leaves_no_shards(model: Model, hub: FakeHub, tmp_path: Path) -> None:
    target = resolved("hf://org/m", tmp_path)
    damaged = sorted(model.weights)[1]
    hub.repos["org/m"].files[damaged] = model.files[damaged][:-1] + bytes([model.files[damaged][-1] ^ 1])
    with pytest.raises(SourceError, match="sha256 mismatch") as found:
        written(target, tmp_path / "out")
    assert str(found.value.where).endswith(damaged)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_write_shards_interrupted_call_is_continued(
    model: Model, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were read to their end are not fetched again, but for the bytes that were in memory."""
    monkeypatch.setattr(streams, "STAGE_BYTES", 1 << 18)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1 << 18)
    here, out = opened(model.root, tmp_path), tmp_path / "out"
    models = pair_of(here, here, tp=4, dtype="bfloat16", replicated=False)
    target = resolved("s3://bucket/models/m", tmp_path)
    first, last = sorted(model.weights)

    def stop(done: int, total: int) -> None:
        if done > total // 3 and (out / "sources.json").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(models, target, here, out, packing=BlockPacking(), progress=stop)
    s3.ranges.clear()
    target = resolved("s3://bucket/models/m", tmp_path)
    shards = write_shards(models, target, here, out, packing=BlockPacking())
    again = write_shards(models, here, here, tmp_path / "local", packing=BlockPacking())
    assert [file.sha256 for file in shards] == [file.sha256 for file in again]
    assert fetched(s3)[last] == len(model.files[last])
    assert fetched(s3)[first] < len(model.files[first]) // 2


def test_shard_unreachable_store_keeps_what_was_written(
    model: Model, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TRIES", 1)
    target = resolved("hf://org/m", tmp_path)
    draft = derive(target, (0,))
    models = pair_of(target, draft, tp=2)

    def build() -> list[str]:
        made = shard(models, (target, draft), BlockPacking(), tmp_path / "cache", lambda _: None, lambda *_: None)
        assert (made.root / "sources.json").is_file()
        return [file.sha256 for file in made.files]

    hub.failing = True
    with pytest.raises(HostError, match="503"):
        build()
    assert len(list((tmp_path / "cache" / "shards").glob("*.partial"))) == 1
    hub.failing = False
    here = opened(model.root, tmp_path)
    expected = write_shards(models, here, derive(here, (0,)), tmp_path / "local", packing=BlockPacking())
    assert build() == [file.sha256 for file in expected]
    assert not list((tmp_path / "cache" / "shards").glob("*.partial"))


def test_with_weights_records_the_digests_of_an_s3_source(model: Model, s3: Bucket, tmp_path: Path) -> None:
    """S3 lists no sha256: the first build that reads a file is the one that knows it."""
    target, here = resolved("s3://bucket/models/m", tmp_path), opened(model.root, tmp_path)
    lock = Lock("recipe", LockedSource("s3://bucket/models/m", target.revision, dict(target.files)))
    assert not lock.target.has_weights
    models = pair_of(target, here, tp=2, replicated=False)
    made = shard(models, (target, here), BlockPacking(), tmp_path / "cache", lambda _: None, lambda *_: None)
    assert with_weights(lock, target, here, made.found).target.files == here.files
    cached = shard(models, (target, here), BlockPacking(), tmp_path / "cache", lambda _: None, lambda *_: None)
    assert cached == made


def test_s3_revision_changes_with_an_object(model: Model, s3: Bucket, tmp_path: Path) -> None:
    source = "s3://bucket/models/m"
    before = resolved(source, tmp_path).revision
    assert moving(source)
    assert current_revision(source) == before
    s3.objects["models/m/notes.txt"] = b"not of the model"
    assert current_revision(source) == before
    name = sorted(model.weights)[0]
    s3.objects[f"models/m/{name}"] = model.files[name][:-1] + b"x"
    assert current_revision(source) != before


def test_s3_object_that_is_replaced_while_it_is_read_is_refused(model: Model, s3: Bucket, tmp_path: Path) -> None:
    """The shards had tensors of both versions."""
    target = resolved("s3://bucket/models/m", tmp_path)
    last = sorted(model.weights)[-1]
    s3.objects[f"models/m/{last}"] = model.files[last][:-1] + b"x"
    with pytest.raises(InputError, match="object was replaced while it was read") as caught:
        written(target, tmp_path / "out")
    assert caught.value.where == f"s3://bucket/models/m/{last}"


def test_s3_prefix_without_a_model(s3: Bucket, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        resolved("s3://bucket/other", tmp_path)
    del s3.objects["models/m/model.safetensors.index.json"]
    with pytest.raises(SourceError, match="2 safetensors files but no"):
        resolved("s3://bucket/models/m", tmp_path / "fresh")


def test_require_local_rejects_weights_in_a_store(s3: Bucket, tmp_path: Path, model: Model) -> None:
    require_local(opened(model.root, tmp_path))
    with pytest.raises(InputError, match="needs the weights on this host"):
        require_local(resolved("s3://bucket/models/m", tmp_path))
