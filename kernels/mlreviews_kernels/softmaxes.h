// Weighted softmaxes over one set of values, a block of queries at a time: out = sum_s w_s P_s V.
//
// All scores of a block of queries are kept, [queries, keys] for each softmax: memory grows with the number of keys,
// and the softmaxes can be added before the product with V, which is then done once whatever their number.  The copies
// of K and V that are second factors of products lie in panels of as many columns as a tile has.
#pragma once

#include <memory>

#include "tile.h"

namespace softmaxes {

constexpr int64_t KEYS = 96, STRIDE = KEYS + 16;  // an odd number of cache lines, so that columns spread over all sets

template <int SOFTMAXES>
struct Problem {
    const float *q[SOFTMAXES], *k[SOFTMAXES], *v, *weights;
    const uint8_t *key_mask, *pair_mask;
    const int64_t *q_offsets, *k_offsets;
    int64_t sequences, heads, kv_heads, dim, value_dim, window;
    bool causal;
    float scale;
    int threads;

    int64_t q_tokens() const { return q_offsets[sequences]; }
    int64_t k_tokens() const { return k_offsets[sequences]; }
    int64_t group() const { return heads / kv_heads; }
};

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Rows [begin, end) of [rows, width] in panels [width / TILE_COLUMNS][rows][TILE_COLUMNS], filled up with zeros.
inline void pack_rows(int64_t rows, int64_t begin, int64_t end, int64_t width, const float* from, int64_t stride,
                      float* to) {
    for (int64_t c = 0; c < width; c += TILE_COLUMNS, to += rows * TILE_COLUMNS) {
        const int64_t columns = std::min(TILE_COLUMNS, width - c);
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < columns; ++j) to[i * TILE_COLUMNS + j] = from[i * stride + c + j];
            for (int64_t j = columns; j < TILE_COLUMNS; ++j) to[i * TILE_COLUMNS + j] = 0.0f;
        }
    }
}

// The transpose of rows [begin, end) in panels [rows / TILE_COLUMNS][width][TILE_COLUMNS], filled up with zeros.
inline void pack_columns(int64_t begin, int64_t end, int64_t width, const float* from, int64_t stride, float* to) {
    for (int64_t i = begin; i < end; i += TILE_COLUMNS) {
        const int64_t columns = std::min(TILE_COLUMNS, end - i);
        if (columns < TILE_COLUMNS) std::fill_n(to + i * width, width * TILE_COLUMNS, 0.0f);
        transpose(columns, width, from + i * stride, stride, to + i * width, TILE_COLUMNS);
    }
}

// Keys or values of all sequences and heads, packed in rows or (transposed) in columns.
struct Packed {
    Packed(const int64_t* offsets, int64_t sequences, int64_t heads, int64_t width, const float* from, bool columns,
           int threads)
        : width_(columns ? width : whole_tiles(width)), heads_(heads), starts_(sequences + 1, 0) {
        for (int64_t n = 0; n < sequences; ++n)
            starts_[n + 1] = starts_[n] + whole_tiles(offsets[n + 1] - offsets[n]);
        data_.reset(new Scratch(starts_[sequences] * heads * width_));
        struct Part {
            int64_t sequence, head, begin;
        };
        std::vector<Part> parts;
        for (int64_t n = 0; n < sequences; ++n)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t i = 0; i < offsets[n + 1] - offsets[n]; i += PART) parts.push_back({n, h, i});
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t t = 0; t < (int64_t)parts.size(); ++t) {
            const Part& part = parts[t];
            const int64_t rows = offsets[part.sequence + 1] - offsets[part.sequence], stride = heads * width;
            const int64_t end = std::min(part.begin + PART, rows);
            const float* at = from + offsets[part.sequence] * stride + part.head * width;
            float* to = (*this)(part.sequence, part.head);
            if (columns)
                pack_columns(part.begin, end, width, at, stride, to);
            else
                pack_rows(rows, part.begin, end, width, at, stride, to);
        }
    }

    float* operator()(int64_t n, int64_t h) const {
        return *data_ + (starts_[n] * heads_ + h * (starts_[n + 1] - starts_[n])) * width_;
    }

  private:
    static constexpr int64_t PART = 512;  // rows that one thread packs at a time, whole tiles
    int64_t width_, heads_;
    std::vector<int64_t> starts_;
    std::unique_ptr<Scratch> data_;
};

