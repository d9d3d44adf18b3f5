"""C++ of `expert_gated` and `expert_linear`, and their registration with Inductor. Imported only to compile.

Rows are sorted by expert; then each block of an expert that has rows is read once for all of them, in order, by one
thread. Blocks of all such experts are shared out among threads. A row's sum runs over I in the same order as in
`block_linear`, whatever other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

from pipeline.backends.inductor import block_int4_kernel as int4
from pipeline.backends.inductor.block_linear_kernel import SHAPES, VECTORS
from pipeline.backends.inductor.vectors import NATIVE_BFLOAT16, ROW_SUMS, WIDENED, filled

EXPERTS = r"""
constexpr int64_t E = EXPERT_COUNT, SHARE = ROWS_PER_INPUT, EXPERT_SIZE = BLOCKS * BLOCK_SIZE;
constexpr int64_t BIASES = BIAS_WIDTH;  // of an expert, up to N; 0: there are none
constexpr bool BOUNDED = IS_BOUNDED, GELU = IS_GELU;

// One block's biases of gate and up, zeros beyond the last.
struct Biases {
    alignas(64) float of[2][LANES] = {};
    Biases(const Input* const* biases, int64_t e, int64_t block) {
        const int64_t first = block * LANES, count = std::min(LANES, BIASES - first);
        for (int64_t n = 0; n < 2; ++n) {
            for (int64_t lane = 0; lane < count; ++lane) of[n][lane] = biases[n][e * BIASES + first + lane];
        }
    }
};

// Inner values of one row of a block: SwiGLU with bounds.
inline void bounded(const float* gate, const float* up, Output* out) {
    const Vec limit(BOUNDS_LIMIT), alpha(BOUNDS_ALPHA), one(1.0f);
    const auto product = [&](int64_t lane) {
        const Vec g = at::vec::clamp_max(Vec::loadu(gate + lane), limit);
        const Vec u = at::vec::clamp(Vec::loadu(up + lane), limit.neg(), limit);
        return g / (one + (g * alpha).neg().exp()) * (u + one);
    };
    for (int64_t lane = 0; lane < LANES; lane += CHUNK) {
        store_both(product(lane), product(lane + Vec::size()), out + lane);
    }
}

// GELU by tanh (Hendrycks and Gimpel 2016) of gate, times up.
inline void of_gelu(const float* gate, const float* up, Output* out) {
    const Vec half(0.5f), one(1.0f), root(0.7978845608028654f), cubic(0.044715f);
    const auto product = [&](int64_t lane) {
        const Vec g = Vec::loadu(gate + lane);
        return half * g * (one + (root * (g + cubic * g * g * g)).tanh()) * Vec::loadu(up + lane);
    };
    for (int64_t lane = 0; lane < LANES; lane += CHUNK) {
        store_both(product(lane), product(lane + Vec::size()), out + lane);
    }
}

inline void inner(float* gate, float* up, const Biases* biases, Output* out) {
    if constexpr (BIASES > 0) {
        for (int64_t lane = 0; lane < LANES; lane += Vec::size()) {
            (Vec::loadu(gate + lane) + Vec::loadu(biases->of[0] + lane)).store(gate + lane);
            (Vec::loadu(up + lane) + Vec::loadu(biases->of[1] + lane)).store(up + lane);
        }
    }
    if constexpr (BOUNDED) bounded(gate, up, out);
    else if constexpr (GELU) of_gelu(gate, up, out);
    else gated(gate, up, out);
}

// Rows by their expert: those of expert e are order[first[e]] up to order[first[e + 1]]. Rows without one are in none.
struct Sorted {
    int64_t order[M], first[E + 1] = {}, used[E], count = 0;
    explicit Sorted(const int32_t* expert_of) {
        for (int64_t r = 0; r < M; ++r) {
            if (expert_of[r] >= 0) ++first[expert_of[r] + 1];
        }
        for (int64_t e = 0; e < E; ++e) {
            if (first[e + 1]) used[count++] = e;
            first[e + 1] += first[e];
        }
        int64_t next[E];
        std::copy_n(first, E, next);
        for (int64_t r = 0; r < M; ++r) {
            if (expert_of[r] >= 0) order[next[expert_of[r]]++] = r;
        }
    }
};

