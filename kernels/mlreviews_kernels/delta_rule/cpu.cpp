// The delta rule in its dual form: matrix products and a triangular solve for each chunk, on tiles in cache.
//
// A task is one sequence and head, and runs through the chunks. Within a chunk that begins with the state W:
//
//     (I + A) U = beta o (V - K W_base),  A_sj = beta_s k_s . k_j where j's mini-batch is before s's, else 0
//     O = Q W + P U,  P = tril(Q K^T),  W' = W + K^T U
//
// A chunk has whole mini-batches, and W_base is W; or it is part of one, A is 0, and W_base was W at its start.
#include "../tile.h"

namespace {

struct Sizes {
    int64_t sequences, heads, keys, values, mini_batch, chunk;
    int64_t k() const { return whole_tiles(keys); }
    int64_t v() const { return whole_tiles(values); }
    int64_t t() const { return whole_tiles(chunk); }
    bool parts() const { return mini_batch > chunk; }

    // where the chunk ends that begins at this step
    int64_t stop(int64_t start, int64_t time) const {
        if (!parts()) return std::min(time, start + chunk / mini_batch * mini_batch);
        return std::min({time, start + chunk, (start / mini_batch + 1) * mini_batch});
    }
    // rows that are solved for at once: a few whole mini-batches
    int64_t block() const { return (2 * TILE_ROWS + mini_batch - 1) / mini_batch * mini_batch; }
};

struct Task {
    int64_t sequence, head, begin, time;
};

template <class Body>
void for_each_task(const int64_t* offsets, const Sizes& size, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < size.sequences * size.heads; ++i) {
        const int64_t sequence = i / size.heads, begin = offsets[sequence];
        body(Task{sequence, i % size.heads, begin, offsets[sequence + 1] - begin});
    }
}

void add_scaled(int64_t size, float factor, const float* from, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

// Zeros above the diagonal, as far as products look, and in row i from column `first(i)` on.
template <class First>
void clear_above(int64_t time, int64_t stride, float* matrix, First first) {
    for (int64_t i = 0; i < time; ++i)
        std::fill(matrix + i * stride + first(i), matrix + i * stride + std::min(stride, i + 1 + TILE_ROWS), 0.0f);
}

// One chunk's inputs, and what forward and backward make of them.
class Chunk {
  public:
    explicit Chunk(const Sizes& sizes)
        : keys(sizes.chunk * sizes.k()), transposed(sizes.keys * sizes.t()), products(sizes.chunk * sizes.t()),
          system(sizes.chunk * sizes.t()), rates(sizes.chunk), size(sizes) {
        std::fill_n((float*)transposed, sizes.keys * sizes.t(), 0.0f);
    }

    void read(const float* k, const float* beta, int64_t steps) {
        time = steps;
        columns = whole_tiles(time);
        pack(time, size.keys, k, size.heads * size.keys, keys, size.k());
        transpose(time, size.keys, keys, size.k(), transposed, size.t());
        for (int64_t i = 0; i < time; ++i) rates[i] = beta[i * size.heads];
    }

    // the lower triangle of x K^T, zeros above
    void with_keys(const float* x, float* out) const {
        product<false, false, Known::lower_result>(time, columns, size.keys, x, size.k(), transposed, size.t(), out,
                                                   size.t());
        clear_above(time, size.t(), out, [](int64_t i) { return i + 1; });
    }

    // V - K W_base
    void errors(const float* v, const float* base, float* out) const {
        product<false, false>(time, size.v(), size.keys, keys, size.k(), base, size.v(), out, size.v());
        for (int64_t i = 0; i < time; ++i) {
            const float* from = v + i * size.heads * size.values;
            float* to = out + i * size.v();
            for (int64_t j = 0; j < size.values; ++j) to[j] = from[j] - to[j];
        }
    }

    bool solves() const { return time > size.mini_batch; }
    int64_t mini_batch_of(int64_t step) const { return step / size.mini_batch * size.mini_batch; }

    // K K^T and -A
    void prepare() {
        with_keys(keys, products);
        for (int64_t i = 0; i < time; ++i)
            for (int64_t j = 0; j <= i; ++j) system[i * size.t() + j] = -rates[i] * products[i * size.t() + j];
    }

    // the solution of (I + A) U = U
    void solve(float* u) const {
        const int64_t step = size.block(), width = size.v();
        for (int64_t begin = 0; begin < time; begin += step) {
            const int64_t end = std::min(time, begin + step);
            product<false, true>(end - begin, width, begin, system + begin * size.t(), size.t(), u, width,
                                 u + begin * width, width);
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = begin; j < mini_batch_of(i); ++j)
                    add_scaled(width, system[i * size.t() + j], u + j * width, u + i * width);
        }
    }

    // the solution of (I + A)^T R = R
    void solve_transposed(float* r) const {
        const int64_t step = size.block(), width = size.v();
        for (int64_t begin = (time - 1) / step * step; begin >= 0; begin -= step) {
            const int64_t end = std::min(time, begin + step);
            product<true, true>(end - begin, width, time - end, system + end * size.t() + begin, size.t(),
                                r + end * width, width, r + begin * width, width);
            for (int64_t j = end - 1; j >= begin; --j)
                for (int64_t i = mini_batch_of(j) + size.mini_batch; i < end; ++i)
                    add_scaled(width, system[i * size.t() + j], r + i * width, r + j * width);
        }
    }

    // U from the right-hand side's factor V - K W_base
    void update(const float* errors, float* u) {
        const int64_t width = size.v();
        for (int64_t i = 0; i < time; ++i)
            for (int64_t j = 0; j < width; ++j) u[i * width + j] = rates[i] * errors[i * width + j];
        if (!solves()) return;
        prepare();
        solve(u);
    }

    // W' = W + K^T U
    void advance(const float* u, float* state) const {
        product<true, true>(size.keys, size.v(), time, keys, size.k(), u, size.v(), state, size.v());
    }

    Scratch keys, transposed, products, system;
    std::vector<float> rates;
    const Sizes size;
    int64_t time = 0, columns = 0;
};

}  // namespace

