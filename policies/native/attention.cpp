// The attention of one layer for all rows, what prompts need for it, and the memory it lives in.

#include "attend.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

template <typename T>
void decode_attention(const DecodeStep& s, const LayerStep& layer, const T* qkv, T* out) {
    std::vector<int64_t> bounds;  // of rows attended together
    for (int64_t i = 0; i < s.rows; i += together(s, s.order + i, s.rows - i)) bounds.push_back(i);
    const int64_t parts = static_cast<int64_t>(bounds.size()), tasks = parts * s.key_heads;
    bounds.push_back(s.rows);
#pragma omp parallel
    {
        Scratch<T> scratch;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const auto rows_of = [&](int64_t part) {
                const int32_t* rows = s.order + bounds[part];
                return Together{rows, rows, bounds[part + 1] - bounds[part]};
            };
            const int64_t part = task / s.key_heads, head = task % s.key_heads, next = task + 1;
            if (next < tasks) announce<T>(s, layer, rows_of(next / s.key_heads), next % s.key_heads, scratch.soon);
            attend(s, layer, rows_of(part), head, qkv, out, scratch);
        }
    }
}

// [tokens][2][key_heads][d] (as projected and rotated) -> layer `layer` of a prompt's store.
template <typename T>
void store_prompt(const T* kv, void* store, int64_t layer, int64_t tokens, int64_t blocks, int64_t heads, int64_t d) {
    for (int64_t h = 0; h < heads; ++h) {
        const Blocks to = prompt_blocks<T>(store, blocks, heads, d, layer, h);
        for (int64_t t = 0; t < tokens; ++t)
            store_token(to, kv + (t * 2 * heads + h) * d, kv + (t * 2 * heads + heads + h) * d, t);
    }
}

}  // namespace

extern "C" {

void nr_decode_attention(const DecodeStep* step, const LayerStep* layer, const void* qkv, void* out) {
    if (step->is_bf16) decode_attention(*step, *layer, static_cast<const bf16*>(qkv), static_cast<bf16*>(out));
    else decode_attention(*step, *layer, static_cast<const float*>(qkv), static_cast<float*>(out));
}

// Large pages for memory that is touched piece by piece: a fault for each 2 MB instead of each 4 kB.
void nr_large_pages(void* memory, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t kPage = 1 << 21;
    const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal is no error
#endif
}

void nr_store_prompt(const void* kv, void* store, int64_t layer, int64_t tokens, int64_t blocks, int64_t heads, int64_t d,
                     int is_bf16) {
    if (is_bf16) store_prompt(static_cast<const bf16*>(kv), store, layer, tokens, blocks, heads, d);
    else store_prompt(static_cast<const float*>(kv), store, layer, tokens, blocks, heads, d);
}
}
