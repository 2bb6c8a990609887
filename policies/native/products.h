// Products of a few rows with a panel of a weight, and of all panels of one that stays in the cache, on one core.
//
// A weight [columns][k] lies in panels of 32 columns, [panel][k / pack words][32]. Every sum is one chain over k, whatever the
// tile, so that a row's result does not depend on the others.
#pragma once

#include "arithmetic.h"
#include "words.h"

namespace {

// Sums, weights and a factor in the registers: 12 rows of a whole panel in 32 of them, 6 of half a panel in 16 smaller ones.
constexpr int kMostRows = kRegisters == 32 ? 12 : 6;
constexpr int kMostSums = kRegisters == 32 ? 24 : 6;

template <typename T>
int64_t panel_words(int64_t k) { return (k + kPack<T> - 1) / kPack<T>; }

template <typename T, int R>
struct Sums { Sum<T> of[R][2]; };

// sum [R][C] += x [R][words] times C * 16 columns of a panel
template <typename T, int R, int C>
inline void add_products(const uint32_t* x, int64_t stride, int64_t words, const uint32_t* panel, Sum<T> (&sum)[R][C]) {
    for (int64_t w = 0; w < words; ++w) {
        Words weight[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) weight[c] = load_words(panel + w * kPanel + kLanes * c);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const uint32_t factor = x[r * stride + w];
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) sum[r][c] = multiply_add<T>(sum[r][c], factor, weight[c]);
        }
    }
}

// Not inlined: next to what follows, the compiler runs out of registers.
template <typename T, int R>
__attribute__((noinline)) void product_sums(const uint32_t* x, int64_t stride, int64_t words, const uint32_t* panel,
                                            Sums<T, R>* to) {
    constexpr int C = 2 * R > kMostSums ? 1 : 2;
    for (int from = 0; from < 2; from += C) {
        Sum<T> sum[R][C] = {};
        add_products<T, R, C>(x, stride, words, panel + kLanes * from, sum);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) to->of[r][from + c] = sum[r][c];
    }
}

// Calls tile(R, first row) on rows `from` to `to` - 1: tiles of the first R while there are enough rows, then of the next.
template <int... R, typename F>
inline void in_tiles(int64_t from, int64_t to, const F& tile) {
    const auto all = [&](auto rows) {
        for (; from + rows.value <= to; from += rows.value) tile(rows, from);
    };
    (all(std::integral_constant<int, R>{}), ...);
}

// finish(row, panel, first 16 sums, second 16) for x [rows][k padded to `stride`] times all panels of `columns`.
template <typename T, typename F>
void product(const T* x, int64_t stride, int64_t rows, int64_t k, const void* panels, int64_t columns, const F& finish) {
    const auto* at = reinterpret_cast<const uint32_t*>(x);
    const int64_t words = panel_words<T>(k), step = stride / kPack<T>;
    for (int64_t p = 0; p * kPanel < columns; ++p) {
        const uint32_t* panel = static_cast<const uint32_t*>(panels) + p * words * kPanel;
        const auto tile = [&](auto count, int64_t row) {
            constexpr int R = decltype(count)::value;
            Sums<T, R> sums;
            product_sums<T, R>(at + row * step, step, words, panel, &sums);
            for (int r = 0; r < R; ++r) finish(row + r, p, sums.of[r][0], sums.of[r][1]);
        };
        if constexpr (kMostRows == 12) in_tiles<12, 8, 4, 2, 1>(0, rows, tile);
        else in_tiles<6, 4, 2, 1>(0, rows, tile);
    }
}

}  // namespace
