"""C++ that our kernels share: conversion of stored dtypes to float32 vectors and back; bfloat16 instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

WIDENED = r"""
using Vec = at::vec::Vectorized<float>;

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

// Two vectors next to each other, rounded to what is stored.
template <typename T>
inline void store_both(const Vec& first, const Vec& second, T* to) {
    if constexpr (std::is_same_v<T, float>) {
        first.store(to);
        second.store(to + Vec::size());
    } else {
        const at::vec::VectorizedN<float, 2> both(first, second);
        at::vec::convert<T, 1, float, 2>(both).store(to, 2 * Vec::size());
    }
}

// Values that lie in pairs, (a0 b0) (a1 b1) ..: all the a, and all the b.
template <typename T>
inline std::pair<Vec, Vec> unpaired(const T* from) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
        const __m512i both = _mm512_loadu_si512(from);
        const __m512i high = _mm512_and_si512(both, _mm512_set1_epi32(0xFFFF0000));
        return {Vec(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))), Vec(_mm512_castsi512_ps(high))};
    }
    if constexpr (std::is_same_v<T, int8_t>) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), high = _mm256_srai_epi16(both, 8);
        const auto wide = [](__m256i half) { return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half))); };
        return {wide(low), wide(high)};
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i high = _mm256_and_si256(both, _mm256_set1_epi32(0xFFFF0000));
        return {Vec(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))), Vec(_mm256_castsi256_ps(high))};
    }
#endif
    __at_align__ float low[Vec::size()], high[Vec::size()];
    for (int64_t lane = 0; lane < Vec::size(); ++lane) {
        low[lane] = static_cast<float>(from[2 * lane]);
        high[lane] = static_cast<float>(from[2 * lane + 1]);
    }
    return {Vec::loadu(low), Vec::loadu(high)};
}
"""


ROW_SUMS = r"""
    Vec low[ROWS], high[ROWS];
    for (int64_t m = 0; m < ROWS; ++m) { low[m] = Vec(0.0f); high[m] = Vec(0.0f); }
    const auto add = [&](int64_t i, const Vec& first, const Vec& second) {
        #pragma GCC unroll 8
        for (int64_t m = 0; m < ROWS; ++m) {
            const Vec one(x[m * I + i]);
            low[m] = at::vec::fmadd(one, first, low[m]);
            high[m] = at::vec::fmadd(one, second, high[m]);
        }
    };
"""
"""The sums of some rows of `x` for the outputs of two vectors, and what adds an input's products to them."""


class Code(NamedTuple):
    """C++ code and its includes."""

    includes: str
    code: str


NATIVE_BFLOAT16 = Code(
    r"""
// GCC knows AMX from version 11 on, clang from 12; both know AVX-512's bfloat16 longer.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TANDEM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define TANDEM_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#endif
""",
    r"""
#if defined(TANDEM_AMX)
// The processor multiplies pairs of bfloat16, and the kernel keeps AVX-512's registers (asked once).
inline bool has_pairs() {
    static const bool found = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq");
    return found;
}

// Tiles 0 to 3 hold sums, 4 and 5 rows of activations, 6 and 7 weights: [rows, 16 x 4 bytes] each.
struct Palette {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
    Palette(int64_t first, int64_t second) {
        const int64_t all[8] = {first, first, second, second, first, second, 16, 16};
        for (int64_t tile = 0; tile < 8; ++tile) rows[tile] = static_cast<uint8_t>(all[tile]);
    }
};

// The processor has AMX for bfloat16, and the kernel lets this process use it (asked once).
inline bool has_tiles() {
    static const bool found = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!has_pairs() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        return tiles && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return found;
}
#endif
""",
)


def filled(code: str, parts: Mapping[str, object]) -> str:
    """Return a kernel's code with its placeholders, in capitals, replaced; values may contain later placeholders."""
    for name, value in parts.items():
        code = code.replace(name, str(value))
    return code
