// What a layer does between its products, on a CPU and for bf16: each pass reads its inputs once and rounds once. The
// equations stand in rmsnorm.py, rope.py and swiglu.py. Widths are multiples of 16.

#include "cpu_team.h"

namespace {

constexpr i64 ROWS = 64;  // that a thread takes at a time, and whose gradients of a norm's weight are one partial sum

template <class Work>
void share_rows(i64 N, i64 threads, Work work) {
    share((N + ROWS - 1) / ROWS, threads, [&](i64 block) {
        work(block, block * ROWS, std::min(N, block * ROWS + ROWS));
    });
}

inline Vec sigmoid(Vec a) { return 1.0f / (1.0f + exp(-a)); }

}  // namespace

extern "C" {

// y and rstd of the norm of x + residual (N, D), which goes to h; without a residual, of x.
void norm_forward(const bf16* x, const bf16* residual, const bf16* weight, bf16* y, bf16* h, float* rstd, i64 N, i64 D,
                  float eps, i64 threads) {
    share_rows(N, threads, [&](i64, i64 first, i64 end) {
        for (i64 row = first; row < end; row++) {
            const bf16* stream = x + row * D;
            Vec squares = {};
            for (i64 j = 0; j < D; j += W) {
                if (residual) store(h + row * D + j, load(stream + j) + load(residual + row * D + j));
                const Vec v = load((residual ? h + row * D : stream) + j);
                squares += v * v;
            }
            if (residual) stream = h + row * D;
            const float r = rstd[row] = 1.0f / std::sqrt(sum_of(squares) / D + eps);
            for (i64 j = 0; j < D; j += W) store(y + row * D + j, load(weight + j) * (load(stream + j) * r));
        }
    });
}

// dh of gradients g of y and d (or none) of h, and partial sums dw (blocks of 64 rows, D) fp32, which begin as 0.
void norm_backward(const bf16* g, const bf16* d, const bf16* h, const bf16* weight, const float* rstd, bf16* dh,
                   float* dw, i64 N, i64 D, i64 threads) {
    share_rows(N, threads, [&](i64 block, i64 first, i64 end) {
        for (i64 at = first * D; at < end * D; at += D) {
            const float r = rstd[at / D];
            Vec sum = {};
            for (i64 j = 0; j < D; j += W) {
                const Vec gu = load(g + at + j) * (load(h + at + j) * r);
                store(dw + block * D + j, load(dw + block * D + j) + gu);
                sum += gu * load(weight + j);
            }
            const float mean = sum_of(sum) / D;
            for (i64 j = 0; j < D; j += W) {
                const Vec dx = r * (load(weight + j) * load(g + at + j) - load(h + at + j) * r * mean);
                store(dh + at + j, d ? dx + load(d + at + j) : dx);
            }
        }
    });
}

// Turn the heads of x (N, heads, 2 half) by their angles, whose cos and sin are (N, half); sign -1 turns back.
void rope(const bf16* x, const float* cos, const float* sin, bf16* out, i64 N, i64 heads, i64 half, float sign,
          i64 threads) {
    share_rows(N, threads, [&](i64, i64 first, i64 end) {
        for (i64 head = first * heads; head < end * heads; head++)
            for (i64 j = 0; j < half; j += W) {
                const i64 at = head * 2 * half + j, angle = head / heads * half + j;
                const Vec c = load(cos + angle), s = sign * load(sin + angle);
                const Vec x1 = load(x + at), x2 = load(x + at + half);
                store(out + at, x1 * c - x2 * s);
                store(out + at + half, x2 * c + x1 * s);
            }
    });
}

// y = silu(gate) up, all (N, I).
void swiglu_forward(const bf16* gate, const bf16* up, bf16* y, i64 N, i64 I, i64 threads) {
    share_rows(N, threads, [&](i64, i64 first, i64 end) {
        for (i64 at = first * I; at < end * I; at += W) {
            const Vec a = load(gate + at);
            store(y + at, a * sigmoid(a) * load(up + at));
        }
    });
}

// The gradients of gate and up for a gradient g of y.
void swiglu_backward(const bf16* g, const bf16* gate, const bf16* up, bf16* d_gate, bf16* d_up, i64 N, i64 I,
                     i64 threads) {
    share_rows(N, threads, [&](i64, i64 first, i64 end) {
        for (i64 at = first * I; at < end * I; at += W) {
            const Vec a = load(gate + at), dy = load(g + at), s = sigmoid(a);
            store(d_gate + at, dy * load(up + at) * s * (1.0f + a * (1.0f - s)));
            store(d_up + at, dy * a * s);
        }
    });
}

}  // extern "C"
