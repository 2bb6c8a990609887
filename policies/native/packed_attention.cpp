// Attention of an update's packed tokens and its backward: prompts, each followed by the completions that share it.
//
// All of a prompt's tokens and completions are one task per key head, so that gradients of the prompt's keys and values are
// summed without locks and in one order. No scores are kept: the backward computes them again from the saved logsumexp.
// Heads come unrotated in the compute dtype; everything here is float.

#include "rotation.h"
#include "tiles.h"

extern "C" {

// Mirrored by policies/native/packed.py (Layout).
struct PackedLayout {
    int64_t query_heads, key_heads, head_dim, window;  // window 0: none
    int64_t prompts;
    const int64_t *prompt_start, *prompt_size;  // [prompts] packed place and tokens
    const int64_t* first;                       // [prompts + 1] where a prompt's completions begin in `start` and `size`
    const int64_t *start, *size;                // [completions] packed place and tokens
    const float *cos, *sin;                     // [positions][head_dim], of rotation.h
    float scale;
};
}

namespace {

constexpr int64_t kRows = 48;  // queries attended at a time

inline int64_t up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// to = rotated x, times `scale`; d is a multiple of 16
template <typename T>
inline void turn(const T* x, const float* cos, const float* sin, int64_t d, float scale, float* to) {
    const int64_t half = d / 2;
    for (int64_t j = 0; j < half; j += 8) turn(load_eight(x + j), load_eight(x + j + half), cos, sin, j, half, scale, to);
}

// the transposed map, for gradients
template <typename T>
inline void turn_back(const float* g, const float* cos, const float* sin, int64_t d, float scale, T* to) {
    const int64_t half = d / 2;
    for (int64_t j = 0; j < half; j += 8) {
        const Eight a = load_eight(g + j) * scale, b = load_eight(g + j + half) * scale;
        save_eight(to + j, a * load_eight(cos + j) + b * load_eight(sin + j + half));
        save_eight(to + j + half, b * load_eight(cos + j + half) + a * load_eight(sin + j));
    }
}

// what stands in the blocks of `line` that tokens [begin, end) lie in, but is none of them, becomes `none`
inline void keep_seen(float* line, int64_t begin, int64_t end, float none) {
    const Integers place = counted();
    const int64_t first = begin / kLanes * kLanes, last = (end - 1) / kLanes * kLanes;
    const Lanes blank = Lanes{} + none;
    save_lanes(line + last, choose(place < static_cast<int32_t>(end - last), load_lanes(line + last), blank));
    if (begin > first) save_lanes(line + first, choose(place < static_cast<int32_t>(begin - first), blank, load_lanes(line + first)));
}

// zeros in [0, first) and [last, n), multiples of 16
inline void clear_outside(float* line, int64_t first, int64_t last, int64_t n) {
    for (int64_t t = 0; t < first; t += kLanes) save_lanes(line + t, Lanes{});
    for (int64_t t = last; t < n; t += kLanes) save_lanes(line + t, Lanes{});
}

template <typename T>
struct Task {
    const PackedLayout& s;
    const int64_t d, repeat, width, tile;  // width: channels of a token's heads; tile: tokens attended at a time
    int64_t head = 0, longest = 0;         // longest: keys that there is room for, a multiple of 16
    std::vector<float> keys, keys_across, values, values_across;  // [longest][d] and [d][longest]
    std::vector<float> grad_keys, grad_values;
    std::vector<float> q, scores, mixed, slopes, grad_mixed, turned;
    std::vector<float> total, peaks;

    explicit Task(const PackedLayout& layout)
        : s(layout), d(layout.head_dim), repeat(layout.query_heads / layout.key_heads),
          width((layout.query_heads + 2 * layout.key_heads) * layout.head_dim), tile(std::max<int64_t>(1, kRows / repeat)) {
        const int64_t rows = tile * repeat;
        for (auto* one : {&q, &mixed, &grad_mixed}) one->resize(rows * d);
        for (auto* one : {&total, &peaks}) one->resize(rows);
        turned.resize(d);
    }

    const T* key_at(const T* qkv, int64_t token) const { return qkv + token * width + (s.query_heads + head) * d; }
    const T* value_at(const T* qkv, int64_t token) const { return qkv + token * width + (s.query_heads + s.key_heads + head) * d; }

    void begin(int64_t which_head, int64_t room, bool backward) {
        head = which_head;
        longest = up(room);
        const int64_t rows = tile * repeat;
        for (auto* one : {&keys_across, &values}) one->assign(longest * d, 0.0f);
        scores.resize(rows * longest);
        if (!backward) return;
        for (auto* one : {&keys, &values_across, &grad_keys, &grad_values}) one->assign(longest * d, 0.0f);
        slopes.resize(rows * longest);
    }

