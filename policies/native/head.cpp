// The head and the draw in one pass: bfloat16 products accumulated and kept in float, reduced to a maximum and a sum per
// panel of 32 tokens, so that the [rows, vocabulary] logits are never written. The panel that the uniform falls in is
// then projected again, by the same instructions in the same order, so that a row's token does not depend on the others.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "int8.h"
#include "pick.h"

#ifdef BYTES

namespace {

// The same of bytes; the columns' scales are padded to whole panels.
struct ByteOperands {
    ByteRows rows;
    const uint32_t* weights;
    const float* column_scale;
    float scale;
};

}  // namespace
#endif

#ifdef __AVX512BF16__
namespace {

inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// Rows of hidden states and the panels of the head that they are multiplied with; logits are products times `scale`.
struct HalfOperands {
    const uint32_t *rows, *weights;
    int64_t pairs;
    float scale;
};

// Cuts columns beyond the vocabulary off: their logits are -inf.
template <int R>
inline void keep_valid(int valid, __m512 (&z)[R][2]) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __mmask16 first = valid >= 16 ? 0xffff : static_cast<__mmask16>((1u << valid) - 1);
    const __mmask16 second = valid >= 32 ? 0xffff : valid <= 16 ? 0 : static_cast<__mmask16>((1u << (valid - 16)) - 1);
    for (int r = 0; r < R; ++r) {
        z[r][0] = _mm512_mask_mov_ps(none, first, z[r][0]);
        z[r][1] = _mm512_mask_mov_ps(none, second, z[r][1]);
    }
}

// logits of R rows from `row` on with one panel
template <int R>
inline void project(const HalfOperands& o, int64_t row, int64_t number, int valid, __m512 (&z)[R][2]) {
    const uint32_t *x = o.rows + row * o.pairs, *panel = o.weights + number * o.pairs * kPanel;
    Lanes sum[R][2] = {};
    add_products<bf16, R, 2>(x, o.pairs, o.pairs, panel, sum);
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) z[r][half] = _mm512_mul_ps((__m512)sum[r][half], _mm512_set1_ps(o.scale));
    keep_valid<R>(valid, z);
}

template <int R>
inline void project(const ByteOperands& o, int64_t row, int64_t number, int valid, __m512 (&z)[R][2]) {
    ByteSums<R> sums;
    multiply_bytes<R>(o.rows, row, o.weights + number * o.rows.words * kPanel, &sums);
    for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(o.rows.scale[row + r] * o.scale);
        for (int half = 0; half < 2; ++half) {
            const __m512 column = _mm512_loadu_ps(o.column_scale + number * kPanel + 16 * half);
            z[r][half] = _mm512_mul_ps(_mm512_mul_ps(byte_sums(sums, o.rows, row, r, half), scale), column);
        }
    }
    keep_valid<R>(valid, z);
}

// log-probability slopes: -factor_i softmax(z_i), as bfloat16
template <int R>
void slope_panel(const HalfOperands& o, int64_t row, int64_t number, int valid, const float* normaliser, const float* factor,
                 uint16_t* out, int64_t stride) {
    __m512 z[R][2];
    project<R>(o, row, number, valid, z);
    for (int r = 0; r < R; ++r) {
        const __m512 shift = _mm512_set1_ps(normaliser[r]), minus = _mm512_set1_ps(-factor[r]);
        for (int half = 0; half < 2; ++half) {
            const int left = valid - 16 * half;
            if (left <= 0) break;
            const __m512 p = _mm512_mul_ps(exp512(_mm512_sub_ps(z[r][half], shift)), minus);
            const __mmask16 kept = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            _mm256_mask_storeu_epi16(out + r * stride + 16 * half, kept, (__m256i)_mm512_cvtneps_pbh(p));
        }
    }
}

// the same of one row from its kept exponentials
inline void slope_kept(const uint16_t* kept, int valid, float shift, float factor, uint16_t* out) {
    const __m512 scale = _mm512_mul_ps(exp512(_mm512_set1_ps(shift)), _mm512_set1_ps(-factor));
    const __m512i both = _mm512_loadu_si512(kept);
    const __m512 first = _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(both));
    const __m512 second = _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(both, 1));
    const __m512i slopes =
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, scale), _mm512_mul_ps(first, scale));
    _mm512_mask_storeu_epi16(out, valid >= kPanel ? 0xffffffffu : (1u << valid) - 1, slopes);
}

