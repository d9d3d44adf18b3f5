"""C++ of `block_linear` and `block_swiglu`, and their registration with Inductor. Imported only to compile.

A decode step multiplies one row by every weight, a step that verifies K drafts K + 1 rows. Both are limited by memory
bandwidth if the kernel streams the weights; torch's own products do not at 2 to 8 rows. A block is read once and in
order for all rows, with sums in registers, in float32 for all dtypes of weights. Each row's sum runs over I in the same
order for any number of rows: decode, verify and score agree bit by bit in their linear layers.

Weights that read the same rows share a loop: every loop ends with a barrier of its threads, and Inductor's code between
products runs on one thread, which takes a sixth of a decoder's step.

Three implementations, chosen when a graph runs: bfloat16 rows use tiles of Intel's AMX if the processor has them, else
AVX-512's products of bfloat16 pairs; all other rows use float32 vectors. So an artifact requires neither extension,
independent of the machine that built it. The number of threads is chosen at run time too. `block_int4_kernel` has what
reads 4-bit weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

from pipeline.backends.inductor import block_int4_kernel as int4
from pipeline.backends.inductor.block_rows_kernel import ALL_ROWS, LIVE_ROWS, ROWS
from pipeline.backends.inductor.vectors import NATIVE_BFLOAT16, ROW_SUMS, WIDENED, filled

SHAPES = r"""
using Weight = WEIGHT_TYPE;
using Input = INPUT_TYPE;
using Output = OUTPUT_TYPE;
constexpr int64_t I = INPUTS, BLOCKS = BLOCK_COUNT, LANES = 32, M = ROW_COUNT, N = BLOCKS * LANES;
constexpr int64_t BLOCK_SIZE = BLOCK_ELEMENTS, CHUNK = 2 * Vec::size();
constexpr bool SCALED = std::is_same_v<Weight, int8_t>, PAIRED = IS_PAIRED, GATED = IS_GATED;
static_assert(LANES % CHUNK == 0);

// An int8 block ends in the bytes of its float32 scales.
inline const float* scales_of(const Weight* block) { return reinterpret_cast<const float*>(block + I * LANES); }

// Blocks of several weights in a row: the first one of each.
constexpr int64_t FIRST[] = {FIRST_BLOCKS};
inline const Weight* block_at(const Weight* const* weights, int64_t block) {
    int64_t n = 0;
    while (block >= FIRST[n + 1]) ++n;
    return weights[n] + (block - FIRST[n]) * BLOCK_SIZE;
}

// silu(gate) * up of one row of a block.
inline void gated(const float* gate, const float* up, Output* out) {
    const auto product = [&](int64_t lane) {
        const Vec g = Vec::loadu(gate + lane);
        return g / (Vec(1.0f) + g.neg().exp()) * Vec::loadu(up + lane);
    };
    for (int64_t lane = 0; lane < LANES; lane += CHUNK) {
        store_both(product(lane), product(lane + Vec::size()), out + lane);
    }
}
"""

VECTORS = r"""
template <int64_t ROWS, int64_t STRIDE>
inline void rows_times_chunk(const float* x, const Weight* w, const float* scales, float* out) {
    ROW_SUMS
    if constexpr (PAIRED) {
        for (int64_t i = 0; i < I; i += 2) {
            const auto [first, next_first] = unpaired(w + i * LANES);
            const auto [second, next_second] = unpaired(w + i * LANES + 2 * Vec::size());
            add(i, first, second);
            add(i + 1, next_first, next_second);
        }
    } else {
        for (int64_t i = 0; i < I; ++i) add(i, widened(w + i * LANES), widened(w + i * LANES + Vec::size()));
    }
    for (int64_t m = 0; m < ROWS; ++m) {
        if constexpr (SCALED) {
            low[m] = low[m] * Vec::loadu(scales);
            high[m] = high[m] * Vec::loadu(scales + Vec::size());
        }
        low[m].store(out + m * STRIDE);
        high[m].store(out + m * STRIDE + Vec::size());
    }
}

