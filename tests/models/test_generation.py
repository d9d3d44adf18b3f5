"""Settings of generation_config.json: each is applied, named as not applied, or without effect on tokens."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from pipeline.errors import SourceError
from pipeline.models.generation import (
    APPLIED,
    NEUTRAL,
    NEUTRAL_IF_SAMPLED,
    WITHOUT_EFFECT,
    GenerationDefaults,
    generation_defaults,
    token_ids,
)

SAMPLED = ("greedy", "stochastic")
VLLM_ONLY = {"presence_penalty", "frequency_penalty"}


def defaults(**config) -> GenerationDefaults:
    return generation_defaults(config, "m/generation_config.json")


def test_every_setting_of_transformers_is_known():
    """A setting of a newer transformers would otherwise be ignored without a word."""
    known = {*APPLIED, *NEUTRAL, *NEUTRAL_IF_SAMPLED, *WITHOUT_EFFECT}
    assert set(GenerationConfig().to_dict()) - known == set()


def test_neutral_values_are_those_of_transformers():
    """A default that transformers writes into a file must not be named as a setting that is left out."""
    # Older files have every default written out.
    written = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "num_beams": 1,
               "diversity_penalty": 0.0, "length_penalty": 1.0, "bad_words_ids": None, "suppress_tokens": None,
               "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "min_length": 0, "num_return_sequences": 1,
               "remove_invalid_values": False, "output_scores": False, "early_stopping": False}  # fmt: skip
    assert defaults(**written).not_applied(SAMPLED) == ()
    own = (
        {k: v for k, v in GenerationConfig()._get_default_generation_params().items() if v is not None}
        if hasattr(GenerationConfig, "_get_default_generation_params")
        else {}
    )
    assert defaults(**own).not_applied(SAMPLED) == ()


def test_defaults_without_a_file_are_those_of_transformers():
    found = defaults()
    assert found == GenerationDefaults()
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (False, 1.0, 50, 1.0)


def test_settings_of_qwen_are_read_and_named():
    """Qwen2.5's settings were reduced to its end-of-sequence ids."""
    found = defaults(do_sample=True, temperature=0.01, top_k=1, top_p=0.8, repetition_penalty=1.1)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 0.01, 1, 0.8)
    assert found.not_applied(SAMPLED) == ("repetition_penalty=1.1",)
    assert found.not_applied(("greedy",))[0] == "do_sample=true (no stochastic graphs were built)"


def test_settings_of_sampling_are_not_named_for_greedy_calls():
    found = defaults(min_p=0.1, typical_p=0.9, no_repeat_ngram_size=3)
    assert found.not_applied(SAMPLED, sampled=False) == ("no_repeat_ngram_size=3",)
    assert found.not_applied(SAMPLED) == ("no_repeat_ngram_size=3", "min_p=0.1", "typical_p=0.9")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bad_words_ids", [[5]]), ("suppress_tokens", [1, 2]), ("forced_eos_token_id", 2), ("num_beams", 4),
     ("stop_strings", ["END"]), ("max_time", 2.0), ("sequence_bias", [[[5], 1.0]]), ("token_healing", True),
     ("min_new_tokens", 3), ("presence_penalty", 1.5), ("guidance_scale", 1.5), ("penalty_alpha", 0.6)],
)  # fmt: skip
def test_settings_that_change_tokens_are_named(setting, value):
    assert defaults(**{setting: value}).not_applied(SAMPLED)[0].startswith(f"{setting}=")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("do_sample", "true"), ("do_sample", 1), ("temperature", "0.7"), ("temperature", -0.5), ("temperature", True),
     ("temperature", float("nan")), ("temperature", [0.7]), ("top_k", 2.5), ("top_k", "50"), ("top_k", -2),
     ("top_p", 1.5), ("top_p", -0.1), ("max_new_tokens", 0), ("max_new_tokens", "8"), ("max_length", -1),
     ("repetition_penalty", "1.1"), ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("min_p", {}),
     ("no_repeat_ngram_size", "3")],
)  # fmt: skip
def test_malformed_settings_are_refused_by_name(setting, value):
    """They had no effect here, and failed in transformers at the first request."""
    with pytest.raises(SourceError, match=f"^m/generation_config.json: {setting}: found ") as caught:
        defaults(**{setting: value})
    assert caught.value.fix


@pytest.mark.parametrize("setting", [*APPLIED[:-1], *NEUTRAL, *NEUTRAL_IF_SAMPLED])
def test_null_is_the_same_as_no_value(setting):
    assert defaults(**{setting: None}) == defaults()


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"top_k": 0}, (0, 1.0)), ({"top_k": -1}, (0, 1.0)), ({"top_k": 10**12}, (0, 1.0)),
     ({"top_p": 0}, (1, 1.0)), ({"top_p": 1}, (50, 1.0)),
     ({"top_k": None, "top_p": 0.5}, (50, 0.5))],
)  # fmt: skip
def test_values_at_the_edge_keep_their_meaning(config, expected):
    """0 of `top_k` and vLLM's -1 keep all tokens; a nucleus of 0 keeps one, as in transformers."""
    found = defaults(**config)
    assert (found.top_k, found.top_p) == expected


@pytest.mark.parametrize(
    ("config", "limit"),
    [({}, 128), ({"max_new_tokens": 9}, 9), ({"max_length": 30}, 20), ({"max_length": 30, "max_new_tokens": 9}, 9)],
)
def test_limit_of_an_answer(config, limit):
    """As in transformers: `max_length` counts the prompt, and `max_new_tokens` comes before it."""
    assert defaults(**config).new_tokens(10, otherwise=128) == limit


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (2, (2,)), ([], ()), ([7, 2, 7], (7, 2)), (0, (0,)), (-1, (-1,))]
)
def test_end_of_sequence_ids(value, ids):
    assert token_ids(value, "m/config.json") == ids


@pytest.mark.parametrize("value", ["</s>", "2", True, 2.0, ["</s>"], [2, None], [[2]], {}])
def test_end_of_sequence_that_is_no_id_is_refused_by_name(value):
    """A token's text ended in a ValueError of Python's int()."""
    with pytest.raises(SourceError, match=r"^m/config\.json: eos_token_id: found ") as caught:
        token_ids(value, "m/config.json")
    assert "tokenizer.json" in caught.value.fix
