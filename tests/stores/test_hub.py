"""What a Hub alone does: tokens, gated repositories, cards, tags and branches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST
from pipeline.errors import HostError, InputError
from pipeline.registry import releases as registry
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull
from support import small_artifacts as small

pytestmark = pytest.mark.server


@pytest.mark.parametrize("token", ["hf_unknown", "hf_reader", ""])
def test_hub_refused(made, hub_url, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HostError, match="token") as caught:
        publish(made, hub_url)
    assert "HF_TOKEN" in caught.value.fix


def test_hub_one_repository(made, hub_url, options):
    """`hf://org/name`, as a recipe may say; another name does not go there."""
    publish(made, f"{hub_url}/small", ["latest"])
    assert small.digests(pull(f"{hub_url}/small@latest", **options)) == small.digests(made)
    assert [one.name for one in registry.list_releases(f"{hub_url}/small")] == ["small"]
    with pytest.raises(InputError, match="this repository is for 'large'"):
        publish(made, f"{hub_url}/large")


def test_hub_private_and_gated(made, hub_url, hub_server, monkeypatch, options):
    publish(made, hub_url, ["latest"])
    repo = f"{hub_url.removeprefix('hf://')}/small"
    monkeypatch.setenv("HF_TOKEN", "")
    hub_server.gated.add(repo)
    with pytest.raises(InputError, match="restricted"):
        pull(f"{hub_url}/small@latest", **options)
    hub_server.gated.clear()
    hub_server.private.add(repo)
    with pytest.raises(InputError, match="no release named 'small'"):
        pull(f"{hub_url}/small@latest", **options)
    monkeypatch.setenv("HF_TOKEN", hub_server.reader)
    assert small.digests(pull(f"{hub_url}/small@latest", **options)) == small.digests(made)


def test_hub_sends_no_token_to_where_files_lie(made, hub_url, hub_server, options):
    publish(made, hub_url, ["latest"])
    pull(f"{hub_url}/small@latest", **options)
    assert hub_server.leaked == []


def test_hub_card_tag_and_branch(made, hub_url, hub_server, tmp_path):
    """What people and the Hub's own clients see."""
    import yaml
    from huggingface_hub import snapshot_download

    lock = json.loads((made / "recipe.lock").read_text())
    lock["target"]["source"] = "hf://HuggingFaceTB/SmolLM2-135M@" + "1" * 40
    (made / "recipe.lock").write_text(json.dumps(lock))
    data = json.loads((made / MANIFEST).read_text())
    data["files"]["recipe.lock"] = {"sha256": small.digests(made)["recipe.lock"],
                                    "size": (made / "recipe.lock").stat().st_size}  # fmt: skip
    (made / MANIFEST).write_text(json.dumps(data))
    version = publish(made, hub_url, ["prod"]).version
    repo = f"{hub_url.removeprefix('hf://')}/small"
    text = hub_server.git(repo, "show", f"refs/tags/{version}:README.md").decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == ["HuggingFaceTB/SmolLM2-135M"]
    assert front["library_name"] == "tandem"
    for word in ("| batch | 1 |", "avx2", version, "tandem pull", "passed"):
        assert word in text
    folder = snapshot_download(repo, revision="prod", endpoint=hub_server.endpoint, cache_dir=tmp_path / "hf")
    for name, digest in small.digests(made).items():
        assert small.digests(Path(folder))[name] == digest
