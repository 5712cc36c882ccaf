// Selective attention in tiles of query and key blocks: softmax(L_h - F) V_h, F accumulated from one head's logits.
//
// Forward, a span of query blocks at a time: first F at the borders of the span's query blocks, by key block; then the
// outputs, by query block: F is rebuilt inside each tile from its border, and used for all heads of the task.
// Backward, by key block, from the last query block to the first: what F gets from the later queries is one number a
// key, carried along.  A worker takes some key blocks and has a dQ of its own; they are added up in the end.
#include "../tile.h"

namespace {

constexpr int64_t ROWS = 64, COLUMNS = 64;  // queries and keys of a tile
constexpr int64_t SPAN = 16;                // query blocks whose borders are kept at a time
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Sizes {
    int64_t batch, queries, keys, heads, kv_heads, dim, v_dim, selector;
    float scale, tau;

    int64_t wide() const { return whole_tiles(dim); }
    int64_t v_wide() const { return whole_tiles(v_dim); }
    int64_t query_blocks() const { return (queries + ROWS - 1) / ROWS; }
    int64_t key_blocks() const { return (keys + COLUMNS - 1) / COLUMNS; }
    int64_t rows(int64_t block) const { return std::min(ROWS, queries - block * ROWS); }
    int64_t columns(int64_t block) const { return std::min(COLUMNS, keys - block * COLUMNS); }
    int64_t position(int64_t block) const { return keys - queries + block * ROWS; }  // of a block's first query
    int64_t visible(int64_t block) const {                                         // key blocks that a query block sees
        return (position(block) + rows(block) - 1) / COLUMNS + 1;
    }
    int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
};

// Which tokens count, as numbers for the loops, [batch, whole key blocks].
struct Tokens {
    Tokens(const Sizes& size, const uint8_t* mask)
        : width(size.key_blocks() * COLUMNS), hidden(size.batch * width), selectable(hidden), counts(hidden) {
        for (int64_t b = 0; b < size.batch; ++b) {
            bool first = true;
            for (int64_t j = 0; j < width; ++j) {
                const bool token = j < size.keys && mask[b * size.keys + j];
                hidden[b * width + j] = token ? 0.0f : INFINITE;
                counts[b * width + j] = token;
                selectable[b * width + j] = token && !first;
                first = first && !token;
            }
        }
    }
    int64_t width;
    std::vector<float> hidden, selectable, counts;
};

// One tile's place: keys from `key` on, queries from position `position` on.
struct Place {
    int64_t key, position, rows;
    const float *hidden, *selectable, *counts;  // of the keys, the keys, the queries

    int64_t before(int64_t row) const { return std::clamp<int64_t>(position + row - key, 0, COLUMNS); }
};

Place place_of(const Sizes& size, const Tokens& tokens, int64_t batch, int64_t query_block, int64_t key_block) {
    const int64_t at = batch * tokens.width, key = key_block * COLUMNS, position = size.position(query_block);
    return Place{key, position, size.rows(query_block), &tokens.hidden[at + key], &tokens.selectable[at + key],
                 &tokens.counts[at + position]};
}

// The selection grows by one query: F += relu(logits) where the query may select.
INLINE void select(const Place& place, int64_t row, const float* logits, float* F) {
    if (place.counts[row] == 0.0f) return;
    const int64_t before = place.before(row);
    auto add = [&](int64_t end) {
#pragma omp simd
        for (int64_t j = 0; j < end; ++j) F[j] += place.selectable[j] * (logits[j] > 0.0f ? logits[j] : 0.0f);
    };
    before == COLUMNS ? add(COLUMNS) : add(before);
}

// F of each query of a tile, infinite where it sees nothing; `F` goes from the first query's to the next tile's.
void accumulate(const Place& place, const float* logits, float* F, float* bias) {
    for (int64_t i = 0; i < place.rows; ++i) {
        float* row = bias + i * COLUMNS;
#pragma omp simd
        for (int64_t j = 0; j < COLUMNS; ++j) row[j] = F[j] + place.hidden[j];
        const int64_t end = std::clamp<int64_t>(place.position + i - place.key + 1, 0, COLUMNS);
        std::fill(row + end, row + COLUMNS, INFINITE);
        select(place, i, logits + i * COLUMNS, F);
    }
}

// Keys or values of a block, [keys, whole tiles] or transposed [whole tiles, keys], with zeros around them.
void pack_block(const Sizes& size, const float* from, int64_t batch, int64_t head, int64_t block, int64_t dim,
                bool transposed, float* to) {
    const int64_t stride = size.kv_heads * dim, columns = size.columns(block), wide = whole_tiles(dim);
    const float* at = from + ((batch * size.keys + block * COLUMNS) * size.kv_heads + head) * dim;
    if (!transposed) {
        pack(columns, dim, at, stride, to, wide);
        std::fill(to + columns * wide, to + COLUMNS * wide, 0.0f);
        return;
    }
    if (columns < COLUMNS || dim < wide) std::fill_n(to, COLUMNS * wide, 0.0f);
    transpose(columns, dim, at, stride, to, COLUMNS);
}

// All blocks, [batch, kv_heads, key blocks, ...].
void pack_blocks(const Sizes& size, const float* from, int64_t dim, bool transposed, float* to, int threads) {
    const int64_t blocks = size.key_blocks(), tasks = size.batch * size.kv_heads * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < tasks; ++i)
        pack_block(size, from, i / blocks / size.kv_heads, i / blocks % size.kv_heads, i % blocks, dim, transposed,
                   to + i * COLUMNS * whole_tiles(dim));
}

