"""References along given experts: those of transformers' whole model with the same choices, cached by their content."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional

from pipeline.cache.local import Cache
from pipeline.progress import no_log
from pipeline.sources.pair import resolve
from pipeline.validate.reference.goldens import Goldens
from pipeline.validate.reference.layers import WITH_GROUPED, Reference
from pipeline.validate.reference.routes import Router, log_shares
from support.families import write_pair
from support.planted_experts import PAIRS

SEQUENCE = [5, 60, 7, 8, 300, 41, 7, 7, 19]


MODERN = int(transformers.__version__.split(".")[0]) >= WITH_GROUPED


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    root = tmp_path_factory.mktemp("routes")
    write_pair(PAIRS["mixtral"], root)
    return resolve("./target", base=root, cache=root / "cache")


def others(experts_TLC: torch.Tensor) -> torch.Tensor:
    """Other experts at two tokens."""
    given = experts_TLC.clone()
    given[2, 1], given[6, 0] = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert not torch.equal(given, experts_TLC)
    return given


def test_a_reference_follows_its_own_experts_and_has_them(target):
    reference = Reference(target, target, "bfloat16")
    (free,) = reference.goldens([SEQUENCE])
    assert free.routes is not None
    assert free.routes.experts.shape == (len(SEQUENCE), 3, 2)
    assert bool((free.routes.gaps < 0).all())
    assert bool((free.routes.noise > 0).all())
    (along,) = reference.goldens([SEQUENCE], [free.routes.experts])
    if MODERN:
        assert torch.equal(along.baseline.values, free.baseline.values)
        assert torch.equal(along.noise.values, free.noise.values)
    else:  # experts are many small products there, whose sums depend on their place in memory
        torch.testing.assert_close(along.baseline.values, free.baseline.values, rtol=0, atol=1e-5)


def test_given_experts_are_those_of_the_whole_model(target):
    reference = Reference(target, target, "float32")
    (free,) = reference.goldens([SEQUENCE])
    assert free.routes is not None
    given = others(free.routes.experts)
    (along,) = reference.goldens([SEQUENCE], [given])
    assert along.routes is not None
    assert torch.equal(along.routes.experts, given)
    assert float(along.routes.gaps[6, 0]) > 0
    options = {"experts_implementation": "eager"} if MODERN else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(target.root, dtype=torch.float64, **options)
    for layer, block in enumerate(model.model.layers):
        chosen = given[:, layer].long()
        if MODERN:
            block.mlp.gate.forward = gate(block.mlp.gate, chosen)
        else:  # which chooses experts outside the gate: scores of the others are too low
            low_TE = torch.full((len(SEQUENCE), 4), -1e4, dtype=torch.float64).scatter(-1, chosen, 0.0)
            block.block_sparse_moe.gate.register_forward_hook(lambda _, __, scores_TE, low=low_TE: scores_TE + low)
    with torch.no_grad():
        wanted = model(torch.tensor([SEQUENCE])).logits[0]
    torch.testing.assert_close(
        along.baseline.values, wanted.gather(-1, along.ids.long()), rtol=0, atol=1e-9 if MODERN else 1e-5
    )
    assert float((along.baseline.projected - free.baseline.projected).abs().max()) > 1e-3


def gate(module, experts_TC: torch.Tensor):
    """A router of Mixtral with other experts."""

    def forward(hidden_states):
        logits = functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), module.weight)
        shares = torch.softmax(logits.float(), dim=-1).gather(-1, experts_TC)
        return logits, shares / shares.sum(-1, keepdim=True), experts_TC

    return forward


def test_goldens_along_experts_are_cached_by_them(target, tmp_path):
    said: list[str] = []
    source = Goldens(target, target, "float32", Cache(tmp_path, "goldens"), said.append)
    (free,) = source.of([SEQUENCE])
    assert free.routes is not None
    given = others(free.routes.experts)
    first = source.of([SEQUENCE], [given])[0]
    again = Goldens(target, target, "float32", Cache(tmp_path, "goldens"), no_log)
    cached = again.of([SEQUENCE, SEQUENCE], [given, None])
    assert (again.computed, again.cached) == (0, 2)
    assert torch.equal(cached[0].baseline.values, first.baseline.values)
    assert torch.equal(cached[1].baseline.values, free.baseline.values)
    assert cached[0].routes is not None
    assert torch.equal(cached[0].routes.flips_of_noise, first.routes.flips_of_noise)
    assert said[1] == "  reference of the target along the artifact's experts: 1 sequences, layer by layer"


def test_router_counts_what_noise_would_choose():
    """Noise flips the first token, and is along the baseline's experts all the same."""
    scores = torch.tensor([[1.0, 0.99, 0.0], [3.0, 1.0, 0.0]])
    noisy = torch.tensor([[0.99, 1.0, 0.0], [3.0, 1.1, 0.0]])
    with (router := Router()):
        assert torch.topk(scores, 1, dim=-1)[1].tolist() == [[0], [0]]
        values, chosen = torch.topk(noisy, 1, dim=-1)
    assert chosen.tolist() == [[0], [0]]
    assert values.tolist() == [[pytest.approx(0.99)], [3.0]]
    routes = router.routes()
    assert routes is not None
    assert routes.flips_of_noise.tolist() == [[True], [False]]
    assert routes.gaps[0, 0] == pytest.approx(-0.01, abs=1e-6)


def test_log_shares_of_shares_and_of_logits_differ_alike():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.4, 0.3]])
    torch.testing.assert_close(log_shares(logits), log_shares(torch.softmax(logits, dim=-1)), rtol=1e-6, atol=1e-6)