// c[rows, TILE_COLUMNS] += or = a b of one panel; a is [rows, depth], or its transpose
template <bool TRANSPOSED, bool ADD>
INLINE void panel(int64_t rows, int64_t depth, const float* a, int64_t stride_a, const float* b, float* c,
                  int64_t stride_c) {
    product<TRANSPOSED, ADD>(rows, TILE_COLUMNS, depth, a, stride_a, b, TILE_COLUMNS, c, stride_c);
}

// Which keys the queries [first, first + rows) of a sequence see, but for the mask.  Both ends rise with the query.
struct Range {
    template <int SOFTMAXES>
    Range(const Problem<SOFTMAXES>& p, int64_t sequence, int64_t first_row, int64_t count)
        : first(first_row), rows(count) {
        keys = p.k_offsets[sequence + 1] - p.k_offsets[sequence];
        shift = keys - (p.q_offsets[sequence + 1] - p.q_offsets[sequence]);
        before = p.window ? p.window - 1 : std::numeric_limits<int32_t>::max() * int64_t{4096};
        after = p.causal ? 0 : before;
        block_begin = begin(0) / KEYS;
        block_end = std::max(block_begin, blocks_of(end(rows - 1), KEYS));
        if (end(rows - 1) == begin(0)) block_end = block_begin;
    }
    int64_t begin(int64_t row) const { return std::clamp<int64_t>(first + row + shift - before, 0, keys); }
    int64_t end(int64_t row) const {
        return std::max(begin(row), std::clamp<int64_t>(first + row + shift + after + 1, 0, keys));
    }
    // the first row that sees a key or one after it
    int64_t row_begin(int64_t key) const { return std::clamp<int64_t>(key - after - shift - first, 0, rows); }
    // past the last row that sees a key or one before it
    int64_t row_end(int64_t key) const { return std::clamp<int64_t>(key + before - shift - first + 1, 0, rows); }

    int64_t first, rows, keys, shift, before, after, block_begin, block_end;
};

// scores of a block of queries: [blocks of keys][rows][STRIDE]
struct Scores {
    Scores(int64_t keys, int64_t most_rows) : rows(most_rows), data(blocks_of(keys, KEYS) * most_rows * STRIDE) {}
    float* block(int64_t b) const { return data + b * rows * STRIDE; }
    int64_t rows;
    Scratch data;
};

// scores = a b, where b is packed in columns; garbage where nobody looks
inline void score_product(const Range& range, int64_t depth, const float* a, const float* packed,
                          const Scores& scores) {
    for (int64_t b = range.block_begin; b < range.block_end; ++b)
        for (int64_t key = b * KEYS; key < std::min((b + 1) * KEYS, range.keys); key += TILE_COLUMNS) {
            const int64_t from = range.row_begin(key) / TILE_ROWS * TILE_ROWS;
            const int64_t rows = range.row_end(key + TILE_COLUMNS - 1) - from;
            if (rows > 0)
                panel<false, false>(rows, depth, a + from * depth, depth, packed + key * depth,
                                    scores.block(b) + from * STRIDE + key - b * KEYS, STRIDE);
        }
}

// c[rows, width] += probabilities b, where b is packed in rows
inline void value_product(const Range& range, const Scores& scores, int64_t width, const float* packed, float* c) {
    for (int64_t b = range.block_begin; b < range.block_end; ++b)
        for (int64_t column = 0; column < width; column += TILE_COLUMNS)
            for (int64_t i = 0; i < range.rows; i += TILE_ROWS) {
                const int64_t rows = std::min<int64_t>(TILE_ROWS, range.rows - i);
                const int64_t begin = std::max(range.begin(i), b * KEYS);
                const int64_t end = std::min(range.end(i + rows - 1), (b + 1) * KEYS);
                if (begin < end)
                    panel<false, true>(rows, end - begin, scores.block(b) + i * STRIDE + begin - b * KEYS, STRIDE,
                                       packed + (column / TILE_COLUMNS * range.keys + begin) * TILE_COLUMNS,
                                       c + i * width + column, width);
            }
}

