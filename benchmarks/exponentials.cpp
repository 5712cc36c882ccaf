// The compiled selective scan with nothing but its exponentials left: what its loops can't be faster than.
#include "../kernels/mlreviews_kernels/selective_scan/cpu.cpp"

EXPORT void exponentials(const float* delta, const float* A, float* out, int64_t tokens, int64_t channels,
                         int64_t states, int threads) {
    constexpr int64_t steps = 64;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> rates(states), stage(steps), sums(steps);
#pragma omp for schedule(dynamic)
        for (int64_t channel = 0; channel < channels; channel += PAIR) {
            const int64_t width = std::min(PAIR, channels - channel);
            read_states(rates.data(), A + channel * states, width, states, LOG2E);
            for (int64_t start = 0; start < tokens; start += steps) {
                const int64_t some = std::min(steps, tokens - start);
                for (int64_t t = 0; t < some; ++t) {
                    read(stage[t], delta + (start + t) * channels + channel, width);
                    sums[t] = Pair{};
                }
                for (int64_t n = 0; n < states; ++n)
                    for (int64_t t = 0; t < some; ++t) {
                        sums[t].low += exp2_v(stage[t].low * rates[n].low);
                        sums[t].high += exp2_v(stage[t].high * rates[n].high);
                    }
                for (int64_t t = 0; t < some; ++t) write(out + (start + t) * channels + channel, sums[t], width);
            }
        }
    }
}
