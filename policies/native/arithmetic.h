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
typedef bf16 EightHalves __attribute__((vector_size(16)));
inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float load(float x) { return x; }
inline float load(bf16 x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
inline void save(float& to, float x) { to = x; }
inline void save(bf16& to, float x) {  // round to nearest even
    const uint32_t u = float_to_bits(x);
    to = static_cast<bf16>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline Eight load_eight(const float* x) { Eight v; std::memcpy(&v, x, sizeof v); return v; }
inline Eight load_eight(const bf16* x) {
    EightHalves v;
    std::memcpy(&v, x, sizeof v);
    return (Eight)(__builtin_convertvector(v, EightWords) << 16);
}
inline void save_eight(float* to, Eight x) { std::memcpy(to, &x, sizeof x); }
inline void save_eight(bf16* to, Eight x) {
    const EightWords u = (EightWords)x;
    const EightHalves h = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, EightHalves);
    std::memcpy(to, &h, sizeof h);
}

#ifdef __AVX512F__
inline Lanes load_lanes(const float* x) { Lanes v; std::memcpy(&v, x, sizeof v); return v; }
inline Words load_words(const uint32_t* x) { Words v; std::memcpy(&v, x, sizeof v); return v; }
inline Lanes load_lanes(const bf16* x) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves h;
    std::memcpy(&h, x, sizeof h);
    return (Lanes)(__builtin_convertvector(h, Words) << 16);
}
inline void save_lanes(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
inline void save_lanes(bf16* to, Lanes x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    typedef uint16_t Halves __attribute__((vector_size(32)));
    const Words u = (Words)x;
    const Halves h = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, Halves);
    std::memcpy(to, &h, sizeof h);
#endif
}
template <int C>
inline void load_row(Lanes (&to)[C], const float* x) { std::memcpy(to, x, sizeof to); }
template <int C>
inline void save_row(float* to, const Lanes (&x)[C]) { std::memcpy(to, x, sizeof x); }
template <typename F>
inline Eight join_halves(Lanes x, F join) {
    Eight h[2];
    std::memcpy(h, &x, sizeof h);
    return join(h[0], h[1]);
}
#else
template <typename T>
inline Lanes load_lanes(const T* x) { return {load_eight(x), load_eight(x + 8)}; }
inline Words load_words(const uint32_t* x) {
    Words v;
    std::memcpy(&v.low, x, sizeof v.low);
    std::memcpy(&v.high, x + 8, sizeof v.high);
    return v;
}
template <typename T>
inline void save_lanes(T* to, Lanes x) { save_eight(to, x.low), save_eight(to + 8, x.high); }
template <int C>
inline void load_row(Lanes (&to)[C], const float* x) {  // copied whole, the halves would not stay in registers
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) to[c] = load_lanes(x + 16 * c);
}
template <int C>
inline void save_row(float* to, const Lanes (&x)[C]) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) save_lanes(to + 16 * c, x[c]);
}
template <typename F>
inline Eight join_halves(Lanes x, F join) { return join(x.low, x.high); }
#endif

template <typename F>
inline float reduce_lanes(Lanes x, F join) {
    typedef float Quarter __attribute__((vector_size(16)));
    const Eight h = join_halves(x, join);
    Quarter q[2];
    std::memcpy(q, &h, sizeof q);
    q[0] = join(q[0], q[1]);
    return join(join(q[0][0], q[0][1]), join(q[0][2], q[0][3]));
}

inline Lanes larger(Lanes a, Lanes b) { return choose(a > b, a, b); }
inline float largest_lane(Lanes x) { return reduce_lanes(x, [](auto a, auto b) { return a > b ? a : b; }); }
inline float sum_lanes(Lanes x) { return reduce_lanes(x, [](auto a, auto b) { return a + b; }); }

inline float choose(bool which, float a, float b) { return which ? a : b; }
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
