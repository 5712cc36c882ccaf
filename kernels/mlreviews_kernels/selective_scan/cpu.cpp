// The selective scan, forward and backward: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t.
//
// Tokens lie one after another; sequence i takes the tokens offsets[i] to offsets[i + 1].  A task walks along one
// sequence with a few channels, chunk by chunk: what a chunk needs of its channels is staged in the first-level cache,
// then each of the states runs through the chunk in registers, so that only exponentials are left to wait for.
#include "../vector.h"

#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t BYTES = 32;
#else
constexpr int64_t BYTES = 16;
#endif
typedef float Vec __attribute__((vector_size(BYTES)));
typedef int32_t IntVec __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / 4;
constexpr int64_t PAIR = 2 * LANES;  // channels that run together: two registers hide each other's latency
constexpr float LOG2E = 1.44269504f;

struct Pair {
    Vec low, high;
};

INLINE Vec broadcast(float x) { return x - Vec{}; }

// 2^x for x = delta A log2(e), relative error below 2e-7: 0 from -127 down, infinity from 128 up; NaN stays.
INLINE Vec exp2_v(Vec x) {
    const Vec least = broadcast(-127.0f), most = broadcast(128.0f);
    x = x < least ? least : x;
    x = x > most ? most : x;
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the lowest bits
    const Vec r = x - (shifted - 12582912.0f);
    Vec p = r * 1.5353362e-4f + 1.3398874e-3f;
    p = p * r + 9.6184374e-3f;
    p = p * r + 5.5503325e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314720e-1f;
    p = p * r + 1.0f;
    return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

INLINE Vec load(const float* at) {
    Vec value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

INLINE void store(float* at, Vec value) { std::memcpy(at, &value, sizeof value); }

// `width` of PAIR floats; the rest is 0, which stays 0 in all that follows.
INLINE void read(Pair& to, const float* from, int64_t width) {
    if (width == PAIR) {
        to = {load(from), load(from + LANES)};
    } else {
        to = Pair{};
        std::memcpy(&to, from, width * sizeof(float));
    }
}

INLINE void write(float* to, const Pair& from, int64_t width) {
    if (width == PAIR) {
        store(to, from.low);
        store(to + LANES, from.high);
    } else {
        std::memcpy(to, &from, width * sizeof(float));
    }
}

// Rows [channel][state] in memory, pairs of channels by state here.
void read_states(Pair* to, const float* from, int64_t width, int64_t states, float factor) {
    for (int64_t n = 0; n < states; ++n) {
        float lanes[PAIR] = {};
        for (int64_t i = 0; i < width; ++i) lanes[i] = from[i * states + n] * factor;
        std::memcpy(to + n, lanes, sizeof lanes);
    }
}

void write_states(float* to, const Pair* from, int64_t width, int64_t states) {
    for (int64_t n = 0; n < states; ++n) {
        float lanes[PAIR];
        std::memcpy(lanes, from + n, sizeof lanes);
        for (int64_t i = 0; i < width; ++i) to[i * states + n] = lanes[i];
    }
}

INLINE float* floats(Pair* pairs) { return reinterpret_cast<float*>(pairs); }
INLINE const float* floats(const Pair* pairs) { return reinterpret_cast<const float*>(pairs); }

struct Inputs {
    const float *u, *delta, *A, *B, *C, *D, *z, *bias;  // D, z and bias may be null
    const int64_t* offsets;
    int64_t sequences, channels, groups, states, chunk;
    int softplus;
};

// Channels of one group, at most `span` of them, and the sequence they run along.
struct Task {
    int64_t sequence, group, block, channel, width, begin, time;
};

struct Tasks {
    int64_t span, per_group, blocks, count;

    Tasks(const Inputs& in, int64_t span)
        : span(span), per_group(in.channels / in.groups), blocks((per_group + span - 1) / span),
          count(in.sequences * in.groups * blocks) {}

    Task operator()(const Inputs& in, int64_t i) const {
        const int64_t sequence = i / (in.groups * blocks), block = i % (in.groups * blocks), within = block % blocks;
        const int64_t group = block / blocks, begin = in.offsets[sequence];
        return {sequence, group, block, group * per_group + within * span, std::min(span, per_group - within * span),
                begin, in.offsets[sequence + 1] - begin};
    }
};

// Of one chunk and one pair: step sizes (before and after the softplus), inputs, and what gets scattered into B.
struct Stage {
    std::vector<Pair> raw, delta, u, entering;
    Pair bias{}, D{};

    explicit Stage(int64_t chunk) : raw(chunk), delta(chunk), u(chunk), entering(chunk) {}

    void load_channels(const Inputs& in, int64_t channel, int64_t width) {
        if (in.bias) read(bias, in.bias + channel, width);
        if (in.D) read(D, in.D + channel, width);
    }

    void fill(const Inputs& in, int64_t token, int64_t steps, int64_t channel, int64_t width) {
        for (int64_t t = 0, at = token * in.channels + channel; t < steps; ++t, at += in.channels) {
            read(u[t], in.u + at, width);
            read(raw[t], in.delta + at, width);
            raw[t].low += bias.low;
            raw[t].high += bias.high;
        }
        const float* from = floats(raw.data());
        float* to = floats(delta.data());
        if (in.softplus) {
#pragma omp simd
            for (int64_t i = 0; i < steps * PAIR; ++i) to[i] = softplus_f(from[i]);
        } else {
            std::copy_n(from, steps * PAIR, to);
        }
        for (int64_t t = 0; t < steps; ++t)
            entering[t] = {delta[t].low * u[t].low, delta[t].high * u[t].high};
    }
};

}  // namespace

EXPORT void selective_scan(const float* u, const float* delta, const float* A, const float* B, const float* C,
                           const float* D, const float* z, const float* bias, const float* initial,
                           const int64_t* offsets, float* y, float* final, float* borders, int64_t sequences,
                           int64_t channels, int64_t groups, int64_t states, int64_t chunk, int softplus, int threads) {
    const Inputs in{u, delta, A, B, C, D, z, bias, offsets, sequences, channels, groups, states, chunk, softplus};
    const Tasks tasks(in, PAIR);
#pragma omp parallel num_threads(threads)
    {
        Stage stage(chunk);
        std::vector<Pair> rates(states), state(states), out(chunk);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks.count; ++i) {
            const Task task = tasks(in, i);
            const int64_t width = task.width, of_states = (task.sequence * channels + task.channel) * states;
            stage.load_channels(in, task.channel, width);
            read_states(rates.data(), A + task.channel * states, width, states, LOG2E);
            read_states(state.data(), initial + of_states, width, states, 1.0f);
            const int64_t row = task.begin / chunk + task.sequence;
            for (int64_t start = 0; start < task.time; start += chunk) {
                const int64_t token = task.begin + start, steps = std::min(chunk, task.time - start);
                write_states(borders + ((row + start / chunk) * channels + task.channel) * states, state.data(), width,
                             states);
                stage.fill(in, token, steps, task.channel, width);
                for (int64_t t = 0; t < steps; ++t)
                    out[t] = {stage.D.low * stage.u[t].low, stage.D.high * stage.u[t].high};
                const int64_t stride = groups * states;
                for (int64_t n = 0; n < states; ++n) {
                    const Pair rate = rates[n];
                    Pair h = state[n];
                    const float *b = B + token * stride + task.group * states + n, *c = C + (b - B);
                    for (int64_t t = 0; t < steps; ++t, b += stride, c += stride) {
                        h.low = exp2_v(stage.delta[t].low * rate.low) * h.low + stage.entering[t].low * *b;
                        h.high = exp2_v(stage.delta[t].high * rate.high) * h.high + stage.entering[t].high * *b;
                        out[t].low += h.low * *c;
                        out[t].high += h.high * *c;
                    }
                    state[n] = h;
                }
                for (int64_t t = 0; t < steps; ++t) {
                    const int64_t at = (token + t) * channels + task.channel;
                    float* lanes = floats(&out[t]);
                    if (z) {
                        Pair gate;
                        read(gate, z + at, width);
                        const float* g = floats(&gate);
#pragma omp simd
                        for (int64_t k = 0; k < PAIR; ++k) lanes[k] *= g[k] * sigmoid_f(g[k]);
                    }
                    write(y + at, out[t], width);
                }
            }
            write_states(final + of_states, state.data(), width, states);
        }
    }
}

