"""C++ of `sample_all`, and its registration with Inductor. Imported only to compile.

Scores are counted and weighed in bins by their distance from the best; only the bin with the border of top-k or top-p
is sorted. Noise is computed where a token can still win: for the others the first random word is too large.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.lowering as lowering  # before what follows: inductor's modules import each other
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate

from pipeline.backends.inductor.vectors import filled
from pipeline.speculation.noise import CONSTANTS, LARGEST

KERNEL = r"""
HEADER
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

namespace NAME_parts {
using Vec = at::vec::Vectorized<float>;
constexpr int64_t ROWS = ROW_COUNT, V = VOCABULARY, LANES = Vec::size(), CHUNK = 64;
constexpr int64_t PADDED = (V + CHUNK - 1) / CHUNK * CHUNK;
constexpr uint32_t CONSTANTS[] = {ROUND_CONSTANTS};
constexpr float LOWEST = -std::numeric_limits<float>::infinity();
// Scores that are lower than the best by 104 have the mass 0 in float32.
constexpr float REACH = 104.0f;
constexpr int64_t BINS = 3328, BINS_PER_UNIT = 32;

typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int64_t WORDS = sizeof(Words) / sizeof(uint32_t);

template <int BITS>
inline Words rotated(Words x) { return (x << BITS) | (x >> (32 - BITS)); }

// Both words of a chunk of names.
inline void hash(const int32_t* names, const uint32_t* keys, uint32_t position, uint32_t* first, uint32_t* second) {
    for (int64_t at = 0; at < CHUNK; at += WORDS) {
        Words x, y = Words{} + position;
        std::memcpy(&x, names + at, sizeof(Words));
        #pragma GCC unroll 32
        for (int round = 0; round < static_cast<int>(std::size(CONSTANTS)); ++round) {
            const Words before = x;
            x = y ^ (rotated<1>(x) & rotated<8>(x)) ^ rotated<2>(x) ^ (keys[round % 2] ^ CONSTANTS[round]);
            y = before;
        }
        std::memcpy(first + at, &x, sizeof(Words));
        std::memcpy(second + at, &y, sizeof(Words));
    }
}

inline float gumbel(uint32_t x, uint32_t y) {
    const float step = 1.0f / (1 << 23);
    float uniform = (static_cast<float>(x >> 9) + (static_cast<float>(y >> 9) + 0.5f) * step) * step;
    uniform = std::min(uniform, LARGEST_BELOW_1);
    const float series = uniform * (1.0f + uniform * (0.5f + uniform / 3.0f));
    return -std::log(uniform < 1e-2f ? series : -std::log(1.0f - uniform));
}

// Scores of a row, and their number and mass by their distance from the best.
struct Scores {
    std::vector<float> values = std::vector<float>(PADDED, LOWEST);
    std::vector<double> mass;
    std::vector<int32_t> counts;
    float best = LOWEST;

    void read(const float* logits, float temperature) {
        const Vec divisor(temperature);
        Vec top(LOWEST);
        int64_t id = 0;
        for (; id + LANES <= V; id += LANES) {
            const Vec score = Vec::loadu(logits + id) / divisor;
            score.store(values.data() + id);
            top = at::vec::maximum(top, score);
        }
        best = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
        for (; id < V; ++id) best = std::max(best, values[id] = logits[id] / temperature);
    }

    static int64_t bin_of(float distance) {
        return std::min(static_cast<int64_t>(distance * BINS_PER_UNIT), BINS - 1);
    }

    void count() {
        mass.assign(BINS, 0.0);
        counts.assign(BINS, 0);
        alignas(64) float shares[CHUNK];
        for (int64_t first = 0; first < PADDED; first += CHUNK) {
            for (int64_t at = 0; at < CHUNK; at += LANES) {
                (Vec::loadu(values.data() + first + at) - Vec(best)).exp().store(shares + at);
            }
            for (int64_t at = 0; at < CHUNK; ++at) {
                const float distance = best - values[first + at];
                if (!(distance <= REACH)) continue;
                const int64_t bin = bin_of(distance);
                mass[bin] += shares[at];
                ++counts[bin];
            }
        }
    }

    // The scores of a bin that are at least `least`, the highest first.
    std::vector<float> in_bin(int64_t bin, float least) const {
        std::vector<float> found;
        for (const float score : values) {
            if (score >= least && best - score <= REACH && bin_of(best - score) == bin) found.push_back(score);
        }
        std::sort(found.begin(), found.end(), std::greater<float>());
        return found;
    }

    float mass_of(float score) const { return std::exp(score - best); }

