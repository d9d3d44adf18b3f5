"""The doctor of drafts: a head that is read right agrees; planted misreadings are found, with the recipe's line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import host
from pipeline.cache.local import Cache
from pipeline.errors import SourceError
from pipeline.models.parallel import PLAIN
from pipeline.models.weights import weight_specs
from pipeline.progress import no_log, no_progress
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation.model import Model, Prompt
from pipeline.stages import draft_check
from pipeline.stages.settings import BuildSettings
from pipeline.validate.draft import short
from pipeline.validate.draft.agreement import Agreement
from pipeline.validate.draft.examine import SHORT, Effort, examine, usable_dtype
from pipeline.validate.draft.readings import Reading
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.draft.target import answer
from pipeline.validate.prompts import recipe_prompts
from pipeline.validate.run import draft_report
from support.heads import FLAT, Parts, write_head
from support.trained_head import Trained, prompts, train

pytestmark = [pytest.mark.usefixtures("one_thread")]

TAPPED = "eagle_aux_hidden_state_layer_ids"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EFFORT = Effort(prompts=16, new_tokens=24, places=3)
UNUSED: Any = SimpleNamespace()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A head whose residual stream starts from the normalised features."""
    return train(tmp_path_factory.mktemp("normed"), norm_before_residual=True)


def recipe_of(target: Path, draft: Path, gates: dict[str, Any] | None = None, **readings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "examined",
            "target": {"source": str(target)},
            "draft": {"source": str(draft), **readings},
            "speculation": {"method": "eagle3", "draft_tokens": (2, 3), "step_costs": (1.1, 1.2)},
            "shapes": {"batch": (1,), "prefill": (16,), "kv": (64,)},
            "validate": {"prompts": "prompts.jsonl", "max_new_tokens": 6, "gates": gates or {}},
        }
    )


def report_of(recipe: Recipe, tmp_path: Path, effort: Effort = EFFORT) -> DraftReport:
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")
    return examine(recipe, pair, prompts(effort.prompts), "float32", effort)


def changed(head: Path, out: Path, **changes: Any) -> Path:
    """A copy of a head with other fields of its config; None removes a field."""
    shutil.copytree(head, out)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out


def test_a_head_that_is_read_right_agrees(trained, tmp_path):
    report = report_of(recipe_of(trained.target, trained.head), tmp_path)
    assert report.verdict == "agrees", report.line
    assert report.setting is None
    assert report.current.by_place[0] > 0.6
    assert [each.draft_tokens for each in report.expected] == [2, 3]
    assert report.expected[0].speed_up == pytest.approx(report.expected[0].tokens_per_step / 1.1)
    assert 0.9 < report.vocabulary.answers <= 1
    assert DraftReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(("ids", "setting"), [([3, 4, 5], "taps: [2, 3, 4]"), ([1, 2, 3], "taps: outputs")])
def test_taps_one_layer_off_are_found(trained, tmp_path, ids, setting):
    head = changed(trained.head, tmp_path / "head", eagle_config=None, **{TAPPED: ids})
    report = report_of(recipe_of(trained.target, head), tmp_path)
    assert report.verdict == "another reading", report.line
    assert report.setting == setting
    assert report_of(recipe_of(trained.target, head, taps=[2, 3, 4]), tmp_path).verdict == "agrees"


def test_a_switch_that_the_file_leaves_out_is_found(normed, tmp_path):
    assert report_of(recipe_of(normed.target, normed.head), tmp_path).verdict == "agrees"
    head = changed(normed.head, tmp_path / "head", norm_before_residual=None)
    report = report_of(recipe_of(normed.target, head), tmp_path)
    assert report.verdict == "another reading", report.line
    assert report.setting == "norm_before_residual: true"


def test_a_switch_that_the_file_has_in_error_is_found(trained, tmp_path):
    head = changed(trained.head, tmp_path / "head", norm_output=True)
    report = report_of(recipe_of(trained.target, head), tmp_path)
    assert report.verdict == "another reading", report.line
    assert report.setting == "norm_output: false"


def test_two_faults_at_once_are_found(normed, tmp_path):
    head = changed(normed.head, tmp_path / "head", norm_before_residual=None, eagle_config=None, **{TAPPED: [3, 4, 5]})
    report = report_of(recipe_of(normed.target, head), tmp_path)
    assert "norm_before_residual: true" in report.setting
    assert "taps: [2, 3, 4]" in report.setting


