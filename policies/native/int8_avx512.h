// Rounding to bytes, and real numbers from their products, by AVX-512.
#pragma once

#include "int8.h"

#ifdef BYTES_BY_AVX512

namespace {

// a + b in the lower lanes and a - b in the higher ones of each pair of `swapped` lanes
inline __m512 butterfly(__m512 x, __m512 swapped, __mmask16 higher) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_fmadd_ps(x, _mm512_mask_sub_ps(one, higher, _mm512_setzero_ps(), one), swapped);
}

// Count * 16 numbers times the Hadamard matrix of that size, whose entries are 1 and -1.
template <int Count, typename T>
inline void hadamard(const T* x, __m512 (&v)[Count]) {
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
        __m512 a = (__m512)load_lanes(x + 16 * i);
        a = butterfly(a, _mm512_permute_ps(a, 0xb1), 0xaaaa);
        a = butterfly(a, _mm512_permute_ps(a, 0x4e), 0xcccc);
        a = butterfly(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
        v[i] = butterfly(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
    }
#pragma GCC unroll 4
    for (int step = 1; step < Count; step *= 2)
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i)
            if (!(i & step)) {
                const __m512 a = v[i], b = v[i + step];
                v[i] = _mm512_add_ps(a, b), v[i + step] = _mm512_sub_ps(a, b);
            }
}

// A row [k] in blocks of Count * 16 numbers; `turned` [k] is scratch.
template <int Count, typename T>
void round_row(const T* x, int64_t k, float* turned, int8_t* to, float* scale, int32_t* sum) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < k; begin += 16 * Count) {
        __m512 v[Count];
        hadamard<Count>(x + begin, v);
        for (int i = 0; i < Count; ++i) {
            top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
            _mm512_storeu_ps(turned + begin + 16 * i, v[i]);
        }
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 factor = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (int64_t j = 0; j < k; j += 16) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(turned + j), factor));  // to nearest even
        total = _mm512_add_epi32(total, q);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm512_cvtepi32_epi8(q));
    }
    *scale = largest / 127.0f / (16 * Count);
    *sum = _mm512_reduce_add_epi32(total);
}

inline void store_sums(float* to, __m512 x, __mmask16 valid) { _mm512_mask_storeu_ps(to, valid, x); }
inline void store_sums(bf16* to, __m512 x, __mmask16 valid) {
    alignas(32) bf16 halves[16];
    save_lanes(halves, (Lanes)x);
    _mm256_mask_storeu_epi16(to, valid, _mm256_load_si256(reinterpret_cast<const __m256i*>(halves)));
}

template <typename T, int R>
void byte_tile(const ByteRows& x, int64_t row, const uint32_t* panel, int64_t first, const Columns& columns, T* out) {
    ByteSums<R> sums;
    multiply_bytes<R>(x, row, panel, &sums);
    for (int half = 0; half < 2; ++half) {
        const int64_t at = first + 16 * half, left = columns.count - at;
        if (left <= 0) return;
        const __mmask16 valid = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        const __m512 scale = _mm512_maskz_loadu_ps(valid, columns.scale + at);
        const __m512 bias = columns.bias ? _mm512_maskz_loadu_ps(valid, columns.bias + at) : _mm512_setzero_ps();
        for (int r = 0; r < R; ++r) {
            const __m512 real = _mm512_mul_ps(byte_sums(sums, x, row, r, half), _mm512_set1_ps(x.scale[row + r]));
            store_sums(out + (row + r) * columns.count + at, _mm512_fmadd_ps(real, scale, bias), valid);
        }
    }
}

}  // namespace
#endif