    // keys and values of `count` packed tokens from `at`, into places from `place` on, which is also their position
    void load_keys(const T* qkv, int64_t at, int64_t count, int64_t place, bool backward) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t to = place + i;
            turn(key_at(qkv, at + i), s.cos + to * d, s.sin + to * d, d, 1.0f, turned.data());
            const T* value = value_at(qkv, at + i);
            for (int64_t j = 0; j < d; ++j) keys_across[j * longest + to] = turned[j];
            for (int64_t j = 0; j < d; ++j) values[to * d + j] = load(value[j]);
            if (!backward) continue;
            std::memcpy(keys.data() + to * d, turned.data(), d * sizeof(float));
            for (int64_t j = 0; j < d; ++j) values_across[j * longest + to] = load(value[j]);
        }
    }

    // queries of `count` packed tokens from `at`, whose positions begin at `place`, and their scores with `n` keys
    void score(const T* qkv, int64_t at, int64_t count, int64_t place, int64_t n) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t r = 0; r < repeat; ++r)
                turn(qkv + (at + i) * width + (head * repeat + r) * d, s.cos + (place + i) * d, s.sin + (place + i) * d, d, s.scale,
                     q.data() + (i * repeat + r) * d);
        product(count * repeat, n, d, q.data(), d, 1, keys_across.data(), longest, scores.data(), longest);
    }

    int64_t seen_from(int64_t position) const { return s.window ? std::max<int64_t>(0, position + 1 - s.window) : 0; }

    void forward(const T* qkv, int64_t at, int64_t count, int64_t place, T* out, float* normaliser) {
        const float none = -std::numeric_limits<float>::infinity();
        for (int64_t begin = 0; begin < count; begin += tile) {
            const int64_t tokens = std::min(tile, count - begin), n = up(place + begin + tokens);
            score(qkv, at + begin, tokens, place + begin, n);
            for (int64_t row = 0; row < tokens * repeat; ++row) {
                const int64_t position = place + begin + row / repeat, from = seen_from(position);
                float* line = scores.data() + row * longest;
                const int64_t first = from / kLanes * kLanes, last = up(position + 1);  // of blocks
                keep_seen(line, from, position + 1, none);
                Lanes top = load_lanes(line + first), sum = {};
                for (int64_t t = first + kLanes; t < last; t += kLanes) {
                    const Lanes x = load_lanes(line + t);
                    top = larger(x, top);
                }
                const float peak = largest_lane(top);
                for (int64_t t = first; t < last; t += kLanes) {
                    const Lanes e = exponential(load_lanes(line + t) - peak);
                    save_lanes(line + t, e);
                    sum += e;
                }
                clear_outside(line, first, last, n);
                total[row] = sum_lanes(sum);
                peaks[row] = peak;
            }
            product(tokens * repeat, d, n, scores.data(), longest, 1, values.data(), d, mixed.data(), d);
            for (int64_t row = 0; row < tokens * repeat; ++row) {
                T* to = out + ((at + begin + row / repeat) * s.query_heads + head * repeat + row % repeat) * d;
                const float scale = 1.0f / total[row];
                for (int64_t j = 0; j < d; j += kLanes) save_lanes(to + j, load_lanes(mixed.data() + row * d + j) * scale);
                normaliser[(at + begin + row / repeat) * s.query_heads + head * repeat + row % repeat] =
                    peaks[row] + std::log(total[row]);
            }
        }
    }

    void backward(const T* qkv, int64_t at, int64_t count, int64_t place, const T* out, const float* normaliser, const T* grad,
                  T* grad_qkv) {
        for (int64_t begin = 0; begin < count; begin += tile) {
            const int64_t tokens = std::min(tile, count - begin), n = up(place + begin + tokens), rows = tokens * repeat;
            score(qkv, at + begin, tokens, place + begin, n);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t where = (at + begin + row / repeat) * s.query_heads + head * repeat + row % repeat;
                float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (int64_t j = 0; j < d; ++j) {
                    const float g = load(grad[where * d + j]);
                    grad_mixed[row * d + j] = g;
                    dot += g * load(out[where * d + j]);
                }
                total[row] = dot;
            }
            product(rows, n, d, grad_mixed.data(), d, 1, values_across.data(), longest, slopes.data(), longest);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t position = place + begin + row / repeat, from = seen_from(position);
                const float shift = normaliser[(at + begin + row / repeat) * s.query_heads + head * repeat + row % repeat];
                float *line = scores.data() + row * longest, *slope = slopes.data() + row * longest;
                const int64_t first = from / kLanes * kLanes, last = up(position + 1);  // of blocks
                for (int64_t t = first; t < last; t += kLanes) save_lanes(line + t, exponential(load_lanes(line + t) - shift));
                keep_seen(line, from, position + 1, 0.0f);
                for (int64_t t = first; t < last; t += kLanes)
                    save_lanes(slope + t, load_lanes(line + t) * (load_lanes(slope + t) - total[row]));
                clear_outside(line, first, last, n);
                clear_outside(slope, first, last, n);
            }
            product(n, d, rows, slopes.data(), 1, longest, q.data(), d, grad_keys.data(), d, true);
            product(n, d, rows, scores.data(), 1, longest, grad_mixed.data(), d, grad_values.data(), d, true);
            product(rows, d, n, slopes.data(), longest, 1, keys.data(), d, mixed.data(), d);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t position = place + begin + row / repeat;
                turn_back(mixed.data() + row * d, s.cos + position * d, s.sin + position * d, d, s.scale,
                          grad_qkv + (at + begin + row / repeat) * width + (head * repeat + row % repeat) * d);
            }
        }
    }

    // write the gradients of `count` packed tokens' keys and values, and forget them
    void store_gradients(int64_t at, int64_t count, int64_t place, T* grad_qkv) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t from = place + i;
            T* to = grad_qkv + (at + i) * width;
            turn_back(grad_keys.data() + from * d, s.cos + from * d, s.sin + from * d, d, 1.0f, to + (s.query_heads + head) * d);
            for (int64_t j = 0; j < d; ++j) save(to[(s.query_heads + s.key_heads + head) * d + j], grad_values[from * d + j]);
        }
        std::fill_n(grad_keys.data() + place * d, (longest - place) * d, 0.0f);
        std::fill_n(grad_values.data() + place * d, (longest - place) * d, 0.0f);
    }
};

