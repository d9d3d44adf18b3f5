"""C++ of `cached_attention` where the processor multiplies pairs of bfloat16: scores, and sums of values.

Queries, and the shares of a chunk's keys, are rounded to bfloat16; sums are float32. That is what torch's attention
does in bfloat16, and takes half the products. Imported only to compile.
"""

IN_PAIRS = r"""
#if defined(TANDEM_BF16)
// The processor's products of pairs: queries and shares are rounded to bfloat16, sums are float32.
inline bool in_pairs() { return PAIRS && LANES == 16 && has_pairs(); }

TANDEM_BF16 inline __m512bh broadcast(Pair pair) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
}

TANDEM_BF16 inline void to_pairs(const float* from, int64_t count, Pair* to) {
    for (int64_t n = 0; n < count; n += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + n + 16), _mm512_loadu_ps(from + n));
        _mm512_storeu_si512(to + n / 2, reinterpret_cast<__m512i>(both));
    }
}

template <int64_t R>
TANDEM_BF16 void score_in_pairs(const Pair* q, int64_t count, const float* columns, float* scores) {
    for (int64_t s = 0; s < count; s += 16) {
        __m512 even[R], odd[R];
        for (int64_t r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
        for (int64_t d = 0; d < D / 2; d += 2) {
            const __m512bh one = reinterpret_cast<__m512bh>(_mm512_loadu_ps(columns + d * CHUNK + s));
            const __m512bh other = reinterpret_cast<__m512bh>(_mm512_loadu_ps(columns + (d + 1) * CHUNK + s));
            #pragma GCC unroll 24
            for (int64_t r = 0; r < R; ++r) even[r] = _mm512_dpbf16_ps(even[r], broadcast(q[r * (D / 2) + d]), one);
            #pragma GCC unroll 24
            for (int64_t r = 0; r < R; ++r) odd[r] = _mm512_dpbf16_ps(odd[r], broadcast(q[r * (D / 2) + d + 1]), other);
        }
        for (int64_t r = 0; r < R; ++r) _mm512_storeu_ps(scores + r * CHUNK + s, _mm512_add_ps(even[r], odd[r]));
    }
}

// Two rows of values as pairs.
TANDEM_BF16 inline __m512i rows_in_pairs(const Cached* v, int64_t s, int64_t count, int64_t at) {
    const auto wide = [](const Cached* from) TANDEM_BF16 {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    const __m512i low = wide(v + s * D + at);
    return s + 1 < count ? _mm512_or_si512(low, _mm512_slli_epi32(wide(v + (s + 1) * D + at), 16)) : low;
}

TANDEM_BF16 inline void values_in_pairs(const Cached* v, int64_t count, Pair* to) {
    for (int64_t s = 0; s < count; s += 2) {
        for (int64_t d = 0; d < D; d += 16) _mm512_storeu_si512(to + s / 2 * D + d, rows_in_pairs(v, s, count, d));
    }
}

// As `add_values`; `pairs` has the values of a chunk, or is null.
template <int64_t Q, int64_t TILE>
TANDEM_BF16 void add_in_pairs(
    const Pair* shares, const Cached* v, const Pair* pairs, int64_t count, int64_t d, float* sums
) {
    __m512 sum[Q * TILE];
    #pragma GCC unroll 24
    for (int64_t n = 0; n < Q * TILE; ++n) sum[n] = _mm512_loadu_ps(sums + n / TILE * PADDED + (d + n % TILE) * 16);
    for (int64_t s = 0; s < count; s += 2) {
        #pragma GCC unroll 8
        for (int64_t n = 0; n < TILE; ++n) {
            const int64_t at = (d + n) * 16;
            const __m512i both = pairs ? _mm512_loadu_si512(pairs + s / 2 * D + at) : rows_in_pairs(v, s, count, at);
            const __m512bh part = reinterpret_cast<__m512bh>(both);
            #pragma GCC unroll 24
            for (int64_t r = 0; r < Q; ++r) {
                const int64_t own = r * TILE + n;
                sum[own] = _mm512_dpbf16_ps(sum[own], broadcast(shares[r * (CHUNK / 2) + s / 2]), part);
            }
        }
    }
    #pragma GCC unroll 24
    for (int64_t n = 0; n < Q * TILE; ++n) _mm512_storeu_ps(sums + n / TILE * PADDED + (d + n % TILE) * 16, sum[n]);
}
#else
inline bool in_pairs() { return false; }
#endif

"""
