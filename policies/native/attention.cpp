// One token's attention over shared prompts and own keys and values.
//
// A word is one float or two bfloat16 that are multiplied and added together. KV layout, per row and key head: keys in blocks
// of 16 tokens, [D / pack words][16 tokens], so that scores of 16 tokens are one vector; values [tokens / pack words][D].
// Rows that share a prompt are attended together, so that each word of the prompt is loaded once for all of them. Every sum
// is taken in the order of the tokens whatever the company, so that a row's result does not depend on the others.

#include "arithmetic.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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

constexpr int kBlock = 16;
constexpr int kTogether = 4;  // rows of one prompt

template <typename T>
constexpr int kPack = 4 / sizeof(T);

template <typename T>
Lanes multiply_add(Lanes sum, uint32_t a, Words b);
template <>
inline Lanes multiply_add<float>(Lanes sum, uint32_t a, Words b) {
    return sum + bits_to_float(a) * (Lanes)b;
}
template <>
inline Lanes multiply_add<bf16>(Lanes sum, uint32_t a, Words b) {
#ifdef __AVX512BF16__
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    return sum + bits_to_float(a << 16) * (Lanes)(b << 16) + bits_to_float(a & 0xffff0000u) * (Lanes)(b & 0xffff0000u);
#endif
}

inline Words load_words(const uint32_t* x) { Words v; std::memcpy(&v, x, sizeof v); return v; }

// scores of Q queries [Q][words] with B blocks of keys
template <typename T, int Q, int B>
inline void score_tile(const uint32_t* keys, const uint32_t* q, int64_t words, float* scores, int64_t stride) {
    Lanes sum[Q][B] = {};
    for (int64_t w = 0; w < words; ++w) {
        Words key[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) key[b] = load_words(keys + (b * words + w) * kBlock);
#pragma GCC unroll 16
        for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) sum[i][b] = multiply_add<T>(sum[i][b], q[i * words + w], key[b]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) save_lanes(scores + i * stride + b * kBlock, sum[i][b]);
}

template <typename T, int Q>
void score_blocks(const uint32_t* keys, const uint32_t* q, int64_t words, int64_t blocks, float* scores, int64_t stride) {
    constexpr int kWide = Q > 6 ? 1 : Q > 3 ? 3 : 4;  // enough independent sums to hide the latency of one
    int64_t b = 0;
    for (; b + kWide <= blocks; b += kWide)
        score_tile<T, Q, kWide>(keys + b * words * kBlock, q, words, scores + b * kBlock, stride);
    for (; b < blocks; ++b) score_tile<T, Q, 1>(keys + b * words * kBlock, q, words, scores + b * kBlock, stride);
}

// out [Q][d] += p [Q][stride] times C * 16 channels of values [steps][d]
template <typename T, int Q, int C>
inline void mix_tile(const uint32_t* values, const uint32_t* p, int64_t stride, int64_t steps, int64_t d, float* out) {
    Lanes sum[Q][C];
    for (int i = 0; i < Q; ++i) std::memcpy(sum[i], out + i * d, sizeof sum[i]);
    for (int64_t t = 0; t < steps; ++t) {
        Words value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) value[c] = load_words(values + t * d + c * 16);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sum[i][c] = multiply_add<T>(sum[i][c], p[i * stride + t], value[c]);
    }
    for (int i = 0; i < Q; ++i) std::memcpy(out + i * d, sum[i], sizeof sum[i]);
}

template <typename T, int Q>
void mix_channels(const uint32_t* values, const uint32_t* p, int64_t stride, int64_t steps, int64_t d, float* out) {
    int64_t c = 0;
    for (; c + 64 <= d; c += 64) mix_tile<T, Q, 4>(values + c, p, stride, steps, d, out + c);
    for (; c < d; c += 16) mix_tile<T, Q, 1>(values + c, p, stride, steps, d, out + c);
}

// Calls f<Q>(first) on `count` queries in tiles that fit the registers.
#define TILES(count, largest, call)                                      \
    for (int64_t first = 0; first < (count);) {                          \
        const int64_t left = std::min<int64_t>((count)-first, largest);  \
        switch (left) {                                                  \
            case 1: { constexpr int Q = 1; call; first += Q; break; }    \
            case 2: { constexpr int Q = 2; call; first += Q; break; }    \
            case 3: { constexpr int Q = 3; call; first += Q; break; }    \
            case 4: { constexpr int Q = 4; call; first += Q; break; }    \
            case 5: { constexpr int Q = 5; call; first += Q; break; }    \
            case 6:                                                      \
            case 7:                                                      \
            case 8:                                                      \
            case 9:                                                      \
            case 10:                                                     \
            case 11: { constexpr int Q = 6; call; first += Q; break; }   \
            default: { constexpr int Q = 12; call; first += Q; break; }  \
        }                                                                \
    }

template <typename T>
void score(const uint32_t* keys, const uint32_t* q, int64_t count, int64_t words, int64_t blocks, float* scores, int64_t stride) {
    TILES(count, 12, (score_blocks<T, Q>(keys, q + first * words, words, blocks, scores + first * stride, stride)))
}

