// The rotation of a head's channels j and j + d / 2 by a position's angles. Its sign is part of `sin`.
#pragma once

#include "arithmetic.h"

namespace {

// to = rotated (a, b), channels j to j + 7 of both halves, times `scale`
template <typename T>
inline void turn(Eight a, Eight b, const float* cos, const float* sin, int64_t j, int64_t half, float scale, T* to) {
    save_eight(to + j, (a * load_eight(cos + j) + b * load_eight(sin + j)) * scale);
    save_eight(to + j + half, (b * load_eight(cos + j + half) + a * load_eight(sin + j + half)) * scale);
}

}  // namespace
