"""C++ of `sample_all`, and its registration with Inductor. Imported only to compile.

Without top-k and top-p a row is read three times: for the best score, for the tokens that noise can still make the best
one, and for their noise. The lowest kept score of top-k is found by selection (Hoare 1961), that of top-p by the same
on masses: a pivot splits the tokens, and the half with the border is split again.
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
#include <limits>
#include <vector>

namespace NAME_parts {
constexpr int64_t ROWS = ROW_COUNT, V = VOCABULARY;
constexpr uint32_t CONSTANTS[] = {ROUND_CONSTANTS};
// Noise is between -2.82 and 32.7: a token whose score is lower than the best by more cannot win.
constexpr float REACH = 36.0f;

inline uint32_t rotated(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

inline float gumbel(uint32_t low, uint32_t high, uint32_t position, uint32_t name) {
    uint32_t x = name, y = position, number = 0;
    for (const uint32_t constant : CONSTANTS) {
        const uint32_t key = (number++ % 2 ? high : low) ^ constant;
        const uint32_t next = y ^ (rotated(x, 1) & rotated(x, 8)) ^ rotated(x, 2) ^ key;
        y = x;
        x = next;
    }
    const float small = 1.0f / (1 << 23);
    float uniform = (static_cast<float>(x >> 9) + (static_cast<float>(y >> 9) + 0.5f) * small) * small;
    uniform = std::min(uniform, LARGEST_BELOW_1);
    const float series = uniform * (1.0f + uniform * (0.5f + uniform / 3.0f));
    return -std::log(uniform < 1e-2f ? series : -std::log(1.0f - uniform));
}

// The lowest score of the smallest set of scores whose mass reaches `share` of all, with equal scores together.
inline float lowest_of_mass(std::vector<float>& scores, float best, double share) {
    const auto mass_of = [&](auto first, auto last) {
        double mass = 0.0;
        for (auto at = first; at != last; ++at) mass += std::exp(*at - best);
        return mass;
    };
    auto first = scores.begin(), last = scores.end();
    double wanted = share * mass_of(first, last), before = 0.0;
    while (last - first > 1) {
        const float low = *std::min_element(first, last), high = *std::max_element(first, last);
        if (low == high) break;
        const float pivot = std::max(low + (high - low) * 0.5f, std::nextafter(low, high));
        const auto middle = std::partition(first, last, [&](float score) { return score >= pivot; });
        const double mass = mass_of(first, middle);
        if (before + mass >= wanted) {
            last = middle;
        } else {
            before += mass;
            first = middle;
        }
    }
    return *first;
}

inline int64_t first_best(const float* logits) {
    int64_t best = 0;
    for (int64_t id = 1; id < V; ++id) best = logits[id] > logits[best] ? id : best;
    return best;
}

struct Row {
    float temperature, top_p;
    int32_t top_k;
    uint32_t low, high, position;
};

inline int64_t sampled(const float* logits, const int32_t* names, const Row& row) {
    if (!(row.temperature > 0.0f)) return first_best(logits);
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t id = 0; id < V; ++id) best = std::max(best, logits[id] / row.temperature);
    float lowest = best - REACH;
    const bool counts = row.top_k > 0 && row.top_k < V, weighs = row.top_p < 1.0f;
    if (counts || weighs) {
        std::vector<float> kept;
        const float floor = best - 104.0f;  // lower scores have the mass 0 in float32
        kept.reserve(V);
        for (int64_t id = 0; id < V; ++id) {
            const float score = logits[id] / row.temperature;
            if (score >= floor) kept.push_back(score);
        }
        float border = floor;
        if (counts && row.top_k < static_cast<int64_t>(kept.size())) {
            std::nth_element(kept.begin(), kept.begin() + (row.top_k - 1), kept.end(), std::greater<float>());
            border = kept[row.top_k - 1];
            const auto below = [&](float score) { return score < border; };
            kept.erase(std::remove_if(kept.begin(), kept.end(), below), kept.end());
        }
        if (weighs) border = lowest_of_mass(kept, best, row.top_p);
        lowest = std::max(lowest, border);
    }
    int64_t winner = 0;
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t id = 0; id < V; ++id) {
        const float score = logits[id] / row.temperature;
        if (score < lowest) continue;
        const float noisy = score + gumbel(row.low, row.high, row.position, static_cast<uint32_t>(names[id]));
        if (noisy > highest) {
            highest = noisy;
            winner = id;
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
            static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[1]),
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