EXPORT void delta_rule(const float* q, const float* k, const float* v, const float* beta, const float* initial,
                       const int64_t* offsets, float* out, float* final, int64_t sequences, int64_t heads,
                       int64_t dim_k, int64_t dim_v, int64_t mini_batch, int64_t chunk_size, int threads) {
    const Sizes size{sequences, heads, dim_k, dim_v, mini_batch, chunk_size};
    for_each_task(offsets, size, threads, [&](const Task& task) {
        const int64_t state_size = dim_k * size.v(), at_state = (task.sequence * heads + task.head) * dim_k * dim_v;
        Scratch state(state_size), base(state_size), u(chunk_size * size.v()), os(chunk_size * size.v()),
            qs(chunk_size * size.k()), scores(chunk_size * size.t());
        Chunk chunk(size);
        pack(dim_k, dim_v, initial + at_state, dim_v, state, size.v());
        for (int64_t start = 0, stop; start < task.time; start = stop) {
            stop = size.stop(start, task.time);
            const int64_t time = stop - start, token = (task.begin + start) * heads + task.head;
            chunk.read(k + token * dim_k, beta + token, time);
            if (size.parts() && start % mini_batch == 0) std::copy_n((float*)state, state_size, (float*)base);
            chunk.errors(v + token * dim_v, size.parts() ? base : state, os);
            chunk.update(os, u);
            pack(time, dim_k, q + token * dim_k, heads * dim_k, qs, size.k());
            chunk.with_keys(qs, scores);
            product<false, false>(time, size.v(), dim_k, qs, size.k(), state, size.v(), os, size.v());
            product<false, true, Known::lower_factor>(time, size.v(), time, scores, size.t(), u, size.v(), os,
                                                      size.v());
            for (int64_t i = 0; i < time; ++i)
                std::copy_n(os + i * size.v(), dim_v, out + (token + i * heads) * dim_v);
            chunk.advance(u, state);
        }
        for (int64_t i = 0; i < dim_k; ++i)
            std::copy_n(state + i * size.v(), dim_v, final + at_state + i * dim_v);
    });
}