// Per chunk, last chunk first: the states again from the one at its border, then, backwards in time,
//   g_t = C_t gy_t + exp(delta_{t+1} A) g_{t+1},   with gy the gradient of y before the gate,
// and from g_t and h_{t-1} the gradients of all that went into h_t.  Those of B and C are sums over channels: each task
// writes its own, [block, token, state], and the caller adds the blocks up in a fixed order.  Those of A, D and the bias
// are sums over time; each sequence has its own.
EXPORT void selective_scan_backward(const float* grad_y, const float* grad_final, const float* u, const float* delta,
                                    const float* A, const float* B, const float* C, const float* D, const float* z,
                                    const float* bias, const int64_t* offsets, const float* borders, float* grad_u,
                                    float* grad_delta, float* grad_A, float* grad_B, float* grad_C,
                                    float* grad_initial, float* grad_D, float* grad_z, float* grad_bias,
                                    int64_t sequences, int64_t channels, int64_t groups, int64_t states, int64_t chunk,
                                    int64_t span, int64_t tokens, int softplus, int threads) {
    const Inputs in{u, delta, A, B, C, D, z, bias, offsets, sequences, channels, groups, states, chunk, softplus};
    const Tasks tasks(in, span);
    const int64_t pairs = span / PAIR, stride = groups * states;
    struct Sums {  // over time, of a pair of channels
        Pair D, bias;
    };
#pragma omp parallel num_threads(threads)
    {
        Stage stage(chunk);
        // of a task's pairs: 2^(delta rate) = exp(delta A); the gradient that goes on to the state before; A's gradient
        std::vector<Pair> rates(pairs * states), carry(pairs * states), into_A(pairs * states);
        std::vector<Sums> sums(pairs);
        std::vector<Pair> before(states), decay(chunk), h(chunk + 1);
        std::vector<Pair> gy(chunk), out(chunk), into_delta(chunk), into_entering(chunk);
        std::vector<Vec> into_B(chunk * states), into_C(chunk * states);  // [state][step], lanes not yet added up
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks.count; ++i) {
            const Task task = tasks(in, i);
            const int64_t used = (task.width + PAIR - 1) / PAIR;
            const int64_t of_states = (task.sequence * channels + task.channel) * states;
            auto width = [&](int64_t p) { return std::min(PAIR, task.width - p * PAIR); };
            for (int64_t p = 0; p < used; ++p) {
                const int64_t skip = p * PAIR * states;
                read_states(&rates[p * states], A + task.channel * states + skip, width(p), states, LOG2E);
                read_states(&carry[p * states], grad_final + of_states + skip, width(p), states, 1.0f);
            }
            std::fill(into_A.begin(), into_A.end(), Pair{});
            std::fill(sums.begin(), sums.end(), Sums{});
            const int64_t row = task.begin / chunk + task.sequence;
            for (int64_t start = (task.time - 1) / chunk * chunk; start >= 0 && task.time; start -= chunk) {
                const int64_t token = task.begin + start, steps = std::min(chunk, task.time - start);
                std::fill(into_B.begin(), into_B.end(), Vec{});
                std::fill(into_C.begin(), into_C.end(), Vec{});
                for (int64_t p = 0; p < used; ++p) {
                    const int64_t channel = task.channel + p * PAIR, w = width(p);
                    stage.load_channels(in, channel, w);
                    stage.fill(in, token, steps, channel, w);
                    read_states(before.data(), borders + ((row + start / chunk) * channels + channel) * states, w,
                                states, 1.0f);
                    for (int64_t t = 0; t < steps; ++t) {
                        const int64_t at = (token + t) * channels + channel;
                        read(gy[t], grad_y + at, w);
                        if (z) {
                            Pair gate;
                            read(gate, z + at, w);
                            const float* g = floats(&gate);
                            float* lanes = floats(&gy[t]);
#pragma omp simd
                            for (int64_t k = 0; k < PAIR; ++k) lanes[k] *= g[k] * sigmoid_f(g[k]);
                        }
                        out[t] = {stage.D.low * stage.u[t].low, stage.D.high * stage.u[t].high};
                        into_delta[t] = into_entering[t] = Pair{};
                    }
                    for (int64_t n = 0; n < states; ++n) {
                        const Pair rate = rates[p * states + n];
                        const float *b = B + token * stride + task.group * states + n, *c = C + (b - B);
                        Pair now = before[n];
                        h[0] = now;
                        for (int64_t t = 0; t < steps; ++t) {
                            const Pair e = {exp2_v(stage.delta[t].low * rate.low),
                                            exp2_v(stage.delta[t].high * rate.high)};
                            now.low = e.low * now.low + stage.entering[t].low * b[t * stride];
                            now.high = e.high * now.high + stage.entering[t].high * b[t * stride];
                            decay[t] = e;
                            h[t + 1] = now;
                        }
                        if (z)
                            for (int64_t t = 0; t < steps; ++t) {
                                out[t].low += h[t + 1].low * c[t * stride];
                                out[t].high += h[t + 1].high * c[t * stride];
                            }
                        Pair g = carry[p * states + n], of_A = into_A[p * states + n];
                        Vec *of_B = &into_B[n * chunk], *of_C = &into_C[n * chunk];
                        for (int64_t t = steps - 1; t >= 0; --t) {
                            const Pair d = stage.delta[t], in_ = stage.entering[t], y = gy[t], e = decay[t], old = h[t];
                            g.low += y.low * c[t * stride];
                            g.high += y.high * c[t * stride];
                            of_B[t] += g.low * in_.low + g.high * in_.high;
                            of_C[t] += y.low * now.low + y.high * now.high;
                            into_entering[t].low += g.low * b[t * stride];
                            into_entering[t].high += g.high * b[t * stride];
                            g.low *= e.low;
                            g.high *= e.high;
                            const Pair x = {g.low * old.low, g.high * old.high};  // gradient of delta A
                            of_A.low += x.low * d.low;
                            of_A.high += x.high * d.high;
                            into_delta[t].low += x.low * rate.low;
                            into_delta[t].high += x.high * rate.high;
                            now = old;
                        }
                        carry[p * states + n] = g;
                        into_A[p * states + n] = of_A;
                    }
                    for (int64_t t = 0; t < steps; ++t) {
                        const int64_t at = (token + t) * channels + channel;
                        const float *d = floats(&stage.delta[t]), *x = floats(&stage.u[t]), *r = floats(&stage.raw[t]);
                        const float *in_ = floats(&into_entering[t]), *skip = floats(&stage.D), *g = floats(&gy[t]);
                        float *of_delta = floats(&into_delta[t]), *of_D = floats(&sums[p].D);
                        float* of_bias = floats(&sums[p].bias);
                        Pair of_u;
                        float* to_u = floats(&of_u);
#pragma omp simd
                        for (int64_t k = 0; k < PAIR; ++k) {
                            to_u[k] = in_[k] * d[k] + skip[k] * g[k];
                            of_D[k] += g[k] * x[k];
                            const float whole = of_delta[k] * (1.0f / LOG2E) + in_[k] * x[k];
                            of_delta[k] = softplus ? whole * sigmoid_f(r[k]) : whole;
                            of_bias[k] += of_delta[k];
                        }
                        write(grad_u + at, of_u, w);
                        write(grad_delta + at, into_delta[t], w);
                        if (z) {
                            Pair gate, upper;
                            read(gate, z + at, w);
                            read(upper, grad_y + at, w);
                            const float *o = floats(&out[t]), *from = floats(&upper);
                            float* v = floats(&gate);
#pragma omp simd
                            for (int64_t k = 0; k < PAIR; ++k) {
                                const float s = sigmoid_f(v[k]);
                                v[k] = from[k] * o[k] * s * (1.0f + v[k] * (1.0f - s));
                            }
                            write(grad_z + at, gate, w);
                        }
                    }
                }
                for (int64_t t = 0; t < steps; ++t) {
                    float* at_B = grad_B + (task.block * tokens + token + t) * states;
                    float* at_C = grad_C + (task.block * tokens + token + t) * states;
                    for (int64_t n = 0; n < states; ++n) {
                        float b[LANES], c[LANES], sum_b = 0, sum_c = 0;
                        std::memcpy(b, &into_B[n * chunk + t], sizeof b);
                        std::memcpy(c, &into_C[n * chunk + t], sizeof c);
#pragma omp simd reduction(+ : sum_b, sum_c)
                        for (int64_t k = 0; k < LANES; ++k) sum_b += b[k], sum_c += c[k];
                        at_B[n] = sum_b;
                        at_C[n] = sum_c;
                    }
                }
            }
            for (int64_t p = 0; p < used; ++p) {
                const int64_t at = task.sequence * channels + task.channel + p * PAIR;
                write_states(grad_initial + at * states, &carry[p * states], width(p), states);
                write_states(grad_A + at * states, &into_A[p * states], width(p), states);
                if (D) write(grad_D + at, sums[p].D, width(p));
                if (bias) write(grad_bias + at, sums[p].bias, width(p));
            }
        }
    }
}
