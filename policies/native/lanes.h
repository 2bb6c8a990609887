// Sixteen numbers at a time.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef int32_t EightIntegers __attribute__((vector_size(32)));

// The sizes that layouts in memory are made of; sizes.py mirrors the three, and a test compares them.
constexpr int64_t kLanes = 16;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a weight that lie together
constexpr int64_t kBlock = kLanes;      // tokens of one head's keys and values that lie together

#ifdef __AVX512F__

constexpr int kRegisters = 32;  // of sixteen numbers each
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

inline Integers counted() { return Integers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
inline Lanes choose(Integers which, Lanes a, Lanes b) { return which ? a : b; }
inline Integers rounded(Lanes x) { return __builtin_convertvector(x, Integers); }

#else

constexpr int kRegisters = 8;

// The compiler takes a vector that is wider than the processor's apart by way of memory, number by number; its two halves
// stay in registers.
template <typename Number>
struct Sixteen {
    typedef Number Half __attribute__((vector_size(32)));
    Half low, high;

    Sixteen() = default;
    Sixteen(Number x) : low(x - Half{}), high(x - Half{}) {}
    Sixteen(Half low, Half high) : low(low), high(high) {}
    template <typename Other>
    explicit Sixteen(const Sixteen<Other>& bits) : low((Half)bits.low), high((Half)bits.high) {}

    Sixteen operator-() const { return {-low, -high}; }
    friend Sixteen operator+(Sixteen a, Sixteen b) { return {a.low + b.low, a.high + b.high}; }
    friend Sixteen operator-(Sixteen a, Sixteen b) { return {a.low - b.low, a.high - b.high}; }
    friend Sixteen operator*(Sixteen a, Sixteen b) { return {a.low * b.low, a.high * b.high}; }
    friend Sixteen operator/(Sixteen a, Sixteen b) { return {a.low / b.low, a.high / b.high}; }
    friend Sixteen operator&(Sixteen a, Sixteen b) { return {a.low & b.low, a.high & b.high}; }
    friend Sixteen operator<<(Sixteen a, int bits) { return {a.low << bits, a.high << bits}; }
    friend Sixteen<int32_t> operator<(Sixteen a, Sixteen b) { return {a.low < b.low, a.high < b.high}; }
    friend Sixteen<int32_t> operator>(Sixteen a, Sixteen b) { return {a.low > b.low, a.high > b.high}; }
    friend Sixteen<int32_t> operator>=(Sixteen a, Sixteen b) { return {a.low >= b.low, a.high >= b.high}; }
    Sixteen& operator+=(Sixteen x) { return *this = *this + x; }
};

using Lanes = Sixteen<float>;
using Words = Sixteen<uint32_t>;
using Integers = Sixteen<int32_t>;

inline Integers counted() { return {EightIntegers{0, 1, 2, 3, 4, 5, 6, 7}, EightIntegers{8, 9, 10, 11, 12, 13, 14, 15}}; }
inline Lanes choose(Integers which, Lanes a, Lanes b) {
    return {which.low ? a.low : b.low, which.high ? a.high : b.high};
}
inline Integers rounded(Lanes x) {
    return {__builtin_convertvector(x.low, EightIntegers), __builtin_convertvector(x.high, EightIntegers)};
}

#endif
}  // namespace
