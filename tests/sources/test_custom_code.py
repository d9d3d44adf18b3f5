"""Code of a source is never run: a checkpoint that needs some is rejected by name, without a question on stdin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SourceError
from pipeline.progress import no_progress
from pipeline.sources.checkpoint import open_checkpoint
from pipeline.sources.hub import Hub
from support import hub_server, odd_tokenizers
from support.checkpoints import CONFIG, write_checkpoint

MINE: dict[str, Any] = {"AutoTokenizer": ["mine.Tokenizer", None]}
CASES = [
    ("tokenizer_config.json", MINE, "AutoTokenizer: mine.Tokenizer"),
    ("tokenizer_config.json", ["mine.Tokenizer", "mine.Fast"], "AutoTokenizer: mine.Tokenizer, mine.Fast"),
    ("tokenizer_config.json", {"AutoTokenizer": "org/code--mine.Tokenizer"}, "AutoTokenizer: org/code--mine.Tokenizer"),
    ("config.json", {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, "AutoConfig: c.C; AutoModelForCausalLM: m.M"),
    ("processor_config.json", {"AutoProcessor": "p.P"}, "AutoProcessor: p.P"),
    ("preprocessor_config.json", {"AutoImageProcessor": "p.P"}, "AutoImageProcessor: p.P"),
]
HARMLESS = [{}, None, {"AutoTokenizer": [None, None]}, {"": "config.Eagle3SpeculatorConfig"}]


def write(root: Path, name: str, auto_map: object) -> None:
    """A checkpoint with `auto_map` in one file, and code that leaves a trace when it runs."""
    odd_tokenizers.truncation(root)
    write_checkpoint(root)
    path = root / name
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(data | {"auto_map": auto_map, "tokenizer_class": "Mine"}), encoding="utf-8")
    for module in ("mine", "c", "m", "p"):
        (root / f"{module}.py").write_text(f"open({str(root / 'ran')!r}, 'w')\n", encoding="utf-8")


@pytest.mark.parametrize(("name", "auto_map", "said"), CASES)
def test_custom_code_is_refused_by_name(
    name: str, auto_map: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asked y/N on stdin for 15 seconds, or told to pass `trust_remote_code=True`."""
    write(tmp_path / "source", name, auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path / "source")
    assert caught.value.what == f"`auto_map` names custom code, which Tandem does not run: {said}"
    assert caught.value.where == str(tmp_path / "source" / name)
    assert "remove `auto_map` from a copy" in caught.value.fix
    assert not (tmp_path / "source" / "ran").exists()


@pytest.mark.parametrize("auto_map", HARMLESS)
def test_auto_map_without_code_is_accepted(auto_map: object, tmp_path: Path) -> None:
    """The files of speculators have an entry that names one of its own classes."""
    write(tmp_path / "source", "config.json", auto_map)
    assert open_checkpoint(tmp_path / "source").files


@pytest.fixture
def hub() -> Iterator[hub_server.FakeHub]:
    with hub_server.running() as server:
        yield server


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_custom_code_on_the_hub_is_refused_before_the_weights_come(
    name: str, tmp_path: Path, hub: hub_server.FakeHub
) -> None:
    write(tmp_path / "source", name, MINE)
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir() if path.suffix != ".py"}
    hub.repos["org/model"] = hub_server.Repo(files)
    with pytest.raises(SourceError) as caught:
        Hub(hub.endpoint, "hf_good", tmp_path / "cache").fetch("org/model", tmp_path / "notes", no_progress)
    assert caught.value.where == f"hf://org/model/{name}"
    assert not any("safetensors" in line and "resolve" in line for line in hub.log)
    assert CONFIG["model_type"] == "llama"