// c[keys, width] += probabilities^T b, where b [rows, width] is packed in rows
inline void key_product(const Range& range, const Scores& scores, int64_t width, const float* packed, float* c) {
    for (int64_t b = range.block_begin; b < range.block_end; ++b)
        for (int64_t column = 0; column < width; column += TILE_COLUMNS)
            for (int64_t key = b * KEYS; key < std::min((b + 1) * KEYS, range.keys); key += TILE_ROWS) {
                const int64_t keys = std::min({int64_t{TILE_ROWS}, (b + 1) * KEYS - key, range.keys - key});
                const int64_t begin = range.row_begin(key), end = range.row_end(key + keys - 1);
                if (begin < end)
                    panel<true, true>(keys, end - begin, scores.block(b) + begin * STRIDE + key - b * KEYS, STRIDE,
                                      packed + (column / TILE_COLUMNS * range.rows + begin) * TILE_COLUMNS,
                                      c + key * width + column, width);
            }
}

// body(scores of one row in a block, first key, how many) for what a row sees of each block of keys
template <class Body>
INLINE void for_each_span(const Range& range, int64_t row, Body body) {
    const int64_t begin = range.begin(row), end = range.end(row);
    for (int64_t b = begin / KEYS; b * KEYS < end; ++b) {
        const int64_t from = std::max(begin, b * KEYS), to = std::min(end, (b + 1) * KEYS);
        body(b, row * STRIDE + from - b * KEYS, from, to - from);
    }
}

// zeros beside what a row sees: products take whole tiles
inline void clear_beside(const Range& range, int64_t row, const Scores& scores) {
    const int64_t begin = range.begin(row), end = range.end(row);
    for (int64_t b = range.block_begin; b < range.block_end; ++b) {
        float* at = scores.block(b) + row * STRIDE;
        const int64_t from = std::clamp<int64_t>(begin - b * KEYS, 0, KEYS);
        const int64_t to = std::max(from, std::clamp<int64_t>(end - b * KEYS, 0, KEYS));
        std::fill(at, at + from, 0.0f);
        std::fill(at + to, at + KEYS, 0.0f);
    }
}

template <int SOFTMAXES>
inline void apply_mask(const Problem<SOFTMAXES>& p, const Range& range, int64_t n, int64_t row, const Scores& scores) {
    if (!p.key_mask && !p.pair_mask) return;
    const int64_t queries = p.q_offsets[n + 1] - p.q_offsets[n];
    const uint8_t* mask = p.key_mask ? p.key_mask + p.k_offsets[n]
                                     : p.pair_mask + (n * queries + range.first + row) * range.keys;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t key, int64_t count) {
        float* s = scores.block(b) + at;
        for (int64_t j = 0; j < count; ++j) s[j] = mask[key + j] ? s[j] : -std::numeric_limits<float>::infinity();
    });
}

// exp(scores - high) in place; returns the sum and the largest score, -inf if nothing is seen
struct Normaliser {
    float high, sum;
};

inline Normaliser exponentials(const Range& range, int64_t row, const Scores& scores) {
    Normaliser found{-std::numeric_limits<float>::infinity(), 0.0f};
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        const float* s = scores.block(b) + at;
        float high = found.high;
#pragma omp simd reduction(max : high)
        for (int64_t j = 0; j < count; ++j) high = std::max(high, s[j]);
        found.high = high;
    });
    const float shift = found.high == -std::numeric_limits<float>::infinity() ? 0.0f : found.high;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        float* s = scores.block(b) + at;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; ++j) {
            s[j] = exp_f(s[j] - shift);
            sum += s[j];
        }
        found.sum += sum;
    });
    return found;
}

inline void gather(int64_t rows, int64_t width, const float* from, int64_t stride, float factor, float* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; ++j) to[i * width + j] = factor * from[i * stride + j];
}

constexpr int64_t FORWARD_ROWS = 48, BACKWARD_ROWS = 48;

