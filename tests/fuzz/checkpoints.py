"""Targets of a checkpoint's folder: configs, indexes, safetensors and GGUF headers, tokenizer files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import TandemError
from pipeline.models.families import config_of
from pipeline.models.quantisation import Bnb, Quantisation
from pipeline.models.weights import weight_specs
from pipeline.progress import no_progress
from pipeline.runtime.text import Text
from pipeline.sources import gguf
from pipeline.sources.bitsandbytes import STATE, with_bitsandbytes
from pipeline.sources.checkpoint import Checkpoint, open_checkpoint
from pipeline.sources.generation import generation_of
from pipeline.sources.heads import with_readings
from pipeline.sources.packed import TABLES
from pipeline.sources.pair import checked
from pipeline.sources.pointers import INDEX, SINGLE
from pipeline.sources.tensors import TensorRef, read_header
from pipeline.sources.tokenizer import check_tokenizers, end_of_sequence_id, tokenizer_files, vocabulary_size
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import check_weights, weights
from support.paths import ROOT

CORPUS = ROOT / "tests/fuzz/corpus"
CONFIG = CORPUS / "config/valid-llama.json"
WEIGHTS = CORPUS / "safetensors/valid-llama.safetensors"
HEAD_WEIGHTS = CORPUS / "head.safetensors"
TOKENIZER = CORPUS / "tokenizer/valid-words.json"
TOKENIZER_CONFIG = CORPUS / "tokenizer_config/valid-chat.json"
LARGEST_LAYERS = 1000
"""Configs of more layers are not expanded into tables of weights."""


def _folder(folder: Path, **files: Path) -> Path:
    for name, source in {"config.json": CONFIG, SINGLE: WEIGHTS, **files}.items():
        shutil.copy(source, folder / name)
    return folder


def config_target(folder: Path) -> Callable[[bytes], object]:
    """A config, as it is read before weights are."""
    root = _folder(folder)

    def read(data: bytes) -> None:
        (root / "config.json").write_bytes(data)
        checkpoint = open_checkpoint(root, read_weights=False)
        if checkpoint.config.layers < LARGEST_LAYERS:
            list(weight_specs(checkpoint.config))
            with suppress(TandemError):
                weights(checkpoint)

    return read


def head_target(folder: Path) -> Callable[[bytes], object]:
    """The config of an EAGLE-3 or P-EAGLE head, or of a DFlash draft, with the tensors of a head."""
    root = _folder(folder, **{SINGLE: HEAD_WEIGHTS})

    def read(data: bytes) -> None:
        (root / "config.json").write_bytes(data)
        head = with_readings(open_checkpoint(root, read_weights=False), {}, folder / "cache")
        if head.config.layers < LARGEST_LAYERS:
            checked(head, "head", "draft")

    return read


def generation_target(folder: Path) -> Callable[[bytes], object]:
    """The defaults of generation of a target."""
    checkpoint = open_checkpoint(_folder(folder), read_weights=False)

    def read(data: bytes) -> None:
        (checkpoint.root / "generation_config.json").write_bytes(data)
        generation_of(checkpoint)

    return read


def weight_map_target(folder: Path) -> Callable[[bytes], object]:
    """The index of sharded weights."""
    root = _folder(folder)
    (root / SINGLE).rename(root / "model-00001-of-00001.safetensors")

    def read(data: bytes) -> None:
        (root / INDEX).write_bytes(data)
        weights(open_checkpoint(root, read_weights=False))

    return read


def safetensors_target(folder: Path) -> Callable[[bytes], object]:
    """A file of weights, its header against the config."""
    checkpoint = open_checkpoint(_folder(folder), read_weights=False)

    def read(data: bytes) -> None:
        (checkpoint.root / SINGLE).write_bytes(data)
        read_header(checkpoint.root / SINGLE)
        check_weights(checkpoint)

    return read


def quant_state_target(folder: Path) -> Callable[[bytes], object]:
    """The state of a 4-bit matrix of bitsandbytes, beside tensors of 8 rows of 64 values with nested scales."""
    codes, map_bytes = bytes(8 * 64 // 2), struct.pack("<16f", *TABLES["nf4"])
    beside = {
        "weight": ("U8", (256, 1), codes), "weight.absmax": ("U8", (8,), bytes(8)),
        "weight.quant_map": ("F32", (16,), map_bytes), "weight.nested_absmax": ("F32", (1,), bytes(4)),
        "weight.nested_quant_map": ("F32", (256,), bytes(1024)),
    }  # fmt: skip
    found, path = {}, folder / "tensors"
    for name, (dtype, shape, data) in beside.items():
        found[f"a.{name}"] = TensorRef(path, dtype, shape, sum(ref.nbytes for ref in found.values()), len(data))
    path.write_bytes(b"".join(data for _, _, data in beside.values()))
    state = folder / "state"

    def read(data: bytes) -> None:
        state.write_bytes(data)
        ref = TensorRef(state, "U8", (len(data),), 0, len(data))
        tensors = found | {f"a.weight.{STATE}nf4": ref}
        read_tensor(with_bitsandbytes(tensors, Quantisation("bitsandbytes", (Bnb(4),)))["a.weight"])

    return read


def gguf_target(folder: Path) -> Callable[[bytes], object]:
    """A GGUF file: its metadata as a config, its tensors as a safetensors file."""
    path = folder / "model.gguf"

    def read(data: bytes) -> None:
        path.unlink(missing_ok=True)  # the reader maps the file: an earlier mapping keeps the earlier file
        path.write_bytes(data)
        reader, config = gguf.opened(path)
        config_of(config, str(path))
        for chunk in gguf.converted_weights(reader, config, path, no_progress):
            len(chunk)

    return read


def _with_tokenizer(folder: Path) -> Checkpoint:
    files = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": TOKENIZER_CONFIG}
    return open_checkpoint(_folder(folder, **files), read_weights=False)


def tokenizer_target(folder: Path) -> Callable[[bytes], object]:
    """A `tokenizer.json`, compared with another one, and used for a prompt."""
    (folder / "other").mkdir()
    (folder / "own").mkdir()
    other, own = _with_tokenizer(folder / "other"), _with_tokenizer(folder / "own")
    path = own.root / "tokenizer.json"
    tokenizer_files(own)  # imports transformers, which a tokenizer without the name of its last token needs

    def read(data: bytes) -> None:
        path.write_bytes(data)
        vocabulary_size(own)
        end_of_sequence_id(own)
        with suppress(TandemError):
            check_tokenizers(other, Checkpoint(own.root, own.config, own.config_json, {"tokenizer.json": None}, ""))  # type: ignore[dict-item]
        text = Text(own.root)
        text.decode(text.encode_prompt("a b"))

    return read


def tokenizer_config_target(folder: Path) -> Callable[[bytes], object]:
    """A `tokenizer_config.json`: its special tokens, its chat template in a conversation."""
    own = _with_tokenizer(folder)
    path = own.root / "tokenizer_config.json"
    vocabulary = json.loads(TOKENIZER.read_bytes())["model"]["vocab"]
    assert vocabulary

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_checkpoint(own.root, read_weights=False)
        text = Text(own.root)
        text.encode_prompt("a b")
        if text.has_chat:
            text.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    return read
