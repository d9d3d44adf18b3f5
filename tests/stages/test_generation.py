"""A target's defaults of generation in the artifact, the warning of the build, and the row of the report."""

from __future__ import annotations

import json

import pytest

from pipeline.cache.local import Cache
from pipeline.progress import no_log
from pipeline.runtime.open import defaults_of
from pipeline.sources.pair import resolve_pair
from pipeline.stages.checks import warn_of_generation
from pipeline.stages.settings import BuildSettings
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import run_gates
from pipeline.validate.prompts import Prompt
from pipeline.validate.report import page, summaries
from pipeline.validate.run import make_report
from support import small_artifacts as small
from support.defaults import recipe_with_defaults, target_with
from support.eager import make_engine
from support.reports import SMALL

QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}


def test_artifact_has_the_file_as_a_whole(tmp_path):
    """It had only the end-of-sequence ids, so servers sampled at temperature 1."""
    generation = QWEN | {"eos_token_id": [2, 7], "chat_format": "chatml"}
    artifact = small.make(tmp_path / "out", tmp_path / "work", generation=generation)
    assert json.loads((artifact.root / "generation_config.json").read_text()) == generation
    found = defaults_of(artifact.root)
    assert (found.temperature, found.top_k, found.top_p) == (0.7, 20, 0.8)
    assert "generation_config.json" in artifact.manifest.files


def test_artifact_of_an_earlier_version_is_greedy(tmp_path):
    """Such an artifact has only ids and a temperature in the file."""
    artifact = small.make(tmp_path / "out", tmp_path / "work", generation={"eos_token_id": [2], "temperature": 0.0})
    assert not defaults_of(artifact.root).do_sample


@pytest.mark.parametrize(
    ("generation", "sampling", "names"),
    [(QWEN, ("greedy", "stochastic"), "repetition_penalty=1.1"),
     (QWEN, ("greedy",), "do_sample=true (no stochastic graphs were built), repetition_penalty=1.1"),
     ({"no_repeat_ngram_size": 3, "temperature": 0.7}, ("greedy",), "no_repeat_ngram_size=3"),
     ({"temperature": 0.7, "max_new_tokens": 7}, ("greedy",), None), (None, ("greedy",), None)],
)  # fmt: skip
def test_build_warns_of_defaults_that_the_artifact_does_not_apply(tmp_path, generation, sampling, names):
    """A repetition penalty was dropped without a word."""
    target_with(tmp_path, generation)
    recipe = recipe_with_defaults(sampling)
    target, _ = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    lines: list[str] = []
    warn_of_generation(BuildSettings(recipe, tmp_path, tmp_path / "out", log=lines.append), target)
    warning = "warning: generation_config.json: not applied: {}; answers differ from those of transformers"
    assert lines == ([] if names is None else [warning.format(names)])


@pytest.mark.usefixtures("one_thread")
def test_gates_use_settings_of_their_own_and_the_report_says_which(tmp_path):
    """Greedy gates of a model that samples by default would compare random tokens."""
    target_with(tmp_path, QWEN | {"max_new_tokens": 1, "eos_token_id": [500]})
    recipe = recipe_with_defaults(shapes=SMALL)
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    prompts = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(("The quick brown fox", "Once upon a time"))]
    inputs = GateInputs(make_engine(recipe, pair), recipe, prompts, pair, Cache(tmp_path / "cache", "goldens"), no_log)
    report = make_report(run_gates(inputs), {})
    assert report.passed
    assert report.tested.settings[0] == "temperature 0, at most 10 new tokens"
    assert report.tested.settings[1].startswith("temperature ")
    assert report.tested.eos_ids == (500, 2)
    assert report.tested.not_applied == ("repetition_penalty=1.1",)
    assert ("generation_config.json, not applied", "repetition_penalty=1.1") in summaries.headlines(report)
    assert "repetition_penalty=1.1" in page.render(report)