// Some queries of one head, times the scale.
void pack_queries(const Sizes& size, const float* q, int64_t batch, int64_t query, int64_t rows, int64_t head,
                  float* to) {
    const int64_t wide = size.wide(), stride = size.heads * size.dim;
    pack(rows, size.dim, q + (batch * size.queries + query) * stride + head * size.dim, stride, to, wide);
#pragma omp simd
    for (int64_t i = 0; i < rows * wide; ++i) to[i] *= size.scale;
}

// Scores become weights, exp(score - F - highest so far); the highest, the sum and the output so far are adapted.
void soften(int64_t rows, const float* scores, const float* bias, float* weights, float* highest, float* sums,
            float* out, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) {
        const float *from = scores + i * COLUMNS, *F = bias + i * COLUMNS;
        float* to = weights + i * COLUMNS;
        Vector high = *(const Vector*)from - *(const Vector*)F;
        *(Vector*)to = high;
#pragma GCC unroll 16
        for (int64_t j = LANES; j < COLUMNS; j += LANES) {
            const Vector x = *(const Vector*)(from + j) - *(const Vector*)(F + j);
            *(Vector*)(to + j) = x;
            high = x > high ? x : high;
        }
        float most = highest[i];
        for (int64_t j = 0; j < LANES; ++j) most = std::max(most, high[j]);
        // nothing seen so far: any number will do, as all weights are 0
        const float shift = most == -INFINITE ? 0.0f : most;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < COLUMNS; ++j) {
            to[j] = exp_f(to[j] - shift);
            sum += to[j];
        }
        const float kept = exp_f(highest[i] - shift);
        highest[i] = most;
        sums[i] = sums[i] * kept + sum;
        if (kept != 1.0f) {
            float* row = out + i * width;
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) row[j] *= kept;
        }
    }
}

// P = exp(score - F - lse) and dL = P (dP - delta), which replace scores and dP; dF -= dL.
void differentiate(int64_t rows, const float* bias, const float* lse, const float* delta, float* scores, float* dP,
                   float* dF) {
    for (int64_t i = 0; i < rows; ++i) {
        const float *F = bias + i * COLUMNS, shift = lse[i] == -INFINITE ? 0.0f : lse[i], mean = delta[i];
        float *s = scores + i * COLUMNS, *d = dP + i * COLUMNS, *sum = dF + i * COLUMNS;
#pragma omp simd
        for (int64_t j = 0; j < COLUMNS; ++j) {
            const float p = exp_f(s[j] - F[j] - shift), dL = p * (d[j] - mean);
            s[j] = p;
            d[j] = dL;
            sum[j] -= dL;
        }
    }
}

}  // namespace

