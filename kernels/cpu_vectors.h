// Sixteen floats at a time, in the vectors of GCC and Clang themselves, which the compiler cuts into what there is; and
// work that threads share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

typedef int64_t i64;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t bf16;
typedef uint16_t Half __attribute__((vector_size(32), aligned(2), may_alias));

namespace {

constexpr int W = 16;  // floats in a Vec
constexpr int PART = 32;  // terms summed by themselves before they join a longer sum, which so loses fewer digits

inline Vec all(float x) { return Vec{} + x; }
inline Vec load(const float* x) { return *(const Vec*)x; }
inline void store(float* x, Vec v) { *(Vec*)x = v; }
inline Vec load(const bf16* x) { return (Vec)(__builtin_convertvector(*(const Half*)x, Int) << 16); }
inline void store(bf16* x, Vec v) {  // to the nearest, of two equally near ones to the even one
    const Int bits = (Int)v;
    *(Half*)x = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff, Half);
}
template <class Number>
inline void store(Number* x, Vec v, i64 count) {  // the first `count` of them
    if (count >= W) return store(x, v);
    Number all[W];
    store(all, v);
    std::copy(all, all + count, x);
}
inline float sum_of(Vec v) {
    float sum = 0.0f;
    for (int i = 0; i < W; i++) sum += v[i];
    return sum;
}
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

// Run work(i) for each i below count, on so many threads.
template <class Work>
void share(i64 count, i64 threads, Work work) {
    std::atomic<i64> next{0};
    auto run = [&] {
        for (i64 i; (i = next++) < count;) work(i);
    };
    std::vector<std::thread> others;
    for (i64 thread = 1; thread < std::min(count, threads); thread++) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

}  // namespace