def test_d2t_that_differs_from_t2d_is_found(trained, tmp_path):
    head = changed(trained.head, tmp_path / "head")
    tensors = load_file(head / "model.safetensors")
    marked = torch.zeros(512, dtype=torch.bool)
    marked[torch.arange(256) + tensors["d2t"]] = True
    save_file(tensors | {"d2t": tensors["d2t"] * 0, "t2d": marked}, head / "model.safetensors")
    assert report_of(recipe_of(trained.target, head), tmp_path).setting == "vocabulary: t2d"


def test_a_head_of_another_target_agrees_by_chance(trained, tmp_path):
    head = write_head(tmp_path / "random", FLAT | {TAPPED: [2, 3, 4]}, Parts())
    report = report_of(recipe_of(trained.target, head), tmp_path)
    assert report.verdict == "chance", report.line


def test_a_stated_rate_twice_the_measured_one_is_named(trained, tmp_path):
    measured = report_of(recipe_of(trained.target, trained.head), tmp_path).current.by_place[0]
    gates = {"acceptance": (min(2.1 * measured, 1.0),)}
    report = report_of(recipe_of(trained.target, trained.head, gates), tmp_path)
    assert report.verdict == ("below the stated rates" if 2.1 * measured <= 1 else "agrees")


def test_a_draft_model_is_measured_without_other_readings(trained, tmp_path):
    data = recipe_of(trained.target, trained.head).model_dump(mode="json", by_alias=True, exclude_none=True)
    data["draft"] = {"derive": {"from": "target", "layers": list(range(6))}}
    data["speculation"] = {"draft_tokens": [2]}
    report = report_of(Recipe.model_validate_json(json.dumps(data)), tmp_path)
    assert report.current.by_place == (1.0, 1.0, 1.0), "a draft of all layers is the target"
    assert report.others == ()


def build_check(recipe: Recipe, tmp_path: Path, **changes: Any) -> list[str]:
    """Run the check of a build; return what it logs."""
    (tmp_path / "prompts.jsonl").write_text('{"class": "chat", "prompt": "The quick brown fox jumps"}\n' * 1)
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")
    lines: list[str] = []
    settings = BuildSettings(recipe, tmp_path, tmp_path / "out", cache=tmp_path / "cache", log=lines.append, **changes)
    draft_check.check_draft(settings, SimpleNamespace(pair=pair, tokenizer=tokenizer_files(pair[0])))
    return lines


def test_a_build_refuses_a_head_that_another_reading_explains(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(draft_check, "encoded_prompts", lambda *_: prompts(16))
    head = changed(trained.head, tmp_path / "head", eagle_config=None, **{TAPPED: [1, 2, 3]})
    with pytest.raises(SourceError) as caught:
        build_check(recipe_of(trained.target, head), tmp_path)
    assert caught.value.fix == "write in the recipe: draft: {taps: outputs}"
    assert "agrees" in build_check(recipe_of(trained.target, head, taps="outputs"), tmp_path)[-1]


@pytest.mark.parametrize(("floor", "refused"), [(1.3, True), (1.0, False)])
def test_a_build_with_a_floor_refuses_a_head_by_chance(trained, tmp_path, floor, refused):
    head = write_head(tmp_path / "random", FLAT | {TAPPED: [2, 3, 4]}, Parts())
    recipe = recipe_of(trained.target, head, {"tokens_per_step": floor})
    if refused:
        with pytest.raises(SourceError, match="by chance"):
            build_check(recipe, tmp_path)
    else:
        assert "by chance" in build_check(recipe, tmp_path)[-1]


def test_the_gates_of_an_artifact_read_what_its_build_measured(trained, tmp_path, monkeypatch):
    """And measure it themselves for an artifact that was built without gates."""
    head = write_head(tmp_path / "random", FLAT | {TAPPED: [2, 3, 4]}, Parts())
    recipe = recipe_of(trained.target, head, {"tokens_per_step": 1.0})
    (line,) = build_check(recipe, tmp_path)[-1:]
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "cache")

    def read(cache: Path) -> DraftReport | None:
        of = recipe_prompts(recipe, tmp_path)
        return draft_report(recipe, pair, of, Cache(cache, "goldens"), no_log, no_progress)

    measured = read(tmp_path / "another cache")
    monkeypatch.setattr(short, "examine", lambda *_: pytest.fail("measured again"))
    assert read(tmp_path / "cache") == measured
    assert measured is not None
    assert measured.line in line