EXPORT void selective_attention(const float* q, const float* k, const float* v, const float* initial,
                                const uint8_t* mask, float* out, float* lse, float* selection, float* memory,
                                int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                                int64_t dim, int64_t v_dim, int64_t selector, float scale, float tau, int threads) {
    const Sizes size{batch, queries, keys, heads, kv_heads, dim, v_dim, selector, scale, tau};
    const int64_t wide = size.wide(), v_wide = size.v_wide(), chosen = size.kv_head(selector);
    const int64_t blocks = size.query_blocks(), key_blocks = size.key_blocks();
    const Tokens tokens(size, mask);
    Scratch keys_packed(batch * kv_heads * key_blocks * COLUMNS * wide);
    Scratch values(batch * kv_heads * key_blocks * COLUMNS * v_wide), selecting(batch * queries * wide);
    pack_blocks(size, k, dim, true, keys_packed, threads);
    pack_blocks(size, v, v_dim, false, values, threads);
    for (int64_t b = 0; b < batch; ++b)
        pack_queries(size, q, b, 0, queries, selector, selecting + b * queries * wide);
    auto keys_of = [&](int64_t b, int64_t head, int64_t block) {
        return keys_packed + ((b * kv_heads + head) * key_blocks + block) * COLUMNS * wide;
    };
    auto values_of = [&](int64_t b, int64_t head, int64_t block) {
        return values + ((b * kv_heads + head) * key_blocks + block) * COLUMNS * v_wide;
    };

    // heads of a task: queries and outputs of 256 KiB, and enough tasks
    int64_t groups = (heads * (wide + v_wide) * ROWS + 65535) / 65536;
    while (groups < heads && batch * blocks * groups < 4 * threads) ++groups;
    const int64_t most = (heads + groups - 1) / groups;
    groups = (heads + most - 1) / most;
    const int64_t span = std::max(SPAN, (8 * threads + batch * groups - 1) / (batch * groups));

    Scratch carry(batch * tokens.width), borders(batch * span * tokens.width);
    for (int64_t b = 0; b < batch; ++b) {
        std::copy_n(initial + b * keys, keys, carry + b * tokens.width);
        std::fill(carry + b * tokens.width + keys, carry + (b + 1) * tokens.width, 0.0f);
    }
    for (int64_t start = 0; start < blocks; start += span) {
        const int64_t stop = std::min(blocks, start + span), seen = size.visible(stop - 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t task = 0; task < batch * seen; ++task) {
            const int64_t b = task / seen, block = task % seen;
            float* F = carry + b * tokens.width + block * COLUMNS;
            alignas(64) float logits[ROWS * COLUMNS];
            for (int64_t i = start; i < stop; ++i) {
                std::copy_n(F, COLUMNS, borders + (b * span + i - start) * tokens.width + block * COLUMNS);
                if (block >= size.visible(i)) continue;
                const Place place = place_of(size, tokens, b, i, block);
                product<false, false>(place.rows, COLUMNS, wide, selecting + (b * queries + i * ROWS) * wide, wide,
                                      keys_of(b, chosen, block), COLUMNS, logits, COLUMNS);
                for (int64_t row = 0; row < place.rows; ++row) select(place, row, logits + row * COLUMNS, F);
            }
        }
#pragma omp parallel num_threads(threads)
        {
            Scratch Q(most * ROWS * wide), O(most * ROWS * v_wide), highest(most * ROWS), sums(most * ROWS);
            Scratch logits(ROWS * COLUMNS), scores(ROWS * COLUMNS), weights(ROWS * COLUMNS), bias(ROWS * COLUMNS);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < batch * groups * (stop - start); ++task) {
                const int64_t b = task % batch, group = task / batch % groups;
                const int64_t i = stop - 1 - task / batch / groups;  // the long ones first
                const int64_t first = group * most, count = std::min(most, heads - first), rows = size.rows(i);
                std::fill_n((float*)O, count * ROWS * v_wide, 0.0f);
                std::fill_n((float*)sums, count * ROWS, 0.0f);
                std::fill_n((float*)highest, count * ROWS, -INFINITE);
                for (int64_t h = 0; h < count; ++h)
                    pack_queries(size, q, b, i * ROWS, rows, first + h, Q + h * ROWS * wide);
                float left[ROWS] = {};
                for (int64_t block = 0; block < size.visible(i); ++block) {
                    product<false, false>(rows, COLUMNS, wide, selecting + (b * queries + i * ROWS) * wide, wide,
                                          keys_of(b, chosen, block), COLUMNS, logits, COLUMNS);
                    alignas(64) float F[COLUMNS];
                    std::copy_n(borders + (b * span + i - start) * tokens.width + block * COLUMNS, COLUMNS, F);
                    accumulate(place_of(size, tokens, b, i, block), logits, F, bias);
                    for (int64_t row = 0; group == 0 && row < rows; ++row) {
                        float sum = 0.0f;
                        const float* at = bias + row * COLUMNS;
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = 0; j < COLUMNS; ++j) sum += at[j] < tau ? 1.0f - at[j] / tau : 0.0f;
                        left[row] += sum;
                    }
                    for (int64_t h = 0; h < count; ++h) {
                        const int64_t head = size.kv_head(first + h);
                        const bool known = first + h == selector;
                        if (!known)
                            product<false, false>(rows, COLUMNS, wide, Q + h * ROWS * wide, wide,
                                                  keys_of(b, head, block), COLUMNS, scores, COLUMNS);
                        float* to = O + h * ROWS * v_wide;
                        soften(rows, known ? logits : scores, bias, weights, highest + h * ROWS, sums + h * ROWS, to,
                               v_wide);
                        product<false, true>(rows, v_wide, COLUMNS, weights, COLUMNS, values_of(b, head, block),
                                             v_wide, to, v_wide);
                    }
                }
                for (int64_t h = 0; h < count; ++h)
                    for (int64_t row = 0; row < rows; ++row) {
                        const int64_t token = b * queries + i * ROWS + row, at = h * ROWS + row;
                        const float sum = sums[at], factor = sum > 0.0f ? 1.0f / sum : sum;
                        float* to = out + (token * heads + first + h) * v_dim;
                        const float* from = O + at * v_wide;
                        for (int64_t j = 0; j < v_dim; ++j) to[j] = factor * from[j];
                        lse[(b * heads + first + h) * queries + i * ROWS + row] = highest[at] + std::log(sum);
                    }
                if (group == 0) std::copy_n(left, rows, memory + b * queries + i * ROWS);
            }
        }
    }
    for (int64_t b = 0; b < batch; ++b) std::copy_n(carry + b * tokens.width, keys, selection + b * keys);
}