// `kept`, if any: exp(z - maximum) of the panel, [rows][32] bfloat16
template <int R, typename O>
void reduce_panel(const O& o, int64_t row, int64_t number, int valid, float* peak, float* sum, int64_t stride,
                  uint16_t* kept) {
    __m512 z[R][2];
    project<R>(o, row, number, valid, z);
    for (int r = 0; r < R; ++r) {
        const float top = _mm512_reduce_max_ps(_mm512_max_ps(z[r][0], z[r][1]));
        const __m512 shift = _mm512_set1_ps(top);
        const __m512 e0 = exp512(_mm512_sub_ps(z[r][0], shift)), e1 = exp512(_mm512_sub_ps(z[r][1], shift));
        if (kept) _mm512_storeu_si512(kept + r * kPanel, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
        peak[r * stride] = top;
        sum[r * stride] = _mm512_reduce_add_ps(_mm512_add_ps(e0, e1));
    }
}

// sums relative to the largest logit of all panels instead of their own
inline void panel_masses(const float* tops, const float* sums, int64_t panels, float top, float* mass) {
    for (int64_t p = 0; p < panels; p += 16) {
        const __mmask16 valid = panels - p >= 16 ? 0xffff : static_cast<__mmask16>((1u << (panels - p)) - 1);
        const __m512 e = exp512(_mm512_sub_ps(_mm512_maskz_loadu_ps(valid, tops + p), _mm512_set1_ps(top)));
        _mm512_mask_storeu_ps(mass + p, valid, _mm512_mul_ps(e, _mm512_maskz_loadu_ps(valid, sums + p)));
    }
}

// the logits of one row with one panel
template <typename O>
inline void row_logits(const O& o, int64_t row, int64_t number, int valid, float* logits) {
    __m512 z[1][2];
    project<1>(o, row, number, valid, z);
    _mm512_store_ps(logits, z[0][0]);
    _mm512_store_ps(logits + 16, z[0][1]);
}

}  // namespace

#elif defined(BYTES)

namespace {

// As above, of bytes alone.
template <int R>
inline void project(const ByteOperands& o, int64_t row, int64_t number, int valid, Lanes (&z)[R][2]) {
    ByteSums<R> sums;
    multiply_bytes<R>(o.rows, row, o.weights + number * o.rows.words * kPanel, &sums);
    for (int half = 0; half < 2; ++half) {
        const Lanes column = load_lanes(o.column_scale + number * kPanel + 16 * half);
        const Lanes none = Lanes{} - std::numeric_limits<float>::infinity();
        const Integers inside = counted() < Integers{} + (valid - 16 * half);
        for (int r = 0; r < R; ++r)
            z[r][half] = choose(inside, byte_sums(sums, o.rows, row, r, half) * (o.rows.scale[row + r] * o.scale) * column, none);
    }
}

template <int R>
void reduce_panel(const ByteOperands& o, int64_t row, int64_t number, int valid, float* peak, float* sum, int64_t stride, uint16_t*) {
    Lanes z[R][2];
    project<R>(o, row, number, valid, z);
    for (int r = 0; r < R; ++r) {
        const float top = peak[r * stride] = largest_lane(larger(z[r][0], z[r][1]));
        sum[r * stride] = sum_lanes(exponential(z[r][0] - top) + exponential(z[r][1] - top));
    }
}

inline void panel_masses(const float* tops, const float* sums, int64_t panels, float top, float* mass) {
    for (int64_t p = 0; p < panels; ++p) mass[p] = exponential(tops[p] - top) * sums[p];
}

inline void row_logits(const ByteOperands& o, int64_t row, int64_t number, int valid, float* logits) {
    Lanes z[1][2];
    project<1>(o, row, number, valid, z);
    save_lanes(logits, z[0][0]);
    save_lanes(logits + 16, z[0][1]);
}

}  // namespace
#endif

#if defined(BYTES) || defined(__AVX512BF16__)

