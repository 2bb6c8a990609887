// The parts of a decode step that are not matrix products, each as one pass over its data, and a fused head.
//
// Plain C interface, no torch headers: builds in seconds and is called through ctypes. Tensors are row-major.
// `bf16` arguments say whether void pointers hold bfloat16 (1) or float (0). Everything is computed in float.
// KV layout, per row and key head: keys in blocks of 16 tokens, channel-major within the block, so that scores of 16
// tokens are one vector (bfloat16: pairs of channels interleaved); values [tokens][D].

#include "arithmetic.h"

namespace {

constexpr int kBlock = 16;

template <typename T>
void add_norm(float* x, const T* delta, const float* weight, T* out, int64_t n, int64_t d, float eps) {
#pragma omp parallel for schedule(static) if (n * d > 16384)
    for (int64_t i = 0; i < n; ++i) {
        float* row = x + i * d;
        float square = 0.0f;
        if (delta) {
            const T* add = delta + i * d;
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < d; ++j) { row[j] += load(add[j]); square += row[j] * row[j]; }
        } else {
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < d; ++j) square += row[j] * row[j];
        }
        const float scale = 1.0f / std::sqrt(square / d + eps);
        T* to = out + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) save(to[j], row[j] * scale * weight[j]);
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t n, int64_t inner) {
#pragma omp parallel for schedule(static) if (n * inner > 16384)
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * inner, *up = gate + inner;
        T* to = out + i * inner;
#pragma omp simd
        for (int64_t j = 0; j < inner; ++j) {
            const float g = load(gate[j]);
            save(to[j], g / (1.0f + fast_exp(-g)) * load(up[j]));
        }
    }
}

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Lanes load_lanes(const float* x) { Lanes v; std::memcpy(&v, x, sizeof v); return v; }
inline Lanes load_lanes(const bf16* x) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    Halves h;
    std::memcpy(&h, x, sizeof h);
    return (Lanes)(__builtin_convertvector(h, Words) << 16);
}

// scores of R queries [R][d_head] with one block of keys
template <int R>
inline void score_block(const float* k, const float* q, int d_head, float* scores, int64_t stride) {
    Lanes acc[R] = {};
    for (int d = 0; d < d_head; ++d) {
        const Lanes key = load_lanes(k + d * kBlock);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] += q[r * d_head + d] * key;
    }
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * stride, &acc[r], sizeof acc[r]);
}

template <int R>
inline void score_block(const bf16* k, const float* q, int d_head, float* scores, int64_t stride) {
    Lanes acc[R] = {};
    for (int d = 0; d < d_head; d += 2) {
        Words pair;
        std::memcpy(&pair, k + d * kBlock, sizeof pair);
        const Lanes even = (Lanes)(pair << 16), odd = (Lanes)(pair & 0xffff0000u);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] += q[r * d_head + d] * even + q[r * d_head + d + 1] * odd;
    }
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * stride, &acc[r], sizeof acc[r]);
}

// out [R][d_head] += weights p [R][stride] times C * 16 channels of values
template <typename T, int R, int C>
inline void mix_chunk(const T* v, const float* p, int64_t stride, int64_t tokens, int d_head, float* out) {
    Lanes acc[R][C];
    for (int r = 0; r < R; ++r) std::memcpy(acc[r], out + r * d_head, sizeof acc[r]);
    for (int64_t t = 0; t < tokens; ++t) {
        Lanes value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) value[c] = load_lanes(v + t * d_head + c * 16);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) acc[r][c] += p[r * stride + t] * value[c];
    }
    for (int r = 0; r < R; ++r) std::memcpy(out + r * d_head, acc[r], sizeof acc[r]);
}

template <typename T, int R>
void mix(const T* v, const float* p, int64_t stride, int64_t tokens, int d_head, float* out) {
    int c = 0;
    for (; c + 64 <= d_head; c += 64) mix_chunk<T, R, 4>(v + c, p, stride, tokens, d_head, out + c);
    for (; c + 32 <= d_head; c += 32) mix_chunk<T, R, 2>(v + c, p, stride, tokens, d_head, out + c);
    for (; c < d_head; c += 16) mix_chunk<T, R, 1>(v + c, p, stride, tokens, d_head, out + c);
}

inline Lanes exp_lanes(Lanes x) {  // fast_exp of arithmetic.h
    typedef int32_t Integers __attribute__((vector_size(64)));
    const Lanes lowest = Lanes{} - 87.0f;
    x = x < lowest ? lowest : x;
    const Lanes n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)((__builtin_convertvector(n, Integers) + 127) << 23);
}