EXPORT void selective_attention_backward(const float* grad_out, const float* grad_selection, const float* grad_memory,
                                         const float* q, const float* k, const float* v, const float* initial,
                                         const uint8_t* mask, const float* out, const float* lse, float* grad_q,
                                         float* grad_k, float* grad_v, float* grad_initial, int64_t batch,
                                         int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                                         int64_t v_dim, int64_t selector, float scale, float tau, int threads) {
    const Sizes size{batch, queries, keys, heads, kv_heads, dim, v_dim, selector, scale, tau};
    const int64_t wide = size.wide(), v_wide = size.v_wide();
    const int64_t blocks = size.query_blocks(), key_blocks = size.key_blocks();
    const Tokens tokens(size, mask);
    const int64_t workers =
        std::min({(threads + batch - 1) / batch, std::max<int64_t>(1, key_blocks / 2), (int64_t)16});
    Scratch Q(batch * heads * queries * wide), dO(batch * heads * queries * v_wide), delta(batch * heads * queries);
    Scratch dQ(batch * workers * heads * queries * wide);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < batch * heads; ++task) {
        const int64_t b = task / heads, head = task % heads, at = (b * queries * heads + head) * v_dim;
        pack_queries(size, q, b, 0, queries, head, Q + task * queries * wide);
        pack(queries, v_dim, grad_out + at, heads * v_dim, dO + task * queries * v_wide, v_wide);
        for (int64_t i = 0; i < queries; ++i)
            delta[task * queries + i] = dot(grad_out + at + i * heads * v_dim, out + at + i * heads * v_dim, v_dim);
    }

