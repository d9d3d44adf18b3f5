"""What a build that changed nothing is known by, and a build that cannot write."""

import os
from pathlib import Path

import pytest

from pipeline.build import BuildSettings
from pipeline.recipe import load
from pipeline.stages.stamp import fingerprint
from support.small_disk import on_small_disk


def _request(base: Path, **options) -> BuildSettings:
    return BuildSettings(recipe=load(base / "local.yaml"), base=base, out=base / "out", cache=base / "cache", **options)


@pytest.fixture
def local(tmp_path):
    """A recipe with a base, a local target, a local draft and prompts; nothing of it is ever built."""
    (tmp_path / "base.yaml").write_text("shapes: {batch: [2], prefill: [16], kv: [48]}\n")
    text = "base: base.yaml\nname: local\ntarget: {source: ./model}\ndraft: {source: ./draft}\n"
    text += "speculation: {draft_tokens: [2]}\nvalidate: {prompts: prompts.jsonl}\n"
    (tmp_path / "local.yaml").write_text(text)
    (tmp_path / "prompts.jsonl").write_text('{"id": "1", "class": "chat", "prompt": "a"}\n')
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "local.lock").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        "prompts.jsonl",
        "draft/model.safetensors",
        "model/model.safetensors",
        "base.yaml",
        "draft/new.json",
        "local.lock",
    ],
)
def test_fingerprint_sees_a_changed_file(local, change):
    """Even one of the same size, with its old time put back."""
    before = fingerprint(_request(local, locked=True))
    assert fingerprint(_request(local, locked=True)) == before
    file = local / change
    if file.exists():
        stat, data = file.stat(), file.read_bytes()
        file.write_bytes(data.replace(b"[2]", b"[3]") if change == "base.yaml" else data[:-1] + b"#")
        assert file.stat().st_size == stat.st_size
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        file.write_text("{}")
    assert fingerprint(_request(local, locked=True)) != before


def test_build_onto_a_read_only_disk_is_refused_before_anything_runs(local):
    code = f"""
    from pathlib import Path
    from pipeline.build import BuildSettings, run
    from pipeline.errors import HostError
    from pipeline.recipe import load
    base = Path({str(local)!r})
    try:
        run(BuildSettings(load(base / "local.yaml"), base, Path("/mnt/out"), base / "cache"))
    except HostError as error:
        print(error, "|", error.fix)
    """
    assert "Read-only file system | use a folder with write permission" in on_small_disk(
        "mount -o remount,ro /mnt", code
    )
    assert not (local / "cache" / "graphs").exists()
