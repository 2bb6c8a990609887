// float32 products of strided matrices that lie in the cache: of attention, of small weights, and gradients of weights.
#pragma once

#include "arithmetic.h"

namespace {

// c [R][C * 16] (+)= a b: element (i, j) of a is a[i * row + j * column], b is [k][ldb].
template <int R, int C>
inline void product_tile(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t k, bool add) {
    Lanes sum[R][C] = {};
    if (add)
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < C; ++j) sum[i][j] = load_lanes(c + i * ldc + j * kLanes);
    for (int64_t t = 0; t < k; ++t) {
        Lanes y[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) y[j] = load_lanes(b + t * ldb + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const float x = a[i * row + t * column];
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) sum[i][j] += x * y[j];
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) save_lanes(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int R, int C>
inline int64_t product_rows(int64_t i, int64_t m, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                            float* c, int64_t ldc, int64_t k, bool add) {
    for (; i + R <= m; i += R) product_tile<R, C>(a + i * row, row, column, b, ldb, c + i * ldc, ldc, k, add);
    return i;
}

template <int C>
inline void product_columns(int64_t m, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, float* c,
                            int64_t ldc, int64_t k, bool add) {
    int64_t i = 0;
    if constexpr (C == 1 && kRegisters == 32) i = product_rows<12, C>(i, m, a, row, column, b, ldb, c, ldc, k, add);
    i = product_rows<6, C>(i, m, a, row, column, b, ldb, c, ldc, k, add);
    i = product_rows<3, C>(i, m, a, row, column, b, ldb, c, ldc, k, add);
    product_rows<1, C>(i, m, a, row, column, b, ldb, c, ldc, k, add);
}

// c [m][n] (+)= a [m][k] b [k][n]; n is a multiple of 16
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add = false) {
    int64_t j = 0;
    if constexpr (kRegisters == 32) {
        for (; j + 4 * kLanes <= n; j += 4 * kLanes) product_columns<4>(m, a, row, column, b + j, ldb, c + j, ldc, k, add);
        if (j + 2 * kLanes <= n) {
            product_columns<2>(m, a, row, column, b + j, ldb, c + j, ldc, k, add);
            j += 2 * kLanes;
        }
    } else {  // six rows of 16 columns are all that fits
        for (; j + kLanes < n; j += kLanes) product_columns<1>(m, a, row, column, b + j, ldb, c + j, ldc, k, add);
    }
    if (j < n) product_columns<1>(m, a, row, column, b + j, ldb, c + j, ldc, k, add);
}

}  // namespace
