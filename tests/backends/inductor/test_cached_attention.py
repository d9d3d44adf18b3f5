"""The attention kernel, compiled: right in every dtype and for ragged rows, and it reads nothing that no query sees."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import bfloat16, float16, float32

from pipeline.backends.inductor.cached_attention import cached_attention
from pipeline.models.parallel import PLAIN, attend_up_to
from support.compiled import run_compiled

pytestmark = pytest.mark.compile

IN_PAIRS = torch.cpu._is_avx512_bf16_supported()
"""The processor multiplies pairs of bfloat16: queries and shares of such caches are rounded to it."""

KV = 150
LONG, SLOTS = 900, 128


class Attention(torch.nn.Module):
    """Over a cache that is written first, as graphs do."""

    def forward(self, q, k, v, new, last):
        k.index_put_((torch.arange(2)[:, None, None], torch.arange(2)[:, None], last[:, None, -1:].long()), new)
        return cached_attention(q, k, v, last, KV), k.clone(), new.clone()


class Windowed(torch.nn.Module):
    """Windows shorter and longer than a chunk of keys, caps and sinks."""

    def forward(self, q, k, v, last, sinks):
        return tuple(cached_attention(q, k, v, last, KV, **how) for how in options(sinks))


class Parts(torch.nn.Module):
    """Many queries, some of them, and one, over a row of the caches that is named."""

    def forward(self, q, k, v, last, rows):
        parts = (slice(0, 70), slice(60, 65), slice(63, 64))
        return tuple(cached_attention(q[:, :, part], k, v, last[:, part].contiguous(), KV, rows=rows) for part in parts)


class Ringed(torch.nn.Module):
    """Windows over whole caches, and over rings that hold the same keys."""

    def forward(self, *operands):
        q, k, v, ring_k, ring_v, last, sinks, rows = operands
        how = [{"window": 5}, {"window": 70, "sinks": sinks}, {"window": 120, "cap": 3.0, "rows": rows}]
        whole = [cached_attention(q, k, v, last, LONG, **each) for each in how]
        return *whole, *(cached_attention(q, ring_k, ring_v, last, LONG, **each, ring=SLOTS) for each in how)


def options(sinks):
    """Options of attention: alone and together."""
    return (
        {"window": 5},
        {"window": 70},
        {"cap": 3.0},
        {"sinks": sinks},
        {"window": 5, "sinks": sinks},
        {"window": 70, "cap": 3.0, "sinks": sinks},
    )


CASES = {
    "native": [
        (torch.float32, 64),
        (torch.float32, 23),
        (torch.bfloat16, 64),
        (torch.float16, 64),
        (torch.float16, 24),
    ],
    "avx2": [(torch.bfloat16, 64), (torch.bfloat16, 24)],
}
"""Dtypes and head sizes that one graph holds, by instruction set."""


class Example(NamedTuple):
    """Operands of an attention, and what eager code makes of them. No query sees the cached positions that are NaN."""

    operands: tuple[torch.Tensor, ...]
    expected: torch.Tensor
    plain: torch.Tensor


def example(dtype, dim):
    torch.manual_seed(0)
    q, new = torch.randn(2, 6, 3, dim) * 2, torch.randn(2, 2, 1, dim).to(dtype)
    k, v = (torch.randn(3, 2, 160, dim).to(dtype) for _ in range(2))
    last = torch.tensor([[0, 1, 2], [130, 131, 149]], dtype=torch.int32)
    expected = cached_attention(q, write(k, last, new), v, last, KV)
    plain = PLAIN.attend(q, write(k, last, new).float(), v.float(), attend_up_to(last, KV)).view(2, 3, 6, dim)
    k[0, :, 3:] = torch.nan
    v[0, :, 3:] = torch.nan
    return Example((q, k, v, new, last), expected, plain)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function of an instruction set: outputs of its `CASES`, and of windows and parts, all in one graph."""

    @cache
    def run(isa):
        modules = {case: (Attention(), example(*case).operands) for case in CASES[isa]}
        modules |= {"windows": (Windowed(), windowed(torch.bfloat16)), "parts": (Parts(), parts(64))}
        modules["ringed"] = (Ringed(), ringed(torch.bfloat16))
        return run_compiled(modules, tmp_path_factory.mktemp("attention"), isa)

    return run


def windowed(dtype):
    """Operands of `Windowed`."""
    (q, k, v, _, last), *_ = example(dtype, 64)
    return q, k.nan_to_num(), v.nan_to_num(), last, torch.tensor([0.5, -1.0, 2.0, 0.0, 9.0, -9.0])


