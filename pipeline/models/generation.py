"""Defaults of generation in `generation_config.json`: the settings that apply, and those that graphs do not support.

The names and their meaning are those of transformers. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import SourceError, no_string

GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"
LARGEST = sys.float_info.max
FIX = f"correct or remove the field in {GENERATION_CONFIG}"

NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": [], "constraints": [],
    "force_words_ids": [], "stop_strings": [], "dola_layers": None, "max_time": None, "watermarking_config": None,
    "token_healing": False,
}  # fmt: skip
"""Settings that change tokens and that graphs do not support, with the value that has no effect, beside null."""

NEUTRAL_IF_SAMPLED: dict[str, Any] = {"min_p": 0, "typical_p": 1, "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""The same for settings that change sampled tokens only."""

SHAPED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p")
"""Those of both that shaped graphs apply."""

APPLIED = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", EOS)

WITHOUT_EFFECT = frozenset({
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp", "prefill_chunk_size",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config", "early_stopping", "length_penalty",
    "diversity_penalty", "remove_invalid_values", "renormalize_logits", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "return_dict_in_generate",
})  # fmt: skip
"""Settings that change no token of a decoder without beams and without transformers' own assistant."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of calls that do not give their own; without a value in the file, the default of transformers.

    `unsupported` has the settings, by name, that change tokens and that graphs do not support.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    unsupported: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, float]:
        """Return the settings that shaped graphs apply, by name."""
        return {name: float(value) for name, value in self.unsupported.items() if name in SHAPED}

    def not_applied(self, sampling: Collection[str], *, sampled: bool = True) -> tuple[str, ...]:
        """Return what an artifact does not apply, as `name=value`.

        `sampling` are its kinds of graphs: stochastic ones sample, shaped ones follow rules. Without `sampled`,
        settings that change sampled tokens only are left out.
        """
        no_string(sampling, "sampling", "kinds of sampling")
        names = [name for name in self.unsupported if not ("shaped" in sampling and name in SHAPED)]
        names = [name for name in names if sampled or name not in NEUTRAL_IF_SAMPLED]
        is_greedy = self.do_sample and "stochastic" not in sampling
        greedy = ["do_sample=true (no stochastic graphs were built)"] if is_greedy else []
        return (*greedy, *(f"{name}={_short(self.unsupported[name])}" for name in names))

    def new_tokens(self, prompt: int, otherwise: int) -> int:
        """Return the limit of an answer to a prompt of this many tokens; `otherwise` if the file sets no limit."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return otherwise if self.max_length is None else self.max_length - prompt


def generation_defaults(config: Mapping[str, Any], where: str) -> GenerationDefaults:
    """Return the settings of a parsed `generation_config.json`.

    Raises:
        SourceError: a value of another type, or out of range; names the field.

    """
    fields, absent = _Fields(config, where), GenerationDefaults()
    top_p = fields.number("top_p", absent.top_p, "from 0 to 1", lambda p: 0 <= p <= 1)
    top_k = fields.integer("top_k", absent.top_k, "-1 or more", -1)
    return GenerationDefaults(
        do_sample=fields.boolean("do_sample"),
        temperature=fields.number("temperature", absent.temperature, "0 or more", lambda t: t >= 0),
        top_k=1 if top_p == 0 else _kept(top_k or 0),  # a nucleus of 0 keeps the likeliest token
        top_p=top_p or absent.top_p,
        max_new_tokens=fields.integer("max_new_tokens", absent.max_new_tokens, "1 or more", 1),
        max_length=fields.integer("max_length", absent.max_length, "1 or more", 1),
        unsupported=dict(_unsupported(fields)),
    )


def not_applied_warning(names: tuple[str, ...], by: str = "transformers") -> str:
    """Return a warning about settings that an artifact does not apply; `by` names the program that does."""
    return f"warning: {GENERATION_CONFIG}: not applied: {', '.join(names)}; answers differ from those of {by}"


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return the ids of an `eos_token_id`: an id, a list of ids, or null.

    Raises:
        SourceError: a token's text, or another type.

    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if strange := [each for each in ids if isinstance(each, bool) or not isinstance(each, int)]:
        what = f"{EOS}: found {_short(strange[0])}, expected a token id, a list of token ids, or null"
        raise SourceError(what, where=where, fix="write the id that the token has in tokenizer.json")
    return tuple(dict.fromkeys(ids))


def generation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation settings in a `config.json`, which apply without a `generation_config.json`."""
    known = {*APPLIED, *NEUTRAL, *NEUTRAL_IF_SAMPLED}
    return {name: value for name, value in config.items() if name in known and value is not None}


@dataclass(frozen=True)
class _Fields:
    """Typed access to a parsed file; null counts as absent, as in transformers."""

    config: Mapping[str, Any]
    where: str

    def boolean(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fault(name, "true or false")
        return bool(value)

    def number(self, name: str, default: float, range_: str, fits: Callable[[float], bool]) -> float:
        value = self.config.get(name)
        if value is None:
            return default
        if not _is_number(value) or not fits(value):
            raise self.fault(name, f"a number {range_}")
        return float(value)

    def integer(self, name: str, default: int | None, range_: str, least: int) -> int | None:
        value = self.config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fault(name, f"an integer, {range_}")
        return value

    def fault(self, name: str, expected: str) -> SourceError:
        what = f"{name}: found {_short(self.config[name])}, expected {expected}"
        return SourceError(what, where=self.where, fix=FIX)


def _kept(top_k: int) -> int:
    """Return `top_k` as graphs take it: 0 keeps all tokens; so do -1, in vLLM, and numbers beyond int32."""
    return top_k if 0 < top_k < 1 << 31 else 0


def _unsupported(fields: _Fields) -> Iterator[tuple[str, Any]]:
    for name, neutral in (NEUTRAL | NEUTRAL_IF_SAMPLED).items():
        value = fields.config.get(name)
        if value is None or value == neutral or (isinstance(neutral, list) and not value):
            continue
        numeric = isinstance(neutral, int) and not isinstance(neutral, bool)
        if numeric and not _is_number(value):
            raise fields.fault(name, "a number")
        if name == "repetition_penalty" and value <= 0:
            raise fields.fault(name, "a number above 0")
        yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
