// The root mean square norm of a row.
#pragma once

#include "arithmetic.h"

namespace {

// 1 / root mean square of x [d]
inline float inverse_mean(const float* x, int64_t d, float eps) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < d; ++j) square += x[j] * x[j];
    return 1.0f / std::sqrt(square / d + eps);
}

// the same after x += delta, in one pass: a second one takes a third longer
template <typename T>
inline float inverse_mean(float* x, const T* delta, int64_t d, float eps) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < d; ++j) { x[j] += load(delta[j]); square += x[j] * x[j]; }
    return 1.0f / std::sqrt(square / d + eps);
}

// to = x [d] times its inverse root mean square and `weight`
template <typename T>
inline void normalise(const float* x, float inverse, const float* weight, T* to, int64_t d) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) save(to[j], x[j] * inverse * weight[j]);
}

}  // namespace
