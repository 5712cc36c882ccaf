// Attention whose scores are multiplied by a function of their softmax's entropy.
//
// A block of queries keeps its scores for all keys, so that both softmaxes come from one product of Q and K.
#include "../softmaxes.h"

using namespace softmaxes;

namespace {

struct Sharpening {
    const double* coefficients;
    int64_t count;
    float threshold;
};

struct Temperature {
    float inverse, slope;  // beta and its derivative with respect to the entropy
};

Temperature temperature(const Sharpening& by, float entropy) {
    double value = 0.0, slope = 0.0;
    for (int64_t i = 0; i < by.count; ++i) {
        slope = slope * entropy + value;
        value = value * entropy + by.coefficients[i];
    }
    if (entropy > by.threshold && value > 1.0) return {(float)value, (float)slope};
    return {1.0f, 0.0f};
}

Problem<1> problem(const float* q, const float* k, const float* v, const uint8_t* key_mask, const uint8_t* pair_mask,
                   const int64_t* q_offsets, const int64_t* k_offsets, int64_t sequences, int64_t heads,
                   int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t causal, float scale, int threads) {
    Problem<1> p{};
    p.q[0] = q, p.k[0] = k, p.v = v, p.key_mask = key_mask, p.pair_mask = pair_mask;
    p.q_offsets = q_offsets, p.k_offsets = k_offsets, p.sequences = sequences, p.heads = heads;
    p.kv_heads = kv_heads, p.dim = dim, p.value_dim = value_dim, p.causal = causal != 0, p.scale = scale;
    p.threads = threads;
    return p;
}

constexpr float LOWEST = -100.0f;  // exp_f of it is 0, and it times 0 is 0: for what is hidden
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Scores of one row become the weights of the sharpened softmax, but for the factor that is returned.
float sharpen(const Range& range, int64_t row, const Scores& scores, const Sharpening& by, float* entropy, float* lse,
              float* sharp) {
    float high = NOTHING, sum = 0.0f, weighted = 0.0f, sharp_sum = 0.0f;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        const float* s = scores.block(b) + at;
        float most = high;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < count; ++j) most = std::max(most, s[j]);
        high = most;
    });
    if (high == NOTHING) {  // no key is seen: the weights are 0
        for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
            std::fill_n(scores.block(b) + at, count, 0.0f);
        });
        *entropy = 0.0f, *lse = *sharp = NOTHING;
        return 0.0f;
    }
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        const float* s = scores.block(b) + at;
        float total = 0.0f, mean = 0.0f;
#pragma omp simd reduction(+ : total, mean)
        for (int64_t j = 0; j < count; ++j) {
            const float x = std::max(s[j] - high, LOWEST), e = exp_f(x);
            total += e;
            mean += e * x;
        }
        sum += total, weighted += mean;
    });
    *entropy = std::log(sum) - weighted / sum;
    *lse = high + std::log(sum);
    const float beta = temperature(by, *entropy).inverse;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        float *s = scores.block(b) + at, total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < count; ++j) {
            s[j] = exp_f(beta * (s[j] - high));
            total += s[j];
        }
        sharp_sum += total;
    });
    *sharp = beta * high + std::log(sharp_sum);
    return 1.0f / sharp_sum;
}

