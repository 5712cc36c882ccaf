// State-space duality in chunks: matrix products on tiles in cache, with the decays applied between them.
//
// A task is one sequence and a few heads of one group, and runs through the chunks: the states of its heads stay in
// the second-level cache.  Within a chunk that begins with the state S, with c the running sum of log_a:
//
//     Y = M X + e o (C S),  S' = e_end S + B^T (f o X),   M = L o (C B^T)
//     L_ij = exp(c_i - c_j) for i >= j,  e_i = exp(c_i),  f_j = exp(c_end - c_j)
//
// c is kept in two floats: differences of large sums would lose what is small.  A log_a of -inf counts as 0 in c;
// `first[i]` is the first step that still counts at step i.
#include "../tile.h"

namespace {

struct Sizes {
    int64_t sequences, heads, groups, dim, state, chunk;
};

struct Layout {
    int64_t time, dim, state;  // of a chunk, of x, of B and C: in whole tiles
    int64_t heads, blocks;     // of a task; of a group
};

Layout layout_of(const Sizes& size, int threads) {
    Layout layout{whole_tiles(size.chunk), whole_tiles(size.dim), whole_tiles(size.state), 0, 0};
    const int64_t heads = size.heads / size.groups;
    // states of about 256 KiB a task, and as many tasks as threads or a multiple of them
    const int64_t most = std::max<int64_t>(1, 65536 / (layout.dim * layout.state));
    int64_t blocks = (heads + most - 1) / most;
    while (blocks < heads && size.sequences * size.groups * blocks % threads) ++blocks;
    layout.heads = (heads + blocks - 1) / blocks;
    layout.blocks = (heads + layout.heads - 1) / layout.heads;
    return layout;
}

struct Task {
    int64_t sequence, group, block, head, heads, begin, end;
};

template <class Body>
void for_each_task(const int64_t* offsets, const Sizes& size, const Layout& layout, int threads, Body body) {
    const int64_t heads = size.heads / size.groups, tasks = size.sequences * size.groups * layout.blocks;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
        const int64_t block = i % layout.blocks, group = i / layout.blocks % size.groups;
        const int64_t sequence = i / layout.blocks / size.groups, first = block * layout.heads;
        body(Task{sequence, group, block, group * heads + first, std::min(layout.heads, heads - first),
                  offsets[sequence], offsets[sequence + 1]});
    }
}

// The decays of one head in one chunk.
struct Decays {
    explicit Decays(int64_t chunk)
        : high(chunk, 0.0f), low(chunk, 0.0f), since_start(chunk), to_end(chunk), first(chunk) {}

    void read(const float* log_a, int64_t stride, int64_t time) {
        double sum = 0.0;
        int64_t from = -1;  // -1: the chunk's initial state counts, too
        for (int64_t i = 0; i < time; ++i) {
            const float step = log_a[i * stride];
            if (is_reset(step))
                from = i;
            else
                sum += step;
            high[i] = (float)sum;
            low[i] = (float)(sum - high[i]);
            first[i] = std::max<int64_t>(from, 0);
            since_start[i] = from < 0 ? exp_f(high[i]) : 0.0f;
        }
        for (int64_t i = 0; i < time; ++i)
            to_end[i] = i < from ? 0.0f : exp_f((high[time - 1] - high[i]) + (low[time - 1] - low[i]));
        whole = since_start[time - 1];
    }

    static bool is_reset(float log_a) { return log_a == -std::numeric_limits<float>::infinity(); }

    std::vector<float> high, low, since_start, to_end;
    std::vector<int64_t> first;
    float whole = 1.0f;
};

// out_ij = L_ij in_ij, and 0 for a tile past the diagonal, as far as products look
void apply_decays(const Decays& decays, int64_t time, const float* in, float* out, int64_t stride) {
    for (int64_t i = 0; i < time; ++i) {
        const float at_high = decays.high[i], at_low = decays.low[i];
        const float *high = decays.high.data(), *low = decays.low.data();
        const float* from = in + i * stride;
        float* to = out + i * stride;
        const int64_t begin = decays.first[i], end = i + 1;
        const int64_t vectors_begin = begin / LANES * LANES, vectors_end = (end + LANES - 1) / LANES * LANES;
#pragma omp simd
        for (int64_t j = vectors_begin; j < vectors_end; ++j)
            to[j] = from[j] * exp_f((at_high - high[j]) + (at_low - low[j]));
        std::fill(to, to + begin, 0.0f);
        std::fill(to + end, to + std::min(stride, end + TILE_ROWS), 0.0f);
    }
}