// out is [q_tokens, heads, value_dim], lse [SOFTMAXES, q_tokens, heads]
template <int SOFTMAXES>
void forward(const Problem<SOFTMAXES>& p, float* out, float* lse) {
    std::unique_ptr<Packed> ks[SOFTMAXES];
    for (int s = 0; s < SOFTMAXES; ++s)
        ks[s].reset(new Packed(p.k_offsets, p.sequences, p.kv_heads, p.dim, p.k[s], true, p.threads));
    const Packed vs(p.k_offsets, p.sequences, p.kv_heads, p.value_dim, p.v, false, p.threads);
    struct Task {
        int64_t sequence, first;
    };
    std::vector<Task> tasks;
    int64_t most = 0;
    for (int64_t n = 0; n < p.sequences; ++n) {
        // the longest rows first: short ones fill the gaps at the end
        const int64_t queries = p.q_offsets[n + 1] - p.q_offsets[n];
        for (int64_t b = blocks_of(queries, FORWARD_ROWS) - 1; b >= 0; --b) tasks.push_back({n, b * FORWARD_ROWS});
        most = std::max(most, p.k_offsets[n + 1] - p.k_offsets[n]);
    }
    const int64_t count = (int64_t)tasks.size() * p.heads, width = whole_tiles(p.value_dim);
#pragma omp parallel num_threads(p.threads)
    {
        std::unique_ptr<Scores> scores[SOFTMAXES];
        for (int s = 0; s < SOFTMAXES; ++s) scores[s].reset(new Scores(most, FORWARD_ROWS));
        Scratch queries(FORWARD_ROWS * p.dim), values(FORWARD_ROWS * width);
        float factors[SOFTMAXES][FORWARD_ROWS];
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; ++t) {
            const auto [n, first] = tasks[t % tasks.size()];
            const int64_t head = t / (int64_t)tasks.size();
            const int64_t queries_of = p.q_offsets[n + 1] - p.q_offsets[n];
            const Range range(p, n, first, std::min(FORWARD_ROWS, queries_of - first));
            const int64_t token = p.q_offsets[n] + first, kv = head / p.group();
            for (int s = 0; s < SOFTMAXES; ++s) {
                gather(range.rows, p.dim, p.q[s] + (token * p.heads + head) * p.dim, p.heads * p.dim, p.scale, queries);
                score_product(range, p.dim, queries, (*ks[s])(n, kv), *scores[s]);
                for (int64_t i = 0; i < range.rows; ++i) {
                    apply_mask(p, range, n, i, *scores[s]);
                    const Normaliser found = exponentials(range, i, *scores[s]);
                    const int64_t at = (s * p.q_tokens() + token + i) * p.heads + head;
                    lse[at] = found.high + std::log(std::max(found.sum, 1.0f));
                    factors[s][i] = found.sum > 0.0f ? p.weights[s * p.heads + head] / found.sum : 0.0f;
                }
            }
            for (int64_t i = 0; i < range.rows; ++i) {
                if constexpr (SOFTMAXES > 1)
                    for_each_span(range, i, [&](int64_t b, int64_t at, int64_t, int64_t keys) {
                        float* x = scores[0]->block(b) + at;
                        const float *y = scores[1]->block(b) + at, f = factors[0][i], g = factors[1][i];
#pragma omp simd
                        for (int64_t j = 0; j < keys; ++j) x[j] = f * x[j] + g * y[j];
                    });
                clear_beside(range, i, *scores[0]);
            }
            std::fill_n((float*)values, range.rows * width, 0.0f);
            value_product(range, *scores[0], width, vs(n, kv), values);
            for (int64_t i = 0; i < range.rows; ++i) {
                float* to = out + ((token + i) * p.heads + head) * p.value_dim;
                const float factor = SOFTMAXES > 1 ? 1.0f : factors[0][i];
                for (int64_t j = 0; j < p.value_dim; ++j) to[j] = factor * values[i * width + j];
            }
        }
    }
}

