// Operations on sixteen numbers against the same ones number by number: which is the first that differs, 0 if none does.
// a and b are of 32 and of 16 numbers.

#include "arithmetic.h"

namespace {

struct Numbers {
    float of[16];
    explicit Numbers(Lanes x) { save_lanes(of, x); }
};

template <typename Vector, typename Scalar>
bool same(Vector vector, Scalar scalar) {
    const Numbers found(vector);
    for (int i = 0; i < 16; ++i) {
        const float expected = scalar(i);
        if (std::memcmp(&found.of[i], &expected, 4)) return false;
    }
    return true;
}

template <typename Scalar>
bool same_halves(Lanes x, Scalar scalar) {
    bf16 found[16], expected[16];
    save_lanes(found, x);
    for (int i = 0; i < 16; ++i) save(expected[i], scalar(i));
    const Numbers loaded(load_lanes(found));
    for (int i = 0; i < 16; ++i)
        if (loaded.of[i] != load(found[i])) return false;
    return !std::memcmp(found, expected, sizeof found);
}

}  // namespace

extern "C" void sizes(int64_t* to) { to[0] = kLanes, to[1] = kPanel, to[2] = kBlock; }

extern "C" int check(const float* a, const float* b) {
    const Lanes x = load_lanes(a), y = load_lanes(b);
    Lanes sum = x;
    sum += y;
    Lanes rows[2];
    load_row(rows, a);
    float copy[32];
    save_row(copy, rows);
    const Numbers exponentials(exponential(x));
    const auto clamped = [](double number) { return std::min(std::max(number, -87.0), 88.0); };
    double total = 0.0, magnitude = 0.0;
    for (int i = 0; i < 16; ++i) total += a[i], magnitude += std::abs(a[i]);
    int number = 0;
#define CHECK(condition) \
    if (++number; !(condition)) return number;
    CHECK(same(x, [&](int i) { return a[i]; }))
    CHECK(same(x + y, [&](int i) { return a[i] + b[i]; }))
    CHECK(same(x - y, [&](int i) { return a[i] - b[i]; }))
    CHECK(same(x * y, [&](int i) { return a[i] * b[i]; }))
    CHECK(same(x / y, [&](int i) { return a[i] / b[i]; }))
    CHECK(same(-x, [&](int i) { return -a[i]; }))
    CHECK(same(2.5f - x, [&](int i) { return 2.5f - a[i]; }))
    CHECK(same(sum, [&](int i) { return a[i] + b[i]; }))
    CHECK(same(choose(x < y, x, y), [&](int i) { return a[i] < b[i] ? a[i] : b[i]; }))
    CHECK(same(larger(x, y), [&](int i) { return a[i] > b[i] ? a[i] : b[i]; }))
    CHECK(same(choose((counted() >= 3) & (counted() < 11), x, y), [&](int i) { return i >= 3 && i < 11 ? a[i] : b[i]; }))
    CHECK(same((Lanes)((Words)x & 0xffff0000u), [&](int i) { return bits_to_float(float_to_bits(a[i]) & 0xffff0000u); }))
    CHECK(same((Lanes)((Words)x << 16), [&](int i) { return bits_to_float(float_to_bits(a[i]) << 16); }))
    CHECK(same((Lanes)rounded(x), [&](int i) { return bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(a[i]))); }))
    CHECK(same_halves(x, [&](int i) { return a[i]; }))
    CHECK(largest_lane(x) == *std::max_element(a, a + 16))
    CHECK(std::abs(sum_lanes(x) - total) <= 1e-5 * magnitude)
    for (int i = 0; i < 16; ++i) CHECK(std::abs(exponentials.of[i] - std::exp(clamped(a[i]))) <= 3e-7 * exponentials.of[i])
    CHECK(same(exponential(x), [&](int i) { return exponential(a[i]); }))
    CHECK(!std::memcmp(copy, a, sizeof copy))
    return 0;
}