struct ByVectors {
    using Row = float;
    // Rows whose sums fit in registers, two vectors each: half of AVX-512's 32, or of 16.
    static constexpr int64_t TILE = Vec::size() >= 16 ? 8 : 4;
    template <int64_t ROWS, int64_t STRIDE>
    static inline void times(const float* x, const Weight* w, float* out) {
        for (int64_t lane = 0; lane < LANES; lane += CHUNK) {
            rows_times_chunk<ROWS, STRIDE>(x, w + lane * (PAIRED ? 2 : 1), scales_of(w) + lane, out + lane);
        }
    }
};

"""

BY_VECTORS = r"""
inline const float* wide(const float* x, const Rows&, std::vector<float>&) { return x; }
template <typename T>
inline const float* wide(const T* x, const Rows& rows, std::vector<float>& memory) {
    memory.assign(x, x + (rows.places == nullptr ? M : rows.count + SPARE_ROWS) * I);
    return memory.data();
}

inline void by_vectors(const Input* x, const Weight* const* weights, Output* y, const Rows& rows) {
    std::vector<float> memory;
    all_blocks<ByVectors>(wide(x, rows, memory), weights, y, rows);
}
"""

BY_PAIRS = r"""
#if defined(TANDEM_BF16)
static_assert(PAIRED && std::is_same_v<Input, at::BFloat16>);

// Two inputs of 16 outputs, side by side as bfloat16: where they lie, or, of int8, converted.
TANDEM_BF16 inline __m512bh pair_of(const Weight* w) {
    if constexpr (SCALED) {
        const __m128i* bytes = reinterpret_cast<const __m128i*>(w);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
        return _mm512_cvtne2ps_pbh(high, low);
    } else {
        return (__m512bh)_mm512_loadu_si512(w);
    }
}

TANDEM_BF16 inline __m512 scaled(__m512 sum, const float* scales) {
    if constexpr (SCALED) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(scales));
    return sum;
}

struct ByPairs {
    using Row = at::BFloat16;
    // Rows whose sums fit in registers, two vectors each, shared out evenly.
    static constexpr int64_t PARTS = (M + 11) / 12, TILE = (M + PARTS - 1) / PARTS;
    template <int64_t ROWS, int64_t STRIDE>
    TANDEM_BF16 static inline void times(const at::BFloat16* x, const Weight* w, float* out) {
        __m512 low[ROWS], high[ROWS];
        for (int64_t m = 0; m < ROWS; ++m) { low[m] = _mm512_setzero_ps(); high[m] = _mm512_setzero_ps(); }
        for (int64_t i = 0; i < I; i += 2) {
            const __m512bh first = pair_of(w + i * LANES), second = pair_of(w + i * LANES + LANES);
            #pragma GCC unroll 16
            for (int64_t m = 0; m < ROWS; ++m) {
                int32_t two;
                std::memcpy(&two, x + m * I + i, sizeof two);
                const __m512bh one = (__m512bh)_mm512_set1_epi32(two);
                low[m] = _mm512_dpbf16_ps(low[m], one, first);
                high[m] = _mm512_dpbf16_ps(high[m], one, second);
            }
        }
        for (int64_t m = 0; m < ROWS; ++m) {
            _mm512_storeu_ps(out + m * STRIDE, scaled(low[m], scales_of(w)));
            _mm512_storeu_ps(out + m * STRIDE + 16, scaled(high[m], scales_of(w) + 16));
        }
    }
};

inline bool by_pairs(const Input* x, const Weight* const* weights, Output* y, const Rows& rows) {
    if (!has_pairs()) return false;
    all_blocks<ByPairs>(x, weights, y, rows);
    return true;
}
#else
inline bool by_pairs(const Input*, const Weight* const*, Output*, const Rows&) { return false; }
#endif
"""

BY_TILES = r"""
#if defined(TANDEM_AMX)
static_assert(I % 32 == 0);

