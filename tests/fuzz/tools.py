"""Targets of files of other tools: heads and drafts, tokenizers in older forms, vLLM's caches, `tandem init`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.checkpoints import LARGEST_LAYERS, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from fuzz.documents import each_alone
from pipeline.errors import InputError
from pipeline.models.eagle3 import fitted, opened_config
from pipeline.models.families import config_of
from pipeline.models.weights import weight_specs
from pipeline.nxdi.vllm_cache import CACHE_FOLDER, COMMAND, PACKAGES, ServerRun, pack
from pipeline.nxdi.vllm_cache_layout import COMPLETE, HLO, METADATA, NKI
from pipeline.progress import no_log, no_progress
from pipeline.proposal.propose import Wish, propose_recipe
from pipeline.sources.checkpoint import open_checkpoint
from pipeline.sources.pointers import SINGLE
from pipeline.sources.tokenizer import tokenizer_files
from support.paths import ROOT

CORPUS = ROOT / "tests/fuzz/corpus"
TARGET = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 192, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip
KEY = "0123456789abcdef" * 2
PARTS = (
    "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of tokenizers beside those that have targets of their own."""


def object_of(data: bytes) -> dict[str, Any]:
    """Return an input that is a JSON object."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON") from error
    if not isinstance(found, dict):
        raise InputError("not an object")
    return found


def public_head_target(folder: Path) -> Callable[[bytes], object]:
    """The config of a head or draft that a public tool wrote, with the names and shapes of its tensors."""
    target = config_of(dict(TARGET), "target")

    def read(data: bytes) -> None:
        given = object_of(data)
        config, tensors = given.get("config"), given.get("tensors")
        if not isinstance(config, dict) or not isinstance(tensors, dict):
            raise InputError("no config or no tensors")
        shapes = {name: shape for name, shape in tensors.items() if _is_shape(shape)}  # a safetensors header checks
        head = fitted(target, config_of(opened_config(config, shapes, {}), "head"), "head")
        if head.layers < LARGEST_LAYERS:
            list(weight_specs(head))

    return read


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def init_target(folder: Path) -> Callable[[bytes], object]:
    """The config of a folder for which `tandem init` writes a recipe, for a CPU and for a chip."""
    for name, source in {
        SINGLE: WEIGHTS,
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }.items():
        shutil.copy(source, folder / name)

    def propose(chip: Any) -> None:
        propose_recipe(Wish(str(folder), folder, chip=chip), folder / "cache", no_log, no_progress)

    def read(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        if open_checkpoint(folder, read_weights=False).config.layers < LARGEST_LAYERS:
            each_alone(lambda: propose("trn2"), lambda: propose(None))

    return read


def tokenizer_parts_target(folder: Path) -> Callable[[bytes], object]:
    """A file of a tokenizer in an older form; the first byte selects it."""
    (folder / SINGLE).write_bytes(WEIGHTS.read_bytes())
    (folder / "config.json").write_bytes((CORPUS / "config/valid-llama.json").read_bytes())
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    others = {"vocab.json": "vocab", "merges.txt": "merges"}
    kept = {name: (CORPUS / f"tokenizer_parts/valid-{of}").read_bytes()[1:] for name, of in others.items()}

    def read(data: bytes) -> None:
        part = PARTS[data[0] % len(PARTS) if data else 0]
        for name in PARTS:
            (folder / name).unlink(missing_ok=True)
        is_model = part == "tokenizer.model"
        class_ = {"tokenizer_class": "LlamaTokenizer"} if is_model else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | class_))
        for name, content in ({} if is_model else kept).items():
            (folder / name).write_bytes(content)
        (folder / part).write_bytes(data[1:])
        tokenizer_files(open_checkpoint(folder, read_weights=False))

    return read


def vllm_cache_target(folder: Path) -> Callable[[bytes], object]:
    """An entry of a compile cache of vLLM's Neuron plugin: its metadata, and after NULs its mark and its command."""
    entry = folder / "root" / CACHE_FOLDER / KEY
    entry.mkdir(parents=True)
    (entry / HLO).write_bytes(b"hlo")
    (entry / f"graph_{KEY}.neff").write_bytes(b"neff")
    kernels = entry.parent / NKI
    kernels.mkdir()
    run = ServerRun(("--model", "org/name", "--tensor-parallel-size", "2"), {}, dict.fromkeys(PACKAGES, "1.0"))

    def read(data: bytes) -> None:
        metadata, complete, command, kernel = (*data.split(b"\0", 3), b"", b"", b"")[:4]
        (entry / METADATA).write_bytes(metadata)
        (entry / COMPLETE).write_bytes(complete)
        (entry / COMMAND).write_bytes(command)
        (kernels / "kernel.json").write_bytes(kernel or b'{"a": 1}')
        pack(folder / "root", folder / "out", "cache", run)

    return read