// With dO and dW' the gradients of O and W', and R those of the right-hand side:
//
//     dU = P^T dO + K dW',  (I + A)^T R = dU,  dP = tril(dO U^T),  dA = -R U^T where A isn't 0,  X = beta o dA
//     dV = beta o R,  dbeta = R . (V - K W_base) + sum_j dA_sj k_s . k_j
//     dQ = dO W^T + dP K,  dK = dP^T Q + U dW'^T - dV W_base^T + (X + X^T) K
//     dW = dW' + Q^T dO,  dW_base = -K^T dV
//
// States and U are computed again first, and the states kept at the chunks' borders.
EXPORT void delta_rule_backward(const float* grad_out, const float* grad_final, const float* q, const float* k,
                                const float* v, const float* beta, const float* initial, const int64_t* offsets,
                                float* grad_q, float* grad_k, float* grad_v, float* grad_beta, float* grad_initial,
                                int64_t sequences, int64_t heads, int64_t dim_k, int64_t dim_v, int64_t mini_batch,
                                int64_t chunk_size, int threads) {
    const Sizes size{sequences, heads, dim_k, dim_v, mini_batch, chunk_size};
    for_each_task(offsets, size, threads, [&](const Task& task) {
        const int64_t wide_k = size.k(), wide_v = size.v(), wide_t = size.t();
        const int64_t state_size = dim_k * wide_v, at_state = (task.sequence * heads + task.head) * dim_k * dim_v;
        std::vector<int64_t> starts;
        std::vector<int64_t> bases;  // the chunk with which each one's mini-batch begins, if that is longer
        for (int64_t start = 0; start < task.time; start = size.stop(start, task.time)) {
            const bool inside = size.parts() && start % mini_batch != 0;
            bases.push_back(inside ? bases.back() : (int64_t)starts.size());
            starts.push_back(start);
        }
        const int64_t chunks = starts.size();
        starts.push_back(task.time);
        Scratch borders((chunks + 1) * state_size), us(task.time * wide_v), grad(state_size), grad_base(state_size);
        Scratch errors(chunk_size * wide_v), dos(chunk_size * wide_v), rs(chunk_size * wide_v),
            turned(dim_v * wide_t), turned_state(dim_v * wide_k);
        Scratch qs(chunk_size * wide_k), dqs(chunk_size * wide_k), dks(chunk_size * wide_k);
        Scratch scores(chunk_size * wide_t), dscores(chunk_size * wide_t), dsystem(chunk_size * wide_t);
        Chunk chunk(size);
        std::fill_n((float*)turned, dim_v * wide_t, 0.0f);
        std::fill_n((float*)turned_state, dim_v * wide_k, 0.0f);
        std::fill_n((float*)grad_base, state_size, 0.0f);
        auto state_at = [&](int64_t c) { return borders + c * state_size; };
        auto turn = [&](const float* state) { transpose(dim_k, dim_v, state, wide_v, turned_state, wide_k); };

        pack(dim_k, dim_v, initial + at_state, dim_v, borders, wide_v);
        pack(dim_k, dim_v, grad_final + at_state, dim_v, grad, wide_v);
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t token = (task.begin + starts[c]) * heads + task.head;
            float* u = us + starts[c] * wide_v;
            chunk.read(k + token * dim_k, beta + token, starts[c + 1] - starts[c]);
            chunk.errors(v + token * dim_v, state_at(bases[c]), errors);
            chunk.update(errors, u);
            std::copy_n(state_at(c), state_size, state_at(c + 1));
            chunk.advance(u, state_at(c + 1));
        }
        for (int64_t c = chunks - 1; c >= 0; --c) {
            const int64_t start = starts[c], time = starts[c + 1] - start;
            const int64_t token = (task.begin + start) * heads + task.head;
            const float *u = us + start * wide_v, *state = state_at(c), *base = state_at(bases[c]);
            chunk.read(k + token * dim_k, beta + token, time);
            chunk.errors(v + token * dim_v, base, errors);
            pack(time, dim_k, q + token * dim_k, heads * dim_k, qs, wide_k);
            pack(time, dim_v, grad_out + token * dim_v, heads * dim_v, dos, wide_v);
            transpose(time, dim_v, u, wide_v, turned, wide_t);
            chunk.with_keys(qs, scores);

            product<true, false, Known::lower_factor>(time, wide_v, time, scores, wide_t, dos, wide_v, rs, wide_v);
            product<false, true>(time, wide_v, dim_k, chunk.keys, wide_k, grad, wide_v, rs, wide_v);
            if (chunk.solves()) {
                chunk.prepare();
                chunk.solve_transposed(rs);
            }
            product<false, false, Known::lower_result>(time, chunk.columns, dim_v, dos, wide_v, turned, wide_t,
                                                       dscores, wide_t);
            clear_above(time, wide_t, dscores, [](int64_t i) { return i + 1; });
            turn(state);
            product<false, false>(time, wide_k, dim_v, dos, wide_v, turned_state, wide_k, dqs, wide_k);
            product<false, true, Known::lower_factor>(time, wide_k, time, dscores, wide_t, chunk.keys, wide_k, dqs,
                                                      wide_k);
            product<true, false, Known::lower_factor>(time, wide_k, time, dscores, wide_t, qs, wide_k, dks, wide_k);
            turn(grad);
            product<false, true>(time, wide_k, dim_v, u, wide_v, turned_state, wide_k, dks, wide_k);

            if (chunk.solves())
                product<false, false, Known::lower_result>(time, chunk.columns, dim_v, rs, wide_v, turned, wide_t,
                                                           dsystem, wide_t);
            for (int64_t i = 0; i < time; ++i) {
                const float rate = chunk.rates[i];
                float *r = rs + i * wide_v, *row = dsystem + i * wide_t, sum = dot(r, errors + i * wide_v, dim_v);
                if (chunk.solves()) {
                    const int64_t before = chunk.mini_batch_of(i);
                    sum -= dot(row, chunk.products + i * wide_t, before);
                    for (int64_t j = 0; j < before; ++j) row[j] *= -rate;
                }
                grad_beta[token + i * heads] = sum;
                float* to = grad_v + (token + i * heads) * dim_v;
                for (int64_t j = 0; j < dim_v; ++j) to[j] = rate * r[j];
                for (int64_t j = 0; j < wide_v; ++j) r[j] *= -rate;  // -dV from here on
            }
            if (chunk.solves()) {
                clear_above(time, wide_t, dsystem, [&](int64_t i) { return chunk.mini_batch_of(i); });
                product<false, true, Known::lower_factor>(time, wide_k, time, dsystem, wide_t, chunk.keys, wide_k,
                                                          dks, wide_k);
                product<true, true, Known::lower_factor>(time, wide_k, time, dsystem, wide_t, chunk.keys, wide_k,
                                                         dks, wide_k);
            }
            turn(base);
            product<false, true>(time, wide_k, dim_v, rs, wide_v, turned_state, wide_k, dks, wide_k);
            for (int64_t i = 0; i < time; ++i) {
                std::copy_n(dqs + i * wide_k, dim_k, grad_q + (token + i * heads) * dim_k);
                std::copy_n(dks + i * wide_k, dim_k, grad_k + (token + i * heads) * dim_k);
            }
            product<true, true>(dim_k, wide_v, time, qs, wide_k, dos, wide_v, grad, wide_v);
            chunk.advance(rs, grad_base);
            if (bases[c] == c) {
                add_scaled(state_size, 1.0f, grad_base, grad);
                std::fill_n((float*)grad_base, state_size, 0.0f);
            }
        }
        for (int64_t i = 0; i < dim_k; ++i)
            std::copy_n(grad + i * wide_v, dim_v, grad_initial + at_state + i * dim_v);
    });
}