// Scores of one row become their gradients, the products dO V^T the weights of the sharpened softmax.
void differentiate(const Range& range, int64_t row, const Scores& scores, const Scores& products,
                   const Sharpening& by, float entropy, float lse, float sharp, float grad_entropy) {
    const bool empty = lse == NOTHING;
    if (empty) lse = sharp = 0.0f;
    const auto [beta, slope] = temperature(by, entropy);
    float mean = 0.0f, logs = 0.0f, both = 0.0f;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        const float *s = scores.block(b) + at, *d = products.block(b) + at;
        float x = 0.0f, y = 0.0f, z = 0.0f;
#pragma omp simd reduction(+ : x, y, z)
        for (int64_t j = 0; j < count; ++j) {
            const float u = std::max(beta * s[j] - sharp, LOWEST), r = exp_f(u);
            x += r * d[j];
            y += r * u;
            z += r * u * d[j];
        }
        mean += x, logs += y, both += z;
    });
    // sum r (dP - mean) s: as the first factors add up to 0, log r / beta does for s
    const float grad = empty ? 0.0f : grad_entropy + slope * (both - mean * logs) / beta;
    for_each_span(range, row, [&](int64_t b, int64_t at, int64_t, int64_t count) {
        float *s = scores.block(b) + at, *d = products.block(b) + at;
        if (grad == 0.0f) {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
                const float r = exp_f(beta * s[j] - sharp);
                s[j] = beta * r * (d[j] - mean);
                d[j] = r;
            }
            return;
        }
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
            const float r = exp_f(beta * s[j] - sharp), log_p = std::max(s[j] - lse, LOWEST);
            s[j] = beta * r * (d[j] - mean) - grad * exp_f(log_p) * (log_p + entropy);
            d[j] = r;
        }
    });
}

}  // namespace

#define ARGUMENTS                                                                                                     \
    const float *q, const float *k, const float *v, const uint8_t *key_mask, const uint8_t *pair_mask,                \
        const int64_t *q_offsets, const int64_t *k_offsets, int64_t sequences, int64_t heads, int64_t kv_heads,       \
        int64_t dim, int64_t value_dim, int64_t causal, float scale, int threads, const double *coefficients,         \
        int64_t count, float threshold
#define PROBLEM                                                                                                       \
    problem(q, k, v, key_mask, pair_mask, q_offsets, k_offsets, sequences, heads, kv_heads, dim, value_dim, causal,   \
            scale, threads)

// out is [batch, queries, heads, value_dim]; entropy, lse and sharp are [batch, heads, queries]
EXPORT void sharpened_attention(ARGUMENTS, float* out, float* entropy, float* lse, float* sharp) {
    const Problem<1> p = PROBLEM;
    const Sharpening by{coefficients, count, threshold};
    const Packed ks(k_offsets, sequences, kv_heads, dim, k, true, threads);
    const Packed vs(k_offsets, sequences, kv_heads, value_dim, v, false, threads);
    const int64_t queries = q_offsets[1], keys = k_offsets[1], blocks = blocks_of(queries, FORWARD_ROWS);
    const int64_t width = whole_tiles(value_dim);
#pragma omp parallel num_threads(threads)
    {
        const Scores scores(keys, FORWARD_ROWS);
        Scratch rows(FORWARD_ROWS * dim), values(FORWARD_ROWS * width);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < sequences * heads * blocks; ++t) {
            // the longest rows first: short ones fill the gaps at the end
            const int64_t head = t % heads, n = t / heads % sequences, kv = head / p.group();
            const int64_t first = (blocks - 1 - t / heads / sequences) * FORWARD_ROWS, token = n * queries + first;
            const Range range(p, n, first, std::min(FORWARD_ROWS, queries - first));
            gather(range.rows, dim, q + (token * heads + head) * dim, heads * dim, scale, rows);
            score_product(range, dim, rows, ks(n, kv), scores);
            float factors[FORWARD_ROWS];
            for (int64_t i = 0; i < range.rows; ++i) {
                const int64_t at = (n * heads + head) * queries + first + i;
                apply_mask(p, range, n, i, scores);
                factors[i] = sharpen(range, i, scores, by, entropy + at, lse + at, sharp + at);
                clear_beside(range, i, scores);
            }
            std::fill_n((float*)values, range.rows * width, 0.0f);
            value_product(range, scores, width, vs(n, kv), values);
            for (int64_t i = 0; i < range.rows; ++i) {
                float* to = out + ((token + i) * heads + head) * value_dim;
                for (int64_t j = 0; j < value_dim; ++j) to[j] = factors[i] * values[i * width + j];
            }
        }
    }
}

// How many tensors of the gradients of keys and values the backward writes.
EXPORT int64_t sharpened_attention_parts(ARGUMENTS) { return parts_of(PROBLEM); }