template <typename T>
void mix(const uint32_t* values, const uint32_t* p, int64_t count, int64_t stride, int64_t steps, int64_t d, float* out) {
    TILES(count, 6, (mix_channels<T, (Q > 6 ? 6 : Q)>(values, p + first * stride, stride, steps, d, out + first * d)))
}

// exp(score - max) over n tokens (a multiple of 16) into p; returns the sum.
template <typename T>
float exponentials(const float* scores, int64_t n, T* p) {
    Lanes top = load_lanes(scores);
    for (int64_t t = 16; t < n; t += 16) {
        const Lanes x = load_lanes(scores + t);
        top = x > top ? x : top;
    }
    float peak = top[0];
    for (int j = 1; j < 16; ++j) peak = std::max(peak, top[j]);
    Lanes sum = {};
    for (int64_t t = 0; t < n; t += 16) {
        const Lanes e = exp_lanes(load_lanes(scores + t) - peak);
        save_lanes(p + t, e);
        sum += e;
    }
    float total = 0.0f;
    for (int j = 0; j < 16; ++j) total += sum[j];
    return total;
}

void normalise_head(float* x, const float* weight, int64_t d, float eps) {
    float square = 0.0f;
    for (int64_t j = 0; j < d; ++j) square += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(square / d + eps);
    for (int64_t j = 0; j < d; ++j) x[j] *= scale * weight[j];
}

// to [d] = rotated x [d] times `scale`, after the head's own norm if there is one
template <typename T>
void turn_head(const T* x, const float* norm, const float* cos, const float* sin, const DecodeStep& s, float scale, T* to) {
    const int64_t d = s.head_dim, half = d / 2;
    float full[d];
    for (int64_t j = 0; j < d; ++j) full[j] = load(x[j]);
    if (norm) normalise_head(full, norm, d, s.eps);
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
        const float a = full[j], b = full[j + half];
        save(to[j], (a * cos[j] - b * sin[j]) * scale);
        save(to[j + half], (b * cos[j + half] + a * sin[j + half]) * scale);
    }
}

template <typename T>
void store_key(T* keys, const T* key, int64_t slot, int64_t d) {
    uint32_t* to = reinterpret_cast<uint32_t*>(keys + (slot / kBlock) * kBlock * d) + slot % kBlock;
    for (int64_t w = 0; w < d / kPack<T>; ++w) std::memcpy(to + w * kBlock, key + w * kPack<T>, 4);
}

inline void store_value(float* values, const float* value, int64_t slot, int64_t d) {
    std::memcpy(values + slot * d, value, d * sizeof(float));
}
inline void store_value(bf16* values, const bf16* value, int64_t slot, int64_t d) {
    auto* to = reinterpret_cast<uint32_t*>(values) + (slot / 2) * d;
    if (slot % 2)
        for (int64_t j = 0; j < d; ++j) to[j] = (to[j] & 0xffffu) | (static_cast<uint32_t>(value[j]) << 16);
    else  // the other half must be finite: it is multiplied by zero until its token comes
        for (int64_t j = 0; j < d; ++j) to[j] = value[j];
}

template <typename T>
struct Scratch {
    std::vector<T> q, p, key;
    std::vector<float> scores, mixed;
};

