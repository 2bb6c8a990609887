// bfloat16 conversions and the exponential that all kernels share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

using bf16 = uint16_t;
inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float load(float x) { return x; }
inline float load(bf16 x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
inline void save(float& to, float x) { to = x; }
inline void save(bf16& to, float x) {  // round to nearest even
    const uint32_t u = float_to_bits(x);
    to = static_cast<bf16>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

template <typename V, typename T>
inline V load_vector(const T* x) {
    constexpr int count = sizeof(V) / 4;
    if constexpr (std::is_class_v<V>) {
        return {load_vector<typename V::Half>(x), load_vector<typename V::Half>(x + count / 2)};
    } else if constexpr (sizeof(T) == 4) {
        V v;
        std::memcpy(&v, x, sizeof v);
        return v;
    } else {
        typename Vector<bf16, count>::Type v;
        std::memcpy(&v, x, sizeof v);
        return (V)(__builtin_convertvector(v, Several<uint32_t, count>) << 16);
    }
}
template <typename T, typename V>
inline void save_vector(T* to, V x) {
    constexpr int count = sizeof(V) / 4;
    if constexpr (std::is_class_v<V>) {
        save_vector(to, x.low);
        save_vector(to + count / 2, x.high);
    } else if constexpr (sizeof(T) == 4) {
        std::memcpy(to, &x, sizeof x);
    } else {
#ifdef __AVX512BF16__
        if constexpr (count == 16) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
            return;
        }
#endif
        const auto u = (Several<uint32_t, count>)x;
        const auto h = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, typename Vector<bf16, count>::Type);
        std::memcpy(to, &h, sizeof h);
    }
}
template <typename T>
inline Eight load_eight(const T* x) { return load_vector<Eight>(x); }
template <typename T>
inline void save_eight(T* to, Eight x) { save_vector(to, x); }
template <typename T>
inline Lanes load_lanes(const T* x) { return load_vector<Lanes>(x); }
template <typename T>
inline void save_lanes(T* to, Lanes x) { save_vector(to, x); }
inline Words load_words(const uint32_t* x) { return load_vector<Words>(x); }
template <int C>
inline void load_row(Lanes (&to)[C], const float* x) {
    if constexpr (std::is_class_v<Lanes>) {  // copied whole, halves would not stay in registers
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) to[c] = load_lanes(x + 16 * c);
    } else {
        std::memcpy(to, x, sizeof to);
    }
}
template <int C>
inline void save_row(float* to, const Lanes (&x)[C]) {
    if constexpr (std::is_class_v<Lanes>) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) save_lanes(to + 16 * c, x[c]);
    } else {
        std::memcpy(to, x, sizeof x);
    }
}

// `join` of all numbers, by halves.
template <typename V, typename F>
inline float reduced(V x, F join) {
    if constexpr (std::is_class_v<V>) {
        return reduced(join(x.low, x.high), join);
    } else if constexpr (sizeof(V) > 16) {
        typename Vector<float, sizeof(V) / 8>::Type half[2];
        std::memcpy(half, &x, sizeof x);
        return reduced(join(half[0], half[1]), join);
    } else {
        return join(join(x[0], x[1]), join(x[2], x[3]));
    }
}

inline Lanes larger(Lanes a, Lanes b) { return choose(a > b, a, b); }
inline float largest_lane(Lanes x) { return reduced(x, [](auto a, auto b) { return choose(a > b, a, b); }); }
inline float sum_lanes(Lanes x) { return reduced(x, [](auto a, auto b) { return a + b; }); }

inline int32_t rounded(float x) { return static_cast<int32_t>(x); }
inline float float_of_bits(int32_t x) { return bits_to_float(static_cast<uint32_t>(x)); }
inline Lanes float_of_bits(Integers x) { return (Lanes)x; }

// Cephes-style exp: 2^n times a degree-6 polynomial; relative error below 2e-7 for x in [-87, 88], its value there beyond.
// X: Lanes or float.
template <typename X>
inline X exponential(X x) {
    const X lowest = X{} - 87.0f, highest = X{} + 88.0f;
    x = choose(x < lowest, lowest, x);
    x = choose(x > highest, highest, x);
    const X n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer without a call
    const X r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    X p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of_bits((rounded(n) + 127) << 23);
}

// silu(gate) * up
template <typename X>
inline X gated(X gate, X up) { return gate / (1.0f + exponential(-gate)) * up; }

}  // namespace
