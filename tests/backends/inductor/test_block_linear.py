"""The kernel of blocked weights, compiled: right in every dtype, and a row's sum whatever the number of rows."""

import pytest
import torch

from pipeline.backends.inductor.block_linear import block_linear, block_swiglu
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.graphs.packing import BlockPacking
from pipeline.models.int8 import quantise, rounded
from support.compiled import compiled

pytestmark = pytest.mark.compile


class Products(torch.nn.Module):
    """Products of the first rows, of a slice that does not start at the tensor's beginning, and of two weights."""

    def forward(self, x, weight, other):
        return (
            *(block_linear(x[:rows], [weight]) for rows in (1, 5, 8, 45)),
            block_linear(x[3:5], [weight]),
            block_linear(x, [other, weight]),
            block_swiglu(x[:5], other, weight[1:4]),
            block_swiglu(x, other, weight[1:4]),
        )


def packed(plain, dtype):
    """A weight as stored, and what that stands for."""
    name = str(dtype).removeprefix("torch.")
    out = torch.empty(BlockPacking().packed_shape(tuple(plain.shape), "linear", name), dtype=dtype)
    whole, scales = quantise(plain) if dtype == torch.int8 else (plain, None)
    BlockPacking().pack(whole, "linear", out, scales)
    return out, rounded(plain) if dtype == torch.int8 else plain.to(dtype)


KINDS = [
    (torch.float32, torch.float32, 96),
    (torch.float16, torch.float16, 96),
    (torch.bfloat16, torch.bfloat16, 96),  # tiles or pairs, where there are any
    (torch.bfloat16, torch.bfloat16, 90),
    (torch.bfloat16, torch.bfloat16, 91),
    (torch.bfloat16, torch.int8, 96),
    (torch.float32, torch.int8, 96),
    (torch.float32, torch.int8, 91),
]


@pytest.mark.parametrize(
    ("inputs", "dtype", "columns", "isa", "by"),
    [
        *((*kind, "native", "any") for kind in KINDS),
        (torch.bfloat16, torch.bfloat16, 96, "avx2", "vectors"),
        (torch.bfloat16, torch.int8, 96, "native", "vectors"),
        (torch.bfloat16, torch.bfloat16, 96, "native", "pairs"),
        (torch.bfloat16, torch.int8, 96, "avx2", "pairs"),
    ],
)
def test_compiled_product_is_exact_and_alike_for_any_number_of_rows(
    tmp_path, monkeypatch, inputs, dtype, columns, isa, by
):
    from pipeline.backends.inductor import block_linear_kernel as kernel

    if by != "any":  # as on processors without tiles, or without pairs
        monkeypatch.setattr(kernel, "BY_TILES", kernel.NO_TILES)
    if by == "vectors":
        monkeypatch.setattr(kernel, "BY_PAIRS", kernel.NO_PAIRS)
    torch.manual_seed(0)
    x = torch.randn(45, columns).to(inputs)
    (weight, plain), (other, gate) = (packed(torch.randn(count, columns) * 0.1, dtype) for count in (190, 96))
    graph = compiled(Products(), (x, weight, other), tmp_path, isa)
    one, five, eight, all_rows, inner, both, few_gated, gated = graph.run([x, weight, other])
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


class Lookup(torch.nn.Module):
    """Rows of an int8 table."""

    def forward(self, ids, weight):
        return BlockedSeams().embed(ids, weight)


def test_compiled_lookup_in_an_int8_table_gives_its_rows(tmp_path):
    torch.manual_seed(0)
    plain = torch.randn(70, 96)
    plain[40] = 0
    weight, stands_for = packed(plain, torch.int8)
    ids = torch.tensor([[0, 31, 32], [40, 69, 63]], dtype=torch.int32)
    assert torch.equal(Lookup()(ids, weight), stands_for[ids])
    assert torch.equal(compiled(Lookup(), (ids, weight), tmp_path).run([ids, weight])[0], stands_for[ids])
    assert (rounded(plain) - plain).abs().max() <= plain.abs().max() / 254 * 1.001