// Asks for what the task after next reads, while this one computes: rows' own stores are too short for the hardware to guess.
template <typename T>
inline void prefetch(const T* from, int64_t size) {
    const char* at = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Tasks [count] of one prompt and one head; `next` is as many tasks ahead as there are.
template <typename T>
void attend(const DecodeStep& s, const int32_t* tasks, int64_t count, int64_t ahead, const T* qkv, T* out, const float* q_norm,
            const float* k_norm, T* keys, T* values, Scratch<T>& scratch) {
    const int64_t d = s.head_dim, words = d / kPack<T>, repeat = s.query_heads / s.key_heads, queries = count * repeat;
    const int64_t width = (s.query_heads + 2 * s.key_heads) * d, plane = s.own_blocks * kBlock * d;
    const int64_t head = tasks[0] % s.key_heads, first = s.prompt_tokens[tasks[0] / s.key_heads];
    const int64_t first_blocks = (first + kBlock - 1) / kBlock, own_at = first_blocks * kBlock;
    int64_t stride = own_at;
    for (int64_t i = 0; i < count; ++i)
        stride = std::max(stride, own_at + (s.position[tasks[i] / s.key_heads] - first + kBlock) / kBlock * kBlock);
    scratch.q.resize(queries * d);
    scratch.key.resize(d);
    scratch.scores.resize(queries * stride);
    scratch.p.resize(queries * stride);
    scratch.mixed.assign(queries * d, 0.0f);
    T *q = scratch.q.data(), *p = scratch.p.data();
    float *scores = scratch.scores.data(), *mixed = scratch.mixed.data();
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = tasks[i] / s.key_heads, at = s.position[row], own = (row * s.key_heads + head) * plane;
        const float *cos = s.cos + at * d, *sin = s.sin + at * d;
        const T* in = qkv + row * width;
        for (int64_t r = 0; r < repeat; ++r)
            turn_head(in + (head * repeat + r) * d, q_norm, cos, sin, s, s.scale, q + (i * repeat + r) * d);
        turn_head(in + (s.query_heads + head) * d, k_norm, cos, sin, s, 1.0f, scratch.key.data());
        store_key(keys + own, scratch.key.data(), at - first, d);
        store_value(values + own, in + (s.query_heads + s.key_heads + head) * d, at - first, d);
    }
    const auto words_of = [](const T* x) { return reinterpret_cast<const uint32_t*>(x); };
    const T *prompt_keys = nullptr, *prompt_values = nullptr;
    if (first) {
        const int64_t row = tasks[0] / s.key_heads, prompt_plane = s.prompt_blocks[row] * kBlock * d;
        prompt_keys = static_cast<const T*>(s.prompt[row]) + (s.layer * 2 * s.key_heads + head) * prompt_plane;
        prompt_values = prompt_keys + s.key_heads * prompt_plane;
        score<T>(words_of(prompt_keys), words_of(q), queries, words, first_blocks, scores, stride);
    }
    std::vector<float> total(queries);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = tasks[i] / s.key_heads, own = s.position[row] - first + 1;
        const int64_t own_blocks = (own + kBlock - 1) / kBlock, size = own_at + own_blocks * kBlock;
        if (i < ahead) {
            const int64_t other = tasks[count + i] / s.key_heads, place = (other * s.key_heads + tasks[count + i] % s.key_heads) * plane;
            const int64_t filled = (s.position[other] - s.prompt_tokens[other] + 1) * d;
            prefetch(keys + place, filled);
            prefetch(values + place, filled);
        }
        const int64_t seen_from = s.window ? s.position[row] + 1 - s.window : 0;
        score<T>(words_of(keys + (row * s.key_heads + head) * plane), words_of(q + i * repeat * d), repeat, words, own_blocks,
                 scores + i * repeat * stride + own_at, stride);
        const float none = -std::numeric_limits<float>::infinity();
        for (int64_t r = i * repeat; r < (i + 1) * repeat; ++r) {
            float* line = scores + r * stride;
            for (int64_t t = first; t < own_at; ++t) line[t] = none;
            for (int64_t t = own_at + own; t < size; ++t) line[t] = none;
            for (int64_t t = 0; t < std::min(seen_from, first); ++t) line[t] = none;
            for (int64_t t = first; t < seen_from; ++t) line[own_at + t - first] = none;
            total[r] = exponentials(line, size, p + r * stride);
        }
    }
    const int64_t steps = stride / kPack<T>;
    if (first)  // the last block is padded with zeros
        mix<T>(words_of(prompt_values), words_of(p), queries, steps, own_at / kPack<T>, d, mixed);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = tasks[i] / s.key_heads, own = s.position[row] - first + 1;
        mix<T>(words_of(values + (row * s.key_heads + head) * plane), words_of(p + i * repeat * stride + own_at), repeat, steps,
               (own + kPack<T> - 1) / kPack<T>, d, mixed + i * repeat * d);
        T* to = out + (row * s.query_heads + head * repeat) * d;
        for (int64_t r = 0; r < repeat; ++r) {
            const float scale = 1.0f / total[i * repeat + r];
            const float* from = mixed + (i * repeat + r) * d;
            for (int64_t j = 0; j < d; j += 16) save_lanes(to + r * d + j, load_lanes(from + j) * scale);
        }
    }
}

template <typename T>
void decode_attention(const DecodeStep& s, const T* qkv, T* out, const float* q_norm, const float* k_norm, T* keys, T* values) {
    std::vector<int64_t> bounds;  // of tasks of one prompt and one head
    for (int64_t i = 0; i < s.tasks; ++i) {
        const auto prompt = [&](int64_t task) { return s.prompt[s.order[task] / s.key_heads]; };
        const auto head = [&](int64_t task) { return s.order[task] % s.key_heads; };
        if (i == 0 || i - bounds.back() == kTogether || prompt(i) != prompt(i - 1) || head(i) != head(i - 1)) bounds.push_back(i);
    }
    const int64_t chunks = static_cast<int64_t>(bounds.size());
    bounds.push_back(s.tasks);
#pragma omp parallel
    {
        Scratch<T> scratch;
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c)
            attend(s, s.order + bounds[c], bounds[c + 1] - bounds[c], std::min<int64_t>(kTogether, s.tasks - bounds[c + 1]), qkv, out, q_norm, k_norm, keys, values, scratch);
    }
}

// [tokens][2][key_heads][d] (as projected and rotated) -> one layer of a prompt's store.
template <typename T>
void store_prompt(const T* kv, T* store, int64_t tokens, int64_t blocks, int64_t heads, int64_t d) {
    const int64_t plane = blocks * kBlock * d;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t t = 0; t < tokens; ++t) {
            const T* key = kv + (t * 2 * heads + h) * d;
            store_key(store + h * plane, key, t, d);
            store_value(store + (heads + h) * plane, key + heads * d, t, d);
        }
}

}  // namespace

extern "C" {

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
