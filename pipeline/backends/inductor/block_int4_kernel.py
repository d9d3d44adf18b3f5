"""C++ of products with 4-bit weights: the parts of `block_linear_kernel` that read a block. Imported only to compile.

A group of 32 inputs is 512 bytes of codes and 32 float16 scales, one for each output (`graphs/packing.py`). Byte
`2 * lane + n` of 32 has the codes of input `n` of a pair: the low four bits of output `lane`, the high ones of output
`lane + 16`. So 32 bytes, widened to words, are two indices into a table of bfloat16 pairs, or four shifts.

Sums of a group are scaled, then added. Processors with AMX use AVX-512's products of pairs: a tile adds up before it
could be scaled.
"""

from __future__ import annotations

GROUPS = r"""
constexpr int64_t GROUP = 32, PAIR_BYTES = 32, CODE_BYTES = GROUP / 2 * PAIR_BYTES, GROUP_BYTES = CODE_BYTES + 64;
static_assert(I % GROUP == 0);
inline const at::Half* scales_at(const Weight* group) { return reinterpret_cast<const at::Half*>(group + CODE_BYTES); }
"""

VECTORS = (
    GROUPS
    + r"""
// Codes of a pair, at `lane` and the lanes after it: of input 0 and of input 1, and the same 16 lanes further on.
struct Codes { Vec first, second, first_high, second_high; };
inline Codes codes_at(const Weight* pair, int64_t lane) {
    const Weight* from = pair + 2 * lane;
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i mask = _mm512_set1_epi32(15);
    const auto bits = [&](int shift) { return _mm512_and_si512(_mm512_srli_epi32(words, shift), mask); };
    const auto at = [&](int shift) { return Vec(_mm512_cvtepi32_ps(bits(shift))); };
    return {at(0), at(8), at(4), at(12)};
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i mask = _mm256_set1_epi32(15);
    const auto bits = [&](int shift) { return _mm256_and_si256(_mm256_srli_epi32(words, shift), mask); };
    const auto at = [&](int shift) { return Vec(_mm256_cvtepi32_ps(bits(shift))); };
    return {at(0), at(8), at(4), at(12)};
#else
    __at_align__ float wide[4][Vec::size()];
    for (int64_t n = 0; n < Vec::size(); ++n) {
        const int first = from[2 * n], second = from[2 * n + 1];
        wide[0][n] = first & 15; wide[1][n] = second & 15; wide[2][n] = first >> 4; wide[3][n] = second >> 4;
    }
    return {Vec::loadu(wide[0]), Vec::loadu(wide[1]), Vec::loadu(wide[2]), Vec::loadu(wide[3])};
#endif
}

// Some rows times the outputs `lane` and after, and those 16 further on. A code times its scale is exact in float32.
template <int64_t ROWS, int64_t STRIDE>
inline void rows_times_lanes(const float* x, const Weight* w, int64_t lane, float* out) {
    ROW_SUMS
    for (int64_t i = 0; i < I; i += GROUP, w += GROUP_BYTES) {
        const Vec scale = widened(scales_at(w) + lane), scale_high = widened(scales_at(w) + lane + 16);
        const Vec eight = scale * Vec(8.0f), eight_high = scale_high * Vec(8.0f);
        const auto value = [&](const Vec& code) { return at::vec::fmsub(code, scale, eight); };
        const auto value_high = [&](const Vec& code) { return at::vec::fmsub(code, scale_high, eight_high); };
        for (int64_t n = 0; n < GROUP; n += 2) {
            const Codes codes = codes_at(w + n / 2 * PAIR_BYTES, lane);
            add(i + n, value(codes.first), value_high(codes.first_high));
            add(i + n + 1, value(codes.second), value_high(codes.second_high));
        }
    }
    for (int64_t m = 0; m < ROWS; ++m) {
        low[m].store(out + m * STRIDE);
        high[m].store(out + m * STRIDE + 16);
    }
}

struct ByVectors {
    using Row = float;
    static constexpr int64_t TILE = Vec::size() >= 16 ? 8 : 4;
    template <int64_t ROWS, int64_t STRIDE>
    static inline void times(const float* x, const Weight* w, float* out) {
        for (int64_t lane = 0; lane < 16; lane += Vec::size()) rows_times_lanes<ROWS, STRIDE>(x, w, lane, out + lane);
    }
};
"""
)

PAIRS = r"""
#if defined(TANDEM_BF16)
// The bfloat16 of codes 0 to 15, twice: an index of five bits may have any fifth.
TANDEM_BF16 inline __m512i table() {
    alignas(64) at::BFloat16 values[32];
    for (int n = 0; n < 32; ++n) values[n] = float(n % 16 - 8);
    return _mm512_load_si512(values);
}

struct ByPairs {
    using Row = at::BFloat16;
    // Rows whose sums fit in registers: two vectors of a group's sums, and two of the whole ones.
    static constexpr int64_t PARTS = (M + 5) / 6, TILE = (M + PARTS - 1) / PARTS;
    template <int64_t ROWS, int64_t STRIDE>
    TANDEM_BF16 static inline void times(const at::BFloat16* x, const Weight* w, float* out) {
        const __m512i codes = table();
        __m512 low[ROWS], high[ROWS];
        for (int64_t m = 0; m < ROWS; ++m) { low[m] = _mm512_setzero_ps(); high[m] = _mm512_setzero_ps(); }
        for (int64_t i = 0; i < I; i += GROUP, w += GROUP_BYTES) {
            __m512 part[ROWS], part_high[ROWS];
            for (int64_t m = 0; m < ROWS; ++m) { part[m] = _mm512_setzero_ps(); part_high[m] = _mm512_setzero_ps(); }
            for (int64_t n = 0; n < GROUP; n += 2) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + n / 2 * PAIR_BYTES));
                const __m512i words = _mm512_cvtepu8_epi16(bytes);
                const __m512bh first = (__m512bh)_mm512_permutexvar_epi16(words, codes);
                const __m512bh second = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), codes);
                #pragma GCC unroll 8
                for (int64_t m = 0; m < ROWS; ++m) {
                    int32_t two;
                    std::memcpy(&two, x + m * I + i + n, sizeof two);
                    const __m512bh one = (__m512bh)_mm512_set1_epi32(two);
                    part[m] = _mm512_dpbf16_ps(part[m], one, first);
                    part_high[m] = _mm512_dpbf16_ps(part_high[m], one, second);
                }
            }
            const __m256i* halves = reinterpret_cast<const __m256i*>(w + CODE_BYTES);
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
            const __m512 scale_high = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
            for (int64_t m = 0; m < ROWS; ++m) {
                low[m] = _mm512_fmadd_ps(part[m], scale, low[m]);
                high[m] = _mm512_fmadd_ps(part_high[m], scale_high, high[m]);
            }
        }
        for (int64_t m = 0; m < ROWS; ++m) {
            _mm512_storeu_ps(out + m * STRIDE, low[m]);
            _mm512_storeu_ps(out + m * STRIDE + 16, high[m]);
        }
    }
};
#endif
"""

BY_PAIRS = (
    PAIRS
    + r"""
#if defined(TANDEM_BF16)
inline bool by_pairs(const Input* x, const Weight* const* weights, Output* y, const Rows& rows) {
    if (!has_pairs()) return false;
    all_blocks<ByPairs>(x, weights, y, rows);
    return true;
}
#else
inline bool by_pairs(const Input*, const Weight* const*, Output*, const Rows&) { return false; }
#endif
"""
)