// Up to `ROWS` rows times one block, written to the rows' own places.
template <typename Way, int64_t ROWS>
inline void some_rows(
    int64_t rows, const typename Way::Row* x, const Weight* const* weights, int64_t at, const Biases* biases,
    const int64_t* order, Output* y
) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) some_rows<Way, ROWS - 1>(rows, x, weights, at, biases, order, y);
        return;
    }
    alignas(64) float sums[ROWS * LANES];
    Way::template times<ROWS, LANES>(x, weights[0] + at, sums);
    if constexpr (GATED) {
        alignas(64) float up[ROWS * LANES];
        Way::template times<ROWS, LANES>(x, weights[1] + at, up);
        for (int64_t r = 0; r < ROWS; ++r) inner(sums + r * LANES, up + r * LANES, biases, y + order[r] * N);
    } else {
        for (int64_t r = 0; r < ROWS; ++r) std::copy_n(sums + r * LANES, LANES, y + order[r] * N);
    }
}

template <typename Way>
inline void by_experts(
    const Input* x, const int32_t* expert_of, const Weight* const* weights, const Input* const* biases, Output* y
) {
    const auto sorted = std::make_unique<Sorted>(expert_of);
    std::vector<typename Way::Row> rows(M * I);
    for (int64_t r = 0; r < M; ++r) {
        if (expert_of[r] < 0) std::fill_n(y + r * N, N, Output(0));
    }
    for (int64_t r = 0; r < sorted->first[E]; ++r) {
        const Input* row = x + sorted->order[r] / SHARE * I;
        std::copy_n(row, I, rows.data() + r * I);
    }
    #pragma omp parallel for
    for (int64_t item = 0; item < sorted->count * BLOCKS; ++item) {
        const int64_t e = sorted->used[item / BLOCKS], block = item % BLOCKS, at = e * EXPERT_SIZE + block * BLOCK_SIZE;
        std::optional<Biases> own;
        if constexpr (BIASES > 0) own.emplace(biases, e, block);
        for (int64_t r = sorted->first[e]; r < sorted->first[e + 1]; r += Way::TILE) {
            const int64_t count = std::min(sorted->first[e + 1] - r, Way::TILE);
            some_rows<Way, Way::TILE>(
                count, rows.data() + r * I, weights, at, own ? &*own : nullptr, sorted->order + r, y + block * LANES
            );
        }
    }
}
"""

IN_PAIRS = r"""#if defined(TANDEM_BF16)
    if (has_pairs()) return by_experts<ByPairs>(X + X_OFFSET, CHOSEN + CHOSEN_OFFSET, weights, biases, Y);
#endif"""
"""bfloat16 rows and 4-bit weights: products of pairs, where the processor has them."""

KERNEL = f"""
HEADER
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>
{NATIVE_BFLOAT16.includes}

namespace NAME_parts {{
{WIDENED}{NATIVE_BFLOAT16.code}{SHAPES}VECTORS
{EXPERTS}
}}

extern "C" SIGNATURE
{{
    using namespace NAME_parts;
    const Weight* const weights[] = {{WEIGHTS}};
    const Input* const biases[] = {{BIAS_POINTERS}};
    IN_PAIRS
    by_experts<ByVectors>(X + X_OFFSET, CHOSEN + CHOSEN_OFFSET, weights, biases, Y);
}}
"""


