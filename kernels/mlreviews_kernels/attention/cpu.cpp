// Attention: one softmax.
#include "../softmaxes.h"

using namespace softmaxes;

EXPORT void attention(const float* q, const float* k, const float* v, const float* weights, const uint8_t* key_mask,
                      const uint8_t* pair_mask, const int64_t* q_offsets, const int64_t* k_offsets, int64_t sequences,
                      int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t window, int64_t causal,
                      float scale, int threads, float* out, float* lse) {
    const Problem<1> problem{{q},       {k},   v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads, kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    forward(problem, out, lse);
}

// How many tensors of the gradients of keys and values `attention_backward` writes.
EXPORT int64_t attention_parts(const float* q, const float* k, const float* v, const float* weights,
                               const uint8_t* key_mask, const uint8_t* pair_mask, const int64_t* q_offsets,
                               const int64_t* k_offsets, int64_t sequences, int64_t heads, int64_t kv_heads,
                               int64_t dim, int64_t value_dim, int64_t window, int64_t causal, float scale,
                               int threads) {
    const Problem<1> problem{{q},       {k},   v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads, kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    return parts_of(problem);
}

EXPORT void attention_backward(const float* q, const float* k, const float* v, const float* weights,
                               const uint8_t* key_mask, const uint8_t* pair_mask, const int64_t* q_offsets,
                               const int64_t* k_offsets, int64_t sequences, int64_t heads, int64_t kv_heads,
                               int64_t dim, int64_t value_dim, int64_t window, int64_t causal, float scale,
                               int threads, const float* grad_out, const float* grad_lse, const float* lse,
                               float* grad_q, float* grad_k, float* grad_v, float* grad_weights, int64_t parts) {
    const Problem<1> problem{{q},       {k},   v,        weights, key_mask,  pair_mask, q_offsets,   k_offsets,
                             sequences, heads, kv_heads, dim,     value_dim, window,    causal != 0, scale,
                             threads};
    backward(problem, grad_out, grad_lse, lse, &grad_q, &grad_k, grad_v, grad_weights, parts);
}