// in place; n is a multiple of 16
void softmax(float* score, int64_t n) {
    Lanes top = load_lanes(score);
    for (int64_t t = 16; t < n; t += 16) {
        const Lanes x = load_lanes(score + t);
        top = x > top ? x : top;
    }
    float peak = top[0];
    for (int j = 1; j < 16; ++j) peak = std::max(peak, top[j]);
    Lanes sum = {};
    for (int64_t t = 0; t < n; t += 16) {
        const Lanes e = exp_lanes(load_lanes(score + t) - peak);
        std::memcpy(score + t, &e, sizeof e);
        sum += e;
    }
    float total = 0.0f;
    for (int j = 0; j < 16; ++j) total += sum[j];
    for (int64_t t = 0; t < n; t += 16) {
        const Lanes p = load_lanes(score + t) * (1.0f / total);
        std::memcpy(score + t, &p, sizeof p);
    }
}

void normalise_head(float* x, const float* weight, int d, float eps) {
    float square = 0.0f;
    for (int j = 0; j < d; ++j) square += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(square / d + eps);
    for (int j = 0; j < d; ++j) x[j] *= scale * weight[j];
}

void rotate_head(float* x, const float* cos, const float* sin, int d) {
    const int half = d / 2;
#pragma omp simd
    for (int j = 0; j < half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cos[j] - b * sin[j];
        x[j + half] = b * cos[j + half] + a * sin[j + half];
    }
}

}  // namespace

extern "C" {

// Mirrored by policies/native/__init__.py (DecodeStep).
struct DecodeStep {
    int64_t query_heads, key_heads, head_dim, own_blocks;  // own_blocks: capacity of a row's own store
    int64_t tasks, layer, window;                          // window 0: none
    const float *cos, *sin;                                // [positions][head_dim], halves repeated
    const int32_t* order;                                  // [tasks] row * key_heads + head, rows of one prompt together
    const int64_t* position;                               // [rows]
    const int64_t* prompt_tokens;                          // [rows] tokens that lie in the shared prompt
    const int64_t* prompt_blocks;                          // [rows] blocks that the prompt's store has room for
    const void* const* prompt;                             // [rows] store of the shared prompt, all layers, or null
    float scale, eps;
};
}

namespace {

template <typename T>
const T* prompt_keys(const DecodeStep& s, int64_t row, int64_t head) {
    const int64_t plane = s.prompt_blocks[row] * kBlock * s.head_dim;
    return static_cast<const T*>(s.prompt[row]) + (s.layer * 2 * s.key_heads + head) * plane;
}

template <typename T, int R>
void attend_heads(const DecodeStep& s, int64_t row, int64_t head, const float* q, const T* own_k, const T* own_v,
                  T* out, std::vector<float>& scratch) {
    const int64_t d = s.head_dim, first = s.prompt_tokens[row], own = s.position[row] - first + 1;
    const int64_t first_blocks = (first + kBlock - 1) / kBlock, own_blocks = (own + kBlock - 1) / kBlock;
    const int64_t stride = (first_blocks + own_blocks) * kBlock, own_at = first_blocks * kBlock;
    scratch.resize(R * (stride + d));
    float *scores = scratch.data(), *mixed = scores + R * stride;
    const T *prompt_k = nullptr, *prompt_v = nullptr;
    if (first) {
        prompt_k = prompt_keys<T>(s, row, head);
        prompt_v = prompt_k + s.key_heads * s.prompt_blocks[row] * kBlock * d;
    }
    for (int64_t b = 0; b < first_blocks; ++b) score_block<R>(prompt_k + b * kBlock * d, q, d, scores + b * kBlock, stride);
    for (int64_t b = 0; b < own_blocks; ++b)
        score_block<R>(own_k + b * kBlock * d, q, d, scores + own_at + b * kBlock, stride);
    const float none = -std::numeric_limits<float>::infinity();
    const int64_t seen_from = s.window ? s.position[row] + 1 - s.window : 0;
    for (int r = 0; r < R; ++r) {
        float* score = scores + r * stride;
        for (int64_t t = first; t < own_at; ++t) score[t] = none;
        for (int64_t t = own_at + own; t < stride; ++t) score[t] = none;
        for (int64_t t = 0; t < std::min(seen_from, first); ++t) score[t] = none;
        for (int64_t t = first; t < seen_from; ++t) score[own_at + t - first] = none;
        softmax(score, stride);
    }
    std::memset(mixed, 0, R * d * sizeof(float));
    if (first) mix<T, R>(prompt_v, scores, stride, first, d, mixed);
    mix<T, R>(own_v, scores + own_at, stride, own, d, mixed);
    for (int64_t j = 0; j < R * d; ++j) save(out[j], mixed[j]);
}

template <typename T>
void store_key(T* block, const float* k, int64_t slot, int64_t d);
template <>
void store_key<float>(float* block, const float* k, int64_t slot, int64_t d) {
    for (int64_t j = 0; j < d; ++j) block[j * kBlock + slot] = k[j];
}
template <>
void store_key<bf16>(bf16* block, const float* k, int64_t slot, int64_t d) {
    for (int64_t j = 0; j < d; ++j) save(block[((j / 2) * kBlock + slot) * 2 + (j & 1)], k[j]);
}

template <typename T>
void decode_attention(const DecodeStep& s, const T* qkv, T* out, const float* q_norm, const float* k_norm, T* keys,
                      T* values) {
    const int64_t d = s.head_dim, repeat = s.query_heads / s.key_heads, width = (s.query_heads + 2 * s.key_heads) * d;
    const int64_t plane = s.own_blocks * kBlock * d;
#pragma omp parallel
    {
        std::vector<float> scratch, q(repeat * d), k(d);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.tasks; ++i) {
            const int64_t row = s.order[i] / s.key_heads, head = s.order[i] % s.key_heads, at = s.position[row];
            const float *cos = s.cos + at * d, *sin = s.sin + at * d;
            const T* in = qkv + row * width;
            for (int64_t j = 0; j < repeat * d; ++j) q[j] = load(in[head * repeat * d + j]);
            for (int64_t j = 0; j < d; ++j) k[j] = load(in[(s.query_heads + head) * d + j]);
            if (k_norm) normalise_head(k.data(), k_norm, d, s.eps);
            rotate_head(k.data(), cos, sin, d);
            for (int64_t r = 0; r < repeat; ++r) {
                if (q_norm) normalise_head(q.data() + r * d, q_norm, d, s.eps);
                rotate_head(q.data() + r * d, cos, sin, d);
            }
            for (float& x : q) x *= s.scale;
            T *own_k = keys + (row * s.key_heads + head) * plane, *own_v = values + (row * s.key_heads + head) * plane;
            const int64_t slot = at - s.prompt_tokens[row];
            store_key(own_k + (slot / kBlock) * kBlock * d, k.data(), slot % kBlock, d);
            std::memcpy(own_v + slot * d, in + (s.query_heads + s.key_heads + head) * d, d * sizeof(T));
            T* to = out + (row * s.query_heads + head * repeat) * d;
            int64_t r = 0;
            for (; r + 4 <= repeat; r += 4) attend_heads<T, 4>(s, row, head, &q[r * d], own_k, own_v, to + r * d, scratch);
            if (repeat - r == 3) attend_heads<T, 3>(s, row, head, &q[r * d], own_k, own_v, to + r * d, scratch);
            if (repeat - r == 2) attend_heads<T, 2>(s, row, head, &q[r * d], own_k, own_v, to + r * d, scratch);
            if (repeat - r == 1) attend_heads<T, 1>(s, row, head, &q[r * d], own_k, own_v, to + r * d, scratch);
        }
    }
}