// grad_k and grad_v are one tensor for each part, [parts, batch, keys, kv_heads, ...]
EXPORT void sharpened_attention_backward(ARGUMENTS, const float* grad_out, const float* grad_entropy,
                                         const float* entropy, const float* lse, const float* sharp, float* grad_q,
                                         float* grad_k, float* grad_v, int64_t parts) {
    const Problem<1> p = PROBLEM;
    const Sharpening by{coefficients, count, threshold};
    const Packed columns(k_offsets, sequences, kv_heads, dim, k, true, threads);
    const Packed rows_of(k_offsets, sequences, kv_heads, dim, k, false, threads);
    const Packed vs(k_offsets, sequences, kv_heads, value_dim, v, true, threads);
    const int64_t queries = q_offsets[1], keys = k_offsets[1], blocks = blocks_of(queries, BACKWARD_ROWS);
    const int64_t width = whole_tiles(dim), value_width = whole_tiles(value_dim);
#pragma omp parallel num_threads(threads)
    {
        const Scores scores(keys, BACKWARD_ROWS), products(keys, BACKWARD_ROWS);
        Scratch key_grads(keys * width), value_grads(keys * value_width), query_grads(BACKWARD_ROWS * width),
            rows(BACKWARD_ROWS * dim), packed_rows(BACKWARD_ROWS * width), outs(BACKWARD_ROWS * value_dim),
            packed_outs(BACKWARD_ROWS * value_width);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < sequences * kv_heads * parts; ++t) {
            const int64_t part = t % parts, kv = t / parts % kv_heads, n = t / parts / kv_heads;
            std::fill_n((float*)key_grads, keys * width, 0.0f);
            std::fill_n((float*)value_grads, keys * value_width, 0.0f);
            // every so many blocks, so that all parts have long rows and short ones
            for (int64_t block = part; block < blocks * p.group(); block += parts) {
                const int64_t head = kv * p.group() + block / blocks, first = block % blocks * BACKWARD_ROWS;
                const Range range(p, n, first, std::min(BACKWARD_ROWS, queries - first));
                const int64_t at = (n * queries + first) * heads + head;
                gather(range.rows, value_dim, grad_out + at * value_dim, heads * value_dim, 1.0f, outs);
                pack_rows(range.rows, 0, range.rows, value_dim, outs, value_dim, packed_outs);
                score_product(range, value_dim, outs, vs(n, kv), products);
                gather(range.rows, dim, q + at * dim, heads * dim, scale, rows);
                pack_rows(range.rows, 0, range.rows, dim, rows, dim, packed_rows);
                score_product(range, dim, rows, columns(n, kv), scores);
                for (int64_t i = 0; i < range.rows; ++i) {
                    const int64_t row = (n * heads + head) * queries + first + i;
                    apply_mask(p, range, n, i, scores);
                    differentiate(range, i, scores, products, by, entropy[row], lse[row], sharp[row],
                                  grad_entropy[row]);
                    clear_beside(range, i, scores);
                    clear_beside(range, i, products);
                }
                key_product(range, products, value_width, packed_outs, value_grads);
                key_product(range, scores, width, packed_rows, key_grads);
                std::fill_n((float*)query_grads, range.rows * width, 0.0f);
                value_product(range, scores, width, rows_of(n, kv), query_grads);
                for (int64_t i = 0; i < range.rows; ++i)
                    for (int64_t j = 0; j < dim; ++j)
                        grad_q[(at + i * heads) * dim + j] = scale * query_grads[i * width + j];
            }
            const int64_t at = (part * sequences + n) * keys * kv_heads + kv;
            for (int64_t j = 0; j < keys; ++j) {
                std::copy_n(key_grads + j * width, dim, grad_k + (at + j * kv_heads) * dim);
                std::copy_n(value_grads + j * value_width, value_dim, grad_v + (at + j * kv_heads) * value_dim);
            }
        }
    }
}
