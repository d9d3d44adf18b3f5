"""C++ of the loops of `block_linear_kernel` over blocks and rows. Imported only to compile.

Rows that are not live are skipped when a graph runs: padding of a prompt, slots without a request. The time of many
rows is in proportion to them, and a graph's shapes need not say how many there are.
"""

ROWS = r"""
constexpr bool IS_LIVE = HAS_LIVE;
constexpr int64_t SPARE_ROWS = 32;  // of the largest tile

// The rows that are computed: how many, one after another, and the place of each (null: all M rows, in order).
struct Rows {
    int64_t count = M;
    const int64_t* places = nullptr;
};

// The live rows of x: where they lie if they are the first ones, with room after them for a tile's other rows, else
// gathered. Results of the others are zeros.
struct LiveRows {
    std::vector<int64_t> places;
    std::unique_ptr<Input[]> gathered;
    const Input* x;
    LiveRows(const Input* all, const bool* live, Output* y) : x(all) {
        places.reserve(M);
        for (int64_t m = 0; m < M; ++m) {
            if (live[m]) places.push_back(m);
            else std::memset(y + m * N, 0, N * sizeof(Output));
        }
        const int64_t count = places.size();
        if (count == 0 || count == M || (places.back() == count - 1 && count + SPARE_ROWS <= M)) return;
        gathered.reset(new Input[(count + SPARE_ROWS) * I]);  // not initialised: a tile's other rows have no meaning
        for (int64_t n = 0; n < count; ++n) std::memcpy(&gathered[n * I], all + places[n] * I, I * sizeof(Input));
        x = gathered.get();
    }
    Rows rows() const {
        const int64_t count = places.size();
        return count == M ? Rows{} : Rows{count, places.data()};
    }
};

// Some rows times one block, or the same block of both weights. `Way` multiplies: at most `Way::TILE` rows at a time.
template <typename Way, int64_t ROWS, int64_t STRIDE>
inline void rows_times_block(const typename Way::Row* x, const Weight* const* weights, int64_t block, Output* out) {
    if constexpr (GATED) {
        alignas(64) float gate[ROWS * LANES], up[ROWS * LANES];
        Way::template times<ROWS, LANES>(x, weights[0] + block * BLOCK_SIZE, gate);
        Way::template times<ROWS, LANES>(x, weights[1] + block * BLOCK_SIZE, up);
        for (int64_t m = 0; m < ROWS; ++m) gated(gate + m * LANES, up + m * LANES, out + m * STRIDE);
    } else {
        Way::template times<ROWS, STRIDE>(x, block_at(weights, block), out);
    }
}

// `count` rows, at most ROWS of them, whose results go to `places`; x has ROWS rows, some of them of no meaning.
template <typename Way, int64_t ROWS>
inline void placed_rows(const typename Way::Row* x, const Weight* const* weights, int64_t block, Output* y,
                        const int64_t* places, int64_t count) {
    constexpr int64_t HALF = (ROWS + 1) / 2;
    if constexpr (ROWS > 3) {
        if (count <= HALF) return placed_rows<Way, HALF>(x, weights, block, y, places, count);
    }
    alignas(64) Output out[ROWS * LANES];
    rows_times_block<Way, ROWS, LANES>(x, weights, block, out);
    for (int64_t m = 0; m < count; ++m) {
        std::memcpy(y + places[m] * N + block * LANES, out + m * LANES, LANES * sizeof(Output));
    }
}

template <typename Way>
inline void all_blocks(const typename Way::Row* x, const Weight* const* weights, Output* y, const Rows& rows) {
    constexpr int64_t TILE = Way::TILE, WHOLE = M / TILE * TILE;
    #pragma omp parallel for
    for (int64_t block = 0; block < BLOCKS; ++block) {
        if (IS_LIVE && rows.places != nullptr) {
            for (int64_t m = 0; m < rows.count; m += TILE) {
                placed_rows<Way, TILE>(x + m * I, weights, block, y, rows.places + m, std::min(TILE, rows.count - m));
            }
            continue;
        }
        Output* out = y + block * LANES;
        for (int64_t m = 0; m < WHOLE; m += TILE) {
            rows_times_block<Way, TILE, N>(x + m * I, weights, block, out + m * N);
        }
        if constexpr (M > WHOLE) rows_times_block<Way, M - WHOLE, N>(x + WHOLE * I, weights, block, out + WHOLE * N);
    }
}
"""

ALL_ROWS = "const Rows rows;"
LIVE_ROWS = r"""const LiveRows of_live(x, LIVE + LIVE_OFFSET, Y);
    const Rows rows = of_live.rows();
    if (rows.count == 0) return;
    x = of_live.x;"""
