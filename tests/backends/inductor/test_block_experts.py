"""The kernels of experts, compiled: right in every dtype, for few and many tokens, with experts that no token chose."""

import pytest
import torch

from pipeline.backends.inductor.block_experts import expert_linear, expert_swiglu
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.graphs.packing import BlockPacking
from pipeline.models.int8 import quantise, rounded
from pipeline.models.parallel import PLAIN, Chosen
from support.compiled import run_compiled

pytestmark = pytest.mark.compile

EXPERTS, INNER, HIDDEN = 7, 40, 64
KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.int8),
]


def packed(plain, dtype):
    """The matrices of experts as stored, and what these stand for."""
    name = str(dtype).removeprefix("torch.")
    out = torch.empty(BlockPacking().packed_shape(tuple(plain.shape), "experts", name), dtype=dtype)
    for expert, own in zip(plain, out, strict=True):
        whole, scales = quantise(expert) if dtype == torch.int8 else (expert, None)
        BlockPacking().pack(whole, "linear", own, scales)
    return out, torch.stack([rounded(e) for e in plain]) if dtype == torch.int8 else plain.to(dtype)


class Mixture(torch.nn.Module):
    """The experts of some tokens, and both products of a slice of them."""

    def forward(self, x, chosen, shares, gate, up, down):
        inner = expert_swiglu(x[2:5], chosen[2:5].int(), gate, up)
        whole = BlockedSeams().experts(x[None], Chosen(chosen[None], shares[None]), (gate, up, down))
        return whole, inner, expert_linear(inner[..., :INNER].contiguous(), chosen[2:5].int(), down)


def operands(dtype, stored, tokens=12):
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens)])  # the last expert has no tokens
    shares = torch.rand(tokens, 2)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    pairs = [packed(torch.randn(EXPERTS, *shape) * 0.2, stored) for shape in shapes]
    return (x, chosen, shares, *(one for one, _ in pairs)), [plain for _, plain in pairs]


def test_compiled_experts_equal_those_written_out(tmp_path):
    cases = {kind: operands(*kind) for kind in KINDS}
    found = run_compiled({kind: (Mixture(), given) for kind, (given, _) in cases.items()}, tmp_path)
    for (dtype, _), ((x, chosen, shares, *blocks), plain) in zip(found, cases.values(), strict=True):
        whole, inner, linear = found[dtype, _]
        wide = PLAIN.experts(x.float()[None], Chosen(chosen[None], shares[None]), tuple(p.float() for p in plain))
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(whole.float(), wide, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(inner, expert_swiglu(x[2:5], chosen[2:5].int(), *blocks[:2]))
        torch.testing.assert_close(linear, expert_linear(inner[..., :INNER].contiguous(), chosen[2:5].int(), blocks[2]))


def test_few_and_many_tokens_have_the_same_experts():
    """Plain seams gather the matrices of few tokens, and multiply all tokens by those of all experts otherwise."""
    (x, chosen, shares, *_), plain = operands(torch.float32, torch.float32)
    whole = PLAIN.experts(x[None], Chosen(chosen[None], shares[None]), tuple(plain))
    alone = [PLAIN.experts(x[None, i : i + 1], Chosen(chosen[None, i : i + 1], shares[None, i : i + 1]), tuple(plain))
             for i in range(len(x))]  # fmt: skip
    torch.testing.assert_close(torch.cat(alone, dim=1), whole)
