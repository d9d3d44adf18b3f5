"""Pickled weights as safetensors: by a process that has no network, no variables, and loads nothing but tensors."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import InputError, SourceError
from pipeline.progress import no_log
from pipeline.sources import convert as module
from pipeline.sources.convert import convert
from support.checkpoints import opened
from support.heads import FLAT, Parts, tensors


class Hostile:
    """Runs a command when it is unpickled by a loader that allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def pickled(root: Path, content: object) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(FLAT))
    torch.save(content, root / "pytorch_model.bin")
    return root


def test_convert_writes_the_same_tensors_and_the_config(tmp_path):
    whole = tensors(Parts())
    assert convert(pickled(tmp_path / "in", whole), tmp_path / "out", no_log) == ["pytorch_model.bin"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == FLAT


def test_the_refusal_of_pickled_weights_names_the_command(tmp_path):
    pickled(tmp_path / "in", tensors(Parts()))
    with pytest.raises(SourceError) as caught:
        opened("in", tmp_path, role="draft")
    assert "tandem draft convert" in caught.value.fix


def test_convert_runs_no_code_of_the_file(tmp_path):
    source = pickled(tmp_path / "in", {"fc.weight": torch.zeros(1), "more": Hostile(tmp_path / "ran")})
    with pytest.raises(SourceError, match="cannot be read as tensors alone"):
        convert(source, tmp_path / "out", no_log)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_process_has_no_network_and_no_variables(tmp_path, monkeypatch):
    """Its program, up to the loader, and then a connection to this process."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        head = module.CHILD.partition("import torch")[0]
        program = f"{head}import socket\nassert 'HF_TOKEN' not in os.environ\n"
        program += f"socket.create_connection(('127.0.0.1', {port}))\n"
        monkeypatch.setattr(module, "CHILD", program)
        with pytest.raises(SourceError, match="OSError"):
            convert(pickled(tmp_path / "in", {}), tmp_path / "out", no_log)


def test_convert_names_what_it_lacks(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceError, match="no pickled weights"):
        convert(tmp_path / "in", tmp_path / "out", no_log)
    with pytest.raises(InputError, match="destination exists"):
        convert(tmp_path / "in", tmp_path / "in", no_log)