// How many parts the queries of a head of keys are split into, each with gradients of the keys and values of its own.
template <int SOFTMAXES>
int64_t parts_of(const Problem<SOFTMAXES>& p) {
    int64_t longest = 0;
    for (int64_t n = 0; n < p.sequences; ++n) longest = std::max(longest, p.q_offsets[n + 1] - p.q_offsets[n]);
    const int64_t most = std::max<int64_t>(1, p.group() * blocks_of(longest, BACKWARD_ROWS));
    int64_t parts = 1;
    while (parts < most && p.sequences * p.kv_heads * parts % p.threads) ++parts;
    return parts;
}

// With dP = dO V^T and delta_s = rowsum(P_s dP): dS_s = P_s (w_s (dP - delta_s) + dlse_s), dw_s = sum delta_s,
// dV = (sum w_s P_s)^T dO, dQ_s = scale dS_s K_s and dK_s = scale dS_s^T Q_s.
//
// grad_q[s] is [q_tokens, heads, dim]; grad_k[s] and grad_v are one tensor for each part, [parts, k_tokens, ...];
// grad_weights is [SOFTMAXES, q_tokens, heads], one number for each query.  grad_lse may be null.
template <int SOFTMAXES>
void backward(const Problem<SOFTMAXES>& p, const float* grad_out, const float* grad_lse, const float* lse,
              float* const* grad_q, float* const* grad_k, float* grad_v, float* grad_weights, int64_t parts) {
    std::unique_ptr<Packed> columns[SOFTMAXES], rows[SOFTMAXES];
    for (int s = 0; s < SOFTMAXES; ++s) {
        columns[s].reset(new Packed(p.k_offsets, p.sequences, p.kv_heads, p.dim, p.k[s], true, p.threads));
        rows[s].reset(new Packed(p.k_offsets, p.sequences, p.kv_heads, p.dim, p.k[s], false, p.threads));
    }
    const Packed vs(p.k_offsets, p.sequences, p.kv_heads, p.value_dim, p.v, true, p.threads);
    int64_t most = 0;
    for (int64_t n = 0; n < p.sequences; ++n) most = std::max(most, p.k_offsets[n + 1] - p.k_offsets[n]);
    const int64_t dim = whole_tiles(p.dim), value_dim = whole_tiles(p.value_dim);
    const int64_t count = p.sequences * p.kv_heads * parts;
#pragma omp parallel num_threads(p.threads)
    {
        std::unique_ptr<Scores> scores[SOFTMAXES];
        std::unique_ptr<Scratch> key_grads[SOFTMAXES], queries[SOFTMAXES], packed_queries[SOFTMAXES];
        for (int s = 0; s < SOFTMAXES; ++s) {
            scores[s].reset(new Scores(most, BACKWARD_ROWS));
            key_grads[s].reset(new Scratch(most * dim));
            queries[s].reset(new Scratch(BACKWARD_ROWS * p.dim));
            packed_queries[s].reset(new Scratch(BACKWARD_ROWS * dim));
        }
        const Scores products(most, BACKWARD_ROWS);
        Scratch value_grads(most * value_dim), query_grads(BACKWARD_ROWS * dim), outs(BACKWARD_ROWS * p.value_dim),
            packed_outs(BACKWARD_ROWS * value_dim);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; ++t) {
            const int64_t part = t % parts, kv = t / parts % p.kv_heads, n = t / parts / p.kv_heads;
            const int64_t queries_of = p.q_offsets[n + 1] - p.q_offsets[n];
            const int64_t keys = p.k_offsets[n + 1] - p.k_offsets[n], blocks = blocks_of(queries_of, BACKWARD_ROWS);
            for (int s = 0; s < SOFTMAXES; ++s) std::fill_n((float*)*key_grads[s], keys * dim, 0.0f);
            std::fill_n((float*)value_grads, keys * value_dim, 0.0f);
            // every so many blocks, so that all parts have long rows and short ones
            for (int64_t block = part; block < blocks * p.group(); block += parts) {
                const int64_t head = kv * p.group() + block / blocks, first = block % blocks * BACKWARD_ROWS;
                const Range range(p, n, first, std::min(BACKWARD_ROWS, queries_of - first));
                const int64_t token = p.q_offsets[n] + first, at_out = (token * p.heads + head) * p.value_dim;
                gather(range.rows, p.value_dim, grad_out + at_out, p.heads * p.value_dim, 1.0f, outs);
                pack_rows(range.rows, 0, range.rows, p.value_dim, outs, p.value_dim, packed_outs);
                score_product(range, p.value_dim, outs, vs(n, kv), products);
                for (int s = 0; s < SOFTMAXES; ++s) {
                    const float* q = p.q[s] + (token * p.heads + head) * p.dim;
                    gather(range.rows, p.dim, q, p.heads * p.dim, p.scale, *queries[s]);
                    pack_rows(range.rows, 0, range.rows, p.dim, *queries[s], p.dim, *packed_queries[s]);
                    score_product(range, p.dim, *queries[s], (*columns[s])(n, kv), *scores[s]);
                }
                for (int64_t i = 0; i < range.rows; ++i) {
                    float deltas[SOFTMAXES], weights[SOFTMAXES], extra[SOFTMAXES];
                    for (int s = 0; s < SOFTMAXES; ++s) {
                        const int64_t at = (s * p.q_tokens() + token + i) * p.heads + head;
                        apply_mask(p, range, n, i, *scores[s]);
                        const bool empty = lse[at] == -std::numeric_limits<float>::infinity();
                        const float shift = empty ? 0.0f : lse[at];
                        deltas[s] = 0.0f;
                        for_each_span(range, i, [&](int64_t b, int64_t at, int64_t, int64_t size) {
                            float *x = scores[s]->block(b) + at, sum = 0.0f;
                            const float* y = products.block(b) + at;
#pragma omp simd reduction(+ : sum)
                            for (int64_t j = 0; j < size; ++j) {
                                x[j] = exp_f(x[j] - shift);
                                sum += x[j] * y[j];
                            }
                            deltas[s] += sum;
                        });
                        weights[s] = p.weights[s * p.heads + head];
                        extra[s] = (grad_lse && !empty ? grad_lse[at] : 0.0f) - weights[s] * deltas[s];
                        grad_weights[at] = deltas[s];
                    }
                    for_each_span(range, i, [&](int64_t b, int64_t at, int64_t, int64_t size) {
                        float *x = scores[0]->block(b) + at, *y = scores[SOFTMAXES - 1]->block(b) + at;
                        float* z = products.block(b) + at;
#pragma omp simd
                        for (int64_t j = 0; j < size; ++j) {
                            const float d = z[j], first_p = x[j];
                            z[j] = weights[0] * first_p;
                            x[j] = first_p * (weights[0] * d + extra[0]);
                            if (SOFTMAXES > 1) {
                                const float second = y[j];
                                z[j] += weights[SOFTMAXES - 1] * second;
                                y[j] = second * (weights[SOFTMAXES - 1] * d + extra[SOFTMAXES - 1]);
                            }
                        }
                    });
                    for (int s = 0; s < SOFTMAXES; ++s) clear_beside(range, i, *scores[s]);
                    clear_beside(range, i, products);
                }
                key_product(range, products, value_dim, packed_outs, value_grads);
                for (int s = 0; s < SOFTMAXES; ++s) {
                    key_product(range, *scores[s], dim, *packed_queries[s], *key_grads[s]);
                    std::fill_n((float*)query_grads, range.rows * dim, 0.0f);
                    value_product(range, *scores[s], dim, (*rows[s])(n, kv), query_grads);
                    float* to = grad_q[s] + (token * p.heads + head) * p.dim;
                    for (int64_t i = 0; i < range.rows; ++i, to += p.heads * p.dim)
                        for (int64_t j = 0; j < p.dim; ++j) to[j] = p.scale * query_grads[i * dim + j];
                }
            }
            const int64_t at = (part * p.k_tokens() + p.k_offsets[n]) * p.kv_heads + kv;
            for (int s = 0; s < SOFTMAXES; ++s)
                for (int64_t j = 0; j < keys; ++j)
                    std::copy_n(*key_grads[s] + j * dim, p.dim, grad_k[s] + (at + j * p.kv_heads) * p.dim);
            for (int64_t j = 0; j < keys; ++j)
                std::copy_n(value_grads + j * value_dim, p.value_dim, grad_v + (at + j * p.kv_heads) * p.value_dim);
        }
    }
}

}  // namespace softmaxes