    // The lowest score that top-k, then top-p keep; equal scores are kept together.
    float lowest_kept(int64_t top_k, float top_p) {
        count();
        float least = best - REACH;
        double whole = 0.0;
        int64_t seen = 0;
        for (int64_t bin = 0; bin < BINS; ++bin) {
            if (top_k > 0 && seen + counts[bin] >= top_k) {
                const auto found = in_bin(bin, LOWEST);
                least = found[top_k - seen - 1];
                for (const float score : found) whole += score >= least ? mass_of(score) : 0.0;
                break;
            }
            seen += counts[bin];
            whole += mass[bin];
        }
        if (!(top_p < 1.0f)) return least;
        const double wanted = top_p * whole;
        double before = 0.0;
        for (int64_t bin = 0; bin < BINS; ++bin) {
            if (before + mass[bin] < wanted) {
                before += mass[bin];
                continue;
            }
            const auto found = in_bin(bin, least);
            for (const float score : found) {
                before += mass_of(score);
                if (before >= wanted) return score;
            }
            return found.empty() ? least : found.back();
        }
        return least;
    }
};

inline int64_t first_best(const float* logits) {
    int64_t best = 0;
    for (int64_t id = 1; id < V; ++id) best = logits[id] > logits[best] ? id : best;
    return best;
}

struct Row {
    float temperature, top_p;
    int32_t top_k;
    uint32_t keys[2], position;
};

inline int64_t sampled(const float* logits, const int32_t* names, const Row& row) {
    if (!(row.temperature > 0.0f)) return first_best(logits);
    thread_local Scores scores;
    scores.read(logits, row.temperature);
    const bool limited = (row.top_k > 0 && row.top_k < V) || row.top_p < 1.0f;
    const float lowest = limited ? scores.lowest_kept(row.top_k < V ? row.top_k : 0, row.top_p) : scores.best - REACH;
    int64_t winner = 0;
    float highest = LOWEST;
    alignas(64) uint32_t x[CHUNK], y[CHUNK];
    int32_t rest[CHUNK] = {};
    for (int64_t first = 0; first < V; first += CHUNK) {
        const float* here = scores.values.data() + first;
        Vec tops(LOWEST);
        for (int64_t at = 0; at < CHUNK; at += LANES) tops = at::vec::maximum(tops, Vec::loadu(here + at));
        const float top = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, tops);
        if (top < lowest || top + 32.7f < highest) continue;
        const int64_t count = std::min(CHUNK, V - first);
        const int32_t* chunk = names + first;
        if (count < CHUNK) chunk = std::copy_n(chunk, count, rest) - count;
        hash(chunk, row.keys, row.position, x, y);
        // A score wins by noise above `highest - score`, for which the first word has to be small.
        const float needed = std::exp(top - highest) * (1 << 23) * 1.01f + 2.0f;
        const uint32_t most = needed < (1 << 23) ? static_cast<uint32_t>(needed) : (1 << 23);
        uint32_t smallest = ~0u;
        for (int64_t at = 0; at < count; ++at) smallest = std::min(smallest, x[at] >> 9);
        if (smallest > most) continue;
        for (int64_t at = 0; at < count; ++at) {
            if (x[at] >> 9 > most || here[at] < lowest) continue;
            const float noisy = here[at] + gumbel(x[at], y[at]);
            if (noisy > highest) {
                highest = noisy;
                winner = first + at;
            }
        }
    }
    return winner;
}
}

extern "C" SIGNATURE
{
    using namespace NAME_parts;
    #pragma omp parallel for
    for (int64_t m = 0; m < ROWS; ++m) {
        const int32_t* seed = SEED + SEED_OFFSET + 2 * m;
        const Row row{
            TEMPERATURE[TEMPERATURE_OFFSET + m], TOP_P[TOP_P_OFFSET + m], TOP_K[TOP_K_OFFSET + m],
            {static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[1])},
            static_cast<uint32_t>(POSITION[POSITION_OFFSET + m])};
        Y[m] = sampled(LOGITS + LOGITS_OFFSET + m * V, NAMES + NAMES_OFFSET, row);
    }
}
"""

OPERANDS = ("LOGITS", "TEMPERATURE", "TOP_K", "TOP_P", "SEED", "POSITION", "NAMES")


class SampleAllTemplate(CppTemplate):
    """The kernel for one shape."""

    def __init__(self, inputs: list[Any], layout: ir.Layout) -> None:
        super().__init__("sample_all", inputs, layout, num_threads=1)

    def render(self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any) -> str:
        """Return the C++ of the kernel."""
        assert not epilogue_nodes, epilogue_nodes
        operands = dict(zip(OPERANDS, self.input_nodes, strict=True))
        rows, size = (int(of) for of in operands["LOGITS"].get_size())
        parts: dict[str, Any] = {
            "HEADER": self.header().getvalue(),
            "SIGNATURE": kernel.def_kernel(operands, {"Y": template_buffer_node or self.output_node}),
            "NAME_parts": f"{kernel.kernel_name}_parts",
            "ROW_COUNT": rows,
            "VOCABULARY": size,
            "ROUND_CONSTANTS": ", ".join(f"{constant & 0xFFFFFFFF}u" for constant in CONSTANTS),
            "LARGEST_BELOW_1": f"{LARGEST!r}f",
            **{f"{name}_OFFSET": operand.get_layout().offset for name, operand in operands.items()},
        }
        return filled(KERNEL, parts)


@lowering.register_lowering(torch.ops.tandem.sample_all, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(*operands: Any) -> Any:
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in operands]
    layout = ir.FixedLayout(inputs[0].get_device(), torch.int64, [inputs[0].get_size()[0]])
    out = SampleAllTemplate(inputs, layout).generate().output_node()
    out.data.data.allow_epilogue_fusion = False
    return out
