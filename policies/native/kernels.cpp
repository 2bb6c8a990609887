// The parts of a decode step that are not matrix products, each as one pass over its data.
//
// Plain C interface, no torch headers: builds in seconds and is called through ctypes. Tensors are row-major.
// `bf16` arguments say whether void pointers hold bfloat16 (1) or float (0). Everything is computed in float.

#include "norms.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

template <typename T>
void add_norm(float* x, const T* delta, const float* weight, T* out, int64_t n, int64_t d, float eps) {
#pragma omp parallel for schedule(static) if (n * d > 16384)
    for (int64_t i = 0; i < n; ++i) {
        float* row = x + i * d;
        const float inverse = delta ? inverse_mean(row, delta + i * d, d, eps) : inverse_mean(row, d, eps);
        normalise(row, inverse, weight, out + i * d, d);
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t n, int64_t inner) {
#pragma omp parallel for schedule(static) if (n * inner > 16384)
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * inner, *up = gate + inner;
        T* to = out + i * inner;
        int64_t j = 0;
        for (; j + kLanes <= inner; j += kLanes) save_lanes(to + j, gated(load_lanes(gate + j), load_lanes(up + j)));
        for (; j < inner; ++j) save(to[j], gated(load(gate[j]), load(up[j])));
    }
}

}  // namespace

extern "C" {

// By default glibc gives an update's gigabytes back to the system as they are freed and faults them in again, page by page,
// at the next micro-batch: a third of its time where pages are small.
void nr_keep_freed_memory() {
#ifdef __GLIBC__
    mallopt(M_TRIM_THRESHOLD, -1);
    mallopt(M_MMAP_MAX, 0);
#endif
}

void nr_add_norm(float* x, const void* delta, const float* weight, void* out, int64_t n, int64_t d, float eps, int is_bf16) {
    if (is_bf16) add_norm(x, static_cast<const bf16*>(delta), weight, static_cast<bf16*>(out), n, d, eps);
    else add_norm(x, static_cast<const float*>(delta), weight, static_cast<float*>(out), n, d, eps);
}

void nr_silu_mul(const void* gate_up, void* out, int64_t n, int64_t inner, int is_bf16) {
    if (is_bf16) silu_mul(static_cast<const bf16*>(gate_up), static_cast<bf16*>(out), n, inner);
    else silu_mul(static_cast<const float*>(gate_up), static_cast<float*>(out), n, inner);
}

}
