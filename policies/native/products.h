// Products of a few rows with a weight that stays in the cache, one core, what follows them done on the sums in registers.
//
// A weight [columns][k] lies in panels of 32 columns, [panel][k / pack words][32]. Every sum is one chain over k, whatever the
// tile, so that a row's result does not depend on the others.
#pragma once

#include "arithmetic.h"
#include "words.h"

namespace {

constexpr int64_t kPanelColumns = 32;
// Sums, weights and a factor in the registers: 12 rows of a whole panel in 32 of them, 6 of half a panel in 16 smaller ones.
constexpr int kMostRows = kRegisters == 32 ? 12 : 6;
constexpr int kMostSums = kRegisters == 32 ? 24 : 6;

template <typename T>
int64_t panel_words(int64_t k) { return (k + kPack<T> - 1) / kPack<T>; }

template <int R>
struct Sums { Lanes of[R][2]; };

// Not inlined: next to what follows, the compiler runs out of registers.
template <typename T, int R>
__attribute__((noinline)) void product_sums(const uint32_t* x, int64_t stride, int64_t words, const uint32_t* panel, Sums<R>* to) {
    constexpr int C = 2 * R > kMostSums ? 1 : 2;
    for (int from = 0; from < 2; from += C) {
        Lanes sum[R][C] = {};
        for (int64_t w = 0; w < words; ++w) {
            Words weight[C];
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) weight[c] = load_words(panel + w * kPanelColumns + 16 * (from + c));
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const uint32_t factor = x[r * stride + w];
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) sum[r][c] = multiply_add<T>(sum[r][c], factor, weight[c]);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) to->of[r][from + c] = sum[r][c];
    }
}

template <typename T, int R, typename F>
inline void product_tile(const uint32_t* x, int64_t stride, int64_t words, const uint32_t* panel, int64_t row, int64_t number,
                         const F& finish) {
    Sums<R> sums;
    product_sums<T, R>(x, stride, words, panel, &sums);
    for (int r = 0; r < R; ++r) finish(row + r, number, sums.of[r][0], sums.of[r][1]);
}

// finish(row, panel, first 16 sums, second 16) for x [rows][k padded to `stride`] times all panels of `columns`.
template <typename T, typename F>
void product(const T* x, int64_t stride, int64_t rows, int64_t k, const void* panels, int64_t columns, const F& finish) {
    const auto* at = reinterpret_cast<const uint32_t*>(x);
    const int64_t words = panel_words<T>(k), step = stride / kPack<T>;
    for (int64_t p = 0; p * kPanelColumns < columns; ++p) {
        const uint32_t* panel = static_cast<const uint32_t*>(panels) + p * words * kPanelColumns;
        int64_t i = 0;
        for (; i + kMostRows <= rows; i += kMostRows)
            product_tile<T, kMostRows>(at + i * step, step, words, panel, i, p, finish);
        if (kMostRows > 8)
            for (; i + 8 <= rows; i += 8) product_tile<T, 8>(at + i * step, step, words, panel, i, p, finish);
        if (kMostRows > 4)
            for (; i + 4 <= rows; i += 4) product_tile<T, 4>(at + i * step, step, words, panel, i, p, finish);
        for (; i + 2 <= rows; i += 2) product_tile<T, 2>(at + i * step, step, words, panel, i, p, finish);
        for (; i < rows; ++i) product_tile<T, 1>(at + i * step, step, words, panel, i, p, finish);
    }
}

}  // namespace
