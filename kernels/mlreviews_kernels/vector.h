// What the compiled loops share: elementary functions that compilers vectorise, without a vector maths library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

INLINE float bits_to_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t float_to_bits(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// exp within 2 units in the last place: e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2, e^r by the
// polynomial of the Cephes library.  0 below -86.64 (half of what is left would be denormal), infinity above 88.72; NaN stays.
INLINE float exp_f(float x) {
    const float low = -86.6434f, high = 88.7228f, shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float y = x < low ? low : x;
    y = y > high ? high : y;
    const float shifted = y * 1.44269504f + shift, n = shifted - shift;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^(n-1), then doubled: n = 128 has no float of its own
    const float scale = bits_to_float((float_to_bits(shifted) - float_to_bits(shift) + 126) << 23);
    const float e = p * scale * 2.0f;
    return x < low ? 0.0f : (x > high ? std::numeric_limits<float>::infinity() : e);
}

// log(1 + e) for 0 <= e <= 1, within 3e-7 relative: 2 artanh(s) with s = e / (2 + e) <= 1/3.
INLINE float log1p_unit(float e) {
    const float s = e / (2.0f + e), q = s * s;
    float p = 0.11612164f;
    p = p * q + 0.10853288f;
    p = p * q + 0.14296179f;
    p = p * q + 0.19999853f;
    p = p * q + 0.33333334f;
    return 2.0f * s + 2.0f * s * q * p;
}

INLINE float softplus_f(float x) { return std::max(x, 0.0f) + log1p_unit(exp_f(-std::fabs(x))); }

INLINE float sigmoid_f(float x) { return 1.0f / (1.0f + exp_f(-x)); }
