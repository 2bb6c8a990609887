// Blocks of keys and values, and the products of queries with them.
//
// 16 tokens of one key head are a block: keys [D / pack words][16 tokens], so that their scores are one vector; then values
// [16 / pack words][D]. Blocks lie as [block][key head][row], in a prompt's store [layer][block][key head]: what a step reads
// is dense wherever rows are about as long as each other, and the memory of blocks that no row has reached is never touched.
#pragma once

#include "arithmetic.h"
#include "words.h"

namespace {

constexpr int kFetched = 2;  // lines at a time
constexpr int kMostQueries = kRegisters == 32 ? 12 : 6;  // whose scores are taken together

// Words of one head's blocks, `step` words apart.
struct Blocks {
    uint32_t* at;
    int64_t step, words;  // words of one token's key
    uint32_t* keys(int64_t block) const { return at + block * step; }
    uint32_t* values(int64_t block) const { return at + block * step + words * kBlock; }
};

// Blocks that will be needed soon, brought into the cache a line at a time between other work: all at once, they would make it
// wait for them.
struct Soon {
    std::vector<const uint32_t*> blocks;
    int64_t words = 0;  // of a block
    size_t block = 0;
    int64_t word = 0;

    void clear(int64_t size) { blocks.clear(), words = size, block = 0, word = 0; }
    void add(const Blocks& kv, int64_t count) {
        for (int64_t b = 0; b < count; ++b) blocks.push_back(kv.keys(b));
    }
    template <int Lines>
    inline void fetch() {
        if (block == blocks.size()) return;
#pragma GCC unroll 4
        for (int i = 0; i < Lines; ++i) __builtin_prefetch(blocks[block] + word + 16 * i, 0, 2);
        if ((word += 16 * Lines) >= words) word = 0, ++block;
    }
};

// Vectors next to each other that Q queries are multiplied with: enough independent sums to hide the latency of one, and no
// more than the registers hold.
template <int Q>
constexpr int kBeside = kRegisters == 32 || Q == 1 ? 4 : Q < 4 ? 2 : 1;

// scores of Q queries [Q][words] with B blocks of keys from block `first`
template <typename T, int Q, int B>
inline void score_tile(const Blocks& kv, int64_t first, const uint32_t* q, float* scores, int64_t stride, Soon& soon) {
    const int64_t words = kv.words;
    const uint32_t* keys[B];
    for (int b = 0; b < B; ++b) keys[b] = kv.keys(first + b);
    Lanes sum[Q][B] = {};
    for (int64_t w = 0; w < words; ++w) {
        soon.fetch<kFetched>();
        Words key[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) key[b] = load_words(keys[b] + w * kBlock);
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
void score_blocks(const Blocks& kv, int64_t blocks, const uint32_t* q, float* scores, int64_t stride, Soon& soon) {
    constexpr int kWide = kRegisters < 32 ? kBeside<Q> : Q > 6 ? 1 : Q > 3 ? 3 : 4;
    int64_t b = 0;
    for (; b + kWide <= blocks; b += kWide) score_tile<T, Q, kWide>(kv, b, q, scores + b * kBlock, stride, soon);
    for (; b < blocks; ++b) score_tile<T, Q, 1>(kv, b, q, scores + b * kBlock, stride, soon);
}

// out [Q][d] += p [Q][stride] times C * 16 channels, from channel `from`, of the values of `steps` words of tokens
template <typename T, int Q, int C>
inline void mix_tile(const Blocks& kv, int64_t from, int64_t steps, const uint32_t* p, int64_t stride, float* out, Soon& soon) {
    constexpr int64_t kSteps = kBlock / kPack<T>;
    const int64_t d = kv.words * kPack<T>;
    Lanes sum[Q][C];
    for (int i = 0; i < Q; ++i) load_row(sum[i], out + i * d + from);
    for (int64_t begin = 0; begin < steps; begin += kSteps) {
        const uint32_t* values = kv.values(begin / kSteps) + from;
        for (int64_t t = 0; t < std::min(kSteps, steps - begin); ++t) {
            soon.fetch<kFetched>();
            Words value[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) value[c] = load_words(values + t * d + c * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) sum[i][c] = multiply_add<T>(sum[i][c], p[i * stride + begin + t], value[c]);
        }
    }
    for (int i = 0; i < Q; ++i) save_row(out + i * d + from, sum[i]);
}

template <typename T, int Q>
void mix_channels(const Blocks& kv, int64_t steps, const uint32_t* p, int64_t stride, float* out, Soon& soon) {
    const int64_t d = kv.words * kPack<T>;
    int64_t c = 0;
    for (; c + kLanes * kBeside<Q> <= d; c += kLanes * kBeside<Q>) mix_tile<T, Q, kBeside<Q>>(kv, c, steps, p, stride, out, soon);
    for (; c < d; c += kLanes) mix_tile<T, Q, 1>(kv, c, steps, p, stride, out, soon);
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
void score(const Blocks& kv, int64_t blocks, const T* queries, int64_t count, float* scores, int64_t stride, Soon& soon) {
    const auto* q = reinterpret_cast<const uint32_t*>(queries);
    TILES(count, kMostQueries, (score_blocks<T, (Q > kMostQueries ? kMostQueries : Q)>(kv, blocks, q + first * kv.words, scores + first * stride, stride, soon)))
}

template <typename T>
void mix(const Blocks& kv, int64_t tokens, const T* weights, int64_t count, int64_t stride, float* out, Soon& soon) {
    const auto* p = reinterpret_cast<const uint32_t*>(weights);
    const int64_t steps = (tokens + kPack<T> - 1) / kPack<T>, d = kv.words * kPack<T>;
    stride /= kPack<T>;
    TILES(count, 6, (mix_channels<T, (Q > 6 ? 6 : Q)>(kv, steps, p + first * stride, stride, out + first * d, soon)))
}

}  // namespace
