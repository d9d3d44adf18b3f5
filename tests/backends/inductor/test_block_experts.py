"""The kernels of experts, compiled: right in every dtype, for few and many tokens, with experts that no token chose."""

from dataclasses import dataclass

import pytest
import torch

from pipeline.backends.inductor.block_experts import expert_gated, expert_linear
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.graphs.packing import BlockPacking
from pipeline.models import int4, int8
from pipeline.models.config import Activation, Clamp
from pipeline.models.parallel import PLAIN, SWIGLU, Chosen, Gating
from support.compiled import run_compiled

pytestmark = pytest.mark.compile

EXPERTS, INNER, HIDDEN = 7, 40, 64


@dataclass(frozen=True)
class Kind:
    """Dtypes of values and of stored matrices, whether there are biases of gate and up, and the activation."""

    dtype: torch.dtype
    stored: torch.dtype
    clamp: Clamp | None = None
    biased: bool = False
    activation: Activation = "silu"


BOUNDS = Clamp(0.8, 1.7)
"""Bounds of SwiGLU that many gates and values pass."""
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.uint8),  # 4 bits
    (torch.float32, torch.uint8),
)
KINDS = [
    *(Kind(*dtypes) for dtypes in DTYPES),
    *(Kind(*dtypes, BOUNDS, biased=True) for dtypes in (DTYPES[0], *DTYPES[3:5])),
    *(Kind(*dtypes, activation="gelu_tanh") for dtypes in (DTYPES[0], *DTYPES[3:5])),
]


def packed(plain, dtype):
    """The matrices of experts as stored, and what these stand for."""
    narrow = {torch.int8: int8, torch.uint8: int4}.get(dtype)
    name = str(dtype).removeprefix("torch.")
    out = torch.empty(BlockPacking().packed_shape(tuple(plain.shape), "experts", name), dtype=dtype)
    for expert, own in zip(plain, out, strict=True):
        whole, scales = narrow.quantise(expert) if narrow else (expert, None)
        BlockPacking().pack(whole, "linear", own, scales)
    return out, torch.stack([narrow.rounded(e) for e in plain]) if narrow else plain.to(dtype)


class Mixture(torch.nn.Module):
    """The experts of some tokens, and both products of a slice of them."""

    def __init__(self, clamp=None, inner=INNER, activation="silu"):
        super().__init__()
        self.clamp, self.inner, self.activation = clamp, inner, activation

    def forward(self, x, chosen, shares, gate, up, down, *biases):
        bounds = [] if self.clamp is None else [self.clamp.limit, self.clamp.alpha]
        is_gelu = self.activation != "silu"
        inner = expert_gated(x[2:5], chosen[2:5].int(), gate, up, biases, bounds, is_gelu)
        gating = Gating(biases or None, self.clamp, self.activation)
        of_tokens = Chosen(chosen[None], shares[None], elsewhere=True)
        whole = BlockedSeams().experts(x[None], of_tokens, (gate, up, down), gating)
        return whole, inner, expert_linear(inner[..., : self.inner].contiguous(), chosen[2:5].int(), down)


def inner_of(stored):
    """Inner values of an expert: whole groups of 4-bit weights, else a part of the last block."""
    return 64 if stored == torch.uint8 else INNER


def operands(dtype, stored, tokens=12):
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens)])  # the last expert has no tokens
    shares = torch.rand(tokens, 2)
    chosen[4, 1] = chosen[7, 0] = chosen[9] = -1  # experts of another rank
    shares[chosen < 0] = 0
    inner = inner_of(stored)
    shapes = ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner))
    pairs = [packed(torch.randn(EXPERTS, *shape) * 0.2, stored) for shape in shapes]
    return (x, chosen, shares, *(one for one, _ in pairs)), [plain for _, plain in pairs]


def biases_of(dtype, inner=INNER):
    """Biases of gate and up, fewer than the outputs of whole blocks."""
    return tuple(torch.randn(EXPERTS, inner, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))


@pytest.mark.slow
def test_compiled_experts_equal_those_written_out(tmp_path):
    """With biases and bounds too, as gpt-oss has them."""
    cases = {kind: operands(kind.dtype, kind.stored) for kind in KINDS}
    biases = {kind: biases_of(kind.dtype, inner_of(kind.stored)) if kind.biased else () for kind in KINDS}
    modules = {
        kind: (Mixture(kind.clamp, inner_of(kind.stored), kind.activation), (*given, *biases[kind]))
        for kind, (given, _) in cases.items()
    }
    found = run_compiled(modules, tmp_path)
    for kind, ((x, chosen, shares, *blocks), plain) in cases.items():
        whole, inner, linear = found[kind]
        gating = Gating(tuple(bias.float() for bias in biases[kind]) or None, kind.clamp, kind.activation)
        matrices = tuple(p.float() for p in plain)
        wide = PLAIN.experts(x.float()[None], Chosen(chosen[None], shares[None], elsewhere=True), matrices, gating)
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[kind.dtype]
        torch.testing.assert_close(whole.float(), wide, atol=tolerance, rtol=tolerance)
        bounds = [] if kind.clamp is None else [BOUNDS.limit, BOUNDS.alpha]
        how = (list(biases[kind]), bounds, kind.activation != "silu")
        torch.testing.assert_close(inner, expert_gated(x[2:5], chosen[2:5].int(), *blocks[:2], *how))
        torch.testing.assert_close(
            linear, expert_linear(inner[..., : inner_of(kind.stored)].contiguous(), chosen[2:5].int(), blocks[2])
        )


def test_experts_of_tokens_that_are_not_live_are_not_read():
    (x, chosen, shares, *blocks), _ = operands(torch.float32, torch.float32)
    live = torch.arange(len(x)) % 3 == 0
    of_tokens = Chosen(chosen[None], shares[None], elsewhere=True)
    wanted = BlockedSeams().experts(x[None], of_tokens, tuple(blocks))[0]
    unread = [e for e in range(EXPERTS) if e not in chosen[live]]
    assert len(unread) < EXPERTS
    for block in blocks:
        block[unread] = torch.nan
    found = BlockedSeams().of_live(live[None]).experts(x[None], of_tokens, tuple(blocks))[0]
    torch.testing.assert_close(found[live], wanted[live])
    assert not found[~live].any()


@pytest.mark.parametrize("gating", [SWIGLU, Gating(biases_of(torch.float32), BOUNDS)], ids=["plain", "bounded"])
def test_few_and_many_tokens_have_the_same_experts(gating):
    """Plain seams gather the matrices of few tokens, and multiply all tokens by those of all experts otherwise."""
    (x, chosen, shares, *_), plain = operands(torch.float32, torch.float32)
    whole = PLAIN.experts(x[None], Chosen(chosen[None], shares[None], elsewhere=True), tuple(plain), gating)
    alone = [
        PLAIN.experts(
            x[None, i : i + 1],
            Chosen(chosen[None, i : i + 1], shares[None, i : i + 1], elsewhere=True),
            tuple(plain),
            gating,
        )
        for i in range(len(x))
    ]
    torch.testing.assert_close(torch.cat(alone, dim=1), whole)
