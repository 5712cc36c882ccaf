// Differential attention: softmaxes of weights 1 and -lambda, added up before the product with V.
#include "../softmaxes.h"

using namespace softmaxes;

EXPORT void differential_attention(const float* q1, const float* k1, const float* q2, const float* k2, const float* v,
                                   const float* weights, const uint8_t* key_mask, const uint8_t* pair_mask,
                                   const int64_t* q_offsets, const int64_t* k_offsets, int64_t sequences,
                                   int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t window,
                                   int64_t causal, float scale, int threads, float* out, float* lse) {
    const Problem<2> problem{{q1, q2},  {k1, k2}, v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads,    kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    forward(problem, out, lse);
}

// How many tensors of the gradients of keys and values `differential_attention_backward` writes.
EXPORT int64_t differential_attention_parts(const float* q1, const float* k1, const float* q2, const float* k2,
                                            const float* v, const float* weights, const uint8_t* key_mask,
                                            const uint8_t* pair_mask, const int64_t* q_offsets,
                                            const int64_t* k_offsets, int64_t sequences, int64_t heads,
                                            int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t window,
                                            int64_t causal, float scale, int threads) {
    const Problem<2> problem{{q1, q2},  {k1, k2}, v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads,    kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    return parts_of(problem);
}

EXPORT void differential_attention_backward(
    const float* q1, const float* k1, const float* q2, const float* k2, const float* v, const float* weights,
    const uint8_t* key_mask, const uint8_t* pair_mask, const int64_t* q_offsets, const int64_t* k_offsets,
    int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t window, int64_t causal,
    float scale, int threads, const float* grad_out, const float* grad_lse, const float* lse, float* grad_q1,
    float* grad_k1, float* grad_q2, float* grad_k2, float* grad_v, float* grad_weights, int64_t parts) {
    const Problem<2> problem{{q1, q2},  {k1, k2}, v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads,    kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    float *grad_qs[] = {grad_q1, grad_q2}, *grad_ks[] = {grad_k1, grad_k2};
    backward(problem, grad_out, grad_lse, lse, grad_qs, grad_ks, grad_v, grad_weights, parts);
}
