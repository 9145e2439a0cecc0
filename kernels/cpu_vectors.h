// Sixteen floats at a time, in the vectors of GCC and Clang themselves, which the compiler cuts into what there is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#if defined(__FMA__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Bits8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t Half8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t bf16;  // its bits, the upper half of a float's
typedef uint32_t Pair __attribute__((aligned(2), may_alias));  // two of them that lie side by side
typedef i64 Quad __attribute__((aligned(2), may_alias));  // four
typedef i64 Long __attribute__((vector_size(64), aligned(4), may_alias));

namespace {

constexpr int W = 16;  // floats in a Vec
constexpr int PART = 32;  // terms summed by themselves before they join a longer sum, which so loses fewer digits

inline Vec all(float x) { return Vec{} + x; }
inline Vec load(const float* x) { return *(const Vec*)x; }
inline Vec load(const bf16* x) { return (Vec)(__builtin_convertvector(*(const Half*)x, Bits) << 16); }
inline void store(float* x, Vec v) { *(Vec*)x = v; }
inline void store(float* x, Vec8 v) { *(Vec8*)x = v; }
inline float sum_of(Vec v) {
    float sum = 0.0f;
    for (int i = 0; i < W; i++) sum += v[i];
    return sum;
}
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

#ifdef __AVX512F__
inline Vec8 lower(Vec x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline Vec8 upper(Vec x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
#else  // GCC shuffles what no register holds one by one
inline Vec8 lower(const Vec& x) { return *(const Vec8*)&x; }
inline Vec8 upper(const Vec& x) { return *((const Vec8*)&x + 1); }
#endif

// Lanes that one vector holds, where a template chooses (a vector as its argument would lose its attributes). A
// compiler fuses a * b + c in one vector and not in another; what all lanes must compute alike is fused by name.
struct Lanes8 {
    typedef Vec8 V;
    typedef Int8 I;
    typedef Bits8 B;
    typedef double Wide __attribute__((vector_size(64)));
    static constexpr int N = 8;
    static V load(const float* x) { return *(const Vec8*)x; }
    static V load(const bf16* x) { return (V)(__builtin_convertvector(*(const Half8*)x, B) << 16); }
#ifdef __FMA__
    static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
    static V fma(V a, V b, V c) { return a * b + c; }
#endif
};
struct Lanes16 {
    typedef Vec V;
    typedef Int I;
    typedef Bits B;
    typedef double Wide __attribute__((vector_size(128)));
    static constexpr int N = 16;
    static V load(const float* x) { return *(const Vec*)x; }
    static V load(const bf16* x) { return ::load(x); }
#ifdef __AVX512F__
    static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#endif
};
#ifdef __AVX512F__
typedef Lanes16 Lanes;  // the widest that the processor has
#else
typedef Lanes8 Lanes;
#endif

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, 4);
    return wide;
}

// The nearest bf16 of each, in the lower half of its place; NaN stays one.
template <class L>
inline typename L::B rounded(typename L::V x) {
    typename L::B bits = (typename L::B)x;
    typename L::B near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? near : near * 0 + 0x7fc0;
}
inline void store(bf16* x, Vec v) { *(Half*)x = __builtin_convertvector(rounded<Lanes16>(v), Half); }
template <class Number>
inline void store(Number* x, Vec v, i64 count) {  // the first `count` of them
    if (count >= W) return store(x, v);
    Number all[W];
    store(all, v);
    std::copy(all, all + count, x);
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) { *to = (bf16)rounded<Lanes16>(all(x))[0]; }

// exp to 1e-7, and 0 below -87: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r) (Cephes), and n into the
// exponent's bits.
template <class L>
inline typename L::V exp_of(typename L::V x) {
    typedef typename L::V V;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    V inside = x > -87.0f ? x : V{} - 87.0f;
    V n = (inside * 1.44269504f + shift) - shift;
    V r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    typename L::I bits = (__builtin_convertvector(n, typename L::I) + 127) << 23;
    return x < -87.0f ? V{} : p * (V)bits;
}
inline Vec exp(Vec x) { return exp_of<Lanes16>(x); }
inline Vec8 exp(Vec8 x) { return exp_of<Lanes8>(x); }

}  // namespace
