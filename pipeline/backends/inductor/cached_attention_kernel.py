"""C++ of `cached_attention`, and its registration with Inductor. Imported only to compile.

Keys and values are read in order, in chunks whose scores fit the L1 cache, for many queries of the heads that share
them; sums are rescaled if a chunk has a new largest score (Milakov, Gimelshein 2018). A chunk's keys are transposed
first, so that a query is multiplied with many keys at a time. Each query's sum runs over its keys in the same order for
any number of queries and rows.

Where caches and the processor's products are bfloat16, queries and shares are rounded to it and multiplied in pairs
(`attention_pairs_kernel.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

from pipeline.backends.inductor.attention_pairs_kernel import IN_PAIRS
from pipeline.backends.inductor.vectors import NATIVE_BFLOAT16, WIDENED, filled

CHUNK = 64
"""Keys of which the scores are computed together."""

KERNEL = (
    f"""
HEADER
#include <algorithm>
#include <cmath>
#include <cstring>
{NATIVE_BFLOAT16.includes}

namespace NAME_parts {{
"""
    + WIDENED
    + NATIVE_BFLOAT16.code
    + r"""
using Cached = CACHED_TYPE;
constexpr int64_t B = BATCH, N = QUERY_HEADS, G = KV_HEADS, T = TOKENS, D = HEAD_SIZE, S = KEYS, LENGTH = CACHE_LENGTH;
constexpr int64_t WINDOW = WINDOW_LENGTH;  // 0: all keys up to the last
constexpr int64_t RING = RING_SLOTS;  // 0: a key's slot is its position
constexpr bool CAPPED = IS_CAPPED, SUNK = HAS_SINKS;
constexpr int64_t LANES = Vec::size(), CHUNK = CHUNK_KEYS, VECTORS = (D + LANES - 1) / LANES, PADDED = VECTORS * LANES;
static_assert(RING % CHUNK == 0, "a chunk of keys would pass the end of the ring");
// A task is some queries of the heads that share keys, for which these are transposed once. A group of them has its
// sums in registers: those of the scores, then those of the values, a tile of vectors of some queries at a time.
constexpr int64_t REGISTERS = LANES >= 16 ? 24 : 12, QUERIES = N / G * T, MOST = 48, TASKS = 16;
constexpr int64_t divisor(int64_t most) { return VECTORS % most == 0 ? most : divisor(most - 1); }
constexpr int64_t NARROW = divisor(std::min<int64_t>(VECTORS, 4));
constexpr int64_t tile(int64_t queries) { return queries == 1 && VECTORS <= REGISTERS ? VECTORS : NARROW; }
constexpr int64_t parts(int64_t all, int64_t size) { return (all + size - 1) / size; }
constexpr int64_t LEAST = std::min(std::max<int64_t>((LANES >= 16 ? 24 : 10) / VECTORS, 1), QUERIES);
constexpr int64_t PARTS = parts(QUERIES, std::clamp(parts(QUERIES, parts(TASKS, B * G)), LEAST, std::max(LEAST, MOST)));
constexpr int64_t SHARE = parts(QUERIES, PARTS), REST = QUERIES - (PARTS - 1) * SHARE;
constexpr int64_t GROUP = std::min(REGISTERS / 2, SHARE);
constexpr float LOWEST = -3.0e38f;
// Rows of bfloat16 are transposed two values at a time.
constexpr bool PAIRS = std::is_same_v<Cached, at::BFloat16> && D % (2 * LANES) == 0;
constexpr int64_t WIDTH = PAIRS ? D / 2 : PADDED;

// One row as float32, filled up with zeros.
inline void widen(const Cached* from, float* to) {
    for (int64_t d = 0; d + LANES <= D; d += LANES) widened(from + d).store(to + d);
    for (int64_t d = D / LANES * LANES; d < PADDED; ++d) to[d] = d < D ? static_cast<float>(from[d]) : 0.0f;
}

// Keys side by side: of `count` rows [count, D] to [WIDTH, CHUNK], in single values or in pairs.
inline void transpose(const Cached* k, int64_t count, float* out) {
    alignas(64) float rows[LANES * WIDTH];
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t here = std::min(LANES, count - first);
        const float* from = rows;
        if (PAIRS && here == LANES) {
            from = reinterpret_cast<const float*>(k + first * D);
        } else {
            for (int64_t s = 0; s < LANES; ++s) {
                float* row = rows + s * WIDTH;
                if (s >= here) std::memset(row, 0, WIDTH * sizeof(float));
                else if constexpr (PAIRS) std::memcpy(row, k + (first + s) * D, WIDTH * sizeof(float));
                else widen(k + (first + s) * D, row);
            }
        }
        for (int64_t d = 0; d < WIDTH; d += LANES) {
            at::vec::transpose_mxn<float, LANES, LANES>(from + d, WIDTH, out + d * CHUNK + first, CHUNK);
        }
    }
}

// Values that are multiplied in pairs, two of bfloat16 in each 32 bits.
using Pair = uint32_t;

// Queries of a task: query r sees the first keys[r] keys, from `before[r]` on. `q` are they in float32, or in pairs.
struct Task {
    const float* q;
    const Pair* pairs;
    const int64_t *before, *keys;
    alignas(64) float sums[SHARE * PADDED] = {};
    float best[SHARE], total[SHARE] = {};
};

// Adds a chunk's values by the scores of `Q` queries to `TILE` vectors of their sums.
template <int64_t Q, int64_t TILE>
inline void add_values(const float* scores, const Cached* v, const float* wide, int64_t count, int64_t d, float* sums) {
    Vec sum[Q * TILE];
    #pragma GCC unroll 24
    for (int64_t n = 0; n < Q * TILE; ++n) sum[n] = Vec::loadu(sums + n / TILE * PADDED + (d + n % TILE) * LANES);
    for (int64_t s = 0; s < count; ++s) {
        #pragma GCC unroll 8
        for (int64_t n = 0; n < TILE; ++n) {
            const int64_t at = (d + n) * LANES;
            const Vec part = wide ? Vec::loadu(wide + s * PADDED + at) : widened(v + s * D + at);
            #pragma GCC unroll 24
            for (int64_t r = 0; r < Q; ++r) {
                sum[r * TILE + n] = at::vec::fmadd(Vec(scores[r * CHUNK + s]), part, sum[r * TILE + n]);
            }
        }
    }
    #pragma GCC unroll 24
    for (int64_t n = 0; n < Q * TILE; ++n) sum[n].store(sums + n / TILE * PADDED + (d + n % TILE) * LANES);
}

// Scores of `R` queries with a chunk of keys, side by side, before scale and cap.
template <int64_t R>
inline void score(const float* q, int64_t count, const float* columns, float* scores) {
    for (int64_t s = 0; s < count; s += LANES) {
        Vec even[R], odd[R];  // two sums, so that one need not wait for the other
        for (int64_t r = 0; r < R; ++r) { even[r] = Vec(0.0f); odd[r] = Vec(0.0f); }
        const auto add = [&](Vec* sums, int64_t d, const Vec& column) {
            #pragma GCC unroll 24
            for (int64_t r = 0; r < R; ++r) sums[r] = at::vec::fmadd(Vec(q[r * D + d]), column, sums[r]);
        };
        for (int64_t d = 0; d + 1 < D; d += 2) {
            if constexpr (PAIRS) {
                const auto [one, other] = unpaired(reinterpret_cast<const Cached*>(columns + d / 2 * CHUNK + s));
                add(even, d, one);
                add(odd, d + 1, other);
            } else {
                add(even, d, Vec::loadu(columns + d * CHUNK + s));
                add(odd, d + 1, Vec::loadu(columns + (d + 1) * CHUNK + s));
            }
        }
        if constexpr (D % 2) add(even, D - 1, Vec::loadu(columns + (D - 1) * CHUNK + s));
        for (int64_t r = 0; r < R; ++r) (even[r] + odd[r]).store(scores + r * CHUNK + s);
    }
}

"""
    + IN_PAIRS
    + r"""
// A chunk of keys and values. `wide` has values as float32, `pairs` two rows at a time; either may be null.
struct Part {
    int64_t first, count;
    const float* columns;
    const Cached* v;
    const float* wide;
    const Pair* pairs;
};

template <int64_t Q, int64_t TILE, bool PAIRED>
inline void add(const float* scores, const Pair* shares, const Part& part, int64_t d, float* sums) {
#if defined(TANDEM_BF16)
    if constexpr (PAIRED) return add_in_pairs<Q, TILE>(shares, part.v, part.pairs, part.count, d, sums);
#endif
    if constexpr (!PAIRED) add_values<Q, TILE>(scores, part.v, part.wide, part.count, d, sums);
}

// `R` queries of a task, from `begin` on, with a chunk.
template <int64_t R, bool PAIRED>
inline void attend(Task& task, int64_t begin, const Part& part) {
    const int64_t *before = task.before + begin, *keys = task.keys + begin, first = part.first;
    float *best = task.best + begin, *total = task.total + begin, *sums = task.sums + begin * PADDED;
    const Vec scale(1.0f / std::sqrt(static_cast<float>(D)));
    alignas(64) float scores[R * CHUNK];
    alignas(64) Pair shares_in_pairs[PAIRED ? R * CHUNK / 2 : 1];
#if defined(TANDEM_BF16)
    if constexpr (PAIRED) score_in_pairs<R>(task.pairs + begin * (D / 2), part.count, part.columns, scores);
#endif
    if constexpr (!PAIRED) score<R>(task.q + begin * D, part.count, part.columns, scores);
    for (int64_t r = 0; r < R; ++r) {
        float* mine = scores + r * CHUNK;
        for (int64_t s = 0; s < part.count; s += LANES) {
            Vec score = Vec::loadu(mine + s) * scale;
            if constexpr (CAPPED) score = (score / Vec(CAP_VALUE)).tanh() * Vec(CAP_VALUE);
            score.store(mine + s);
        }
        for (int64_t s = std::clamp<int64_t>(keys[r] - first, 0, CHUNK); s < CHUNK; ++s) mine[s] = LOWEST;
        if constexpr (WINDOW > 0) std::fill_n(mine, std::clamp<int64_t>(before[r] - first, 0, CHUNK), LOWEST);
        Vec top(best[r]), shares(0.0f);
        for (int64_t s = 0; s < CHUNK; s += LANES) top = at::vec::maximum(top, Vec::loadu(mine + s));
        const float now = at::vec::vec_reduce_all<float>(
            [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
        for (int64_t s = 0; s < CHUNK; s += LANES) {
            const Vec below = Vec::loadu(mine + s) - Vec(now), share = PAIRED ? below.exp_u20() : below.exp();
            share.store(mine + s);
            shares = shares + share;
        }
        const float shrink = std::exp(best[r] - now);
        best[r] = now;
        total[r] = total[r] * shrink
            + at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, shares);
        for (int64_t d = 0; d < PADDED; d += LANES) {
            (Vec::loadu(sums + r * PADDED + d) * Vec(shrink)).store(sums + r * PADDED + d);
        }
#if defined(TANDEM_BF16)
        if constexpr (PAIRED) to_pairs(mine, CHUNK, shares_in_pairs + r * CHUNK / 2);
#endif
    }
    constexpr int64_t TILE = tile(R), SOME = std::min(std::max<int64_t>(REGISTERS / TILE, 1), R);
    for (int64_t d = 0; d < VECTORS; d += TILE) {
        int64_t r = 0;
        const Pair* own = shares_in_pairs;
        for (; r + SOME <= R; r += SOME, own += PAIRED ? SOME * CHUNK / 2 : 0) {
            add<SOME, TILE, PAIRED>(scores + r * CHUNK, own, part, d, sums + r * PADDED);
        }
        if constexpr (R % SOME) add<R % SOME, TILE, PAIRED>(scores + r * CHUNK, own, part, d, sums + r * PADDED);
    }
}

// The first `live` of R queries of a task, from `begin` on, and others if there is no function for so few.
template <int64_t R, bool PAIRED>
inline void attend_live(Task& task, int64_t begin, int64_t live, const Part& part) {
    constexpr int64_t HALF = (R + 1) / 2;
    if constexpr (R > 3) {
        if (live <= HALF) return attend_live<HALF, PAIRED>(task, begin, live, part);
    }
    attend<R, PAIRED>(task, begin, part);
}

// The `C` queries of a task, which see the same keys and values.
template <int64_t C, bool PAIRED>
inline void run(Task& task, const Cached* k, const Cached* v, const float* sinks, Cached* const* out) {
    constexpr bool MANY = C > GROUP, WIDE = !PAIRED && (D % LANES != 0 || MANY);  // converted once for all groups
    alignas(64) float columns[WIDTH * CHUNK], wide[WIDE ? CHUNK * PADDED : 1];
    alignas(64) Pair pairs[PAIRED && MANY ? CHUNK / 2 * D : 1];
    std::fill_n(task.best, C, WINDOW ? LOWEST / 2 : LOWEST);  // above hidden scores, which may come first in a window
    if constexpr (SUNK) {
        std::copy_n(sinks, C, task.best);
        std::fill_n(task.total, C, 1.0f);
    }
    const int64_t all = *std::max_element(task.keys, task.keys + C);
    int64_t live = C;
    const int64_t start = WINDOW ? *std::min_element(task.before, task.before + C) / CHUNK * CHUNK : 0;
    for (int64_t first = start; first < all; first += CHUNK) {
        const int64_t count = std::min(CHUNK, all - first);
        const int64_t slot = RING ? first % RING : first;
        transpose(k + slot * D, count, columns);
        const Cached* values = v + slot * D;
        while (task.keys[live - 1] <= first) --live;  // the last ones may see fewer keys, or be of no meaning
        Part part{first, count, columns, values, nullptr, nullptr};
        if (WIDE && (D % LANES != 0 || live > GROUP)) {
            for (int64_t s = 0; s < count; ++s) widen(values + s * D, wide + s * PADDED);
            part.wide = wide;
        }
#if defined(TANDEM_BF16)
        if constexpr (PAIRED && MANY) {
            if (live > GROUP) {
                values_in_pairs(values, count, pairs);
                part.pairs = pairs;
            }
        }
#endif
        int64_t begin = 0;
        for (; begin + GROUP <= C && begin < live; begin += GROUP) {
            attend_live<GROUP, PAIRED>(task, begin, live - begin, part);
        }
        if constexpr (C % GROUP) {
            if (begin < live) attend<C % GROUP, PAIRED>(task, begin, part);
        }
    }
    for (int64_t r = 0; r < C; ++r) {
        const Vec all(task.total[r]);
        const float* mine = task.sums + r * PADDED;
        constexpr int64_t WHOLE = D / (2 * LANES) * (2 * LANES);
        for (int64_t d = 0; d < WHOLE; d += 2 * LANES) {
            store_both(Vec::loadu(mine + d) / all, Vec::loadu(mine + d + LANES) / all, out[r] + d);
        }
        for (int64_t d = WHOLE; d < D; ++d) out[r][d] = static_cast<Cached>(mine[d] / task.total[r]);
    }
}

template <int64_t C>
inline void run(Task& task, const Cached* k, const Cached* v, const float* sinks, Cached* const* out) {
#if defined(TANDEM_BF16)
    if constexpr (PAIRS && LANES == 16) {
        if (in_pairs()) {
            alignas(64) Pair pairs[C * D / 2];
            to_pairs(task.q, C * D, pairs);
            task.pairs = pairs;
            return run<C, true>(task, k, v, sinks, out);
        }
    }
#endif
    run<C, false>(task, k, v, sinks, out);
}

}

extern "C" SIGNATURE
{
    using namespace NAME_parts;
    #pragma omp parallel for
    for (int64_t place = 0; place < B * G * PARTS; ++place) {
        const int64_t part = place % PARTS, g = place / PARTS % G, b = place / PARTS / G;
        const int64_t first = part * SHARE, count = part + 1 < PARTS ? SHARE : REST;
        int64_t before[SHARE], keys[SHARE];
        float sinks[SHARE];
        Task task;
        Cached* out[SHARE];
        alignas(64) float queries[SHARE * D];
        for (int64_t r = 0; r < count; ++r) {
            // Queries of one token side by side: tokens that are left out, and those that see more keys, are the last.
            const int64_t head = (first + r) % (N / G), t = (first + r) / (N / G), n = g * (N / G) + head;
            std::copy_n(Q + Q_OFFSET + ((b * N + n) * T + t) * D, D, queries + r * D);
            const int64_t last = static_cast<int64_t>(LAST[LAST_OFFSET + b * T + t]) + 1;
            keys[r] = std::max<int64_t>(std::min(S, last), 1);
            before[r] = WINDOW ? std::max<int64_t>(keys[r] - WINDOW, 0) : 0;
            sinks[r] = SINK_OF_HEAD;
            out[r] = Y + ((b * T + t) * N + n) * D;
        }
        task.q = queries;
        task.before = before;
        task.keys = keys;
        const int64_t row = ROW_OF_B;
        const Cached *k = K + (row * G + g) * LENGTH * D, *v = V + (row * G + g) * LENGTH * D;
        if (count == SHARE) run<SHARE>(task, k, v, sinks, out);
        else run<REST>(task, k, v, sinks, out);
    }
}
"""
)


class CachedAttentionTemplate(CppTemplate):
    """The kernel for one shape: `inputs` are q, k, v and last, `optional` are SINKS and ROWS where they are given."""

    def __init__(
        self, inputs: list[Any], optional: dict[str, Any], layout: ir.Layout, constants: dict[str, Any]
    ) -> None:  # fmt: skip
        super().__init__("cached_attention", [*inputs, *optional.values()], layout, num_threads=1)
        self.optional, self.constants = tuple(optional), constants

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """Return the C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        q, k, v, last, *given = self.input_nodes
        optional = dict(zip(self.optional, given, strict=True))
        offsets = {name: node.get_layout().offset for name, node in optional.items()}
        batch, heads, tokens, dim = (int(size) for size in q.get_size())
        inputs, outputs = {"Q": q, "K": k, "V": v, "LAST": last}, {"Y": template_buffer_node or self.output_node}
        inputs |= optional
        parts = self.constants | {
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel(inputs, outputs),
            "NAME": kernel.kernel_name,
            "CACHED_TYPE": kernel.dtype(k),
            "BATCH": batch,
            "QUERY_HEADS": heads,
            "KV_HEADS": int(k.get_size()[1]),
            "TOKENS": tokens,
            "HEAD_SIZE": dim,
            "CACHE_LENGTH": int(k.get_size()[2]),
            "Q_OFFSET": q.get_layout().offset,
            "LAST_OFFSET": last.get_layout().offset,
            "HAS_SINKS": "true" if "SINKS" in optional else "false",
            "SINK_OF_HEAD": f"SINKS[{offsets['SINKS']} + n]" if "SINKS" in optional else "0.0f",
            "ROW_OF_B": f"ROWS[{offsets['ROWS']} + b]" if "ROWS" in optional else "b",
        }
        return filled(KERNEL, parts)


@lowering.register_lowering(torch.ops.tandem.cached_attention, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(  # noqa: PLR0913 - the operator's signature
    q: Any, k: Any, v: Any, last: Any, kv: int, window: int = 0, cap: float = 0.0, sinks: Any = None, rows: Any = None,
    ring: int = 0,
) -> Any:  # fmt: skip
    realized = {
        name: ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(given))
        for name, given in {"Q": q, "K": k, "V": v, "LAST": last, "SINKS": sinks, "ROWS": rows}.items()
        if given is not None
    }
    inputs = [realized.pop(name) for name in ("Q", "K", "V", "LAST")]
    batch, heads, tokens, dim = inputs[0].get_size()
    layout = ir.FixedLayout(inputs[0].get_device(), k.get_dtype(), [batch, tokens, heads, dim])
    constants = {
        "CHUNK_KEYS": CHUNK,
        "KEYS": kv,
        "WINDOW_LENGTH": window,
        "RING_SLOTS": ring,
        "IS_CAPPED": "true" if cap else "false",
        "CAP_VALUE": f"{cap!r}f",
    }
    out = CachedAttentionTemplate(inputs, realized, layout, constants).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out
