"""Read the `quantization_config` of a `config.json`: which format, and which modules it leaves out. Imports no torch.

A field that is not read here is rejected by name, unless it says only how the checkpoint was made or which kernel runs
it. `sources.quantised` finds the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import SourceError
from pipeline.models.compressed import Compressed, read_groups
from pipeline.models.fields import is_int, shown

KEY = "quantization_config"
METHOD = "quant_method"
SKIPPED = "modules_to_not_convert"
MODELOPT_FILE = "hf_quant_config.json"
"""Where checkpoints of NVIDIA's ModelOpt say how they are quantised; many have no `quantization_config`."""

Method = Literal["fp8", "compressed-tensors", "awq", "gptq", "mxfp4", "bitsandbytes"]

MAKING = frozenset({
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "dataset", "dequantize", "desc_act", "disable_exllama", "do_fuse", "exllama_config",
    "fuse_max_seq_len", "global_compression_ratio", "is_checkpoint_fp8_serialized", "lm_head", "max_input_length",
    "meta", "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "modules_to_convert", "modules_to_fuse", "mse", "nsamples", "pad_token_id",
    "quantizer", "seqlen", "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
})  # fmt: skip
"""Fields that say how a checkpoint was made, or which kernel runs it: the tensors tell the rest."""

BNB_4, BNB_8, BNB_SKIPPED = "load_in_4bit", "load_in_8bit", "llm_int8_skip_modules"
BNB_16 = "llm_int8_has_fp16_weight"
"""The weights of 8-bit modules are rounded at each use; without effect on 4-bit modules."""
BNB_READ = (
    BNB_SKIPPED, "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload",
)  # fmt: skip
"""The type and double quantisation are those of each matrix's own state; the last three say how a kernel multiplies."""


@dataclass(frozen=True)
class Fp8:
    """Values in 8-bit floats. `block`: rows and columns that share a scale, where scales are a matrix."""

    block: tuple[int, int] | None


@dataclass(frozen=True)
class Gptq:
    """GPTQ: integers in words along the inputs. `first`: version 1, whose zero points are stored minus 1."""

    bits: int
    first: bool


@dataclass(frozen=True)
class Awq:
    """AWQ, layout `gemm`: 4-bit integers in words along the outputs."""


@dataclass(frozen=True)
class Mxfp4:
    """Blocks of 32 values of 4-bit floats with a power of two (gpt-oss)."""


@dataclass(frozen=True)
class Bnb:
    """bitsandbytes: 4-bit codes with a state for each matrix, or int8 with a scale for each row."""

    bits: Literal[4, 8]


Scheme = Fp8 | Gptq | Awq | Mxfp4 | Bnb | Compressed


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's matrices are stored.

    `skipped` are modules that are not quantised, as the method writes them. `unrounded` is the field of a rounding of
    activations, which is not applied: results are those of the dequantised weights.
    """

    method: Method
    schemes: tuple[Scheme, ...]
    skipped: tuple[str, ...] = ()
    unrounded: str | None = None


@dataclass(frozen=True)
class Reader:
    """A `quantization_config` and its place in errors."""

    data: Mapping[str, Any]
    where: str

    def error(self, key: str, value: Any, what: str, fix: str = "use the unquantised checkpoint") -> SourceError:
        """Return the error of a field: its name, its value, and what is expected."""
        return SourceError(f"{KEY}.{key}={shown(value)}: {what}", where=self.where, fix=fix)

    def choice(self, key: str, default: Any, accepted: Collection[Any]) -> Any:
        """Return a field that has one of some values."""
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, str | int | None) or value not in accepted:
            known = ", ".join(shown(one) for one in accepted)
            raise self.error(key, value, f"not supported; accepted: {known}")
        return value

    def flag(self, key: str) -> bool:
        """Return a field that is true, false or null."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "expected true or false", "correct config.json")
        return value is True

    def names(self, *keys: str) -> tuple[str, ...]:
        """Return the strings in some fields that are lists or null."""
        found: list[str] = []
        for key in keys:
            value = self.data.get(key) or []
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.error(key, value, "expected a list of strings", "correct config.json")
            found += value
        return tuple(found)

    def reject_others(self, *read: str) -> None:
        """Reject fields that are neither read nor without effect on the weights."""
        for key, value in self.data.items():
            if key in (METHOD, *read) or key in MAKING or value is None or value in ({}, [], "", False):
                continue
            raise self.error(key, value, "this field is not supported")


def read_quantisation(config_json: Mapping[str, Any], where: str) -> Quantisation | None:
    """Return how a checkpoint's matrices are stored; None without a `quantization_config`.

    Raises:
        SourceError: an unsupported method, format or field, by name and value.

    """
    data = config_json.get(KEY)
    if data is None:
        return None
    if not isinstance(data, dict):
        raise SourceError(f"{KEY}={shown(data)}: expected an object", where=where, fix="correct config.json")
    reader = Reader(data, where)
    method = data.get(METHOD)
    if not isinstance(method, str) or method not in METHODS:
        fix = f"supported: {', '.join(METHODS)}; or use the unquantised checkpoint"
        raise reader.error(METHOD, method, "this quantisation is not supported", fix)
    return METHODS[method](reader)