// 32 inputs of a block as two tiles of bfloat16 pairs: where they lie, or, of int8, converted into `scratch`.
TANDEM_AMX inline const at::BFloat16* pairs_of(const Weight* w, at::BFloat16* scratch) {
    if constexpr (SCALED) {
        for (int64_t n = 0; n < 32 * LANES; n += 32) _mm512_storeu_si512(scratch + n, (__m512i)pair_of(w + n));
        return scratch;
    } else {
        return reinterpret_cast<const at::BFloat16*>(w);
    }
}

// Sums of up to 16 rows, as a tile's two halves left them, written out row by row.
template <int64_t STRIDE>
TANDEM_AMX inline void store(const float* sums, int64_t rows, const float* scales, float* out) {
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t lane = 0; lane < LANES; lane += 16) {
            const __m512 sum = _mm512_loadu_ps(sums + (lane / 16) * 256 + m * 16);
            _mm512_storeu_ps(out + m * STRIDE + lane, scaled(sum, scales + lane));
        }
    }
}

constexpr int64_t AHEAD = 16384;  // bytes; tiles load too few lines at a time for the processor to run ahead itself

template <int64_t ROWS, int64_t STRIDE>  // 1 to 32
TANDEM_AMX inline void rows_times_tiles(const at::BFloat16* x, const Weight* w, float* out) {
    constexpr int64_t FIRST = ROWS < 16 ? ROWS : 16, SECOND = ROWS - FIRST;
    alignas(64) Palette palette{FIRST, SECOND ? SECOND : 1};
    alignas(64) at::BFloat16 scratch[2][SCALED ? 1024 : 32];
    alignas(64) float sums[512];
    _tile_loadconfig(&palette);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // Converted one turn ahead: tiles wait for stores to reach the cache.
    const at::BFloat16* next = pairs_of(w, scratch[0]);
    for (int64_t i = 0; i < I; i += 32) {
        const at::BFloat16* pairs = next;
        for (int64_t line = 0; line < 32 * LANES * int64_t(sizeof(Weight)); line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(w + i * LANES) + AHEAD + line, _MM_HINT_T0);
        }
        if (i + 32 < I) next = pairs_of(w + (i + 32) * LANES, scratch[(i / 32 + 1) % 2]);
        _tile_loadd(6, pairs, 128);
        _tile_loadd(7, pairs + 32, 128);
        _tile_loadd(4, x + i, I * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (SECOND > 0) {
            _tile_loadd(5, x + 16 * I + i, I * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    store<STRIDE>(sums, FIRST, scales_of(w), out);
    if constexpr (SECOND > 0) {
        _tile_stored(2, sums, 64);
        _tile_stored(3, sums + 256, 64);
        store<STRIDE>(sums, SECOND, scales_of(w), out + 16 * STRIDE);
    }
    _tile_release();
}

struct ByTiles {
    using Row = at::BFloat16;
    static constexpr int64_t TILE = 32;
    template <int64_t ROWS, int64_t STRIDE>
    TANDEM_AMX static inline void times(const at::BFloat16* x, const Weight* w, float* out) {
        rows_times_tiles<ROWS, STRIDE>(x, w, out);
    }
};

inline bool by_tiles(const Input* x, const Weight* const* weights, Output* y, const Rows& rows) {
    if (!has_tiles()) return false;
    all_blocks<ByTiles>(x, weights, y, rows);
    return true;
}
#else
inline bool by_tiles(const Input*, const Weight* const*, Output*, const Rows&) { return false; }
#endif
"""

NO_PAIRS = "inline bool by_pairs(const Input*, const Weight* const*, Output*, const Rows&) { return false; }"
NO_TILES = "inline bool by_tiles(const Input*, const Weight* const*, Output*, const Rows&) { return false; }"

KERNEL = f"""
HEADER
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>
{NATIVE_BFLOAT16.includes}

namespace NAME_parts {{
{WIDENED}{NATIVE_BFLOAT16.code}{SHAPES}{ROWS}VECTORS{BY_VECTORS}BY_PAIRS
BY_TILES
}}

extern "C" SIGNATURE
{{
    using namespace NAME_parts;
    const auto* x = X + X_OFFSET;
    const Weight* const weights[] = {{WEIGHTS}};
    OF_ROWS
    if (!by_tiles(x, weights, Y, rows) && !by_pairs(x, weights, Y, rows)) by_vectors(x, weights, Y, rows);
}}
"""


class BlockLinearTemplate(CppTemplate):
    """The kernel for given shapes: concatenated products, or, if `gated`, SwiGLU of two products.

    With `live`, the last of the inputs says which rows are computed.
    """

    def __init__(self, inputs: list[Any], layout: ir.Layout, *, gated: bool, live: bool) -> None:
        super().__init__("block_swiglu" if gated else "block_linear", inputs, layout, num_threads=1)
        self.gated, self.live = gated, live

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """Return the C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        x, *weights = self.input_nodes[:-1] if self.live else self.input_nodes
        block = [int(size) for size in weights[0].get_size()[1:]]
        counts = [int(weight.get_size()[0]) for weight in weights]
        paired, columns = len(block) == 3, int(x.get_size()[1])
        pairs, narrow = paired and x.get_dtype() == torch.bfloat16, weights[0].get_dtype() == torch.uint8
        out = template_buffer_node or self.output_node
        operands = {f"W{number}": weight for number, weight in enumerate(weights)}
        live = {"LIVE": self.input_nodes[-1]} if self.live else {}
        parts: dict[str, Any] = {
            "BY_PAIRS": (int4.BY_PAIRS if narrow else BY_PAIRS) if pairs else NO_PAIRS,
            "BY_TILES": BY_TILES if pairs and not narrow and columns % 32 == 0 else NO_TILES,
            "VECTORS": int4.VECTORS if narrow else VECTORS,
            "ROW_SUMS": ROW_SUMS,
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel({"X": x, **operands, **live}, {"Y": out}),
            "OF_ROWS": LIVE_ROWS if live else ALL_ROWS,
            "HAS_LIVE": "true" if live else "false",
            "LIVE_OFFSET": live["LIVE"].get_layout().offset if live else 0,
            "NAME": kernel.kernel_name,
            "WEIGHTS": ", ".join(f"{name} + {weight.get_layout().offset}" for name, weight in operands.items()),
            "WEIGHT_TYPE": kernel.dtype(weights[0]),
            "INPUT_TYPE": kernel.dtype(x),
            "OUTPUT_TYPE": kernel.dtype(out),
            "IS_PAIRED": "true" if paired else "false",
            "IS_GATED": "true" if self.gated else "false",
            "INPUTS": columns,
            "BLOCK_ELEMENTS": math.prod(block),
            "BLOCK_COUNT": counts[0] if self.gated else sum(counts),
            "FIRST_BLOCKS": ", ".join(str(sum(counts[:number])) for number in range(len(counts) + 1)),
            "ROW_COUNT": int(x.get_size()[0]),
            "X_OFFSET": x.get_layout().offset,
        }
        return filled(KERNEL, parts)


def _lowered(x: Any, weights: list[Any], live: Any, dtype: torch.dtype, *, gated: bool) -> Any:
    given = (x, *weights) if live is None else (x, *weights, live)
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in given]
    columns = [weight.get_size()[0] * weight.get_size()[2] for weight in inputs[1 : len(weights) + 1]]
    size = [inputs[0].get_size()[0], columns[0] if gated else sum(columns)]
    layout = ir.FixedLayout(inputs[0].get_device(), dtype, size)
    out = BlockLinearTemplate(inputs, layout, gated=gated, live=live is not None).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out


@lowering.register_lowering(torch.ops.tandem.block_linear, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower_linear(x: Any, weights: list[Any], live: Any = None) -> Any:
    return _lowered(x, weights, live, torch.float32, gated=False)


@lowering.register_lowering(torch.ops.tandem.block_swiglu, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower_swiglu(x: Any, gate: Any, up: Any, live: Any = None) -> Any:
    return _lowered(x, [gate, up], live, x.get_dtype(), gated=True)
