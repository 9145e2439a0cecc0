// What a head does with its logits on a CPU: products of bf16 matrices, summed and returned in fp32 (torch's own round
// what they return to bf16), and the row kernels of linear_logprob.py in as few passes as on a GPU.
//
// A product is cut into blocks of KC terms. Both operands are copied so that two terms of a row or column lie side by
// side, which is what vdpbf16ps multiplies: B as [KC / 2][NR] for a panel of NR columns, A as [KC / 2][MR] for MR rows.

#include "cpu_team.h"

namespace {

constexpr i64 MR = 6, NR = 64, KC = 1024, PIECE = 16;

// to[k / 2][i] holds x(i, k) and x(i, k + 1) of `terms` terms; 0 where there is no x. x(i, k) is at x[i si + k sk].
template <i64 WIDTH>
void pack(const bf16* x, i64 si, i64 sk, i64 count, i64 terms, uint32_t* to) {
    for (i64 k = 0; k < terms; k += 2, to += WIDTH) {
        const bf16 *low = x + k * sk, *high = low + sk;
        const bool pair = k + 1 < terms;
        if (si == 1 && pair && count == WIDTH)
            for (i64 i = 0; i < WIDTH; i++) to[i] = low[i] | (uint32_t)high[i] << 16;
        else
            for (i64 i = 0; i < WIDTH; i++)
                to[i] = i < count ? low[i * si] | (pair ? (uint32_t)high[i * si] << 16 : 0) : 0;
    }
}

#ifdef __AVX512BF16__

// out (rows, columns) = or += a · b, for MR rows of a and NR columns of b, of which so many exist.
void tile(const uint32_t* a, const uint32_t* b, i64 pairs, float* out, i64 stride, i64 rows, i64 columns, bool add) {
    __m512 sum[MR][NR / W];
    for (auto& row : sum)
        for (auto& x : row) x = _mm512_setzero_ps();
    for (i64 k = 0; k < pairs; k++, a += MR, b += NR) {
        __m512bh column[NR / W];
        for (int j = 0; j < NR / W; j++) column[j] = (__m512bh)_mm512_loadu_si512(b + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(a[i]);
#pragma GCC unroll 8
            for (int j = 0; j < NR / W; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, column[j]);
        }
    }
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < NR / W; j++) {
            const i64 left = std::max<i64>(0, std::min<i64>(W, columns - j * W));
            const __mmask16 inside = (1 << left) - 1;
            float* at = out + i * stride + j * W;
            const __m512 old = add ? _mm512_maskz_loadu_ps(inside, at) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(at, inside, sum[i][j] + old);
        }
}

#endif

// Up to 16 numbers, scaled; -1e30 behind the last, whose exponential is 0.
inline Vec some(const float* z, i64 left, float scale) {
    if (left >= W) return load(z) * scale;
    Vec found = all(-1e30f);
    for (i64 i = 0; i < left; i++) found[i] = z[i] * scale;
    return found;
}

// The gradient of a row's logits: see dlogits_kernel. rows: m, log s, g and, if entropy, H and e, `stride` apart.
template <class Number>
void gradient_row(const float* z, Number* out, i64 v, i64 target, const float* rows, i64 stride, bool entropy,
                  float scale) {
    const float m = rows[0], log_s = rows[stride], g = rows[2 * stride];
    const float H = entropy ? rows[3 * stride] : 0.0f, e = entropy ? rows[4 * stride] : 0.0f;
    const float at_target = target >= 0 && target < v ? z[target] : 0.0f;
    for (i64 j = 0; j < v; j += W) {
        const Vec log_p = (some(z + j, v - j, scale) - m) - log_s;
        store(out + j, exp(log_p) * -(g + e * (log_p + H)) * scale, v - j);
    }
    if (target < 0 || target >= v) return;
    const Vec log_p = all((at_target * scale - m) - log_s);
    store(out + target, (g - exp(log_p) * (g + e * (log_p + H))) * scale, 1);
}

}  // namespace