def ringed(dtype):
    """Operands of `Ringed`: rows at the ring's first turn, at a later one, and across its end."""
    torch.manual_seed(0)
    q = torch.randn(3, 6, 3, 64) * 2
    k, v = (torch.randn(3, 2, LONG, 64).to(dtype) for _ in "kv")
    last = torch.tensor([[3, 4, 5], [700, 701, 702], [5 * SLOTS - 1, 5 * SLOTS, 5 * SLOTS + 1]], dtype=torch.int32)
    rings = [torch.full((3, 2, SLOTS + 1, 64), 1e4, dtype=dtype) for _ in "kv"]
    for row, end in enumerate(last[:, -1].tolist()):
        held = torch.arange(max(end + 1 - SLOTS, 0), end + 1)
        for ring, whole in zip(rings, (k, v), strict=True):
            ring[row][:, held % SLOTS] = whole[row][:, held]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0, 9.0, -9.0])
    return q, k, v, *rings, last, sinks, torch.arange(3, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_ring_gives_the_bits_of_the_whole_cache(compiled, dtype, tmp_path):
    """Of which it holds the newest keys alone; what no query sees is larger than all that is seen."""
    operands = ringed(dtype)
    shared = dtype == torch.bfloat16
    found = compiled("native") if shared else run_compiled({"ringed": (Ringed(), operands)}, tmp_path)
    whole, rings = found["ringed"][:3], found["ringed"][3:]
    for one, other, eager in zip(whole, rings, Ringed()(*operands)[3:], strict=True):
        assert torch.equal(one, other)
        assert_near(other, eager, in_pairs=IN_PAIRS and shared)


def parts(dim):
    """Operands of `Parts`."""
    torch.manual_seed(0)
    q, last = torch.randn(1, 6, 70, dim) * 2, torch.arange(70, 140, dtype=torch.int32)[None]
    k, v = (torch.randn(3, 2, 160, dim).bfloat16() for _ in range(2))
    return q, k, v, last, torch.tensor([2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("isa", "dtype", "dim"),
    [
        pytest.param(isa, *case, marks=[pytest.mark.slow] if isa == "avx2" else [])  # on many machines the native one
        for isa, cases in CASES.items()
        for case in cases
    ],
)
def test_compiled_attention_is_exact_and_reads_only_what_is_seen(compiled, isa, dtype, dim):
    _, expected, plain = example(dtype, dim)
    output, k, new = compiled(isa)[dtype, dim]
    rounding = {float32: 1e-6, float16: 2**-10, bfloat16: 2**-7}[dtype]
    assert torch.allclose(expected.float(), plain, atol=1e-5, rtol=rounding)
    assert output.dtype == dtype
    in_pairs = IN_PAIRS and (isa, dtype, dim) == ("native", bfloat16, 64)
    assert in_pairs or torch.allclose(output.float(), expected.float(), atol=2e-6, rtol=rounding)
    assert dtype == float32 or in_pairs or (output == expected).float().mean() > 0.99
    assert_near(output, expected, in_pairs=in_pairs)
    assert torch.equal(k[1, :, 149], new[1, :, 0])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_compiled_windows_caps_and_sinks_are_those_of_plain_attention(compiled, dtype, tmp_path):
    """Against the attention of the eager reference, with masks, or written out."""
    operands = windowed(dtype)
    shared = dtype == torch.bfloat16
    found = compiled("native") if shared else run_compiled({"windows": (Windowed(), operands)}, tmp_path)
    q, k, v, last, sinks = operands
    for how, output in zip(options(sinks), found["windows"], strict=True):
        attend = replace(attend_up_to(last, KV).within(how.get("window")), cap=how.get("cap"), sinks_N=how.get("sinks"))
        plain = PLAIN.attend(q, k.float(), v.float(), attend).view(2, 3, 6, 64)
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
        assert_near(output, plain, in_pairs=IN_PAIRS and shared)
        torch.testing.assert_close(cached_attention(q, k, v, last, KV, **how).float(), plain, atol=1e-4, rtol=rounding)


@pytest.mark.parametrize("isa", ["native", pytest.param("avx2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [64, pytest.param(24, marks=pytest.mark.slow)])
def test_a_query_gives_the_same_bits_beside_any_others(compiled, dim, isa, tmp_path):
    """A prompt's tokens are those of decode steps, however it is read."""
    q, k, v, last, rows = operands = parts(dim)
    found = compiled(isa) if dim == 64 else run_compiled({"parts": (Parts(), operands)}, tmp_path, isa)
    many, some, one = found["parts"]
    assert torch.equal(many[:, 60:65], some)
    assert torch.equal(some[:, 3:4], one)
    expected = PLAIN.attend(q, k.float(), v.float(), attend_up_to(last, KV, rows)).view(1, 70, 6, dim)
    assert_near(many, expected, in_pairs=IN_PAIRS and (isa, dim) == ("native", 64))
    torch.testing.assert_close(cached_attention(q, k, v, last, KV, rows=rows).float(), expected, atol=1e-4, rtol=2**-7)


def assert_near(found, expected, *, in_pairs):
    """Within the rounding of the result; in pairs also of scores up to about 20 and of shares, by 2**-9 each."""
    atol = 2e-2 if in_pairs else 1e-4
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=2**-7)
    if in_pairs:
        assert (found.float() - expected.float()).square().mean().sqrt() < 5e-3


def write(k, last, new):
    k = k.clone()
    for row in range(2):
        k[row, :, int(last[row, -1])] = new[row, :, 0]
    return k
