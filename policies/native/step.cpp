// A whole decode step, or a prompt's keys and values, for models whose weights stay in a core's reach: a thread takes some
// rows through all layers, so that there is one call and one barrier a step and activations never leave the core.

#include "attend.h"
#include "norms.h"
#include "pick.h"
#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t kAtOnce = 48;  // rows that a weight is read for

inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

template <typename T>
struct Buffers {
    std::vector<float> x;
    std::vector<T> normed, qkv, mixed, inner;
    std::vector<int32_t> place;
    Scratch<T> scratch;

    explicit Buffers(const DecodeStep& s)
        : x(kAtOnce * padded(s.width)),
          normed(kAtOnce * padded(s.width)),
          qkv(kAtOnce * (s.query_heads + 2 * s.key_heads) * s.head_dim),
          mixed(kAtOnce * s.query_heads * s.head_dim),
          inner(kAtOnce * padded(s.inner)),
          place(kAtOnce) {
        for (int64_t i = 0; i < kAtOnce; ++i) place[i] = static_cast<int32_t>(i);
    }
};

template <typename T>
void normalised(const float* x, const float* weight, T* to, int64_t d, float eps) {
    normalise(x, inverse_mean(x, d, eps), weight, to, d);
}

inline Lanes bias_lanes(const float* bias, int64_t column) { return bias ? load_lanes(bias + column) : Lanes{}; }

enum class Wanted { hidden, keys, products };  // final hidden states; keys and values alone; the time of the products alone

// x [rows][padded(width)] += input times a weight that maps back to the residual stream
template <typename T>
void add_product(const DecodeStep& s, const T* input, int64_t stride, int64_t rows, int64_t k, const void* panels, const float* bias,
                 float* x) {
    product(input, stride, rows, k, panels, s.width, [&](int64_t row, int64_t panel, Lanes a, Lanes b) {
        float* to = x + row * padded(s.width) + panel * kPanel;
        save_lanes(to, load_lanes(to) + (a + bias_lanes(bias, panel * kPanel)));
        save_lanes(to + 16, load_lanes(to + 16) + (b + bias_lanes(bias, panel * kPanel + 16)));
    });
}

template <typename T>
void attention_half(const DecodeStep& s, const LayerStep& layer, const int32_t* rows, int64_t n, Wanted wanted, Buffers<T>& b) {
    const int64_t width = padded(s.width), projected = (s.query_heads + 2 * s.key_heads) * s.head_dim;
    if (wanted != Wanted::products)
        for (int64_t i = 0; i < n; ++i) normalised(&b.x[i * width], layer.attention_norm, &b.normed[i * width], s.width, s.eps);
    product(b.normed.data(), width, n, s.width, layer.qkv, projected, [&](int64_t row, int64_t panel, Lanes first, Lanes second) {
        const int64_t column = panel * kPanel;
        T* to = &b.qkv[row * projected + column];
        save_lanes(to, first + bias_lanes(layer.qkv_bias, column));
        if (column + 16 < projected) save_lanes(to + 16, second + bias_lanes(layer.qkv_bias, column + 16));
    });
    if (wanted == Wanted::keys) {
        b.scratch.room(1, s.head_dim, 1);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t head = 0; head < s.key_heads; ++head)
                store_key_value(s, layer, rows[i], head, &b.qkv[i * projected], b.scratch.key.data());
        return;
    }
    for (int64_t i = 0, count; i < n && wanted == Wanted::hidden; i += count) {
        count = together(s, rows + i, n - i);
        for (int64_t head = 0; head < s.key_heads; ++head)
            attend(s, layer, {rows + i, &b.place[i], count}, head, b.qkv.data(), b.mixed.data(), b.scratch);
    }
    const int64_t mixed = s.query_heads * s.head_dim;
    add_product(s, b.mixed.data(), mixed, n, mixed, layer.out, layer.out_bias, b.x.data());
}