// [tokens][2][key_heads][d] (as projected and rotated) -> one layer of a prompt's store.
template <typename T>
void store_prompt(const T* kv, T* store, int64_t tokens, int64_t blocks, int64_t heads, int64_t d) {
    const int64_t plane = blocks * kBlock * d;
    std::vector<float> k(d);
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t t = 0; t < tokens; ++t) {
            const T *key = kv + (t * 2 * heads + h) * d, *value = key + heads * d;
            for (int64_t j = 0; j < d; ++j) k[j] = load(key[j]);
            store_key(store + h * plane + (t / kBlock) * kBlock * d, k.data(), t % kBlock, d);
            std::memcpy(store + (heads + h) * plane + t * d, value, d * sizeof(T));
        }
}

}  // namespace

extern "C" {

void nr_add_norm(float* x, const void* delta, const float* weight, void* out, int64_t n, int64_t d, float eps, int is_bf16) {
    if (is_bf16) add_norm(x, static_cast<const bf16*>(delta), weight, static_cast<bf16*>(out), n, d, eps);
    else add_norm(x, static_cast<const float*>(delta), weight, static_cast<float*>(out), n, d, eps);
}

void nr_silu_mul(const void* gate_up, void* out, int64_t n, int64_t inner, int is_bf16) {
    if (is_bf16) silu_mul(static_cast<const bf16*>(gate_up), static_cast<bf16*>(out), n, inner);
    else silu_mul(static_cast<const float*>(gate_up), static_cast<float*>(out), n, inner);
}

void nr_decode_attention(const DecodeStep* step, const void* qkv, void* out, const float* q_norm, const float* k_norm,
                         void* keys, void* values, int is_bf16) {
    if (is_bf16)
        decode_attention(*step, static_cast<const bf16*>(qkv), static_cast<bf16*>(out), q_norm, k_norm,
                         static_cast<bf16*>(keys), static_cast<bf16*>(values));
    else
        decode_attention(*step, static_cast<const float*>(qkv), static_cast<float*>(out), q_norm, k_norm,
                         static_cast<float*>(keys), static_cast<float*>(values));
}

void nr_store_prompt(const void* kv, void* store, int64_t tokens, int64_t blocks, int64_t heads, int64_t d, int is_bf16) {
    if (is_bf16) store_prompt(static_cast<const bf16*>(kv), static_cast<bf16*>(store), tokens, blocks, heads, d);
    else store_prompt(static_cast<const float*>(kv), static_cast<float*>(store), tokens, blocks, heads, d);
}

}
