"""A target's end-of-sequence ids and defaults of generation, compared with transformers' own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.errors import SourceError
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve
from support.checkpoints import write_checkpoint
from support.families import write_tokenizer

IM_END = "<|im_end|>"
VOCAB = 400


def target(root: Path, config: dict[str, Any], generation: dict[str, Any] | None, tokenizer: dict[str, Any]) -> Path:
    """A checkpoint with these fields in its three files; None: no generation_config.json."""
    write_checkpoint(root, vocab_size=VOCAB)
    write(root, "config.json", json.loads((root / "config.json").read_text()) | config)
    write_tokenizer(root, "json-jinja")
    write(root, "tokenizer_config.json", tokenizer)
    if generation is not None:
        write(root, "generation_config.json", generation)
    return root


def write(root: Path, name: str, data: object) -> None:
    (root / name).write_text(json.dumps(data), encoding="utf-8")


def opened(root: Path) -> Checkpoint:
    return resolve(str(root), base=root.parent, cache=root.parent / "cache")


def ids_of_vllm(root: Path) -> set[int]:
    """The ids at which vLLM stops: those of the generation config, and the tokenizer's own."""
    try:
        generation = transformers.GenerationConfig.from_pretrained(root)
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(root))
    eos = generation.eos_token_id
    own = transformers.AutoTokenizer.from_pretrained(root).eos_token_id
    listed = eos if isinstance(eos, list) else [eos]
    return {token for token in (*listed, own) if token is not None and 0 <= token < VOCAB}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TOKENIZERS = {
    "text": FAST | {"eos_token": IM_END},
    "added token": FAST | {"eos_token": {"content": IM_END, "__type": "AddedToken", "lstrip": False}},
    "none": FAST,
    "null": FAST | {"eos_token": None},
    "of the class": {"tokenizer_class": "Qwen2Tokenizer"},
    "same as the config": FAST | {"eos_token": "</s>"},
}
GENERATIONS = {
    "no file": None, "id": {"eos_token_id": 7}, "list": {"eos_token_id": [7, 9]}, "null": {"eos_token_id": None},
    "no id": {"temperature": 0.7}, "empty list": {"eos_token_id": []},
    "beyond the vocabulary": {"eos_token_id": [7, 4000]}, "negative": {"eos_token_id": -1},
}  # fmt: skip


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_end_of_sequence_ids_are_those_of_vllm(tmp_path, generation, tokenizer):
    """The tokenizer's were left out: an artifact of a chat model never stopped at the end of its turn."""
    root = target(tmp_path / "m", {}, GENERATIONS[generation], TOKENIZERS[tokenizer])
    found = opened(root)
    assert set(found.config.eos_ids) == ids_of_vllm(root)
    recorded = found.config_json["eos_token_id"]
    assert ([recorded] if isinstance(recorded, int) else recorded or []) == list(found.config.eos_ids)
    assert found.generation.get("eos_token_id", []) == list(found.config.eos_ids)


@pytest.mark.parametrize("eos", [None, 5, [5, 6], []])
def test_ids_of_the_config_count_without_a_generation_config(tmp_path, eos):
    root = target(tmp_path / "m", {"eos_token_id": eos}, None, TOKENIZERS["text"])
    assert set(opened(root).config.eos_ids) == ids_of_vllm(root)


def test_token_in_the_map_of_special_tokens_alone(tmp_path):
    root = target(tmp_path / "m", {"eos_token_id": None}, None, FAST)
    write(root, "special_tokens_map.json", {"eos_token": {"content": IM_END}})
    assert opened(root).config.eos_ids == (transformers.AutoTokenizer.from_pretrained(root).eos_token_id,)


def test_files_that_name_two_tokens_are_read_as_transformers_reads_them(tmp_path):
    root = target(tmp_path / "m", {"eos_token_id": None}, None, FAST | {"eos_token": "</s>"})
    write(root, "special_tokens_map.json", {"eos_token": IM_END})
    assert opened(root).config.eos_ids == (transformers.AutoTokenizer.from_pretrained(root).eos_token_id,)


@pytest.mark.parametrize("form", ["sentencepiece", "vocab-merges"])
def test_end_of_sequence_id_of_tokenizers_in_older_forms(tmp_path, form):
    write_checkpoint(tmp_path / "m", vocab_size=VOCAB, eos_token_id=None)
    write_tokenizer(tmp_path / "m", form)
    assert opened(tmp_path / "m").config.eos_ids == (2,)


@pytest.mark.parametrize(
    ("config", "generation", "where"),
    [({"eos_token_id": "</s>"}, None, "config.json: eos_token_id: found \"</s>\""),
     ({}, {"eos_token_id": "</s>"}, "generation_config.json: eos_token_id: found \"</s>\""),
     ({}, {"eos_token_id": [2, "x"]}, "generation_config.json: eos_token_id: found \"x\""),
     ({}, {"temperature": "0.7"}, "generation_config.json: temperature: found \"0.7\""),
     ({}, [], "generation_config.json: not a JSON object")],
)  # fmt: skip
def test_malformed_values_are_refused_before_any_work(tmp_path, config, generation, where):
    """A text in place of an id was a ValueError; everything else in generation_config.json was ignored."""
    root = target(tmp_path / "m", config, generation, FAST)
    with pytest.raises(SourceError) as caught:
        opened(root)
    assert where in str(caught.value)
    assert caught.value.fix


def test_generation_config_is_kept_as_a_whole(tmp_path):
    """It was reduced to its end-of-sequence ids."""
    generation = {
        "temperature": 0.01,
        "top_k": 1,
        "repetition_penalty": 1.1,
        "chat_format": "chatml",
        "eos_token_id": 7,
    }
    root = target(tmp_path / "m", {}, generation, TOKENIZERS["none"])
    assert opened(root).generation == generation | {"eos_token_id": [7]}


def test_settings_in_the_config_count_without_a_generation_config(tmp_path):
    """Older checkpoints have them there, and transformers' `generate` applies them."""
    root = target(tmp_path / "m", {"temperature": 0.6, "do_sample": True}, None, FAST)
    assert opened(root).generation == {"temperature": 0.6, "do_sample": True, "eos_token_id": [2]}


def test_drafts_settings_do_not_count(tmp_path):
    root = target(tmp_path / "m", {}, {"temperature": "warm"}, FAST)
    assert resolve(str(root), base=tmp_path, cache=tmp_path / "cache", role="draft").generation == {}


def test_absent_ids_are_the_default_of_the_family(tmp_path):
    """Was: none. Without both fields transformers and vLLM end at 2, the default of Llama."""
    root = target(tmp_path / "m", {}, None, FAST)
    config = json.loads((root / "config.json").read_text())
    del config["eos_token_id"]
    write(root, "config.json", config)
    assert set(opened(root).config.eos_ids) == ids_of_vllm(root) == {2}