extern "C" {

// Say whether `product` was compiled for this machine's instructions.
int has_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// out (M, N), rows contiguous, = or += a (M, K) · b (K, N) in fp32; as and bs are the strides of a and b.
void product(const bf16* a, const i64* as, const bf16* b, const i64* bs, float* out, i64 M, i64 N, i64 K, bool add,
             i64 threads) {
#ifdef __AVX512BF16__
    const i64 blocks = (M + MR - 1) / MR, panels = (N + NR - 1) / NR;
    for (i64 start = 0; start < K; start += KC) {
        const i64 terms = std::min(KC, K - start), pairs = (terms + 1) / 2;
        auto pack_rows = [&](i64 i, uint32_t* to) {
            pack<MR>(a + i * MR * as[0] + start * as[1], as[0], as[1], std::min(MR, M - i * MR), terms, to);
        };
        auto pack_columns = [&](i64 j, uint32_t* to) {
            pack<NR>(b + j * NR * bs[1] + start * bs[0], bs[1], bs[0], std::min(NR, N - j * NR), terms, to);
        };
        auto multiply = [&](i64 i, i64 j, const uint32_t* rows, const uint32_t* columns) {
            tile(rows, columns, pairs, out + i * MR * N + j * NR, N, std::min(MR, M - i * MR), std::min(NR, N - j * NR),
                 add || start);
        };
        // The smaller operand is packed once for all, the larger one piece by piece, by the thread that uses the piece.
        if (M > N) {
            std::vector<uint32_t> columns(panels * NR * pairs);
            share(panels, threads, [&](i64 j) { pack_columns(j, &columns[j * NR * pairs]); });
            share((blocks + PIECE - 1) / PIECE, threads, [&](i64 part) {
                const i64 first = part * PIECE, count = std::min(PIECE, blocks - first);
                std::vector<uint32_t> rows(count * MR * pairs);
                for (i64 i = 0; i < count; i++) pack_rows(first + i, &rows[i * MR * pairs]);
                for (i64 j = 0; j < panels; j++)
                    for (i64 i = 0; i < count; i++)
                        multiply(first + i, j, &rows[i * MR * pairs], &columns[j * NR * pairs]);
            });
        } else {
            std::vector<uint32_t> rows(blocks * MR * pairs);
            share(blocks, threads, [&](i64 i) { pack_rows(i, &rows[i * MR * pairs]); });
            share(panels, threads, [&](i64 j) {
                std::vector<uint32_t> columns(NR * pairs);
                pack_columns(j, columns.data());
                for (i64 i = 0; i < blocks; i++) multiply(i, j, &rows[i * MR * pairs], columns.data());
            });
        }
    }
#endif
}

// Fold rows of logits (n, v), of ids [first, first + v), into their m, s, u and z_y, `stride` apart: see fold_kernel.
void fold(const float* logits, const i64* targets, i64 n, i64 v, i64 first, float scale, float* stats, i64 stride,
          i64 threads) {
    share((n + W - 1) / W, threads, [&](i64 part) {
        for (i64 row = part * W; row < std::min(n, part * W + W); row++) {
            const float* z = logits + row * v;
            float *m = stats + row, *s = m + stride, *u = s + stride, *z_y = u + stride;
            Vec top = all(*m), sum = {}, weighted = {};
            for (i64 j = 0; j < v; j += W) top = larger(top, some(z + j, v - j, scale));
            float m_new = top[0];
            for (int i = 1; i < W; i++) m_new = std::max(m_new, top[i]);
            for (i64 start = 0; start < v; start += PART * W) {
                Vec part_sum = {}, part_weighted = {};
                for (i64 j = start; j < std::min(v, start + PART * W); j += W) {
                    const Vec x = some(z + j, v - j, scale) - m_new, e = exp(x) + x * 0.0f;  // NaN stays NaN
                    part_sum += e;
                    part_weighted += e * x;
                }
                sum += part_sum;
                weighted += part_weighted;
            }
            const float old = std::exp(*m - m_new);
            *u = old * (*u + (*m - m_new) * *s) + sum_of(weighted);
            *s = old * *s + sum_of(sum);
            *m = m_new;
            const i64 target = targets[row] - first;
            if (target >= 0 && target < v) *z_y = z[target] * scale;
        }
    });
}

// Write the gradients of logits (n, v) over them: in fp32, or in bf16, each row in the first half of where it was.
void gradients(float* logits, const i64* targets, i64 n, i64 v, i64 first, float scale, const float* rows,
               i64 stride, bool entropy, bool low, i64 threads) {
    share(n, threads, [&](i64 row) {
        float* z = logits + row * v;
        auto run = [&](auto* to) {
            gradient_row(z, to, v, targets[row] - first, rows + row, stride, entropy, scale);
        };
        low ? run((bf16*)z) : run(z);
    });
}

}  // extern "C"
