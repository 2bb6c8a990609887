// Sixteen numbers at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

// The sizes that layouts in memory are made of; sizes.py mirrors the three, and a test compares them.
constexpr int64_t kLanes = 16;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a weight that lie together
constexpr int64_t kBlock = kLanes;      // tokens of one head's keys and values that lie together

#if defined(__AVX512F__)
constexpr int kWidest = 16, kRegisters = 32;  // numbers of a register, and registers of sixteen numbers each
#elif defined(__AVX2__)
constexpr int kWidest = 8, kRegisters = 8;
#else
constexpr int kWidest = 4, kRegisters = 8;
#endif

template <typename Number, int Count>
struct Vector { typedef Number Type __attribute__((vector_size(Count * sizeof(Number)))); };

// The compiler takes a vector that is wider than the processor's apart by way of memory, number by number; its halves stay in
// registers.
template <typename Number, int Count>
struct Pair;
template <typename Number, int Count>
using Several = typename std::conditional_t<Count <= kWidest, Vector<Number, Count>, Pair<Number, Count>>::Type;

template <typename V, typename Number>
inline V all(Number x) {
    if constexpr (std::is_class_v<V>) return V(x);
    else return x - V{};
}

template <typename Number, int Count>
struct Pair {
    using Type = Pair;
    using Half = Several<Number, Count / 2>;
    using Which = Several<int32_t, Count>;
    Half low, high;

    Pair() = default;
    Pair(Number x) : low(all<Half>(x)), high(all<Half>(x)) {}
    Pair(Half low, Half high) : low(low), high(high) {}
    template <typename Other>
    explicit Pair(const Pair<Other, Count>& bits) : low((Half)bits.low), high((Half)bits.high) {}

    Pair operator-() const { return {-low, -high}; }
    friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
    friend Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
    friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
    friend Pair operator/(Pair a, Pair b) { return {a.low / b.low, a.high / b.high}; }
    friend Pair operator&(Pair a, Pair b) { return {a.low & b.low, a.high & b.high}; }
    friend Pair operator<<(Pair a, int bits) { return {a.low << bits, a.high << bits}; }
    friend Which operator<(Pair a, Pair b) { return {a.low < b.low, a.high < b.high}; }
    friend Which operator>(Pair a, Pair b) { return {a.low > b.low, a.high > b.high}; }
    friend Which operator>=(Pair a, Pair b) { return {a.low >= b.low, a.high >= b.high}; }
    Pair& operator+=(Pair x) { return *this = *this + x; }
    Pair& operator*=(Pair x) { return *this = *this * x; }
};

using Eight = Several<float, 8>;
using Lanes = Several<float, 16>;
using Words = Several<uint32_t, 16>;
using Integers = Several<int32_t, 16>;

// V's numbers from `first` on, each one more than that before it.
template <typename V>
inline V counted(int32_t first = 0) {
    if constexpr (std::is_class_v<V>) return {counted<typename V::Half>(first), counted<typename V::Half>(first + sizeof(V) / 8)};
    else if constexpr (sizeof(V) == 64) return V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
    else if constexpr (sizeof(V) == 32) return V{0, 1, 2, 3, 4, 5, 6, 7} + first;
    else return V{0, 1, 2, 3} + first;
}
inline Integers counted() { return counted<Integers>(); }

template <typename Which, typename V>
inline V choose(Which which, V a, V b) {
    if constexpr (std::is_class_v<V>) return {choose(which.low, a.low, b.low), choose(which.high, a.high, b.high)};
    else return which ? a : b;
}

// Each number as one of another type.
template <typename To, typename V>
inline To converted(V x) {
    if constexpr (std::is_class_v<V>) return {converted<typename To::Half>(x.low), converted<typename To::Half>(x.high)};
    else return __builtin_convertvector(x, To);
}
inline Integers rounded(Lanes x) { return converted<Integers>(x); }

}  // namespace