// `visit(task, at, count, place)` for each prompt and, after it, each of its completions; `end(task, ...)` the other way round
template <typename T, typename Visit, typename End>
void for_each(const PackedLayout& s, const T* qkv, bool backward, Visit visit, End end) {
#pragma omp parallel
    {
        Task<T> task(s);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < s.prompts * s.key_heads; ++number) {
            const int64_t p = number / s.key_heads, prompt = s.prompt_size[p];
            int64_t longest = 0;
            for (int64_t c = s.first[p]; c < s.first[p + 1]; ++c) longest = std::max(longest, s.size[c]);
            task.begin(number % s.key_heads, prompt + longest, backward);
            task.load_keys(qkv, s.prompt_start[p], prompt, 0, backward);
            for (int64_t c = s.first[p]; c < s.first[p + 1]; ++c) {
                task.load_keys(qkv, s.start[c], s.size[c], prompt, backward);
                visit(task, s.start[c], s.size[c], prompt);
                end(task, s.start[c], s.size[c], prompt);
            }
            visit(task, s.prompt_start[p], prompt, int64_t{0});
            end(task, s.prompt_start[p], prompt, int64_t{0});
        }
    }
}

template <typename T>
void forward_all(const PackedLayout& s, const T* qkv, T* out, float* normaliser) {
    for_each<T>(
        s, qkv, false,
        [&](Task<T>& task, int64_t at, int64_t count, int64_t place) { task.forward(qkv, at, count, place, out, normaliser); },
        [](Task<T>&, int64_t, int64_t, int64_t) {});
}

template <typename T>
void backward_all(const PackedLayout& s, const T* qkv, const T* out, const float* normaliser, const T* grad, T* grad_qkv) {
    for_each<T>(
        s, qkv, true,
        [&](Task<T>& task, int64_t at, int64_t count, int64_t place) {
            task.backward(qkv, at, count, place, out, normaliser, grad, grad_qkv);
        },
        [&](Task<T>& task, int64_t at, int64_t count, int64_t place) { task.store_gradients(at, count, place, grad_qkv); });
}

}  // namespace

extern "C" {

// qkv [N][(Hq + 2 Hk) D] -> out [N][Hq D] and normaliser [N][Hq]
void nr_packed_attention(const PackedLayout* layout, const void* qkv, void* out, float* normaliser, int is_bf16) {
    if (is_bf16) forward_all(*layout, static_cast<const bf16*>(qkv), static_cast<bf16*>(out), normaliser);
    else forward_all(*layout, static_cast<const float*>(qkv), static_cast<float*>(out), normaliser);
}

void nr_packed_attention_backward(const PackedLayout* layout, const void* qkv, const void* out, const float* normaliser,
                                  const void* grad, void* grad_qkv, int is_bf16) {
    if (is_bf16)
        backward_all(*layout, static_cast<const bf16*>(qkv), static_cast<const bf16*>(out), normaliser,
                     static_cast<const bf16*>(grad), static_cast<bf16*>(grad_qkv));
    else
        backward_all(*layout, static_cast<const float*>(qkv), static_cast<const float*>(out), normaliser,
                     static_cast<const float*>(grad), static_cast<float*>(grad_qkv));
}
}
