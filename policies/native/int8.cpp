// Linear maps on bytes: each row is rotated by Hadamard matrices, which spreads its outliers, rounded to bytes with a scale
// of its own, and multiplied with weights that were rotated and rounded alike (policies/model/int8.py).

#include "int8_rows.h"

#ifdef BYTES

namespace {

template <typename T>
void round_row(const T* x, int64_t k, int64_t block, float* turned, int8_t* to, float* scale, int32_t* sum) {
    if (block == 64) round_row<4>(x, k, turned, to, scale, sum);
    else if (block == 32) round_row<2>(x, k, turned, to, scale, sum);
    else round_row<1>(x, k, turned, to, scale, sum);
}

// Where the bytes [n][k] of rows go, with their scales and sums [n] and what of them is multiplied apart [n][1 + k / 4].
struct Rounded {
    int8_t* bytes;
    float* scale;
    int32_t* sum;
    Apart* apart;
};

// Of x [n][k], by all threads of a team; `turned` [k] is a thread's scratch.
template <typename T>
void round_rows(const T* x, int64_t n, int64_t k, int64_t block, float* turned, const Rounded& to) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        round_row(x + i * k, k, block, turned, to.bytes + i * k, to.scale + i, to.sum + i);
#ifdef BYTES_BY_AVX2
        set_apart(to.bytes + i * k, k, to.apart + i * (1 + k / 4));
#endif
    }
}

template <typename T>
void linear(const T* x, int64_t n, int64_t k, int64_t block, const uint32_t* panels, const Columns& columns, const Rounded& to,
            T* out) {
    const int64_t words = k / 4, count = (columns.count + kPanel - 1) / kPanel;
    const ByteRows rows{reinterpret_cast<const uint32_t*>(to.bytes), to.scale, to.sum, words, to.apart};
#pragma omp parallel
    {
        std::vector<float> turned(k);
        round_rows(x, n, k, block, turned.data(), to);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; ++p) {
            const uint32_t* panel = panels + p * words * kPanel;
            in_tiles<kMostRows, 4, 2, 1>(0, n, [&](auto count, int64_t row) {
                byte_tile<T, decltype(count)::value>(rows, row, panel, p * kPanel, columns, out);
            });
        }
    }
}

}  // namespace

extern "C" {

int nr_int8_available() { return 1; }

// weight [columns][k] float -> panels and their scales [columns].
void nr_int8_pack(const float* weight, int64_t columns, int64_t k, int64_t block, uint32_t* panels, float* scale) {
    const int64_t words = k / 4;
#pragma omp parallel
    {
        std::vector<float> turned(k);
        std::vector<int8_t> bytes(k);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < columns; ++c) {
            int32_t sum;
            round_row(weight + c * k, k, block, turned.data(), bytes.data(), scale + c, &sum);
            scale[c] *= block;  // the rows' scales account for both rotations
            uint32_t* to = panels + c / kPanel * words * kPanel + c % kPanel;
            for (int64_t w = 0; w < words; ++w) {
                uint32_t word;
                std::memcpy(&word, bytes.data() + 4 * w, 4);
                to[w * kPanel] = word ^ kAdded * 0x01010101u;
            }
        }
    }
}

// The bytes [n][k] of rows x [n][k], with their scales and sums [n] and their parts that are multiplied apart [n][1 + k / 4].
void nr_int8_round(const float* x, int64_t n, int64_t k, int64_t block, int8_t* bytes, float* scale, int32_t* sum, Apart* apart) {
#pragma omp parallel
    {
        std::vector<float> turned(k);
        round_rows(x, n, k, block, turned.data(), {bytes, scale, sum, apart});
    }
}

// x [n][k] -> out [n][columns]; bytes, scale, sum and apart, as of `nr_int8_round`, are scratch.
void nr_int8_linear(const void* x, int64_t n, int64_t k, int64_t block, const uint32_t* panels, const float* column_scale,
                    const float* bias, int64_t columns, int8_t* bytes, float* scale, int32_t* sum, Apart* apart, void* out,
                    int is_bf16) {
    const Columns to{column_scale, bias, columns};
    const Rounded rows{bytes, scale, sum, apart};
    if (is_bf16) linear(static_cast<const bf16*>(x), n, k, block, panels, to, rows, static_cast<bf16*>(out));
    else linear(static_cast<const float*>(x), n, k, block, panels, to, rows, static_cast<float*>(out));
}
}
#else
extern "C" {
int nr_int8_available() { return 0; }
void nr_int8_pack(const float*, int64_t, int64_t, int64_t, uint32_t*, float*) {}
void nr_int8_round(const float*, int64_t, int64_t, int64_t, int8_t*, float*, int32_t*, void*) {}
void nr_int8_linear(const void*, int64_t, int64_t, int64_t, const uint32_t*, const float*, const float*, int64_t, int8_t*, float*,
                    int32_t*, void*, void*, int) {}
}
#endif
