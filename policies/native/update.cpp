// An update's norms and gates, forward and backward, one pass over their data each, and its float32 products.

#include "norms.h"
#include "threads.h"
#include "tiles.h"

namespace {

template <typename T>
void norm_forward(const float* x, const float* weight, T* out, float* inverse, int64_t n, int64_t d, float eps) {
#pragma omp parallel for schedule(static) if (n * d > 16384)
    for (int64_t i = 0; i < n; ++i) {
        const float scale = inverse[i] = inverse_mean(x + i * d, d, eps);
        normalise(x + i * d, scale, weight, out + i * d, d);
    }
}

// grad_weight has one row of d per thread, summed by the caller.
template <typename T>
void norm_backward(const T* grad, const float* x, const float* weight, const float* inverse, float* grad_x,
                   float* grad_weight, int64_t threads, int64_t n, int64_t d) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < threads; ++part) {
        float* sum = grad_weight + part * d;
        std::memset(sum, 0, d * sizeof(float));
        for (int64_t i = n * part / threads; i < n * (part + 1) / threads; ++i) {
            const T* g = grad + i * d;
            const float *row = x + i * d, scale = inverse[i];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < d; ++j) dot += load(g[j]) * weight[j] * row[j];
            const float back = dot * scale * scale / d;
            float* to = grad_x + i * d;
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                const float slope = load(g[j]);
                to[j] = scale * (slope * weight[j] - row[j] * back);
                sum[j] += slope * row[j] * scale;
            }
        }
    }
}

template <typename T>
void silu_mul_backward(const T* gate_up, const T* grad, T* out, int64_t n, int64_t inner) {
#pragma omp parallel for schedule(static) if (n * inner > 16384)
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * inner, *up = gate + inner, *g = grad + i * inner;
        T *grad_gate = out + i * 2 * inner, *grad_up = grad_gate + inner;
        int64_t j = 0;
        for (; j + kLanes <= inner; j += kLanes) {
            const Lanes z = load_lanes(gate + j), slope = load_lanes(g + j), s = 1.0f / (1.0f + exponential(-z));
            save_lanes(grad_up + j, slope * z * s);
            save_lanes(grad_gate + j, slope * load_lanes(up + j) * s * (1.0f + z * (1.0f - s)));
        }
        for (; j < inner; ++j) {
            const float z = load(gate[j]), slope = load(g[j]), s = 1.0f / (1.0f + exponential(-z));
            save(grad_up[j], slope * z * s);
            save(grad_gate[j], slope * load(up[j]) * s * (1.0f + z * (1.0f - s)));
        }
    }
}

// out [n][m] = x [n][k] b [k][m] for a b that stays in the second cache; m is a multiple of 16
void small_product(const float* x, const float* b, float* out, int64_t n, int64_t m, int64_t k) {
    constexpr int64_t kRows = 48;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += kRows) product(std::min(kRows, n - i), m, k, x + i * k, k, 1, b, m, out + i * m, m);
}

// out [m][k] = grad [n][m] transposed times x [n][k]; k is a multiple of 16
void outer_product(const float* grad, const float* x, float* out, int64_t n, int64_t m, int64_t k) {
    constexpr int64_t kMost = 48, kTokens = 256, kTile = 6;  // what stays in the first cache; rows of a tile
    const int64_t threads = omp_get_max_threads(), parts = (m + kMost * threads - 1) / (kMost * threads) * threads;
    const int64_t rows = (m + parts * kTile - 1) / (parts * kTile) * kTile;
    if (n == 0) std::fill_n(out, m * k, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i += rows)
        for (int64_t t = 0; t < n; t += kTokens)
            product(std::min(rows, m - i), k, std::min(kTokens, n - t), grad + t * m + i, 1, m, x + t * k, k, out + i * k, k, t > 0);
}

}  // namespace

extern "C" {

void nr_small_product(const float* x, const float* b, float* out, int64_t n, int64_t m, int64_t k) {
    small_product(x, b, out, n, m, k);
}

void nr_outer_product(const float* grad, const float* x, float* out, int64_t n, int64_t m, int64_t k) {
    outer_product(grad, x, out, n, m, k);
}

void nr_norm_forward(const float* x, const float* weight, void* out, float* inverse, int64_t n, int64_t d, float eps,
                     int is_bf16) {
    if (is_bf16) norm_forward(x, weight, static_cast<bf16*>(out), inverse, n, d, eps);
    else norm_forward(x, weight, static_cast<float*>(out), inverse, n, d, eps);
}

void nr_norm_backward(const void* grad, const float* x, const float* weight, const float* inverse, float* grad_x,
                      float* grad_weight, int64_t threads, int64_t n, int64_t d, int is_bf16) {
    if (is_bf16) norm_backward(static_cast<const bf16*>(grad), x, weight, inverse, grad_x, grad_weight, threads, n, d);
    else norm_backward(static_cast<const float*>(grad), x, weight, inverse, grad_x, grad_weight, threads, n, d);
}

void nr_silu_mul_backward(const void* gate_up, const void* grad, void* out, int64_t n, int64_t inner, int is_bf16) {
    if (is_bf16)
        silu_mul_backward(static_cast<const bf16*>(gate_up), static_cast<const bf16*>(grad), static_cast<bf16*>(out), n, inner);
    else
        silu_mul_backward(static_cast<const float*>(gate_up), static_cast<const float*>(grad), static_cast<float*>(out), n,
                          inner);
}
}