namespace {

// maximum and sum of every panel [n][panels]; `kept` [kept_panels][n][32] of the first panels
template <typename O>
void reduce_all(const O& o, int64_t n, int64_t vocabulary, float* peak, float* sum, uint16_t* kept = nullptr,
                int64_t kept_panels = 0) {
    const int64_t panels = (vocabulary + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const int valid = static_cast<int>(std::min<int64_t>(kPanel, vocabulary - p * kPanel));
        uint16_t* keep = p < kept_panels ? kept + p * n * kPanel : nullptr;
        in_tiles<kMostRows, 4, 1>(0, n, [&](auto count, int64_t i) {
            reduce_panel<decltype(count)::value>(o, i, p, valid, peak + i * panels + p, sum + i * panels + p, panels,
                                                 keep ? keep + i * kPanel : nullptr);
        });
    }
}

inline float scale_of(float temperature) { return temperature > 0.0f ? 1.0f / temperature : 1.0f; }

// Draws one token per row; temperature 0: greedy, log-probability of the untempered softmax. peak, sum: scratch [n][panels].
template <typename O>
void draw(const O& o, int64_t n, int64_t vocabulary, float temperature, const double* uniform, int64_t* token, float* logp,
          float* peak, float* sum) {
    const int64_t panels = (vocabulary + kPanel - 1) / kPanel;
    const auto valid = [&](int64_t p) { return static_cast<int>(std::min<int64_t>(kPanel, vocabulary - p * kPanel)); };
    reduce_all(o, n, vocabulary, peak, sum);
#pragma omp parallel
    {
        std::vector<float> mass(panels);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            const float *tops = peak + i * panels, *sums = sum + i * panels;
            int64_t chosen = 0;
            for (int64_t p = 1; p < panels; ++p)
                if (tops[p] > tops[chosen]) chosen = p;
            const float top = tops[chosen];
            panel_masses(tops, sums, panels, top, mass.data());
            double total = 0.0, reached = 0.0;
            for (int64_t p = 0; p < panels; ++p) total += mass[p];
            const double target = uniform[i] * total;
            if (temperature > 0.0f) chosen = pick(panels, target, reached, [&](int64_t p) { return mass[p]; });
            alignas(64) float logits[kPanel];
            row_logits(o, i, chosen, valid(chosen), logits);
            const int64_t column = temperature > 0.0f
                ? pick(valid(chosen), target, reached, [&](int64_t c) { return std::exp(logits[c] - top); })
                : std::max_element(logits, logits + valid(chosen)) - logits;
            token[i] = chosen * kPanel + column;
            logp[i] = static_cast<float>(logits[column] - top - std::log(total));
        }
    }
}

}  // namespace
#endif

extern "C" {

#ifdef __AVX512BF16__
int nr_head_available() { return 1; }

// [vocabulary][width] bfloat16 -> panels [ceil(vocabulary / 32)][width / 2][32][2].
void nr_pack_head(const uint16_t* weight, uint16_t* packed, int64_t vocabulary, int64_t width) {
    const int64_t panels = (vocabulary + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t k = 0; k < width / 2; ++k)
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t v = p * kPanel + c;
                uint16_t* to = packed + ((p * (width / 2) + k) * kPanel + c) * 2;
                to[0] = v < vocabulary ? weight[v * width + 2 * k] : 0;
                to[1] = v < vocabulary ? weight[v * width + 2 * k + 1] : 0;
            }
}

// logp [n] and normaliser [n] of the given tokens; peak [n][panels]; sum: scratch [n][panels]; kept: of `reduce_all`.
void nr_head_logp(const uint16_t* x, const uint16_t* packed, int64_t n, int64_t vocabulary, int64_t width, float temperature,
                  const int64_t* token, float* logp, float* normaliser, float* peak, float* sum, uint16_t* kept,
                  int64_t kept_panels) {
    const int64_t panels = (vocabulary + kPanel - 1) / kPanel, pairs = width / 2;
    const float scale = 1.0f / temperature;
    const HalfOperands o{reinterpret_cast<const uint32_t*>(x), reinterpret_cast<const uint32_t*>(packed), pairs, scale};
    reduce_all(o, n, vocabulary, peak, sum, kept, kept_panels);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const float *tops = peak + i * panels, *sums = sum + i * panels;
        const float top = *std::max_element(tops, tops + panels);
        double total = 0.0;
        for (int64_t p = 0; p < panels; ++p) total += sums[p] * std::exp(tops[p] - top);
        const int64_t chosen = token[i] / kPanel;
        alignas(64) float logits[kPanel];
        row_logits(o, i, chosen, kPanel, logits);
        normaliser[i] = static_cast<float>(top + std::log(total));
        logp[i] = static_cast<float>(static_cast<double>(logits[token[i] % kPanel]) - top - std::log(total));
    }
}