#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t task = 0; task < batch * workers; ++task) {
        const int64_t b = task / workers, worker = task % workers, tile = ROWS * COLUMNS;
        float* dQs = dQ + task * heads * queries * wide;
        std::fill_n(dQs, heads * queries * wide, 0.0f);
        Scratch K(kv_heads * COLUMNS * wide), K_transposed(kv_heads * COLUMNS * wide);
        Scratch V_transposed(kv_heads * COLUMNS * v_wide), dK(kv_heads * COLUMNS * wide);
        Scratch dV(kv_heads * COLUMNS * v_wide), borders(blocks * COLUMNS);
        Scratch logits(tile), bias(tile), scores(tile), dP(tile), dF(tile);
        for (int64_t turn = 0; turn < key_blocks; ++turn) {
            // there and back again: early key blocks are seen by more queries
            const int64_t place_in_turn = turn % (2 * workers);
            if (worker != std::min(place_in_turn, 2 * workers - 1 - place_in_turn)) continue;
            const int64_t block = turn, columns = size.columns(block), key = block * COLUMNS;
            std::fill_n((float*)dK, kv_heads * COLUMNS * wide, 0.0f);
            std::fill_n((float*)dV, kv_heads * COLUMNS * v_wide, 0.0f);
            for (int64_t head = 0; head < kv_heads; ++head) {
                pack_block(size, k, b, head, block, dim, false, K + head * COLUMNS * wide);
                pack_block(size, k, b, head, block, dim, true, K_transposed + head * COLUMNS * wide);
                pack_block(size, v, b, head, block, v_dim, true, V_transposed + head * COLUMNS * v_wide);
            }
            auto score = [&](int64_t head, int64_t i, float* to) {
                product<false, false>(size.rows(i), COLUMNS, wide,
                                      Q + ((b * heads + head) * queries + i * ROWS) * wide, wide,
                                      K_transposed + size.kv_head(head) * COLUMNS * wide, COLUMNS, to, COLUMNS);
            };
            alignas(64) float F[COLUMNS] = {}, carry[COLUMNS] = {};  // carry: of F, from all later queries
            std::copy_n(initial + b * keys + key, columns, F);
            std::copy_n(grad_selection + b * keys + key, columns, carry);
            int64_t begin = 0;
            while (begin < blocks && size.visible(begin) <= block) ++begin;
            for (int64_t i = begin; i < blocks; ++i) {
                std::copy_n(F, COLUMNS, borders + i * COLUMNS);
                if (i + 1 == blocks) break;
                const Place place = place_of(size, tokens, b, i, block);
                score(selector, i, logits);
                for (int64_t row = 0; row < place.rows; ++row) select(place, row, logits + row * COLUMNS, F);
            }
            for (int64_t i = blocks - 1; i >= begin; --i) {
                const Place place = place_of(size, tokens, b, i, block);
                const int64_t rows = place.rows;
                score(selector, i, logits);
                accumulate(place, logits, borders + i * COLUMNS, bias);
                for (int64_t row = 0; row < rows; ++row) {
                    const float less = -grad_memory[b * queries + i * ROWS + row] / tau;
#pragma omp simd
                    for (int64_t j = row * COLUMNS; j < (row + 1) * COLUMNS; ++j) dF[j] = bias[j] <= tau ? less : 0.0f;
                }
                for (int64_t turn_of_head = 1; turn_of_head <= heads; ++turn_of_head) {
                    const int64_t head = (selector + turn_of_head) % heads;  // the selector last: dF is complete then
                    const int64_t kv = size.kv_head(head), at = (b * heads + head) * queries + i * ROWS;
                    if (head == selector)
                        std::copy_n((float*)logits, rows * COLUMNS, (float*)scores);
                    else
                        score(head, i, scores);
                    product<false, false>(rows, COLUMNS, v_wide, dO + at * v_wide, v_wide,
                                          V_transposed + kv * COLUMNS * v_wide, COLUMNS, dP, COLUMNS);
                    differentiate(rows, bias, lse + at, delta + at, scores, dP, dF);
                    if (head == selector)
                        for (int64_t row = rows - 1; row >= 0; --row) {
                            const float *L = logits + row * COLUMNS, *more = dF + row * COLUMNS;
                            const float counts = place.counts[row];
                            float* to = dP + row * COLUMNS;
                            const int64_t before = place.before(row);
#pragma omp simd
                            for (int64_t j = 0; j < before; ++j)
                                to[j] += L[j] > 0.0f ? counts * place.selectable[j] * carry[j] : 0.0f;
#pragma omp simd
                            for (int64_t j = 0; j < COLUMNS; ++j) carry[j] += more[j];
                        }
                    product<true, true>(COLUMNS, v_wide, rows, scores, COLUMNS, dO + at * v_wide, v_wide,
                                        dV + kv * COLUMNS * v_wide, v_wide);
                    product<true, true>(COLUMNS, wide, rows, dP, COLUMNS, Q + at * wide, wide,
                                        dK + kv * COLUMNS * wide, wide);
                    product<false, true>(rows, wide, COLUMNS, dP, COLUMNS, K + kv * COLUMNS * wide, wide,
                                         dQs + (head * queries + i * ROWS) * wide, wide);
                }
            }
            std::copy_n(carry, columns, grad_initial + b * keys + key);
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t head = 0; head < kv_heads; ++head) {
                    const int64_t at = (b * keys + key + j) * kv_heads + head, from = head * COLUMNS + j;
                    std::copy_n(dK + from * wide, dim, grad_k + at * dim);
                    std::copy_n(dV + from * v_wide, v_dim, grad_v + at * v_dim);
                }
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < batch * queries; ++token)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t b = token / queries, i = token % queries;
            float* to = grad_q + (token * heads + head) * dim;
            std::fill_n(to, dim, 0.0f);
            for (int64_t worker = 0; worker < workers; ++worker) {
                const float* from = dQ + (((b * workers + worker) * heads + head) * queries + i) * wide;
#pragma omp simd
                for (int64_t j = 0; j < dim; ++j) to[j] += scale * from[j];
            }
        }
}
