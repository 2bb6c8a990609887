// The inverse of a cumulative sum, by which tokens are drawn.
#pragma once

#include <cstdint>

namespace {

// The first of n masses that takes the running sum beyond `target`, else the last that is not zero; `reached`, the sum so far,
// becomes that before it.
template <typename F>
inline int64_t pick(int64_t n, double target, double& reached, const F& mass) {
    int64_t chosen = 0;
    double before = reached;
    for (int64_t i = 0; i < n && reached <= target; ++i) {
        const double one = mass(i);
        if (one == 0.0) continue;
        chosen = i;
        before = reached;
        reached += one;
    }
    reached = before;
    return chosen;
}

}  // namespace