class BlockExpertsTemplate(CppTemplate):
    """The kernel for given shapes: `inputs` are x, chosen, and one weight, or, if `gated`, gate and up, and biases."""

    def __init__(
        self, inputs: list[Any], layout: ir.Layout, *, gated: bool, bounds: Sequence[float], gelu: bool
    ) -> None:
        super().__init__("expert_gated" if gated else "expert_linear", inputs, layout, num_threads=1)
        self.gated, self.bounds, self.gelu = gated, bounds, gelu

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """Return the C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        x, chosen, *rest = self.input_nodes
        weights, biases = rest[: 1 + self.gated], rest[1 + self.gated :]
        experts, blocks, *block = [int(size) for size in weights[0].get_size()]
        tokens, each = (int(size) for size in chosen.get_size())
        out = template_buffer_node or self.output_node
        operands, vectors = (
            {f"{name}{number}": node for number, node in enumerate(nodes)}
            for name, nodes in (("W", weights), ("B", biases))
        )
        limit, alpha = self.bounds or (0.0, 0.0)
        parts: dict[str, Any] = _products(x, weights[0]) | {
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel({"X": x, "CHOSEN": chosen, **operands, **vectors}, {"Y": out}),
            "NAME": kernel.kernel_name,
            "WEIGHTS": _pointers(operands),
            "BIAS_POINTERS": _pointers(vectors) or "nullptr",
            "BIAS_WIDTH": int(biases[0].get_size()[-1]) if biases else 0,
            "IS_BOUNDED": "true" if self.bounds else "false",
            "IS_GELU": "true" if self.gelu else "false",
            "BOUNDS_LIMIT": f"float({limit!r})",
            "BOUNDS_ALPHA": f"float({alpha!r})",
            "WEIGHT_TYPE": kernel.dtype(weights[0]),
            "INPUT_TYPE": kernel.dtype(x),
            "OUTPUT_TYPE": kernel.dtype(out),
            "IS_PAIRED": "true" if len(block) == 3 else "false",
            "IS_GATED": "true" if self.gated else "false",
            "INPUTS": int(x.get_size()[-1]),
            "BLOCK_ELEMENTS": math.prod(block),
            "BLOCK_COUNT": blocks,
            "FIRST_BLOCKS": f"0, {blocks}",
            "ROW_COUNT": tokens * each,
            "EXPERT_COUNT": experts,
            "ROWS_PER_INPUT": each if self.gated else 1,
            "CHOSEN_OFFSET": chosen.get_layout().offset,
            "X_OFFSET": x.get_layout().offset,
        }
        return filled(KERNEL, parts)


def _products(x: Any, weight: Any) -> dict[str, str]:
    """Return the parts that multiply rows of x by blocks of a weight: 4-bit ones as pairs where x is bfloat16."""
    narrow = weight.get_dtype() == torch.uint8
    in_pairs = narrow and x.get_dtype() == torch.bfloat16
    return {
        "IN_PAIRS": IN_PAIRS if in_pairs else "",
        "VECTORS": (int4.VECTORS if narrow else VECTORS) + (int4.PAIRS if in_pairs else ""),
        "ROW_SUMS": ROW_SUMS,
    }


def _pointers(nodes: dict[str, Any]) -> str:
    return ", ".join(f"{name} + {node.get_layout().offset}" for name, node in nodes.items())


def _lowered(
    operands: list[Any], dtype: torch.dtype, *, gated: bool, bounds: Sequence[float] = (), gelu: bool = False
) -> Any:
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in operands]
    weight = inputs[2].get_size()
    layout = ir.FixedLayout(inputs[0].get_device(), dtype, [*inputs[1].get_size(), weight[1] * weight[3]])
    out = BlockExpertsTemplate(inputs, layout, gated=gated, bounds=bounds, gelu=gelu).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out


@lowering.register_lowering(torch.ops.tandem.expert_gated, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower_gated(
    x: Any, chosen: Any, gate: Any, up: Any, biases: list[Any], bounds: list[float], gelu: bool = False
) -> Any:
    return _lowered([x, chosen, gate, up, *biases], x.get_dtype(), gated=True, bounds=bounds, gelu=gelu)


@lowering.register_lowering(torch.ops.tandem.expert_linear, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower_linear(x: Any, chosen: Any, weight: Any) -> Any:
    return _lowered([x, chosen, weight], torch.float32, gated=False)