template <typename T>
void mlp_half(const DecodeStep& s, const LayerStep& layer, int64_t n, Wanted wanted, Buffers<T>& b) {
    const int64_t width = padded(s.width), inner = padded(s.inner);
    if (wanted != Wanted::products)
        for (int64_t i = 0; i < n; ++i) normalised(&b.x[i * width], layer.mlp_norm, &b.normed[i * width], s.width, s.eps);
    // A panel holds 16 gates and the 16 numbers that they multiply.
    product(b.normed.data(), width, n, s.width, layer.gate_up, 2 * s.inner, [&](int64_t row, int64_t panel, Lanes gate, Lanes up) {
        gate += bias_lanes(layer.gate_up_bias, panel * kPanel);
        up += bias_lanes(layer.gate_up_bias, panel * kPanel + 16);
        const Lanes value = wanted == Wanted::products ? gate + up : gated(gate, up);
        save_lanes(&b.inner[row * inner + panel * 16], value);
    });
    add_product(s, b.inner.data(), inner, n, s.inner, layer.down, layer.down_bias, b.x.data());
}

template <typename T>
void run_rows(const DecodeStep& s, const LayerStep* layers, int64_t count, const int32_t* rows, int64_t n, const float* embedding,
              const float* norm, Wanted wanted, float* hidden, Buffers<T>& b) {
    int64_t last = count - 1;
    while (!layers[last].attention_norm) --last;
    for (int64_t i = 0; i < n; ++i)
        std::memcpy(&b.x[i * padded(s.width)], embedding + s.token[rows[i]] * s.width, s.width * sizeof(float));
    for (int64_t l = 0; l < count; ++l) {
        const bool stop = wanted == Wanted::keys && l == last;
        if (layers[l].attention_norm)
            attention_half(s, layers[l], rows, n, wanted == Wanted::keys && !stop ? Wanted::hidden : wanted, b);
        if (stop) return;
        if (layers[l].mlp_norm) mlp_half(s, layers[l], n, wanted, b);
    }
    if (wanted == Wanted::products) return;
    for (int64_t i = 0; i < n; ++i) normalised(&b.x[i * padded(s.width)], norm, hidden + rows[i] * s.width, s.width, s.eps);
}

template <typename T>
void run(const DecodeStep& s, const LayerStep* layers, int64_t count, const int64_t* bounds, int64_t parts, const float* embedding,
         const float* norm, Wanted wanted, float* hidden) {
#pragma omp parallel
    {
        Buffers<T> buffers(s);
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t i = bounds[part]; i < bounds[part + 1]; i += kAtOnce)
                run_rows(s, layers, count, s.order + i, std::min(kAtOnce, bounds[part + 1] - i), embedding, norm, wanted, hidden,
                         buffers);
    }
}

// Draws from logits [panels][32], tempered, -inf beyond the vocabulary; overwrites them. sums: scratch [panels].
void draw_row(float* logits, int64_t panels, bool greedy, double uniform, float* sums, int64_t* token, float* logp) {
    int64_t best = 0;
    for (int64_t v = 1; v < panels * kPanel; ++v)
        if (logits[v] > logits[best]) best = v;
    const float top = logits[best];
    double total = 0.0;
    for (int64_t p = 0; p < panels; ++p) {
        float* at = logits + p * kPanel;
        const Lanes first = load_lanes(at) - top, second = load_lanes(at + 16) - top, least = Lanes{} - 87.0f;
        const Lanes a = choose(first > least, exponential(first), Lanes{}), b = choose(second > least, exponential(second), Lanes{});
        save_lanes(at, a);
        save_lanes(at + 16, b);
        total += sums[p] = sum_lanes(a + b);
    }
    int64_t chosen = best;
    if (!greedy) {
        double reached = 0.0;
        const float* at = logits + kPanel * pick(panels, uniform * total, reached, [&](int64_t p) { return sums[p]; });
        chosen = at - logits + pick(kPanel, uniform * total, reached, [&](int64_t v) { return at[v]; });
    }
    *token = chosen;
    *logp = static_cast<float>(std::log(static_cast<double>(logits[chosen])) - std::log(total));
}

