"""Defaults of requests: vLLM's for the checkpoint, without those that the artifact's graphs do not support."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.models.generation import GENERATION_CONFIG
from pipeline.serve.settings import request_defaults
from support.defaults import recipe_with_defaults, target_with

QWEN = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.8, "repetition_penalty": 1.1}


def test_supported_defaults_stay():
    replaced = request_defaults(
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "max_new_tokens": 7}, {}, sampling=("greedy", "stochastic")
    )
    assert replaced.values == {}
    assert replaced.left_out == ()


def test_unsupported_defaults_are_neutral_and_named():
    """Every request without a repetition penalty of its own would be rejected."""
    replaced = request_defaults(QWEN | {"min_p": 0.1}, {}, sampling=("greedy", "stochastic"))
    assert replaced.values == {"repetition_penalty": 1.0, "min_p": 0.0}
    assert replaced.left_out == ("repetition_penalty=1.1", "min_p=0.1")


def test_requests_are_greedy_without_stochastic_graphs():
    assert request_defaults({}, {}, sampling=("greedy",)).values == {"temperature": 0.0}
    assert request_defaults({}, {}, sampling=("greedy",)).left_out == ()
    replaced = request_defaults(QWEN, {}, sampling=("greedy",))
    assert replaced.values == {"temperature": 0.0, "repetition_penalty": 1.0}
    assert replaced.left_out == ("repetition_penalty=1.1", "temperature=0.01")


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"repetition_penalty": 1.2}, ("greedy", "stochastic")),
        ({"min_p": 0.1}, ("greedy", "stochastic")),
        ({"temperature": 0.7}, ("greedy",)),
    ],
)
def test_unsupported_override_stops_the_server(asked, sampling):
    """The server started, and rejected every request."""
    with pytest.raises(InputError, match=next(iter(asked))) as caught:
        request_defaults({}, asked, sampling)
    assert caught.value.where == "--override-generation-config"


def test_override_comes_before_the_file():
    replaced = request_defaults(
        QWEN, {"repetition_penalty": 1.0, "temperature": 0.9}, sampling=("greedy", "stochastic")
    )
    assert replaced.left_out == ()


def test_shaped_graphs_apply_every_setting_of_the_file():
    replaced = request_defaults(QWEN | {"min_p": 0.1}, {"presence_penalty": 0.5}, ("greedy", "stochastic", "shaped"))
    assert (dict(replaced.values), replaced.left_out) == ({}, ())


# vLLM itself


@pytest.fixture(scope="module", params=[("greedy",), ("greedy", "stochastic")], ids=["greedy", "sampling"])
def sampling(request) -> tuple[str, ...]:
    return request.param


@dataclass(frozen=True)
class Manifest:
    """What the platform asks of a manifest here."""

    sampling: tuple[str, ...]


def folder_of_artifact(work: Path, sampling: tuple[str, ...]) -> Path:
    """The folder that a server of the artifact reads, with the manifest's facts, without graphs and weights."""
    from pipeline.sources.pair import resolve_pair
    from pipeline.sources.tokenizer import tokenizer_files

    target, _ = resolve_pair(recipe_with_defaults(sampling), base=work, cache=work / "sources")
    artifact = work / "artifact"
    (artifact / "tokenizer").mkdir(parents=True, exist_ok=True)
    (artifact / "config.json").write_text(json.dumps(target.config_json))
    (artifact / GENERATION_CONFIG).write_text(json.dumps(target.generation))
    for name, data in tokenizer_files(target).items():
        (artifact / "tokenizer" / name).write_bytes(data)
    (artifact / "tokenizer/config.json").write_text(json.dumps(target.config_json))
    return artifact


CONFIGS = {
    "qwen": QWEN | {"eos_token_id": [7, 9]},
    "llama": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "max_new_tokens": 33},
    "greedy": {"temperature": 0.3, "do_sample": False, "no_repeat_ngram_size": 3, "eos_token_id": None},
    "none": None,
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", CONFIGS)
def test_defaults_of_vllm_for_the_artifact_are_those_for_the_checkpoint(tmp_path, name, sampling):
    """Requests without a temperature were sampled at 1.0 in place of the checkpoint's 0.01."""
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

    from pipeline.serve.platform import _set_request_defaults

    checkpoint = target_with(tmp_path, CONFIGS[name])
    artifact = folder_of_artifact(tmp_path, sampling)
    ours = ModelConfig(model=str(artifact), tokenizer=str(artifact / "tokenizer"), dtype="float32")
    theirs = ModelConfig(model=str(checkpoint), tokenizer=str(checkpoint), dtype="float32")
    expected = theirs.get_diff_sampling_param()
    assert ours.get_diff_sampling_param() == expected

    stochastic = "stochastic" in sampling
    _set_request_defaults(ours, Manifest(sampling))
    served = ours.get_diff_sampling_param()
    replaced = {"repetition_penalty", *(() if stochastic else ("temperature",))}
    assert {k: v for k, v in served.items() if k not in replaced} == {
        k: v for k, v in expected.items() if k not in replaced
    }
    params = SamplingParams.from_optional(**served)
    assert (params.repetition_penalty, params.min_p) == (1.0, 0.0)
    assert stochastic or params.temperature == 0


@pytest.mark.vllm
@pytest.mark.parametrize("name", CONFIGS)
def test_requests_end_at_the_same_tokens_as_with_the_checkpoint(tmp_path, name):
    """With the tokenizer's own token, which vLLM adds, and `run` did not know."""
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import get_tokenizer

    from pipeline.sources.pair import resolve

    checkpoint = target_with(tmp_path, CONFIGS[name])
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_start|>"}))
    artifact = folder_of_artifact(tmp_path, ("greedy",))

    def ends(model: Path, tokenizer: Path) -> set[int]:
        params = SamplingParams()
        config = ModelConfig(model=str(model), tokenizer=str(tokenizer), dtype="float32")
        params.update_from_generation_config(
            config.try_get_generation_config(), get_tokenizer(str(tokenizer)).eos_token_id
        )
        return params.all_stop_token_ids

    of_run = set(resolve("target", base=tmp_path, cache=tmp_path / "sources").config.eos_ids)
    assert ends(artifact, artifact / "tokenizer") == ends(checkpoint, checkpoint) == of_run
    assert of_run == {"qwen": {7, 9, 1}, "none": {2, 1}}.get(name, {1})