def refuse_modelopt(config_json: Mapping[str, Any], document: Mapping[str, Any], where: str) -> None:
    """Raise an error for matrices that ModelOpt quantised, which `config.json` does not say; `where` names its file.

    `document` is that file. One with an algorithm for caches alone is no error: the weights are numbers.

    Raises:
        SourceError: an algorithm for weights, or no section `quantization`.

    """
    if config_json.get(KEY) is not None:
        return
    section = document.get("quantization")
    if not isinstance(section, dict):
        fix = f"correct {MODELOPT_FILE}"
        raise SourceError(f"quantization={shown(section)}: expected an object", where=where, fix=fix)
    if section.get("quant_algo") is not None:
        what = f"quantization.quant_algo={shown(section['quant_algo'])}: quantisation by ModelOpt is not supported"
        fix = f"supported: {', '.join(METHODS)}; or use the unquantised checkpoint"
        raise SourceError(what, where=where, fix=fix)


def without_quantisation(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model with its weights as numbers."""
    return {key: value for key, value in config_json.items() if key != KEY}


def _fp8(reader: Reader) -> Quantisation:
    reader.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn", None))
    reader.choice("scale_fmt", "float", ("float", "ue8m0", None))
    reader.choice("expert_dtype", "fp8", ("fp8", None))
    scheme = reader.choice("activation_scheme", "dynamic", ("dynamic", "static", None))
    read = ("fmt", "scale_fmt", "expert_dtype", "activation_scheme", "weight_block_size", SKIPPED, "ignored_layers")
    reader.reject_others(*read)
    skipped = reader.names(SKIPPED, "ignored_layers")
    return Quantisation("fp8", (Fp8(_block(reader)),), skipped, "activation_scheme" if scheme else None)


def _block(reader: Reader) -> tuple[int, int] | None:
    value = reader.data.get("weight_block_size", [128, 128])
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(is_int(size) and size > 0 for size in value):
        raise reader.error("weight_block_size", value, "expected two positive integers, or null", "correct config.json")
    return value[0], value[1]


def _gptq(reader: Reader) -> Quantisation:
    bits = reader.choice("bits", None, (2, 3, 4, 8))
    version = reader.choice("checkpoint_format", reader.data.get("format", "gptq"), ("gptq", "gptq_v2"))
    reader.choice("pack_dtype", "int32", ("int32", None))
    reader.reject_others("bits", "group_size", "checkpoint_format", "format", "pack_dtype", "version")
    return Quantisation("gptq", (Gptq(bits, version == "gptq"),))


def _awq(reader: Reader) -> Quantisation:
    reader.choice("bits", reader.data.get("w_bit", 4), (4,))
    version = reader.data.get("version", reader.data.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm" or reader.data.get("backend") == "llm-awq":
        key = "version" if "version" in reader.data else "format" if "format" in reader.data else "backend"
        raise reader.error(key, reader.data.get(key), 'this layout is not supported; accepted: "gemm"')
    read = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", SKIPPED)
    reader.reject_others(*read)
    return Quantisation("awq", (Awq(),), reader.names(SKIPPED))


def _mxfp4(reader: Reader) -> Quantisation:
    reader.reject_others(SKIPPED)
    return Quantisation("mxfp4", (Mxfp4(),), reader.names(SKIPPED))


def _compressed(reader: Reader) -> Quantisation:
    reader.choice("quantization_status", "compressed", ("compressed",))
    sparse = reader.data.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        raise reader.error("sparsity_config", sparse, 'not supported; accepted: format "dense"')
    read = ("quantization_status", "sparsity_config", "version", "config_groups", "format", "ignore")
    reader.reject_others(*read)
    schemes, unrounded = read_groups(reader.data, reader.error)
    return Quantisation("compressed-tensors", schemes, reader.names("ignore"), unrounded)


def _bitsandbytes(reader: Reader) -> Quantisation:
    four, eight = reader.flag(BNB_4), reader.flag(BNB_8)
    if four == eight:
        what = f"{BNB_8}={shown(reader.data.get(BNB_8))}: exactly one of the two must be true"
        raise reader.error(BNB_4, reader.data.get(BNB_4), what, "correct config.json")
    for key, value in ((BNB_4, four), (BNB_8, eight)):  # transformers writes each twice, and reads this one
        if reader.data.get(f"_{key}") is not None and reader.flag(f"_{key}") != value:
            raise reader.error(f"_{key}", reader.data[f"_{key}"], f"{key} differs", "remove one of the two")
    reader.choice("bnb_4bit_quant_storage", "uint8", ("uint8", None))
    reader.choice("bnb_4bit_quant_type", "fp4", ("fp4", "nf4"))
    reader.reject_others(BNB_4, BNB_8, f"_{BNB_4}", f"_{BNB_8}", *BNB_READ, *((BNB_16,) if four else ()))
    return Quantisation("bitsandbytes", (Bnb(4 if four else 8),), reader.names(BNB_SKIPPED), BNB_8 if eight else None)


METHODS: Mapping[str, Callable[[Reader], Quantisation]] = {
    "fp8": _fp8, "compressed-tensors": _compressed, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}  # fmt: skip


def is_skipped(name: str, quantisation: Quantisation) -> bool:
    """Return whether a module is one of those that the method leaves out.

    compressed-tensors compares whole names, or regular expressions after `re:`; the others match a name's start at a
    dot, as transformers does, or its end.
    """
    if quantisation.method == "compressed-tensors":
        return any(named(name, pattern) for pattern in quantisation.skipped)
    return any(_starts(name, pattern) or name.endswith(pattern) for pattern in quantisation.skipped if pattern)


def named(name: str, target: str) -> bool:
    """Return whether a target of compressed-tensors is a module's name or matches it."""
    if not target.startswith("re:"):
        return name == target
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error:
        return False


def _starts(name: str, pattern: str) -> bool:
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:
        return name.startswith(f"{pattern}.") or name == pattern