void draw_rows(const float* hidden, const void* panels, int64_t n, int64_t vocabulary, int64_t width, float temperature,
               const double* uniform, int64_t* token, float* logp, std::vector<float>& scratch) {
    const int64_t count = padded(vocabulary) / kPanel, size = padded(vocabulary);
    const float scale = temperature > 0.0f ? 1.0f / temperature : 1.0f, none = -std::numeric_limits<float>::infinity();
    scratch.resize(n * size + count);
    float* logits = scratch.data();
    product(hidden, width, n, width, panels, vocabulary, [&](int64_t row, int64_t panel, Lanes a, Lanes b) {
        float* to = logits + row * size + panel * kPanel;
        save_lanes(to, a * scale);
        save_lanes(to + 16, b * scale);
    });
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t v = vocabulary; v < size; ++v) logits[i * size + v] = none;
        draw_row(logits + i * size, count, temperature == 0.0f, uniform[i], logits + n * size, token + i, logp + i);
    }
}

// [columns][k] -> panels; `halves`: each of 16 columns of the first half and the 16 of the second that belong to them
template <typename T>
void pack_panels(const T* weight, T* packed, int64_t columns, int64_t k, bool halves) {
    const int64_t words = panel_words<T>(k), half = columns / 2;
    const int64_t panels = halves ? (half + 15) / 16 : padded(columns) / kPanel;
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t c = 0; c < kPanel; ++c) {
            const int64_t of_half = p * 16 + c % 16;
            const int64_t column = !halves ? p * kPanel + c : of_half >= half ? columns : of_half + (c < 16 ? 0 : half);
            for (int64_t j = 0; j < words * kPack<T>; ++j) {
                T* to = packed + ((p * words + j / kPack<T>) * kPanel + c) * kPack<T> + j % kPack<T>;
                *to = column < columns && j < k ? weight[column * k + j] : T{};
            }
        }
}

}  // namespace

extern "C" {

// packed [panels][words of k][32]; zeros beyond the columns and beyond k.
void nr_pack_panels(const void* weight, void* packed, int64_t columns, int64_t k, int halves, int is_bf16) {
    if (is_bf16) pack_panels(static_cast<const bf16*>(weight), static_cast<bf16*>(packed), columns, k, halves);
    else pack_panels(static_cast<const float*>(weight), static_cast<float*>(packed), columns, k, halves);
}

// Rows order[bounds[i]] to order[bounds[i + 1] - 1] go one after the other: a row may attend to what an earlier one stored.
// hidden [rows][width], or null where keys and values are all that is wanted. products: compute nothing but those, to be timed.
void nr_run(const DecodeStep* step, const LayerStep* layers, int64_t count, const int64_t* bounds, int64_t parts,
            const float* embedding, const float* norm, float* hidden, int products) {
    const Wanted wanted = products ? Wanted::products : hidden ? Wanted::hidden : Wanted::keys;
    if (step->is_bf16) run<bf16>(*step, layers, count, bounds, parts, embedding, norm, wanted, hidden);
    else run<float>(*step, layers, count, bounds, parts, embedding, norm, wanted, hidden);
}

// As nr_head_draw, from float32 and for a head that stays in a core's reach.
void nr_draw(const float* hidden, const void* panels, int64_t n, int64_t vocabulary, int64_t width, float temperature,
             const double* uniform, int64_t* token, float* logp) {
    const int64_t share = (n + omp_get_max_threads() - 1) / omp_get_max_threads(), rows = std::min(kAtOnce, share);
#pragma omp parallel
    {
        std::vector<float> scratch;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += rows)
            draw_rows(hidden + i * width, panels, std::min(rows, n - i), vocabulary, width, temperature, uniform + i, token + i,
                      logp + i, scratch);
    }
}
}