// out [n][vocabulary] bfloat16 = -factor_i softmax(logits_i / temperature); from what `nr_head_logp` kept of the first panels,
// and computed again for the others. peak is [n][peak_stride], with the maxima of these panels.
void nr_head_slope(const uint16_t* x, const uint16_t* packed, int64_t n, int64_t vocabulary, int64_t width, float temperature,
                   const float* normaliser, const float* factor, uint16_t* out, const uint16_t* kept, int64_t kept_panels,
                   const float* peak, int64_t peak_stride) {
    const int64_t panels = (vocabulary + kPanel - 1) / kPanel, pairs = width / 2;
    const float scale = 1.0f / temperature;
    const HalfOperands o{reinterpret_cast<const uint32_t*>(x), reinterpret_cast<const uint32_t*>(packed), pairs, scale};
    constexpr int64_t kFew = 20 * kMostRows;  // rows at a time: a panel of all of them would touch a page for each
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t begin = 0; begin < n; begin += kFew)
        for (int64_t p = 0; p < panels; ++p) {
            const int valid = static_cast<int>(std::min<int64_t>(kPanel, vocabulary - p * kPanel));
            const int64_t end = std::min(n, begin + kFew);
            int64_t i = begin;
            for (; i < end && p < kept_panels; ++i)
                slope_kept(kept + (p * n + i) * kPanel, valid, peak[i * peak_stride + p] - normaliser[i], factor[i],
                           out + i * vocabulary + p * kPanel);
            in_tiles<kMostRows, 1>(i, end, [&](auto count, int64_t row) {
                slope_panel<decltype(count)::value>(o, row, p, valid, normaliser + row, factor + row,
                                                    out + row * vocabulary + p * kPanel, vocabulary);
            });
        }
}

// Draws one token per row of x [n][width] bfloat16. temperature 0: greedy, log-probability of the untempered softmax.
// peak, sum: scratch [n][panels].
void nr_head_draw(const uint16_t* x, const uint16_t* packed, int64_t n, int64_t vocabulary, int64_t width, float temperature,
                  const double* uniform, int64_t* token, float* logp, float* peak, float* sum) {
    draw(HalfOperands{reinterpret_cast<const uint32_t*>(x), reinterpret_cast<const uint32_t*>(packed), width / 2,
                      scale_of(temperature)},
         n, vocabulary, temperature, uniform, token, logp, peak, sum);
}

#else
int nr_head_available() { return 0; }
void nr_pack_head(const uint16_t*, uint16_t*, int64_t, int64_t) {}
void nr_head_logp(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, float, const int64_t*, float*, float*, float*,
                  float*, uint16_t*, int64_t) {}
void nr_head_slope(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, float, const float*, const float*, uint16_t*,
                   const uint16_t*, int64_t, const float*, int64_t) {}
void nr_head_draw(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, float, const double*, int64_t*, float*, float*,
                  float*) {}
#endif

#ifdef BYTES
// As nr_head_draw, of rows of bytes with a head of bytes (int8.cpp); column_scale is padded to whole panels.
void nr_int8_head_draw(const int8_t* x, const float* row_scale, const int32_t* row_sum, const Apart* apart, const uint32_t* packed,
                       const float* column_scale, int64_t n, int64_t vocabulary, int64_t width, float temperature,
                       const double* uniform, int64_t* token, float* logp, float* peak, float* sum) {
    const ByteRows rows{reinterpret_cast<const uint32_t*>(x), row_scale, row_sum, width / 4, apart};
    draw(ByteOperands{rows, packed, column_scale, scale_of(temperature)}, n, vocabulary, temperature, uniform, token, logp,
         peak, sum);
}
#else
void nr_int8_head_draw(const int8_t*, const float*, const int32_t*, const void*, const uint32_t*, const float*, int64_t, int64_t,
                       int64_t, float, const double*, int64_t*, float*, float*, float*) {}
#endif
}
