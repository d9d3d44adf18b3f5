"""Experts of many tokens, as graphs of chips and GPUs write them out: one product of all, no output of each expert."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.config import Clamp
from pipeline.models.parallel import PLAIN, SWIGLU, Chosen, Gating

EXPERTS, INNER, HIDDEN, TOKENS = 7, 24, 96, 200
BIASES = tuple(torch.randn(EXPERTS, INNER, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
GATINGS = {"plain": SWIGLU, "bounded": Gating((BIASES[0], BIASES[1]), Clamp(0.8, 1.7))}


class Largest(TorchDispatchMode):
    """Most values of a tensor that an operator returns; a view has those of its storage."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max(self.values, out.untyped_storage().nbytes() // out.element_size())
        return out


def operands():
    """Return hidden states, experts with shares, and the matrices of gate, up and down."""
    generator = torch.Generator().manual_seed(0)
    x_BTH = torch.randn(2, TOKENS // 2, HIDDEN, generator=generator)
    chosen = torch.rand(2, TOKENS // 2, EXPERTS - 1, generator=generator).topk(2).indices  # none of the last expert
    shares = torch.rand(2, TOKENS // 2, 2, generator=generator)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return x_BTH, Chosen(chosen, shares), tuple(torch.randn(EXPERTS, *s, generator=generator) * 0.2 for s in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", GATINGS)
def test_many_tokens_hold_no_output_of_each_expert(kind, dtype):
    """8192 tokens of Qwen3-30B-A3B held 128 outputs each, 16 GiB on each of 8 ranks; the values are those of few."""
    x, chosen, matrices = operands()
    few = torch.stack([
        torch.cat([
            PLAIN.experts(
                x[b : b + 1, t : t + 1], Chosen(*(c[b : b + 1, t : t + 1] for c in (chosen.experts, chosen.shares))),
                matrices, GATINGS[kind],
            )[0]
            for t in range(TOKENS // 2)
        ])
        for b in range(2)
    ])  # fmt: skip
    gating = GATINGS[kind]
    if gating.biases is not None:
        gating = replace(gating, biases=(gating.biases[0].to(dtype), gating.biases[1].to(dtype)))
    narrow = tuple(matrix.to(dtype) for matrix in matrices)
    with Largest() as largest:
        many = PLAIN.experts(x.to(dtype), chosen, narrow, gating)
    assert largest.values <= EXPERTS * TOKENS * INNER
    assert many.dtype == dtype
    error = float((many.float() - few).abs().max())
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] * float(few.abs().max()), error
