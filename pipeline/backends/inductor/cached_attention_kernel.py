"""The C++ that `cached_attention` becomes inside a graph. Imported only to compile.

Keys and values of one head are read once, in order, in chunks whose scores stay in the nearest cache; sums are
rescaled where a chunk has a new largest score (Milakov, Gimelshein 2018). Every query's sum runs over its keys in the
same order however many queries and rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

from pipeline.backends.inductor.vectors import WIDENED, filled

KERNEL = (
    r"""
HEADER

namespace NAME_parts {
"""
    + WIDENED
    + r"""
using Cached = CACHED_TYPE;
constexpr int64_t B = BATCH, N = QUERY_HEADS, G = KV_HEADS, T = TOKENS, D = HEAD_SIZE, S = KEYS, LENGTH = CACHE_LENGTH;
constexpr int64_t CHUNK = 64;
constexpr float LOWEST = -3.0e38f;
constexpr bool WHOLE = D % Vec::size() == 0;

inline float product(const float* q, const Cached* k) {
    if constexpr (WHOLE) {
        Vec sum(0.0f);
        for (int64_t d = 0; d < D; d += Vec::size()) sum = at::vec::fmadd(Vec::loadu(q + d), widened(k + d), sum);
        return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
    } else {
        float sum = 0.0f;
        for (int64_t d = 0; d < D; ++d) sum += q[d] * static_cast<float>(k[d]);
        return sum;
    }
}

inline void add(float* sum, float share, const Cached* v) {
    if constexpr (WHOLE) {
        for (int64_t d = 0; d < D; d += Vec::size()) {
            at::vec::fmadd(Vec(share), widened(v + d), Vec::loadu(sum + d)).store(sum + d);
        }
    } else {
        for (int64_t d = 0; d < D; ++d) sum[d] += share * static_cast<float>(v[d]);
    }
}

inline void attend(const float* q, const Cached* k, const Cached* v, int64_t keys, float* out) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(D));
    alignas(64) float sum[D] = {}, scores[CHUNK];
    float best = LOWEST, total = 0.0f;
    for (int64_t first = 0; first < keys; first += CHUNK) {
        const int64_t count = std::min(CHUNK, keys - first);
        float top = best;
        for (int64_t s = 0; s < count; ++s) {
            scores[s] = product(q, k + (first + s) * D) * scale;
            top = std::max(top, scores[s]);
        }
        for (int64_t s = count; s < CHUNK; ++s) scores[s] = LOWEST;
        for (int64_t s = 0; s < CHUNK; s += Vec::size()) (Vec::loadu(scores + s) - Vec(top)).exp().store(scores + s);
        const float shrink = std::exp(best - top);
        total *= shrink;
        for (int64_t d = 0; d < D; ++d) sum[d] *= shrink;
        for (int64_t s = 0; s < count; ++s) {
            total += scores[s];
            add(sum, scores[s], v + (first + s) * D);
        }
        best = top;
    }
    for (int64_t d = 0; d < D; ++d) out[d] = sum[d] / total;
}

}

extern "C" SIGNATURE
{
    using namespace NAME_parts;
    #pragma omp parallel for
    for (int64_t place = 0; place < B * N; ++place) {
        const int64_t b = place / N, n = place % N, cache = (b * G + n / (N / G)) * LENGTH * D;
        for (int64_t t = 0; t < T; ++t) {
            const int64_t keys = std::min<int64_t>(S, static_cast<int64_t>(LAST[LAST_OFFSET + b * T + t]) + 1);
            attend(Q + Q_OFFSET + (place * T + t) * D, K + cache, V + cache, std::max<int64_t>(keys, 1),
                   Y + ((b * T + t) * N + n) * D);
        }
    }
}
"""
)


class CachedAttentionTemplate(CppTemplate):
    """The kernel for one shape."""

    def __init__(self, inputs: list[Any], layout: ir.Layout, kv: int) -> None:
        super().__init__("cached_attention", inputs, layout, num_threads=1)
        self.kv = kv

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        q, k, v, last = self.input_nodes
        batch, heads, tokens, dim = (int(size) for size in q.get_size())
        inputs, outputs = {"Q": q, "K": k, "V": v, "LAST": last}, {"Y": template_buffer_node or self.output_node}
        parts = {
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel(inputs, outputs),
            "NAME": kernel.kernel_name,
            "CACHED_TYPE": kernel.dtype(k),
            "BATCH": batch,
            "QUERY_HEADS": heads,
            "KV_HEADS": int(k.get_size()[1]),
            "TOKENS": tokens,
            "HEAD_SIZE": dim,
            "KEYS": self.kv,
            "CACHE_LENGTH": int(k.get_size()[2]),
            "Q_OFFSET": q.get_layout().offset,
            "LAST_OFFSET": last.get_layout().offset,
        }
        return filled(KERNEL, parts)


@lowering.register_lowering(torch.ops.tandem.cached_attention, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(q: Any, k: Any, v: Any, last: Any, kv: int) -> Any:
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in (q, k, v, last)]
    batch, heads, tokens, dim = inputs[0].get_size()
    layout = ir.FixedLayout(inputs[0].get_device(), torch.float32, [batch, tokens, heads, dim])
    out = CachedAttentionTemplate(inputs, layout, kv).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out
