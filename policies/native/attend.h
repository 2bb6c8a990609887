// One token's attention over shared prompts and own keys and values.
//
// Rows that share a prompt are attended together, so that each word of the prompt is loaded once for all of them. Every sum
// is taken in the order of the tokens whatever the company, so that a row's result does not depend on the others.
#pragma once

#include "blocks.h"
#include "rotation.h"

extern "C" {

// Both mirrored by policies/native/step.py. Weights are panels (products.h), biases and norms are float.
struct DecodeStep {
    int64_t query_heads, key_heads, head_dim, width, inner;
    int64_t rows, head_step, block_step;                   // words between heads and between blocks of an own store
    const float *cos, *sin;                                // [positions][head_dim], of rotation.h
    const int32_t* order;                                  // [rows], those of one prompt together
    const int64_t* token;                                  // [rows]
    const int64_t* position;                               // [rows]
    const int64_t* own;                                    // [rows] words before a row's first block in an own store
    const int64_t* prompt_tokens;                          // [rows] tokens that lie in the shared prompt
    const int64_t* prompt_blocks;                          // [rows] blocks that the prompt's store has room for
    const void* const* prompt;                             // [rows] store of the shared prompt, all layers, or null
    float scale, eps;
    int32_t is_bf16;
};

struct LayerStep {
    const float *attention_norm, *mlp_norm;                // null: that half is skipped
    const float *query_norm, *key_norm;                    // or null
    const void *qkv, *out, *gate_up, *down;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;  // or null
    void* store;                                           // own keys and values
    int64_t number, window;                                // place in the prompt's store; 0: no window
};
}

namespace {

constexpr int kTogether = 4;  // rows of one prompt

// Of a line of scores, blocks lie at [from, to), and tokens [begin, end) of them are seen.
struct Seen {
    int64_t from, begin, end, to;
};

inline Lanes mask_scores(float* line, int64_t at, const Seen& seen) {
    const Lanes x = load_lanes(line + at);
    if (seen.begin <= at && at + 16 <= seen.end) return x;
    const Integers place = counted() + static_cast<int32_t>(at);
    const Integers inside = (place >= static_cast<int32_t>(seen.begin)) & (place < static_cast<int32_t>(seen.end));
    const Lanes masked = choose(inside, x, Lanes{} - std::numeric_limits<float>::infinity());
    save_lanes(line + at, masked);
    return masked;
}

// exp(score - max) of the tokens of the prompt and of a row's own into p, 0 elsewhere; returns the sum.
template <typename T>
float exponentials(float* line, const Seen& prompt, const Seen& own, T* p) {
    Lanes top = Lanes{} - std::numeric_limits<float>::infinity();
    for (const Seen* seen : {&prompt, &own})
        for (int64_t t = seen->from; t < seen->to; t += 16) top = larger(mask_scores(line, t, *seen), top);
    const float peak = largest_lane(top);
    Lanes sum = {};
    for (int64_t t = prompt.from; t < own.to; t += 16) {
        const Lanes e = exponential(load_lanes(line + t) - peak);
        save_lanes(p + t, e);
        sum += e;
    }
    return sum_lanes(sum);
}

// to [d] = rotated x [d] times `scale`, after the head's own norm if there is one; d is a multiple of 16
template <typename T>
void turn_head(const T* x, const float* norm, const float* cos, const float* sin, const DecodeStep& s, float scale, T* to) {
    const int64_t d = s.head_dim, half = d / 2;
    float inverse = 1.0f;
    if (norm) {
        float square = 0.0f;
        for (int64_t j = 0; j < d; ++j) square += load(x[j]) * load(x[j]);
        inverse = 1.0f / std::sqrt(square / d + s.eps);
    }
    for (int64_t j = 0; j < half; j += 8) {
        Eight a = load_eight(x + j), b = load_eight(x + j + half);
        if (norm) a *= inverse * load_eight(norm + j), b *= inverse * load_eight(norm + j + half);
        turn(a, b, cos, sin, j, half, scale, to);
    }
}

template <typename T>
Blocks own_blocks(const DecodeStep& s, const LayerStep& layer, int64_t row, int64_t head) {
    return {static_cast<uint32_t*>(layer.store) + s.own[row] + head * s.head_step, s.block_step, s.head_dim / kPack<T>};
}

template <typename T>
Blocks prompt_blocks(void* store, int64_t blocks, int64_t heads, int64_t d, int64_t layer, int64_t head) {
    const int64_t words = d / kPack<T>, size = 2 * kBlock * words;
    return {static_cast<uint32_t*>(store) + (layer * blocks * heads + head) * size, heads * size, words};
}

inline void store_token(const Blocks& kv, const float* key, const float* value, int64_t slot) {
    const int64_t d = kv.words, block = slot / kBlock, place = slot % kBlock;
    uint32_t* to = kv.keys(block) + place;
    for (int64_t w = 0; w < d; ++w) to[w * kBlock] = float_to_bits(key[w]);
    std::memcpy(kv.values(block) + place * d, value, d * sizeof(float));
}
inline void store_token(const Blocks& kv, const bf16* key, const bf16* value, int64_t slot) {
    const int64_t d = 2 * kv.words, block = slot / kBlock, place = slot % kBlock;
    uint32_t *to = kv.keys(block) + place, *out = kv.values(block) + place / 2 * d;
    for (int64_t w = 0; w < kv.words; ++w) std::memcpy(to + w * kBlock, key + 2 * w, 4);
    if (place % 2)
        for (int64_t j = 0; j < d; ++j) out[j] = (out[j] & 0xffffu) | (static_cast<uint32_t>(value[j]) << 16);
    else  // the other half must be finite: it is multiplied by zero until its token comes
        for (int64_t j = 0; j < d; ++j) out[j] = value[j];
}

template <typename T>
struct Scratch {
    std::vector<T> q, p, key;
    std::vector<float> scores, mixed, total;
    Soon soon;

