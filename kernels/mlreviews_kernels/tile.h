// Small matrix products in cache, for loops that do something between them: plain C++ with the compiler's vectors.
#pragma once

#include <vector>

#include "vector.h"

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 10;  // 20 of 32
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 6;
#endif

constexpr int64_t LANES = VECTOR_BYTES / 4;
constexpr int64_t TILE_COLUMNS = 2 * LANES;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

// Widths of matrices that are the second factor or the result of a product: whole tiles.
INLINE int64_t whole_tiles(int64_t width) { return (width + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

// Uninitialised floats, at the beginning of a cache line.
class Scratch {
  public:
    explicit Scratch(int64_t size) : whole_(new char[(size + 16) * sizeof(float)]) {
        data_ = (float*)(((uintptr_t)whole_ + 63) / 64 * 64);
    }
    ~Scratch() { delete[] whole_; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator float*() const { return data_; }

  private:
    char* whole_;
    float* data_;
};

template <int ROWS, bool TRANSPOSED, bool ADD>
INLINE void tile(const float* a, int64_t stride_a, const float* b, int64_t stride_b, float* c, int64_t stride_c,
                 int64_t depth) {
    Vector sums[ROWS][2];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j)
            sums[i][j] = ADD ? *(const Vector*)(c + i * stride_c + j * LANES) : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        const Vector left = *(const Vector*)(b + k * stride_b), right = *(const Vector*)(b + k * stride_b + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const float factor = TRANSPOSED ? a[k * stride_a + i] : a[i * stride_a + k];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j) *(Vector*)(c + i * stride_c + j * LANES) = sums[i][j];
}

template <int ROWS, bool TRANSPOSED, bool ADD>
static void tile_of(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t stride_b, float* c,
                    int64_t stride_c, int64_t depth) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return tile<ROWS, TRANSPOSED, ADD>(a, stride_a, b, stride_b, c, stride_c, depth);
        tile_of<ROWS - 1, TRANSPOSED, ADD>(rows, a, stride_a, b, stride_b, c, stride_c, depth);
    }
}

// What is known to be zero, or not needed.
enum class Known {
    nothing,
    lower_factor,  // the first factor is lower triangular (or, transposed, upper)
    lower_result,  // of the result, the lower triangle is wanted; above it may be anything
};

// c = a b, or c += a b: `a` is [rows, depth], or its transpose [depth, rows]; the columns of b and c are whole tiles.
// A triangular factor must hold zeros for TILE_ROWS - 1 columns past its diagonal.
template <bool TRANSPOSED, bool ADD, Known KNOWN = Known::nothing>
static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t stride_a, const float* b,
                    int64_t stride_b, float* c, int64_t stride_c) {
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
        for (int64_t i = KNOWN == Known::lower_result ? j : 0; i < rows; i += TILE_ROWS) {
            const int64_t height = std::min<int64_t>(TILE_ROWS, rows - i);
            const int64_t begin = KNOWN == Known::lower_factor && TRANSPOSED ? i : 0;
            const int64_t end = KNOWN == Known::lower_factor && !TRANSPOSED ? std::min(depth, i + height) : depth;
            const float* at_a = TRANSPOSED ? a + begin * stride_a + i : a + i * stride_a + begin;
            const float* at_b = b + begin * stride_b + j;
            float* at_c = c + i * stride_c + j;
            if (height == TILE_ROWS)
                tile<TILE_ROWS, TRANSPOSED, ADD>(at_a, stride_a, at_b, stride_b, at_c, stride_c, end - begin);
            else
                tile_of<TILE_ROWS - 1, TRANSPOSED, ADD>(height, at_a, stride_a, at_b, stride_b, at_c, stride_c,
                                                        end - begin);
        }
    }
}

// to[column, row] = from[row, column]
static void transpose(int64_t rows, int64_t columns, const float* from, int64_t stride_from, float* to,
                      int64_t stride_to) {
    constexpr int64_t SIDE = 8;
    int64_t i = 0;
    for (; i + SIDE <= rows; i += SIDE) {
        int64_t j = 0;
        for (; j + SIDE <= columns; j += SIDE) {
            float block[SIDE][SIDE];
            for (int64_t r = 0; r < SIDE; ++r)
                for (int64_t s = 0; s < SIDE; ++s) block[s][r] = from[(i + r) * stride_from + j + s];
            for (int64_t s = 0; s < SIDE; ++s)
                for (int64_t r = 0; r < SIDE; ++r) to[(j + s) * stride_to + i + r] = block[s][r];
        }
        for (; j < columns; ++j)
            for (int64_t r = 0; r < SIDE; ++r) to[j * stride_to + i + r] = from[(i + r) * stride_from + j];
    }
    for (; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[j * stride_to + i] = from[i * stride_from + j];
}

// to = from, and zeros up to whole tiles
static void pack(int64_t rows, int64_t columns, const float* from, int64_t stride_from, float* to, int64_t stride_to) {
    for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(to + i * stride_to, from + i * stride_from, columns * sizeof(float));
        std::memset(to + i * stride_to + columns, 0, (stride_to - columns) * sizeof(float));
    }
}

INLINE float dot(const float* x, const float* y, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
}
