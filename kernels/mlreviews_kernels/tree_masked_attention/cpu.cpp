// Attention of a few queries over long caches that are read where they lie.
//
// A task is a head of keys and a stretch of the cache, or the tree; all query heads of the group, and all tokens of
// the tree, are the columns of its matrices: scores [keys, queries] = K Q^T, out [value_dim, queries] += V^T weights,
// in panels of as many queries as a tile has columns.
#include "../tile.h"

namespace {

constexpr int64_t KEYS = 96;     // keys at a time: they stay in cache while all panels use them
constexpr int64_t STRETCH = 10 * KEYS;  // keys of a task, whatever the number of threads: results don't depend on it
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Task {
    int64_t row, head, begin, end;
    bool tree;
};

struct Cache {
    const void* data;
    int64_t batch, token, head;  // strides
};

INLINE float from_bfloat16(uint16_t bits) { return bits_to_float((int32_t)((uint32_t)bits << 16)); }

// the exponent moves from 5 bits to 8; the factor 2^112 makes denormals right, too
INLINE float from_float16(uint16_t bits) {
    const int32_t magnitude = (bits & 0x7fff) << 13, sign = (int32_t)((uint32_t)(bits & 0x8000) << 16);
    const float small = bits_to_float(magnitude) * 5.192296858534828e33f;
    const int32_t found = magnitude >= 0x7c00 << 13 ? magnitude | 0x7f800000 : float_to_bits(small);
    return bits_to_float(found | sign);
}

// Some rows of a cache as floats, one after another: in place if they are that, else in `room`.  Rows that are apart by
// a power of two share few sets of the processor's cache, and would have to be fetched again and again.
const float* rows_of(const Cache& cache, int64_t kind, int64_t row, int64_t head, int64_t begin, int64_t count,
                     int64_t width, float* room) {
    const int64_t at = row * cache.batch + head * cache.head + begin * cache.token;
    if (kind == 0 && cache.token == width) return (const float*)cache.data + at;
    for (int64_t i = 0; i < count; ++i) {
        float* to = room + i * width;
        if (kind == 0) {
            const float* from = (const float*)cache.data + at + i * cache.token;
            for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(from + KEYS * cache.token + j);
            std::copy_n(from, width, to);
            continue;
        }
        const uint16_t* from = (const uint16_t*)cache.data + at + i * cache.token;
        if (kind == 1)
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) to[j] = from_bfloat16(from[j]);
        else
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) to[j] = from_float16(from[j]);
    }
    return room;
}

// The running softmax of a panel: scores [keys, TILE_COLUMNS] become weights, earlier sums and results shrink.
void weigh(int64_t keys, int64_t width, float* scores, float* highest, float* sums, float* out) {
    float most[TILE_COLUMNS], shift[TILE_COLUMNS], kept[TILE_COLUMNS], total[TILE_COLUMNS];
    std::copy_n(highest, TILE_COLUMNS, most);
    for (int64_t j = 0; j < keys; ++j)
#pragma omp simd
        for (int64_t c = 0; c < TILE_COLUMNS; ++c) most[c] = std::max(most[c], scores[j * TILE_COLUMNS + c]);
    bool same = true;
    for (int64_t c = 0; c < TILE_COLUMNS; ++c) {
        shift[c] = most[c] == NOTHING ? 0.0f : most[c];
        kept[c] = exp_f(highest[c] - shift[c]);
        same &= most[c] == highest[c];
        highest[c] = most[c];
        total[c] = sums[c] * kept[c];
    }
    for (int64_t j = 0; j < keys; ++j)
#pragma omp simd
        for (int64_t c = 0; c < TILE_COLUMNS; ++c) {
            const float e = exp_f(scores[j * TILE_COLUMNS + c] - shift[c]);
            scores[j * TILE_COLUMNS + c] = e;
            total[c] += e;
        }
    std::copy_n(total, TILE_COLUMNS, sums);
    if (same) return;
    for (int64_t i = 0; i < width; ++i)
#pragma omp simd
        for (int64_t c = 0; c < TILE_COLUMNS; ++c) out[i * TILE_COLUMNS + c] *= kept[c];
}

}  // namespace