// to_i = weights_i from_i, rows of whole tiles
void scale_rows(int64_t rows, int64_t columns, const float* weights, const float* from, float* to) {
    for (int64_t i = 0; i < rows; ++i) {
        const float weight = weights[i];
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = weight * from[i * columns + j];
    }
}

void scale(int64_t size, float factor, float* values) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) values[i] *= factor;
}

}  // namespace

EXPORT void ssd(const float* x, const float* log_a, const float* B, const float* C, const float* D,
                const float* initial, const int64_t* offsets, float* y, float* final, int64_t sequences,
                int64_t heads, int64_t groups, int64_t dim, int64_t state, int64_t chunk, int threads) {
    const Sizes size{sequences, heads, groups, dim, state, chunk};
    const Layout in = layout_of(size, threads);
    const int64_t stride_x = heads * dim, stride_B = groups * state;
    for_each_task(offsets, size, in, threads, [&](const Task& task) {
        Scratch states(task.heads * state * in.dim), transposed(state * in.time), scores(chunk * in.time),
            weighted(chunk * in.time), xs(chunk * in.dim), decayed(chunk * in.dim), ys(chunk * in.dim);
        Decays decays(in.time);
        for (int64_t h = 0; h < task.heads; ++h)
            pack(state, dim, initial + (task.sequence * heads + task.head + h) * state * dim, dim,
                 states + h * state * in.dim, in.dim);
        std::fill_n((float*)transposed, state * in.time, 0.0f);
        for (int64_t begin = task.begin; begin < task.end; begin += chunk) {
            const int64_t time = std::min(chunk, task.end - begin);
            const float *Bs = B + begin * stride_B + task.group * state, *Cs = C + (Bs - B);
            transpose(time, state, Bs, stride_B, transposed, in.time);
            product<false, false, Known::lower_result>(time, whole_tiles(time), state, Cs, stride_B, transposed,
                                                       in.time, scores, in.time);
            for (int64_t h = 0; h < task.heads; ++h) {
                const int64_t head = task.head + h, at = begin * stride_x + head * dim;
                float* S = states + h * state * in.dim;
                decays.read(log_a + begin * heads + head, heads, time);
                apply_decays(decays, time, scores, weighted, in.time);
                pack(time, dim, x + at, stride_x, xs, in.dim);
                product<false, false>(time, in.dim, state, Cs, stride_B, S, in.dim, ys, in.dim);
                scale_rows(time, in.dim, decays.since_start.data(), ys, ys);
                product<false, true, Known::lower_factor>(time, in.dim, time, weighted, in.time, xs, in.dim, ys,
                                                          in.dim);
                const float skip = D ? D[head] : 0.0f;
                for (int64_t i = 0; i < time; ++i) {
                    float* to = y + at + i * stride_x;
#pragma omp simd
                    for (int64_t j = 0; j < dim; ++j) to[j] = ys[i * in.dim + j] + skip * xs[i * in.dim + j];
                }
                scale_rows(time, in.dim, decays.to_end.data(), xs, decayed);
                scale(state * in.dim, decays.whole, S);
                product<true, true>(state, in.dim, time, Bs, stride_B, decayed, in.dim, S, in.dim);
            }
        }
        for (int64_t h = 0; h < task.heads; ++h)
            for (int64_t n = 0; n < state; ++n)
                std::copy_n(states + (h * state + n) * in.dim, dim,
                            final + ((task.sequence * heads + task.head + h) * state + n) * dim);
    });
}

