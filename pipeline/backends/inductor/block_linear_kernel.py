"""The C++ that `block_linear` becomes inside a graph, and how Inductor is told of it. Imported only to compile.

A decode step multiplies one row by every weight, a step that verifies K drafts K + 1 rows, so either takes as long as
the weights take to arrive from memory, if the kernel lets them stream. torch's own products do not at 2 to 8 rows.
Here a block [I, 32] is read once, in order, for up to eight rows at a time, and sums are kept in registers, in float32
whatever the weight's dtype. Every row's sum runs over I in the same order however many rows there are: decode, verify
and score agree bit by bit in their linear layers.

Threads are the runtime's choice, not the build's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

KERNEL = r"""
HEADER

namespace NAME_parts {

using Vec = at::vec::Vectorized<float>;
using Weight = WEIGHT_TYPE;
constexpr int64_t I = INPUTS, BLOCKS = BLOCK_COUNT, LANES = LANE_COUNT, M = ROW_COUNT, N = BLOCKS * LANES;
constexpr int64_t CHUNK = 2 * Vec::size(), BLOCK_SIZE = BLOCK_ROWS * LANES;
constexpr bool SCALED = std::is_same_v<Weight, int8_t>;
static_assert(LANES % CHUNK == 0);

inline Vec widened(const float* from) { return Vec::loadu(from); }
inline Vec widened(const at::BFloat16* from) { Vec wide; at::vec::load_fp32_from_bf16(from, wide); return wide; }
inline Vec widened(const at::Half* from) { Vec wide; at::vec::load_fp32_from_fp16(from, wide); return wide; }

inline Vec widened(const int8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    __at_align__ float wide[Vec::size()];
    for (int64_t lane = 0; lane < Vec::size(); ++lane) wide[lane] = from[lane];
    return Vec::loadu(wide);
#endif
}

template <int64_t ROWS>
inline void rows_times_chunk(const float* x, const Weight* w, const float* scales, float* out) {
    Vec low[ROWS], high[ROWS];
    for (int64_t m = 0; m < ROWS; ++m) { low[m] = Vec(0.0f); high[m] = Vec(0.0f); }
    for (int64_t i = 0; i < I; ++i) {
        const Vec first = widened(w + i * LANES), second = widened(w + i * LANES + Vec::size());
        #pragma GCC unroll 8
        for (int64_t m = 0; m < ROWS; ++m) {
            const Vec one(x[m * I + i]);
            low[m] = at::vec::fmadd(one, first, low[m]);
            high[m] = at::vec::fmadd(one, second, high[m]);
        }
    }
    for (int64_t m = 0; m < ROWS; ++m) {
        if constexpr (SCALED) {
            low[m] = low[m] * Vec::loadu(scales);
            high[m] = high[m] * Vec::loadu(scales + Vec::size());
        }
        low[m].store(out + m * N);
        high[m].store(out + m * N + Vec::size());
    }
}

template <int64_t ROWS>
inline void rows_times_block(const float* x, const Weight* w, float* out) {
    // An int8 block ends in the bytes of its float32 scales.
    const float* scales = reinterpret_cast<const float*>(w + I * LANES);
    for (int64_t lane = 0; lane < LANES; lane += CHUNK) rows_times_chunk<ROWS>(x, w + lane, scales + lane, out + lane);
}

}

extern "C" SIGNATURE
{
    using namespace NAME_parts;
    // Rows whose sums fit in registers, two vectors each: half of AVX-512's 32, or of 16.
    constexpr int64_t TILE = Vec::size() >= 16 ? 8 : 4, WHOLE = M / TILE * TILE;
    #pragma omp parallel for
    for (int64_t block = 0; block < BLOCKS; ++block) {
        const Weight* from = W + W_OFFSET + block * BLOCK_SIZE;
        for (int64_t m = 0; m < WHOLE; m += TILE) {
            rows_times_block<TILE>(X + X_OFFSET + m * I, from, Y + m * N + block * LANES);
        }
        if constexpr (M > WHOLE) {
            rows_times_block<M - WHOLE>(X + X_OFFSET + WHOLE * I, from, Y + WHOLE * N + block * LANES);
        }
    }
}
"""


class BlockLinearTemplate(CppTemplate):
    """The kernel for one shape."""

    def __init__(self, inputs: list[Any], layout: ir.Layout) -> None:
        super().__init__("block_linear", inputs, layout, num_threads=1)

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        x, w = self.input_nodes
        blocks, block_rows, lanes = (int(size) for size in w.get_size())
        parts = {
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel({"X": x, "W": w}, {"Y": template_buffer_node or self.output_node}),
            "NAME": kernel.kernel_name,
            "WEIGHT_TYPE": kernel.dtype(w),
            "INPUTS": int(x.get_size()[1]),
            "BLOCK_ROWS": block_rows,
            "BLOCK_COUNT": blocks,
            "LANE_COUNT": lanes,
            "ROW_COUNT": int(x.get_size()[0]),
            "X_OFFSET": x.get_layout().offset,
            "W_OFFSET": w.get_layout().offset,
        }
        code = KERNEL
        for name, value in parts.items():
            code = code.replace(name, str(value))
        return code


@lowering.register_lowering(torch.ops.tandem.block_linear, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(x: Any, weight: Any) -> Any:
    x, weight = (ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in (x, weight))
    size = [x.get_size()[0], weight.get_size()[0] * weight.get_size()[2]]
    layout = ir.FixedLayout(x.get_device(), torch.float32, size)
    out = BlockLinearTemplate([x, weight], layout).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out
