// Sixteen floats at a time, in the vectors of GCC and Clang themselves, which the compiler cuts into what there is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

typedef int64_t i64;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(64), aligned(4), may_alias));

namespace {

constexpr int W = 16;  // floats in a Vec
constexpr int PART = 32;  // terms summed by themselves before they join a longer sum, which so loses fewer digits

inline Vec all(float x) { return Vec{} + x; }
inline Vec load(const float* x) { return *(const Vec*)x; }
inline void store(float* x, Vec v) { *(Vec*)x = v; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// exp to 1e-7, and 0 below -87: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r) (Cephes), and n into the
// exponent's bits.
inline Vec exp(Vec x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec inside = larger(x, all(-87.0f));
    Vec n = (inside * 1.44269504f + shift) - shift;
    Vec r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Int bits = (__builtin_convertvector(n, Int) + 127) << 23;
    return x < -87.0f ? Vec{} : p * (Vec)bits;
}

}  // namespace
