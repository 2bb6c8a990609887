// Rounding rows to bytes, and real numbers from the products of bytes.
#pragma once

#include "int8_avx2.h"
#include "int8_avx512.h"
#include "int8_neon.h"

#ifdef BYTES

namespace {

// V's numbers times the Hadamard matrix of that size, whose entries are 1 and -1.
template <typename V>
inline V hadamard(V a) {
    if constexpr (std::is_class_v<V>) {
        const auto low = hadamard(a.low), high = hadamard(a.high);
        return {low + high, low - high};
    } else {
        return hadamard_of_register(a);
    }
}

// Count * 16 numbers times the matrix of that size.
template <int Count, typename T>
inline void hadamard(const T* x, Lanes (&v)[Count]) {
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) v[i] = hadamard(load_lanes(x + 16 * i));
#pragma GCC unroll 4
    for (int step = 1; step < Count; step *= 2)
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i)
            if (!(i & step)) {
                const Lanes a = v[i], b = v[i + step];
                v[i] = a + b, v[i + step] = a - b;
            }
}

inline Lanes magnitude(Lanes x) { return (Lanes)((Words)x & 0x7fffffffu); }

// A row [k] in blocks of Count * 16 numbers; `turned` [k] is scratch.
template <int Count, typename T>
void round_row(const T* x, int64_t k, float* turned, int8_t* to, float* scale, int32_t* sum) {
    Lanes top = {};
    for (int64_t begin = 0; begin < k; begin += 16 * Count) {
        Lanes v[Count];
        hadamard<Count>(x + begin, v);
        for (int i = 0; i < Count; ++i) {
            top = larger(top, magnitude(v[i]));
            save_lanes(turned + begin + 16 * i, v[i]);
        }
    }
    const float largest = largest_lane(top), factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    Integers total = {};
    for (int64_t j = 0; j < k; j += 16) total += round_to_bytes(load_lanes(turned + j) * factor, to + j);
    *scale = largest / 127.0f / (16 * Count);
    int32_t sums[16];
    save_vector(sums, total);
    *sum = 0;
    for (int i = 0; i < 16; ++i) *sum += sums[i];
}

// The first `count` numbers at x, zeros after them.
inline Lanes load_first(const float* x, int64_t count) {
    if (count >= kLanes) return load_lanes(x);
    float first[kLanes] = {};
    std::memcpy(first, x, count * sizeof(float));
    return load_lanes(first);
}

template <typename T>
inline void save_first(T* to, Lanes x, int64_t count) {
    if (count >= kLanes) return save_lanes(to, x);
    T first[kLanes];
    save_lanes(first, x);
    std::memcpy(to, first, count * sizeof(T));
}

template <typename T, int R>
void byte_tile(const ByteRows& x, int64_t row, const uint32_t* panel, int64_t first, const Columns& columns, T* out) {
    ByteSums<R> sums;
    multiply_bytes<R>(x, row, panel, &sums);
    for (int half = 0; half < 2; ++half) {
        const int64_t at = first + 16 * half, left = columns.count - at;
        if (left <= 0) return;
        const Lanes scale = load_first(columns.scale + at, left);
        const Lanes bias = columns.bias ? load_first(columns.bias + at, left) : Lanes{};
        for (int r = 0; r < R; ++r)
            save_first(out + (row + r) * columns.count + at,
                       byte_sums(sums, x, row, r, half) * x.scale[row + r] * scale + bias, left);
    }
}

}  // namespace
#endif