// With dY and dS' the gradients of Y and S':
//
//     dM = dY X^T,  dG = sum over heads of L o dM,  dX = M^T dY + f o (B dS')
//     dC = dG B + sum (e o dY) S^T,  dB = dG^T C + sum (f o X) dS'^T,  dS = e_end dS' + C^T (e o dY)
//
// log_a_k multiplies what goes from steps before k to steps from k on: its gradient is the sum over i >= k of
// y_i . dy_i - x_i . dx_i (the skip left out), and <S', dS'>.  States are computed again, and kept at the chunks'
// borders, transposed: S^T is the second factor of a product.  grad_B and grad_C are one tensor for each block of
// heads, [blocks, tokens, groups, state]; grad_D is [sequences, heads].
EXPORT void ssd_backward(const float* grad_y, const float* grad_final, const float* x, const float* log_a,
                         const float* B, const float* C, const float* D, const float* initial,
                         const int64_t* offsets, float* grad_x, float* grad_log_a, float* grad_B, float* grad_C,
                         float* grad_D, float* grad_initial, int64_t sequences, int64_t heads, int64_t groups,
                         int64_t dim, int64_t state, int64_t chunk, int threads) {
    const Sizes size{sequences, heads, groups, dim, state, chunk};
    const Layout in = layout_of(size, threads);
    const int64_t stride_x = heads * dim, stride_B = groups * state, tokens = offsets[sequences];
    for_each_task(offsets, size, in, threads, [&](const Task& task) {
        const int64_t chunks = (task.end - task.begin + chunk - 1) / chunk;
        const int64_t state_size = dim * in.state, grad_size = state * in.dim;
        Scratch borders(task.heads * chunks * state_size), grads(task.heads * grad_size), last(state_size);
        Scratch Bs(chunk * in.state), Cs(chunk * in.state), transposed(std::max(state, dim) * in.time);
        Scratch scores(chunk * in.time), weighted(chunk * in.time), products(chunk * in.time), sums(chunk * in.time);
        Scratch xs(chunk * in.dim), scaled(chunk * in.dim), dys(chunk * in.dim), dxs(chunk * in.dim),
            from_grad(chunk * in.dim), dBs(chunk * in.state), dCs(chunk * in.state), from_state(chunk * in.state);
        Decays decays(in.time);
        std::vector<float> totals(chunk), skips(task.heads, 0.0f);
        std::fill_n((float*)transposed, std::max(state, dim) * in.time, 0.0f);
        auto border = [&](int64_t h, int64_t c) { return borders + (h * chunks + c) * state_size; };

        for (int64_t h = 0; h < task.heads; ++h) {
            const int64_t at = (task.sequence * heads + task.head + h) * state * dim;
            pack(state, dim, grad_final + at, dim, grads + h * grad_size, in.dim);
            if (chunks == 0) continue;
            std::fill_n(border(h, 0), state_size, 0.0f);
            transpose(state, dim, initial + at, dim, border(h, 0), in.state);
        }
        for (int64_t c = 0; c + 1 < chunks; ++c) {
            const int64_t begin = task.begin + c * chunk;
            pack(chunk, state, B + begin * stride_B + task.group * state, stride_B, Bs, in.state);
            for (int64_t h = 0; h < task.heads; ++h) {
                const int64_t head = task.head + h;
                decays.read(log_a + begin * heads + head, heads, chunk);
                pack(chunk, dim, x + begin * stride_x + head * dim, stride_x, xs, in.dim);
                scale_rows(chunk, in.dim, decays.to_end.data(), xs, xs);
                const float* S = border(h, c);
                float* next = border(h, c + 1);
                for (int64_t i = 0; i < state_size; ++i) next[i] = decays.whole * S[i];
                product<true, true>(dim, in.state, chunk, xs, in.dim, Bs, in.state, next, in.state);
            }
        }
        for (int64_t c = chunks - 1; c >= 0; --c) {
            const int64_t begin = task.begin + c * chunk, time = std::min(chunk, task.end - begin);
            const int64_t columns = whole_tiles(time), at_B = begin * stride_B + task.group * state;
            pack(time, state, B + at_B, stride_B, Bs, in.state);
            pack(time, state, C + at_B, stride_B, Cs, in.state);
            transpose(time, state, Bs, in.state, transposed, in.time);
            product<false, false, Known::lower_result>(time, columns, state, Cs, in.state, transposed, in.time,
                                                       scores, in.time);
            std::fill_n((float*)sums, chunk * in.time, 0.0f);
            std::fill_n((float*)dBs, chunk * in.state, 0.0f);
            std::fill_n((float*)dCs, chunk * in.state, 0.0f);
            for (int64_t h = 0; h < task.heads; ++h) {
                const int64_t head = task.head + h, at = begin * stride_x + head * dim;
                const float* S = border(h, c);
                float* dS = grads + h * grad_size;
                decays.read(log_a + begin * heads + head, heads, time);
                pack(time, dim, x + at, stride_x, xs, in.dim);
                pack(time, dim, grad_y + at, stride_x, dys, in.dim);
                transpose(time, dim, xs, in.dim, transposed, in.time);
                product<false, false, Known::lower_result>(time, columns, dim, dys, in.dim, transposed, in.time,
                                                           products, in.time);
                apply_decays(decays, time, products, products, in.time);
                apply_decays(decays, time, scores, weighted, in.time);
                for (int64_t i = 0; i < time; ++i) {
                    const float *row = products + i * in.time, *other = scores + i * in.time;
                    float *sum = sums + i * in.time, total = 0.0f;
#pragma omp simd reduction(+ : total)
                    for (int64_t j = 0; j <= i; ++j) {
                        sum[j] += row[j];
                        total += row[j] * other[j];
                    }
                    totals[i] = total;
                }
                product<true, false, Known::lower_factor>(time, in.dim, time, weighted, in.time, dys, in.dim, dxs,
                                                          in.dim);
                product<false, false>(time, in.dim, state, Bs, in.state, dS, in.dim, from_grad, in.dim);
                // <S', dS'>: what x gives to S', and what is left of S
                float given = 0.0f;
                for (int64_t i = 0; i < time; ++i) {
                    const float f = decays.to_end[i];
                    const float *from = from_grad + i * in.dim, *row = xs + i * in.dim;
                    float *to = dxs + i * in.dim, one = 0.0f;
#pragma omp simd reduction(+ : one)
                    for (int64_t j = 0; j < in.dim; ++j) {
                        to[j] += f * from[j];
                        one += row[j] * from[j];
                    }
                    given += f * one;
                    totals[i] -= dot(row, to, in.dim);
                }
                scale_rows(time, in.dim, decays.to_end.data(), xs, scaled);
                transpose(state, dim, dS, in.dim, last, in.state);
                if (in.state > state)
                    for (int64_t i = 0; i < dim; ++i)
                        std::fill(last + i * in.state + state, last + (i + 1) * in.state, 0.0f);
                product<false, true>(time, in.state, dim, scaled, in.dim, last, in.state, dBs, in.state);
                given += decays.whole * dot(S, last, state_size);

                scale_rows(time, in.dim, decays.since_start.data(), dys, scaled);
                product<false, false>(time, in.state, dim, scaled, in.dim, S, in.state, from_state, in.state);
                for (int64_t i = 0; i < time; ++i) {
                    const float *from = from_state + i * in.state, *row = Cs + i * in.state;
                    float *to = dCs + i * in.state, total = 0.0f;
#pragma omp simd reduction(+ : total)
                    for (int64_t j = 0; j < in.state; ++j) {
                        to[j] += from[j];
                        total += from[j] * row[j];
                    }
                    totals[i] += total;
                }
                scale(grad_size, decays.whole, dS);
                product<true, true>(state, in.dim, time, Cs, in.state, scaled, in.dim, dS, in.dim);

                const float skip = D ? D[head] : 0.0f;
                float sum = given;
                for (int64_t i = time - 1; i >= 0; --i) {
                    const int64_t token = (begin + i) * heads + head;
                    sum += totals[i];
                    grad_log_a[token] = Decays::is_reset(log_a[token]) ? 0.0f : sum;
                    float* to = grad_x + at + i * stride_x;
                    const float *from = dxs + i * in.dim, *dy = dys + i * in.dim;
#pragma omp simd
                    for (int64_t j = 0; j < dim; ++j) to[j] = from[j] + skip * dy[j];
                    if (D) skips[h] += dot(dy, xs + i * in.dim, dim);
                }
            }
            product<false, true>(time, in.state, time, sums, in.time, Bs, in.state, dCs, in.state);
            product<true, true>(time, in.state, time, sums, in.time, Cs, in.state, dBs, in.state);
            const int64_t out = task.block * tokens * stride_B + at_B;
            for (int64_t i = 0; i < time; ++i) {
                std::copy_n(dBs + i * in.state, state, grad_B + out + i * stride_B);
                std::copy_n(dCs + i * in.state, state, grad_C + out + i * stride_B);
            }
        }
        for (int64_t h = 0; h < task.heads; ++h) {
            const int64_t head = task.sequence * heads + task.head + h;
            if (D) grad_D[head] = skips[h];
            for (int64_t n = 0; n < state; ++n)
                std::copy_n(grads + h * grad_size + n * in.dim, dim, grad_initial + (head * state + n) * dim);
        }
    });
}

// How many tensors of grad_B and grad_C `ssd_backward` writes.
EXPORT int64_t ssd_blocks(int64_t sequences, int64_t heads, int64_t groups, int64_t dim, int64_t state, int64_t chunk,
                          int threads) {
    return layout_of(Sizes{sequences, heads, groups, dim, state, chunk}, threads).blocks;
}
