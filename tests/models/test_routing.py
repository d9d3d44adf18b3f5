"""Routers choose the experts that transformers' own routers choose, in bfloat16 as in float32, with the same shares."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from pipeline.models.families import config_of
from pipeline.models.parallel import PLAIN
from pipeline.models.routing import routed
from support.families import SIZES
from support.planted_experts import PAIRS

FAMILIES = ["gpt-oss", "granite-moe", "mixtral", "olmoe", "qwen2-moe", "qwen3-moe"]
TOKENS = 400


def router_of(family: str, dtype: torch.dtype):
    """Return transformers' router of a family with random weights, and the experts of its config as read here."""
    pair = PAIRS[family]
    config = getattr(transformers, f"{pair.model}Config")(**(SIZES | pair.changes))
    model = getattr(transformers, f"{pair.model}ForCausalLM")(config)
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    if not routers:
        pytest.skip("this version of transformers has no module for a router")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in routers[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    read = config_of(json.loads(config.to_json_string()), "config.json")
    return routers[0].to(dtype).eval(), read.expert_layers[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_is_the_choice_of_transformers(family, dtype):
    """Other experts only where their scores are equal, or, of gpt-oss, rounded once less, within the rounding."""
    router, experts = router_of(family, dtype)
    x_TH = torch.randn(TOKENS, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = {f"mlp.gate.{name}": tensor for name, tensor in router.state_dict().items()}
    with torch.no_grad():
        scores_TE, shares_TC, chosen_TC = router(x_TH)
        ours = routed(experts, weights, PLAIN, x_TH[None])
    wide_TE = scores_TE.double()
    best_TC = wide_TE.topk(experts.chosen + 1).values
    rounding_T = torch.finfo(dtype).eps * wide_TE.abs().amax(-1) if experts.bias else torch.zeros(TOKENS)
    is_tie_T = best_TC[:, -2] - best_TC[:, -1] <= rounding_T
    same_T = (ours.experts[0].sort(-1).values == chosen_TC.sort(-1).values).all(-1)
    assert bool((same_T | is_tie_T).all())
    assert float(is_tie_T.double().mean()) < 0.05
    pairs = ((ours.shares[0], ours.experts[0]), (shares_TC, chosen_TC))
    order = [shares_TC.gather(-1, ids_TC.argsort(-1)) for shares_TC, ids_TC in pairs]
    torch.testing.assert_close(order[0][same_T], order[1][same_T].float(), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert ours.shares.dtype == torch.float32