def test_a_build_without_gates_measures_nothing(trained, tmp_path):
    assert build_check(recipe_of(trained.target, trained.head), tmp_path, validate=False) == []


def test_usable_dtype_is_the_widest_that_half_of_the_memory_holds(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "processor_flags", lambda *_: frozenset({"avx2"}))
    target, _ = resolve_pair(recipe_of(trained.target, trained.head), base=tmp_path, cache=tmp_path / "cache")
    assert usable_dtype(target, "bfloat16", 1 << 30) == "float32"
    assert usable_dtype(target, "bfloat16", 1 << 21) == "bfloat16"
    assert usable_dtype(target, "bfloat16", 1 << 16) is None
    monkeypatch.setattr(host, "processor_flags", lambda *_: frozenset({"avx512_bf16"}))
    assert usable_dtype(target, "bfloat16", 1 << 30) == "bfloat16"
    assert usable_dtype(target, "float16", 1 << 30) == "float32"


def test_states_of_answers_are_those_of_one_pass_over_the_whole_text(trained, tmp_path):
    """They are kept while the answers are decoded, one token at a time."""
    target, _ = resolve_pair(recipe_of(trained.target, trained.head), base=tmp_path, cache=tmp_path / "cache")
    cases = [tokens[: 9 + 2 * row] for row, tokens in enumerate(prompts(3))]
    (found,) = answer(target, cases, 7, (2, 5), "float32")
    loaded = {spec.name: read_tensor(weights(target)[spec.name]).float() for spec in weight_specs(target.config)}
    for row, prompt in enumerate(cases):
        length = int(found.learn_BT[row].nonzero().max()) + 1
        tokens = found.tokens_BT1[row : row + 1, :length]
        shape = (1, target.config.kv_heads, length + 1, target.config.head_dim)
        state = {f"{part}.{layer}": torch.zeros(shape) for layer in range(target.config.layers) for part in "kv"}
        text = Prompt(tokens, torch.arange(length)[None], torch.tensor([length]), torch.tensor([0]))
        hidden = Model(target.config, loaded, state, PLAIN, taps=(2, 5)).read(text)
        assert found.tokens_BT1[row, : len(prompt)].tolist() == prompt
        assert int(found.learn_BT[row].nonzero().min()) == len(prompt) - 1
        torch.testing.assert_close(found.batch((2, 5)).taps_BTX[row, :length], hidden.taps_BTX[0], **CLOSE)
        torch.testing.assert_close(found.last_BTH[row, :length], hidden.last_BTH[0], **CLOSE)


def test_the_short_form_measures_a_worse_reading_at_the_first_place_alone(trained, tmp_path):
    recipe = recipe_of(trained.target, trained.head)
    whole, short = (report_of(recipe, tmp_path, replace(EFFORT, screens=screens)) for screens in (False, True))
    places, now = {each.reading: each.by_place for each in whole.others}, whole.current.by_place[0]
    assert {len(each.by_place) for each in short.others} == {1, EFFORT.places}, "none is screened, or all are"
    for each in short.others:
        measured, whole_places = len(each.by_place), places[each.reading]
        assert each.by_place == whole_places[:measured]
        assert measured == EFFORT.places or whole_places[0] < now, each.reading
        assert measured == 1 or whole_places[0] >= 0.97 * now, each.reading


def test_agreement_counts_places_only_after_right_ones():
    right = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    reached = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]], dtype=torch.bool)
    found = Agreement(reached, right, torch.tensor([1, 1, 2, 3]), torch.tensor([1, 1, 1, 1]))
    assert found.by_place == (0.5, 0.5)
    assert found.tokens_per_step(3) == 1 + 0.5 + 0.25 + 0.125
    assert found.chance == pytest.approx(0.5)


def test_the_short_form_is_short():
    assert SHORT.prompts * SHORT.new_tokens <= 512


def test_a_small_certain_gain_counts_for_usual_readings_in_the_long_form_only():
    gain = torch.ones(2000, dtype=torch.long)
    base = Agreement(*lengths(gain), gain, gain)
    gain = gain.clone()
    gain[:60] = 2
    more = Agreement(*lengths(gain), gain, gain)
    usual, alone = Reading(UNUSED), Reading(UNUSED, is_usual=False)
    assert Effort().prefers(usual, more, base)
    assert not Effort().prefers(alone, more, base)
    assert not SHORT.prefers(usual, more, base)


def lengths(right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reached and right places of chains with these numbers of right drafts, of three."""
    places = torch.arange(3)
    return places <= right[:, None], places < right[:, None]