    void room(int64_t queries, int64_t d, int64_t tokens) {
        if (static_cast<int64_t>(key.size()) < d) key.resize(d);
        if (static_cast<int64_t>(q.size()) < queries * d) q.resize(queries * d), mixed.resize(queries * d);
        if (static_cast<int64_t>(p.size()) < queries * tokens) p.resize(queries * tokens), scores.resize(queries * tokens);
        if (static_cast<int64_t>(total.size()) < queries) total.resize(queries);
        std::fill_n(mixed.data(), queries * d, 0.0f);
    }
};

// Some rows of one prompt, and where they lie in the fused projections and in the output.
struct Together {
    const int32_t *row, *place;
    int64_t count;
};

template <typename T>
void store_key_value(const DecodeStep& s, const LayerStep& layer, int64_t row, int64_t head, const T* projected, T* key) {
    const int64_t d = s.head_dim, at = s.position[row];
    const T* in = projected + (s.query_heads + head) * d;
    turn_head(in, layer.key_norm, s.cos + at * d, s.sin + at * d, s, 1.0f, key);
    store_token(own_blocks<T>(s, layer, row, head), key, in + s.key_heads * d, at - s.prompt_tokens[row]);
}

inline int64_t own_count(const DecodeStep& s, int64_t row) { return (s.position[row] - s.prompt_tokens[row] + kBlock) / kBlock; }

// What the next call of `attend` will read.
template <typename T>
void announce(const DecodeStep& s, const LayerStep& layer, const Together& rows, int64_t head, Soon& soon) {
    soon.clear(2 * kBlock * s.head_dim / kPack<T>);
    const int64_t row = rows.row[0], blocks = (s.prompt_tokens[row] + kBlock - 1) / kBlock;
    if (blocks)
        soon.add(prompt_blocks<T>(const_cast<void*>(s.prompt[row]), s.prompt_blocks[row], s.key_heads, s.head_dim, layer.number, head),
                 blocks);
    for (int64_t i = 0; i < rows.count; ++i) soon.add(own_blocks<T>(s, layer, rows.row[i], head), own_count(s, rows.row[i]));
}

template <typename T>
void attend(const DecodeStep& s, const LayerStep& layer, const Together& rows, int64_t head, const T* qkv, T* out,
            Scratch<T>& scratch) {
    const int64_t d = s.head_dim, repeat = s.query_heads / s.key_heads, queries = rows.count * repeat;
    const int64_t width = (s.query_heads + 2 * s.key_heads) * d, first = s.prompt_tokens[rows.row[0]];
    const int64_t first_blocks = (first + kBlock - 1) / kBlock, own_at = first_blocks * kBlock;
    const auto blocks_of = [&](int64_t row) { return own_count(s, row); };
    int64_t stride = own_at;
    for (int64_t i = 0; i < rows.count; ++i) stride = std::max(stride, own_at + blocks_of(rows.row[i]) * kBlock);
    scratch.room(queries, d, stride);
    T *q = scratch.q.data(), *p = scratch.p.data();
    float *scores = scratch.scores.data(), *mixed = scratch.mixed.data(), *total = scratch.total.data();
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = rows.row[i], at = s.position[row];
        const T* in = qkv + rows.place[i] * width;
        for (int64_t r = 0; r < repeat; ++r)
            turn_head(in + (head * repeat + r) * d, layer.query_norm, s.cos + at * d, s.sin + at * d, s, s.scale,
                      q + (i * repeat + r) * d);
        store_key_value(s, layer, row, head, in, scratch.key.data());
    }
    Blocks prompt{};
    if (first) {
        const int64_t row = rows.row[0];
        prompt = prompt_blocks<T>(const_cast<void*>(s.prompt[row]), s.prompt_blocks[row], s.key_heads, d, layer.number, head);
        score<T>(prompt, first_blocks, q, queries, scores, stride, scratch.soon);
    }
    for (int64_t i = 0; i < rows.count; ++i)
        score<T>(own_blocks<T>(s, layer, rows.row[i], head), blocks_of(rows.row[i]), q + i * repeat * d, repeat,
                 scores + i * repeat * stride + own_at, stride, scratch.soon);
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = rows.row[i], at = s.position[row], last = own_at + at - first + 1;
        const int64_t from = layer.window ? std::max<int64_t>(0, at + 1 - layer.window) : 0;
        const Seen of_prompt{0, from, first, own_at};
        const Seen of_own{own_at, own_at + std::max<int64_t>(0, from - first), last, own_at + blocks_of(row) * kBlock};
        for (int64_t r = i * repeat; r < (i + 1) * repeat; ++r)
            total[r] = exponentials(scores + r * stride, of_prompt, of_own, p + r * stride);
    }
    if (first) mix<T>(prompt, own_at, p, queries, stride, mixed, scratch.soon);  // the last block is padded with zeros
    for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t row = rows.row[i], at = i * repeat;
        mix<T>(own_blocks<T>(s, layer, row, head), s.position[row] - first + 1, p + at * stride + own_at, repeat, stride,
               mixed + at * d, scratch.soon);
        T* to = out + (rows.place[i] * s.query_heads + head * repeat) * d;
        for (int64_t r = 0; r < repeat; ++r) {
            const float scale = 1.0f / total[at + r];
            for (int64_t j = 0; j < d; j += 16) save_lanes(to + r * d + j, load_lanes(mixed + (at + r) * d + j) * scale);
        }
    }
}

// How many of the `left` rows from `row` on are attended together.
inline int64_t together(const DecodeStep& s, const int32_t* row, int64_t left) {
    int64_t n = 1;
    while (n < std::min<int64_t>(left, kTogether) && s.prompt[row[n]] == s.prompt[row[0]] &&
           s.prompt_tokens[row[n]] == s.prompt_tokens[row[0]])
        ++n;
    return n;
}

}  // namespace