EXPORT void tree_masked_attention(const float* q, const float* k, const float* v, const uint8_t* tree_mask,
                                  const int64_t* lengths, const void* k_cache, const void* v_cache, int64_t k_batch,
                                  int64_t k_token, int64_t k_head, int64_t v_batch, int64_t v_token, int64_t v_head,
                                  int64_t batch, int64_t tree, int64_t heads, int64_t kv_heads, int64_t dim,
                                  int64_t value_dim, int64_t kind, float scale, int threads, float* out, float* lse) {
    const Cache keys_of{k_cache, k_batch, k_token, k_head}, values_of{v_cache, v_batch, v_token, v_head};
    const Cache tree_keys{k, tree * kv_heads * dim, kv_heads * dim, dim};
    const Cache tree_values{v, tree * kv_heads * value_dim, kv_heads * value_dim, value_dim};
    const int64_t group = heads / kv_heads, rows = tree * group, columns = whole_tiles(rows), pairs = batch * kv_heads;
    std::vector<Task> tasks;
    std::vector<int64_t> first_task;  // of each row of the batch and head of keys
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t h = 0; h < kv_heads; ++h) {
            first_task.push_back((int64_t)tasks.size());
            for (int64_t begin = 0; begin < lengths[n]; begin += STRETCH)
                tasks.push_back({n, h, begin, std::min(begin + STRETCH, lengths[n]), false});
            tasks.push_back({n, h, 0, tree, true});
        }
    first_task.push_back((int64_t)tasks.size());
    const int64_t count = (int64_t)tasks.size();
    // a panel is [dim or value_dim, TILE_COLUMNS]; column r is token r / group, head r % group of the group
    Scratch queries(pairs * columns * dim), outs(count * columns * value_dim), highest(count * columns),
        sums(count * columns);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; ++p)
            for (int64_t r = 0; r < columns; ++r) {
                const int64_t token = r / group, head = p % kv_heads * group + r % group;
                const float* from = q + ((p / kv_heads * tree + token) * heads + head) * dim;
                float* to = queries + (p * columns + r / TILE_COLUMNS * TILE_COLUMNS) * dim + r % TILE_COLUMNS;
                for (int64_t i = 0; i < dim; ++i) to[i * TILE_COLUMNS] = r < rows ? scale * from[i] : 0.0f;
            }
        Scratch scores(KEYS * TILE_COLUMNS), key_room(KEYS * dim), value_room(KEYS * value_dim);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; ++t) {
            const Task task = tasks[t];
            float *task_outs = outs + t * columns * value_dim, *task_highest = highest + t * columns;
            float* task_sums = sums + t * columns;
            std::fill_n(task_outs, columns * value_dim, 0.0f);
            std::fill_n(task_highest, columns, NOTHING);
            std::fill_n(task_sums, columns, 0.0f);
            for (int64_t begin = task.begin; begin < task.end; begin += KEYS) {
                const int64_t size = std::min(KEYS, task.end - begin), of = task.tree ? 0 : kind;
                const float* ks = rows_of(task.tree ? tree_keys : keys_of, of, task.row, task.head, begin, size, dim,
                                          key_room);
                const float* vs = rows_of(task.tree ? tree_values : values_of, of, task.row, task.head, begin, size,
                                          value_dim, value_room);
                for (int64_t c = 0; c < columns; c += TILE_COLUMNS) {
                    const float* panel = queries + ((task.row * kv_heads + task.head) * columns + c) * dim;
                    product<false, false>(size, TILE_COLUMNS, dim, ks, dim, panel, TILE_COLUMNS, scores,
                                          TILE_COLUMNS);
                    if (task.tree)
                        for (int64_t r = c; r < std::min(c + TILE_COLUMNS, rows); ++r) {
                            const uint8_t* seen = tree_mask + (task.row * tree + r / group) * tree + begin;
                            for (int64_t j = 0; j < size; ++j)
                                if (!seen[j]) scores[j * TILE_COLUMNS + r - c] = NOTHING;
                        }
                    weigh(size, value_dim, scores, task_highest + c, task_sums + c, task_outs + c * value_dim);
                    product<true, true>(value_dim, TILE_COLUMNS, size, vs, value_dim, scores, TILE_COLUMNS,
                                        task_outs + c * value_dim, TILE_COLUMNS);
                }
            }
        }
        // the stretches of one head are merged in a fixed order
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; ++p)
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t token = r / group, head = p % kv_heads * group + r % group, n = p / kv_heads;
                float* to = out + ((n * tree + token) * heads + head) * value_dim;
                float most = NOTHING, total = 0.0f;
                for (int64_t t = first_task[p]; t < first_task[p + 1]; ++t)
                    most = std::max(most, highest[t * columns + r]);
                std::fill_n(to, value_dim, 0.0f);
                lse[(n * heads + head) * tree + token] = NOTHING;
                if (most == NOTHING) continue;
                for (int64_t t = first_task[p]; t < first_task[p + 1]; ++t) {
                    const float share = exp_f(highest[t * columns + r] - most);
                    const int64_t panel = t * columns + r / TILE_COLUMNS * TILE_COLUMNS;
                    const float* from = outs + panel * value_dim + r % TILE_COLUMNS;
                    total += share * sums[t * columns + r];
                    for (int64_t i = 0; i < value_dim; ++i) to[i] += share * from[i * TILE_COLUMNS];
                }
                for (int64_t i = 0; i < value_dim; ++i) to[i] /= total;
                lse[(n * heads + head) * tree + token] = most + std::log(total);
            }
    }
}
