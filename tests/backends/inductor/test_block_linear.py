"""The kernel of blocked weights, compiled: right in every dtype, and a row's sum whatever the number of rows."""

from functools import cache

import pytest
import torch

from pipeline.backends.inductor.block_linear import block_linear, block_swiglu
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.graphs.packing import BlockPacking
from pipeline.models import int4, int8
from support.compiled import run_compiled

pytestmark = pytest.mark.compile


class Products(torch.nn.Module):
    """Products of the first rows, of a slice that starts later than the tensor, of two weights, of some rows."""

    def forward(self, x, weight, other, live):
        return (
            *(block_linear(x[:rows], [weight]) for rows in (1, 5, 8, 45)),
            block_linear(x[3:5], [weight]),
            block_linear(x, [other, weight]),
            block_swiglu(x[:5], other, weight[1:4]),
            block_swiglu(x, other, weight[1:4]),
            block_linear(x[:5], [weight], live[:5]),
            *(
                block_linear(x, [other, weight], which)
                for which in (live, torch.zeros_like(live), torch.arange(45) < 7)
            ),
            block_swiglu(x, other, weight[1:4], live),
        )


def packed(plain, dtype):
    """A weight as stored, and what that stands for."""
    name = str(dtype).removeprefix("torch.")
    out = torch.empty(BlockPacking().packed_shape(tuple(plain.shape), "linear", name), dtype=dtype)
    narrow = {torch.int8: int8, torch.uint8: int4}.get(dtype)
    whole, scales = narrow.quantise(plain) if narrow else (plain, None)
    BlockPacking().pack(whole, "linear", out, scales)
    return out, narrow.rounded(plain) if narrow else plain.to(dtype)


KINDS = [
    (torch.float32, torch.float32, 96),
    (torch.float16, torch.float16, 96),
    (torch.bfloat16, torch.bfloat16, 96),  # tiles or pairs, where there are any
    (torch.bfloat16, torch.bfloat16, 90),
    (torch.bfloat16, torch.bfloat16, 91),
    (torch.bfloat16, torch.int8, 96),
    (torch.float32, torch.int8, 96),
    (torch.float32, torch.int8, 91),
    (torch.bfloat16, torch.uint8, 96),  # 4 bits
    (torch.float32, torch.uint8, 96),
]


LIVE = torch.tensor([number % 7 in (0, 2, 3) for number in range(45)])
"""Rows of `Products` that are live: 20 of them."""
NONE, FIRST = torch.zeros_like(LIVE), torch.arange(45) < 7

CASES = {
    ("native", "any"): KINDS,
    ("avx2", "vectors"): [(torch.bfloat16, torch.bfloat16, 96), (torch.bfloat16, torch.uint8, 96)],
    ("native", "vectors"): [(torch.bfloat16, torch.int8, 96), (torch.bfloat16, torch.uint8, 96)],
    ("native", "pairs"): [(torch.bfloat16, torch.bfloat16, 96)],
    ("avx2", "pairs"): [(torch.bfloat16, torch.int8, 96)],
}
"""Kinds that one graph holds, by instruction set and by what multiplies."""


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """A function of a key of `CASES`: for each kind its operands and the outputs of the compiled products."""
    from pipeline.backends.inductor import block_linear_kernel as kernel  # takes seconds

    @cache
    def run(isa, by):
        with pytest.MonkeyPatch.context() as patch:
            if by != "any":  # as on processors without tiles, or without pairs
                patch.setattr(kernel, "BY_TILES", kernel.NO_TILES)
            if by == "vectors":
                patch.setattr(kernel, "BY_PAIRS", kernel.NO_PAIRS)
            operands = {kind: operands_of(*kind) for kind in CASES[isa, by]}
            cases = {
                kind: (Products(), (x, weight, other, LIVE)) for kind, (x, (weight, _), (other, _)) in operands.items()
            }
            outputs = run_compiled(cases, tmp_path_factory.mktemp("products"), isa)
        return {kind: (operands[kind], outputs[kind]) for kind in operands}

    return run


def operands_of(inputs, dtype, columns):
    """Rows, and two weights as `packed` returns them."""
    torch.manual_seed(0)
    x = torch.randn(45, columns).to(inputs)
    return x, *(packed(torch.randn(count, columns) * 0.1, dtype) for count in (190, 96))


@pytest.mark.parametrize(
    ("isa", "by", "kind"),
    [
        pytest.param(isa, by, kind, marks=[pytest.mark.slow] if (isa, by) != ("native", "any") else [])
        for (isa, by), kinds in CASES.items()
        for kind in kinds
    ],
)
def test_compiled_product_is_exact_and_alike_for_any_number_of_rows(products, isa, by, kind):
    inputs = kind[0]
    (x, (weight, plain), (other, gate)), outputs = products(isa, by)[kind]
    one, five, eight, all_rows, inner, both, few_gated, gated, *of_live = outputs
    exact = x.double() @ plain.double().T
    worst = (all_rows[:, :190] - exact).abs().max()
    assert worst < 5e-6, f"largest error {worst:.1e}"
    for part, same in ((one, all_rows[:1]), (five, all_rows[:5]), (eight, all_rows[:8]), (inner, all_rows[3:5])):
        assert torch.equal(part, same)
    assert torch.equal(both[:, 96:], all_rows)
    assert torch.equal(few_gated, gated[:5])
    fused = torch.nn.functional.silu(both[:, :96]) * all_rows[:, 32:128]
    assert torch.allclose(gated.float(), fused.to(inputs).float(), rtol=2**-7 if inputs != torch.float32 else 1e-6)
    for eager, fast in (
        (block_linear(x, [other, weight]), both),
        (block_swiglu(x, other, weight[1:4]).float(), gated.float()),
    ):
        assert torch.allclose(eager, fast, atol=5e-6, rtol=2**-7)
    assert torch.allclose(both[:, :96].double(), x.double() @ gate.double().T, atol=5e-6)
    whole, masks = (all_rows[:5], both, both, both, gated), (LIVE[:5], LIVE, NONE, FIRST, LIVE)
    for found, same, live in zip(of_live, whole, masks, strict=True):
        assert torch.equal(found, torch.where(live[:, None], same, 0))
    assert torch.equal(block_linear(x, [weight], LIVE), torch.where(LIVE[:, None], block_linear(x, [weight]), 0))


class Lookup(torch.nn.Module):
    """Rows of an int8 table."""

    def forward(self, ids, weight):
        return (BlockedSeams().embed(ids, weight),)


def test_compiled_lookup_in_an_int8_table_gives_its_rows(tmp_path):
    torch.manual_seed(0)
    plain = torch.randn(70, 96)
    plain[40] = 0
    weight, stands_for = packed(plain, torch.int8)
    ids = torch.tensor([[0, 31, 32], [40, 69, 63]], dtype=torch.int32)
    assert torch.equal(Lookup()(ids, weight)[0], stands_for[ids])
    assert torch.equal(run_compiled({0: (Lookup(), (ids, weight))}, tmp_path)[0][0], stands_for[ids])
    assert (int8.rounded(plain) - plain).abs().max() <= plain.abs().max() / 254 * 1.001
