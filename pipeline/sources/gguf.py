"""GGUF -> a folder in Hugging Face layout, in float32, written tensor by tensor.

Supports the families of `pipeline.models`. Does not keep the quantisation: the weights are dequantised exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline.errors import HostError, SourceError, reason
from pipeline.files.atomic import atomic_dir
from pipeline.files.unfinished import work_folder
from pipeline.models.families import config_of
from pipeline.progress import Progress
from pipeline.sources.gguf_header import check_header
from pipeline.sources.pointers import SINGLE
from pipeline.sources.tensors import layout

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy import ndarray

CONVERTER = "v1"
"""Part of the cache's key: raise it when the converter's output changes."""

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PERMUTED = ("llama", "mistral")
"""llama.cpp stores these families' q and k with the halves of each head interleaved."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR = re.compile(r"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")
MALFORMED = (LookupError, ValueError, TypeError, ArithmeticError, AttributeError)
"""Errors of the reader, and of its values, for a file that is not what it says."""

HOST_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")
"""Keys of a saved tokenizer config that describe the host on which it was saved."""


def convert_once(path: Path, sha256: str, cache: Path, progress: Progress) -> Path:
    """Return the folder in the cache with `path` converted, at most once by builds that run at the same time.

    Raises:
        SourceError: an architecture, tensor or quantisation that is not supported, or a damaged file.

    """
    target = cache / "gguf" / f"{sha256[:32]}-{CONVERTER}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with atomic_dir(target) as work:
                convert(path, work, progress)
    return target


def convert(path: Path, out: Path, progress: Progress) -> None:
    """Write config, tokenizer and weights of a GGUF file into the folder `out`."""
    reader, config = opened(path)
    config_of(config, str(path))
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save_tokenizer(path, out)
    with (out / SINGLE).open("wb") as file:
        for chunk in converted_weights(reader, config, path, progress):
            file.write(chunk)


def opened(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """Return the reader of a GGUF file, and the `config.json` that its metadata describe.

    Raises:
        SourceError: a damaged file, or an architecture that is not supported.

    """
    reader = _open(path)
    try:
        return reader, _config(_Fields(reader, str(path)), {tensor.name for tensor in reader.tensors})
    except MALFORMED as error:
        what = f"the file's metadata have another form: {reason(error)}"
        raise SourceError(what, where=str(path), fix="convert the model again") from error


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader  # here: an extra that most sources do not need
    except ImportError as error:
        raise HostError("the package gguf is not installed", where=str(path), fix="pip install gguf") from error
    try:
        check_header(path)
        return GGUFReader(str(path))
    except (*MALFORMED, OSError) as error:
        raise SourceError(
            f"damaged GGUF file: {reason(error)}", where=str(path), fix="download the file again"
        ) from error


@dataclass(frozen=True)
class _Fields:
    """Metadata of a GGUF file by key, without its architecture's prefix."""

    reader: GGUFReader
    where: str

    @property
    def architecture(self) -> str:
        field = self.reader.fields.get("general.architecture")
        return "" if field is None else str(field.contents())

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceError(
                f"no {self.architecture}.{key} in the file's metadata", where=self.where, fix="convert the model again"
            )
        return value

    def token(self, name: str) -> int | None:
        field = self.reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else int(field.contents())


def _config(fields: _Fields, tensors: set[str]) -> dict[str, Any]:
    """Return the `config.json` of a GGUF file's metadata."""
    architecture = fields.architecture
    if architecture not in ARCHITECTURES:
        fix = f"supported: {', '.join(ARCHITECTURES)}"
        raise SourceError(f"unsupported GGUF architecture: {architecture!r}", where=fields.where, fix=fix)
    heads, hidden = int(fields.need("attention.head_count")), int(fields.need("embedding_length"))
    head_dim = int(fields.get("attention.key_length") or fields.get("rope.dimension_count") or hidden // heads)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(fields.need("feed_forward_length")),
        "num_hidden_layers": int(fields.need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(fields.need("context_length")),
        "rms_norm_eps": float(fields.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in tensors,
        "vocab_size": len(fields.reader.fields["tokenizer.ggml.tokens"].data),
    }
    tokens = {"bos": fields.token("bos"), "eos": fields.token("eos"), "pad": fields.token("padding")}
    return config | {f"{name}_token_id": value for name, value in tokens.items() if value is not None}


def _rope(fields: _Fields) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(fields.get("rope.freq_base", 10000.0)), "rope_type": "default"}
    kind = fields.get("rope.scaling.type", "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": float(fields.need("rope.scaling.factor"))}
    if kind != "none":
        raise SourceError(f"unsupported rope scaling in GGUF: {kind!r}", where=fields.where, fix=USE_ORIGINAL)
    return rope


USE_ORIGINAL = "use the model's original checkpoint (hf:// or a folder)"


def _save_tokenizer(path: Path, out: Path) -> None:
    """Write the tokenizer, chat template included, that transformers builds from the GGUF metadata.

    Transformers sees this file alone: other files of its folder could change the tokens or name code to run.
    """
    from transformers import AutoTokenizer  # here, because it imports torch

    try:
        with work_folder("gguf") as folder:
            (folder / path.name).symlink_to(path.absolute())
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise SourceError(
            f"the tokenizer cannot be converted: {reason(error)}", where=str(path), fix=USE_ORIGINAL
        ) from error
    tokenizer.save_pretrained(str(out))
    saved = out / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(saved.read_bytes()).items() if key not in HOST_KEYS}
    saved.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def converted_weights(
    reader: GGUFReader, config: dict[str, Any], path: Path, progress: Progress
) -> Iterator[bytes | memoryview]:
    """Yield the safetensors file, piece by piece, with at most one tensor in memory."""
    import numpy as np  # here: slow to import, and only converting needs it
    from gguf import dequantize  # here: an extra, as above

    named = [(_name(tensor.name, path), tensor) for tensor in reader.tensors]
    shapes = [(name, "F32", tuple(int(n) for n in reversed(tensor.shape))) for name, tensor in named]
    plan = layout(shapes, {"format": "pt"})
    yield plan.header
    done = len(plan.header)
    for (name, tensor), (_, _, shape) in zip(named, shapes, strict=True):
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except (*MALFORMED, NotImplementedError) as error:
            raise SourceError(f"{tensor.name}: {reason(error)}", where=str(path), fix=USE_ORIGINAL) from error
        if values.size == 0:
            raise SourceError(f"{tensor.name}: shape {list(shape)}", where=str(path), fix=USE_ORIGINAL)
        values = _unpermute(config)(name, values)
        yield np.ascontiguousarray(values, dtype="<f4").data.cast("B")
        done += plan.tensors[name].nbytes
        progress("converting GGUF", done, plan.size)


def _name(gguf_name: str, path: Path) -> str:
    """Return the Hugging Face name of a GGUF tensor."""
    match = TENSOR.fullmatch(gguf_name)
    if match is None or match["part"] not in NAMES:
        raise SourceError(f"unsupported tensor in GGUF: {gguf_name!r}", where=str(path), fix=USE_ORIGINAL)
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{NAMES[match['part']]}.{match['leaf']}"


def _unpermute(config: dict[str, Any]) -> Callable[[str, ndarray], ndarray]:
    """Undo llama.cpp's reordering of the rows of q and k: per head, (half, 2) back to (2, half)."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def undo(name: str, values: ndarray) -> ndarray:
        count = heads.get(name.split(".")[-2])
        if count is None or config["model_type"] not in PERMUTED:
            return values
        pairs = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    return undo
