// h_t = a_t h_{t-1} + b_t and its log-space form, forward and backward, in one pass over memory each.
//
// Tokens lie one after another, [tokens, channels]; sequence i takes the tokens offsets[i] to offsets[i + 1].  A task
// is one sequence and one block of channels: the state of a block stays in the first-level cache while time runs.
#include "../vector.h"

namespace {

constexpr int64_t BLOCK = 1024;  // floats of state: 4 KiB of the first-level cache, and long runs of memory

struct Task {
    int64_t first, step, time, width;  // offset of the first element; from one step to the next; steps; channels
    int64_t state;                     // offset of the state
};

// Calls `body` for every task: sequences x blocks of channels, in processing order (backwards in time if `reverse`).
template <class Body>
void for_each_task(const int64_t* offsets, int64_t sequences, int64_t channels, bool reverse, int threads, Body body) {
    // few tasks would leave threads idle: then narrower blocks, though not below a cache line
    int64_t block = BLOCK;
    while (block > 16 && sequences * ((channels + block - 1) / block) < 2 * threads) block /= 2;
    const int64_t blocks = (channels + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < sequences * blocks; ++i) {
        // neighbouring blocks share pages of memory: threads are kept apart by sequence first
        const int64_t sequence = i % sequences, channel = i / sequences * block;
        const int64_t begin = offsets[sequence], end = offsets[sequence + 1];
        body(Task{(reverse ? end - 1 : begin) * channels + channel, reverse ? -channels : channels, end - begin,
                  std::min(block, channels - channel), sequence * channels + channel});
    }
}

INLINE float logaddexp(float x, float y) {
    const float high = std::max(x, y), gap = -std::fabs(x - y);
    // both -inf: the gap is NaN, the sum is empty
    return high == -std::numeric_limits<float>::infinity() ? high : high + log1p_unit(exp_f(gap));
}

}  // namespace

EXPORT void linear_scan(const float* a, const float* b, const float* initial, const int64_t* offsets, float* h,
                        float* final, int64_t sequences, int64_t channels, int reverse, int threads) {
    for_each_task(offsets, sequences, channels, reverse, threads, [=](Task task) {
        float state[BLOCK];
        std::copy_n(initial + task.state, task.width, state);
        for (int64_t t = 0, at = task.first; t < task.time; ++t, at += task.step) {
            const float *at_a = a + at, *at_b = b + at;
            float* at_h = h + at;
#pragma omp simd
            for (int64_t i = 0; i < task.width; ++i) at_h[i] = state[i] = at_a[i] * state[i] + at_b[i];
        }
        std::copy_n(state, task.width, final + task.state);
    });
}

// g_t = grad_h_t + a_{t+1} g_{t+1};  grad_b_t = g_t, grad_a_t = g_t h_{t-1}
EXPORT void linear_scan_backward(const float* grad_h, const float* grad_final, const float* a, const float* h,
                                 const float* initial, const int64_t* offsets, float* grad_a, float* grad_b,
                                 float* grad_initial, int64_t sequences, int64_t channels, int reverse, int threads) {
    for_each_task(offsets, sequences, channels, reverse, threads, [=](Task task) {
        float carry[BLOCK];  // a_{t+1} g_{t+1}
        std::copy_n(grad_final + task.state, task.width, carry);
        for (int64_t t = task.time - 1, at = task.first + t * task.step; t >= 0; --t, at -= task.step) {
            const float *at_grad = grad_h + at, *at_a = a + at;
            const float* before = t ? h + at - task.step : initial + task.state;
            float *at_grad_a = grad_a + at, *at_grad_b = grad_b + at;
#pragma omp simd
            for (int64_t i = 0; i < task.width; ++i) {
                const float g = at_grad[i] + carry[i];
                at_grad_b[i] = g;
                at_grad_a[i] = g * before[i];
                carry[i] = at_a[i] * g;
            }
        }
        std::copy_n(carry, task.width, grad_initial + task.state);
    });
}

EXPORT void log_linear_scan(const float* log_a, const float* log_b, const float* initial, const int64_t* offsets,
                            float* log_h, float* final, int64_t sequences, int64_t channels, int reverse,
                            int threads) {
    for_each_task(offsets, sequences, channels, reverse, threads, [=](Task task) {
        float state[BLOCK];
        std::copy_n(initial + task.state, task.width, state);
        for (int64_t t = 0, at = task.first; t < task.time; ++t, at += task.step) {
            const float *at_a = log_a + at, *at_b = log_b + at;
            float* at_h = log_h + at;
#pragma omp simd
            for (int64_t i = 0; i < task.width; ++i) at_h[i] = state[i] = logaddexp(at_a[i] + state[i], at_b[i]);
        }
        std::copy_n(state, task.width, final + task.state);
    });
}

// With w_t = a_t h_{t-1} / h_t, the share of the old state: g_t = grad_t + w_{t+1} g_{t+1};
// grad_log_a_t = w_t g_t, grad_log_b_t = (b_t / h_t) g_t, both 0 where h_t is.
EXPORT void log_linear_scan_backward(const float* grad_h, const float* grad_final, const float* log_a,
                                     const float* log_b, const float* log_h, const float* initial,
                                     const int64_t* offsets, float* grad_a, float* grad_b, float* grad_initial,
                                     int64_t sequences, int64_t channels, int reverse, int threads) {
    for_each_task(offsets, sequences, channels, reverse, threads, [=](Task task) {
        float carry[BLOCK];
        std::copy_n(grad_final + task.state, task.width, carry);
        for (int64_t t = task.time - 1, at = task.first + t * task.step; t >= 0; --t, at -= task.step) {
            const float *at_grad = grad_h + at, *at_a = log_a + at, *at_b = log_b + at, *at_h = log_h + at;
            const float* before = t ? log_h + at - task.step : initial + task.state;
            float *at_grad_a = grad_a + at, *at_grad_b = grad_b + at;
#pragma omp simd
            for (int64_t i = 0; i < task.width; ++i) {
                const float g = at_grad[i] + carry[i];
                const bool empty = at_h[i] == -std::numeric_limits<float>::infinity();
                carry[i] = empty ? 0.0f : exp_f(at_a[i] + before[i] - at_h[i]) * g;
                at_grad_a[i] = carry[i];
                at_grad_b[i] = empty ? 0.0f : exp_f(at_b[i] - at_h[i]) * g;
            }
        }
        std::copy_n(carry, task.width, grad_initial + task.state);
    });
}
