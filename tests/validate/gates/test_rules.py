"""The gate of verify graphs passes right graphs, and sees every fault of how rules are followed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.cache.local import Cache
from pipeline.progress import no_log
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.speculation import model, phases
from pipeline.speculation.shaping import log_probs, shape
from pipeline.validate.gates.driving import fill
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.rules import draw_by_rules
from support.eager import make_engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_of(tmp_path_factory.mktemp("rules"), "float32", (4,))


HEAD = {"source": "pico://llama?draft_vocab=128&eagle3=1"}
COPIED = {"derive": {"from": "target", "layers": [0]}}


def inputs_of(work, dtype, batch, draft=COPIED):
    method = "eagle3" if draft == HEAD else "draft_model"
    recipe = Recipe.model_validate(
        {
            "name": "rules",
            "target": {"source": "pico://llama", "dtype": dtype},
            "draft": draft,
            "speculation": {"method": method, "draft_tokens": (3,), "sampling": ("greedy", "stochastic", "shaped")},
            "shapes": {"batch": batch, "prefill": (16,), "kv": (48,)},
        }
    )
    pair = resolve_pair(recipe, base=work, cache=work / "sources")
    return GateInputs(make_engine(recipe, pair), recipe, [], pair, Cache(work / "cache", "goldens"), no_log)


def faults(inputs) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    probes = torch.randint(3, 200, (4, inputs.engine.length), generator=generator).tolist()
    fill(inputs.engine, 48, probes)
    tie = 1e-5 if inputs.recipe.target.dtype == "float32" else 1e-3
    drawn = list(draw_by_rules(inputs, probes, tie))
    batches = inputs.recipe.shapes.batch
    assert {of.graph for of in drawn} == {f"verify-b{b}-t4-s48-k3-shaped" for b in batches} | {
        f"propose-b{b}-t1-s48-k3-stochastic" for b in batches
    }
    return [fault for of in drawn for fault in of.faults]


def changed(**fields):
    """A fault in how one of the rules is followed: a function of its tensor in its place."""

    def planted(logits, shaping, drafts, temperature, share):
        wrong = {name: of(getattr(shaping, name)) for name, of in fields.items()}
        return shape(logits, replace(shaping, **wrong), drafts, temperature, share)

    return planted


def occurrences(drafts, logits):
    return (drafts[..., None] == torch.arange(logits.shape[-1])).sum(1).int()


FAULTS = {
    "frequency penalty is not counted": changed(frequency_B=torch.zeros_like),
    "presence penalty is doubled": changed(presence_B=lambda of: of * 2),
    "repetition penalty is inverted": changed(repetition_B=lambda of: 1 / of),
    "the prompt is not in the repetition penalty": changed(prompted_BV=torch.zeros_like),
    "the answer is not in the penalties": changed(counts_BV=torch.zeros_like),
    "counts of another row": changed(counts_BV=lambda of: of.roll(1, 0)),
    "bias has another sign": changed(bias_BV=lambda of: -of),
    "bias of the token before": changed(bias_BV=lambda of: of.roll(1, 1)),
    "bias of another row": changed(bias_BV=lambda of: of.roll(1, 0) if len(of) > 1 else of * 0),
    "every token is allowed": changed(allowed_BTW=lambda of: of * 0 - 1),
    "tokens of the position before are allowed": changed(allowed_BTW=lambda of: of.roll(1, 1)),
    "bits are read from the other end": changed(allowed_BTW=lambda of: of.flip(2)),
    "min_p is not applied": changed(min_p_B=torch.zeros_like),
    "min_p keeps fewer tokens": changed(min_p_B=lambda of: of.sqrt()),
    "drafts do not count": lambda logits, shaping, drafts, temperature, share: shape(
        logits, shaping, drafts * 0 - 1, temperature),
    "a position sees the drafts after it": lambda logits, shaping, drafts, temperature, share: shape(
        logits, replace(shaping, counts_BV=shaping.counts_BV + occurrences(drafts, logits)), drafts * 0 - 1,
        temperature),
    "min_p ignores the temperature": lambda logits, shaping, drafts, temperature, share: shape(
        logits, shaping, drafts, torch.where(temperature > 0, 1.0, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("draft", [COPIED, HEAD], ids=["model", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_graphs_pass(tmp_path, dtype, draft):
    assert faults(inputs_of(tmp_path, dtype, (1, 4), draft)) == []


PROPOSED = {
    "other tokens": lambda drafts: (drafts + 1) % 128,
    "a later token is another": lambda drafts: torch.cat((drafts[:, :2], (drafts[:, 2:] + 1) % 128), 1),
    "proposals of another row": lambda drafts: drafts.roll(1, 0),
    "none": lambda drafts: drafts * 0 - 1,
}


@pytest.mark.parametrize("fault", PROPOSED)
def test_wrong_proposals_are_found(inputs, monkeypatch, fault):
    """No gate ran these graphs: requests with rules were slow, and answers right."""
    propose = phases.propose
    monkeypatch.setattr(phases, "propose", lambda *given: PROPOSED[fault](propose(*given)))
    assert any("which the draft does not choose" in found for found in faults(inputs))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(inputs, monkeypatch, fault):
    monkeypatch.setattr(model, "shape", FAULTS[fault])
    assert faults(inputs)


@pytest.mark.parametrize("place", range(3), ids=["chosen", "top", "ids"])
def test_wrong_log_probabilities_are_found(inputs, monkeypatch, place):
    def planted(logits, chosen, count, share):
        found = log_probs(logits, chosen, count, share)
        wrong = {
            0: found._replace(chosen_BT=found.chosen_BT - 0.2),
            1: found._replace(top_BTN=found.top_BTN.roll(1, -1)),
            2: found._replace(top_ids_BTN=found.top_ids_BTN.roll(1, -1)),
        }
        return wrong[place]

    monkeypatch.setattr(model, "log_probs", planted)
    assert any("log probability" in fault for fault in faults(inputs))
