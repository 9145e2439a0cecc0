// Attention over token trees on a CPU, forward and backward: the rule of tree_attention.py, tile by tile.
//
// A tile is 16 queries, one to a lane of a vector: scores, exponentials, and what they weigh are vertical. Of all
// tokens a tile visits those that one of its queries may see; whom each lane sees is two comparisons.
//
// Trees lie one after another, and the first token of each is its root: enter and leave of a root are where it begins
// and where the next one does.
//
// q, o and their gradients are (T, H, DH), k, v and theirs (T, HKV, DH); lse (H, T) is log Σ exp of each softmax.

#include <memory>

#include "cpu_team.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct TreeTokens {
    i64 T, H, HKV;
    const int32_t *enter, *leave;  // (T,): j is seen by i if enter[j] <= enter[i] < leave[j]
};

namespace {

constexpr int KEYS = 8;  // visited at a time: what a vector of the tile is combined with before it is stored again
constexpr float HIDDEN = -1e30f;

template <int DH>
struct Tile {
    const TreeTokens& t;
    i64 first;
    int count;
    Int enter;  // of each lane; -1 behind the last: sees nothing
    std::vector<int32_t> seen;

    // Find the tokens that a query of this tile may see: all are its own or come before it.
    Tile(const TreeTokens& t, i64 first) : t(t), first(first), count(std::min<i64>(W, t.T - first)) {
        int32_t low = t.enter[first], high = low;
        for (int lane = 0; lane < W; lane++) {
            enter[lane] = lane < count ? t.enter[first + lane] : -1;
            if (lane < count) low = std::min<int32_t>(low, enter[lane]), high = std::max<int32_t>(high, enter[lane]);
        }
        i64 root = 0;
        while (t.leave[root] <= low) root = t.leave[root];  // the trees before this one end there
        for (i64 j = root; j < first + count; j++)
            if (t.enter[j] <= high && t.leave[j] > low) seen.push_back(j);
    }

    // x[d][lane] of rows (T, heads, DH)
    void transpose(const float* rows, i64 heads, i64 head, float scale, float* x) const {
        for (int lane = 0; lane < W; lane++) {
            const float* row = rows + ((first + (lane < count ? lane : 0)) * heads + head) * DH;
            for (int d = 0; d < DH; d++) x[d * W + lane] = row[d] * scale;
        }
    }

    // z[j][lane] = x · rows[seen[j]]
    void dots(const float* x, const float* rows, i64 stride, float* z) const {
        i64 j = 0, S = seen.size();
        for (; j + KEYS <= S; j += KEYS) dots_some<KEYS>(x, rows, stride, &seen[j], z + j * W);
        for (; j < S; j++) dots_some<1>(x, rows, stride, &seen[j], z + j * W);
    }

    template <int SOME>
    void dots_some(const float* x, const float* rows, i64 stride, const int32_t* tokens, float* z) const {
        const float* row[SOME];
        Vec total[SOME] = {};
        for (int i = 0; i < SOME; i++) row[i] = rows + tokens[i] * stride;
        for (int start = 0; start < DH; start += PART) {
            Vec sum[SOME] = {};
            for (int d = start; d < std::min(DH, start + PART); d++) {
                Vec column = load(x + d * W);
                for (int i = 0; i < SOME; i++) sum[i] += row[i][d] * column;
            }
            for (int i = 0; i < SOME; i++) total[i] += sum[i];
        }
        for (int i = 0; i < SOME; i++) store(z + i * W, total[i]);
    }

    // z = HIDDEN where a lane does not see the token
    void hide(float* z) const {
        for (size_t j = 0; j < seen.size(); j++) {
            Int visible = (t.enter[seen[j]] <= enter) & (enter < t.leave[seen[j]]);
            store(z + j * W, visible ? load(z + j * W) : all(HIDDEN));
        }
    }

    // x[d][lane] += Σ_j p[j][lane] rows[seen[j]][d]
    void weigh(const float* p, const float* rows, i64 stride, float* x) const {
        i64 S = seen.size();
        for (i64 j = 0; j < S; j += KEYS) {
            int some = std::min<i64>(KEYS, S - j);
            const float* row[KEYS];
            Vec weight[KEYS];
            for (int i = 0; i < KEYS; i++) {
                row[i] = rows + seen[j + (i < some ? i : 0)] * stride;
                weight[i] = i < some ? load(p + (j + i) * W) : Vec{};
            }
            for (int d = 0; d < DH; d++) {
                Vec sum = row[0][d] * weight[0];
                for (int i = 1; i < KEYS; i++) sum += row[i][d] * weight[i];
                store(x + d * W, load(x + d * W) + sum);
            }
        }
    }

    // out[seen[j]] += Σ_lane p[j][lane] rows[first + lane], where seen[j] is in [begin, end)
    void scatter(const float* p, const float* rows, i64 stride, float* out, i64 out_stride, i64 begin, i64 end) const {
        constexpr int NV = DH / W, SOME = NV <= 2 ? 8 : NV <= 4 ? 4 : 2;  // sums that stay in registers
        i64 j = std::lower_bound(seen.begin(), seen.end(), begin) - seen.begin();
        const i64 S = std::lower_bound(seen.begin(), seen.end(), end) - seen.begin();
        for (; j + SOME <= S; j += SOME) scatter_some<SOME>(p + j * W, &seen[j], rows, stride, out, out_stride);
        for (; j < S; j++) scatter_some<1>(p + j * W, &seen[j], rows, stride, out, out_stride);
    }

    template <int SOME>
    void scatter_some(const float* p, const int32_t* tokens, const float* rows, i64 stride, float* out,
                      i64 out_stride) const {
        constexpr int NV = DH / W;
        Vec sum[SOME][NV];
        for (int i = 0; i < SOME; i++)
            for (int v = 0; v < NV; v++) sum[i][v] = Vec{};
        for (int lane = 0; lane < count; lane++) {
            const float* row = rows + (first + lane) * stride;
            for (int v = 0; v < NV; v++) {
                Vec x = load(row + v * W);
                for (int i = 0; i < SOME; i++) sum[i][v] += p[i * W + lane] * x;
            }
        }
        for (int i = 0; i < SOME; i++)
            for (int v = 0; v < NV; v++) {
                float* at = out + tokens[i] * out_stride + v * W;
                store(at, load(at) + sum[i][v]);
            }
    }
};

// Where runs of whole trees begin, and T: as many runs as keep all threads busy beside so many KV heads.
std::vector<i64> cut(const TreeTokens& t, i64 threads) {
    const i64 runs = t.HKV % threads ? threads : 1;
    std::vector<i64> cuts = {0};
    for (i64 root = 0; root < t.T; root = t.leave[root])
        if (root && root >= t.T * (i64)cuts.size() / runs) cuts.push_back(root);
    cuts.push_back(t.T);
    return cuts;
}

template <int DH>
void forward_head(const Tile<DH>& tile, const float* q, const float* k, const float* v, float* o, float* lse, i64 head,
                  std::vector<float>& work) {
    const TreeTokens& t = tile.t;
    const i64 S = tile.seen.size(), kv = head / (t.H / t.HKV) * DH, stride = t.HKV * DH;
    work.assign((2 * DH + S) * W, 0.0f);
    float *x = work.data(), *out = x + DH * W, *z = out + DH * W;
    tile.transpose(q, t.H, head, 1.0f / std::sqrt((float)DH), x);
    tile.dots(x, k + kv, stride, z);
    tile.hide(z);
    Vec top = all(HIDDEN), sum = {};
    for (i64 j = 0; j < S; j++) top = larger(top, load(z + j * W));
    for (i64 j = 0; j < S; j++) {
        Vec e = exp(load(z + j * W) - top);
        store(z + j * W, e);
        sum += e;
    }
    tile.weigh(z, v + kv, stride, out);
    for (int lane = 0; lane < tile.count; lane++) {
        for (int d = 0; d < DH; d++)
            o[((tile.first + lane) * t.H + head) * DH + d] = out[d * W + lane] / sum[lane];
        lse[head * t.T + tile.first + lane] = top[lane] + std::log(sum[lane]);
    }
}

// p = exp(q·k - lse),  ds = p (do·v - do·o) / √DH,  dq = Σ ds k,  dk = Σ ds q,  dv = Σ p do
// dk and dv of the tokens in [begin, end); dq if the tile begins there.
template <int DH>
void backward_head(const Tile<DH>& tile, const float* q, const float* k, const float* v, const float* o,
                   const float* lse, const float* d_o, float* dq, float* dk, float* dv, i64 head,
                   std::vector<float>& work, i64 begin, i64 end) {
    const TreeTokens& t = tile.t;
    const i64 S = tile.seen.size(), kv = head / (t.H / t.HKV) * DH, stride = t.HKV * DH;
    const float scale = 1.0f / std::sqrt((float)DH);
    work.assign((3 * DH + 2 * S) * W, 0.0f);
    float *x = work.data(), *g = x + DH * W, *dx = g + DH * W, *p = dx + DH * W, *ds = p + S * W;
    tile.transpose(q, t.H, head, scale, x);
    tile.transpose(d_o, t.H, head, 1.0f, g);
    Vec delta = {}, norm = {};
    for (int lane = 0; lane < tile.count; lane++) {
        const i64 at = ((tile.first + lane) * t.H + head) * DH;
        float sum = 0.0f;
        for (int d = 0; d < DH; d++) sum += d_o[at + d] * o[at + d];
        delta[lane] = sum;
        norm[lane] = lse[head * t.T + tile.first + lane];
    }
    tile.dots(x, k + kv, stride, p);
    tile.hide(p);
    tile.dots(g, v + kv, stride, ds);
    for (i64 j = 0; j < S; j++) {
        Vec e = exp(load(p + j * W) - norm);
        store(p + j * W, e);
        store(ds + j * W, e * (load(ds + j * W) - delta) * scale);
    }
    tile.scatter(ds, q + head * DH, t.H * DH, dk + kv, stride, begin, end);
    tile.scatter(p, d_o + head * DH, t.H * DH, dv + kv, stride, begin, end);
    if (tile.first < begin) return;
    tile.weigh(ds, k + kv, stride, dx);
    for (int lane = 0; lane < tile.count; lane++)
        for (int d = 0; d < DH; d++) dq[((tile.first + lane) * t.H + head) * DH + d] = dx[d * W + lane];
}

#ifdef __AVX512BF16__

// The same for bf16, two terms at a time: probabilities and their gradients are rounded to bf16, and all sums are fp32.
// Rows are (tokens, heads, DH) as above; a pair is two bf16 numbers in 32 bits.
typedef uint32_t Pair;

inline Vec multiply(Vec sum, Vec a, Pair b) {  // + a · b in each lane, of two terms each
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
}
inline Int rounded(Vec x) { return (Int)x + 0x7fff + ((Int)x >> 16 & 1); }
inline Vec pairs_of(Vec low, Vec high) { return (Vec)((rounded(low) >> 16 & 0xffff) | (rounded(high) & -65536)); }

// to[d] = (low[d], high[d])
template <int DH>
void interleave(const bf16* low, const bf16* high, Pair* to) {
    for (int d = 0; d < DH; d += W) {
        const Int pairs = ((Int)load(low + d) >> 16 & 0xffff) | (Int)load(high + d);
        store((float*)to + d, (Vec)pairs);
    }
}

template <int DH>
struct LowTile {
    const Tile<DH>& tile;
    const i64 S = tile.seen.size(), half = (S + 1) / 2;
    std::vector<Pair> keys, values;  // of the tokens seen, interleaved by two for all query heads of a KV head

    explicit LowTile(const Tile<DH>& tile) : tile(tile) {}

    std::vector<Pair> by_twos(const bf16* rows, i64 stride) const {
        std::vector<Pair> found(half * DH);
        for (i64 j = 0; j < half; j++)
            interleave<DH>(rows + tile.seen[2 * j] * stride, rows + tile.seen[std::min(2 * j + 1, S - 1)] * stride,
                           &found[j * DH]);
        return found;
    }

    const bf16* row(const bf16* rows, i64 heads, i64 head, int lane) const {
        return rows + ((tile.first + (lane < tile.count ? lane : 0)) * heads + head) * DH;
    }

    // z[j][lane] = queries[lane] · rows[seen[j]] scale
    void dots(const bf16* queries, i64 heads, i64 head, const bf16* rows, i64 stride, float scale, float* z) const {
        alignas(64) Pair x[DH / 2 * W];
        for (int lane = 0; lane < W; lane++)
            for (int d = 0; d < DH / 2; d++) x[d * W + lane] = ((const Pair*)row(queries, heads, head, lane))[d];
        for (i64 j = 0; j < S; j += KEYS) {
            const Pair* key[KEYS];
            Vec sum[KEYS] = {};
            for (int i = 0; i < KEYS; i++) key[i] = (const Pair*)(rows + tile.seen[std::min(j + i, S - 1)] * stride);
            for (int d = 0; d < DH / 2; d++)
                for (int i = 0; i < KEYS; i++) sum[i] = multiply(sum[i], load((const float*)x + d * W), key[i][d]);
            for (int i = 0; i < std::min<i64>(KEYS, S - j); i++) store(z + (j + i) * W, sum[i] * scale);
        }
    }

    // x[d][lane] += Σ_j p[j][lane] rows[seen[j]][d], of rows by twos
    void weigh(const float* p, const Pair* rows, float* x) const {
        for (i64 j = 0; j < half; j += KEYS) {
            const int some = std::min<i64>(KEYS, half - j);
            Vec weight[KEYS];
            for (int i = 0; i < some; i++) {
                const float* at = p + 2 * (j + i) * W;
                weight[i] = pairs_of(load(at), 2 * (j + i) + 1 < S ? load(at + W) : Vec{});
            }
            for (int d = 0; d < DH; d++) {
                Vec sum = load(x + d * W);
                for (int i = 0; i < some; i++) sum = multiply(sum, weight[i], rows[(j + i) * DH + d]);
                store(x + d * W, sum);
            }
        }
    }

    // out[seen[j]] += Σ_lane p[j][lane] rows[lane], where seen[j] is in [begin, end)
    void scatter(const float* p, const bf16* rows, i64 heads, i64 head, float* out, i64 stride, i64 begin,
                 i64 end) const {
        constexpr int NV = DH / W, SOME = NV <= 2 ? 8 : NV <= 4 ? 4 : 2;
        alignas(64) Pair lanes[W / 2 * DH];
        for (int i = 0; i < W / 2; i++)
            interleave<DH>(row(rows, heads, head, 2 * i), row(rows, heads, head, 2 * i + 1), lanes + i * DH);
        const auto& seen = tile.seen;
        i64 j = std::lower_bound(seen.begin(), seen.end(), begin) - seen.begin();
        const i64 stop = std::lower_bound(seen.begin(), seen.end(), end) - seen.begin();
        for (; j < stop; j += SOME) {
            const int some = std::min<i64>(SOME, stop - j);
            Pair weight[SOME][W / 2] = {};
            Vec sum[SOME][NV] = {};
            for (int i = 0; i < some; i++) store((bf16*)weight[i], load(p + (j + i) * W));
            for (int lane = 0; lane < W / 2; lane++)
                for (int v = 0; v < NV; v++) {
                    const Vec x = load((const float*)lanes + lane * DH + v * W);
                    for (int i = 0; i < SOME; i++) sum[i][v] = multiply(sum[i][v], x, weight[i][lane]);
                }
            for (int i = 0; i < some; i++)
                for (int v = 0; v < NV; v++) {
                    float* at = out + seen[j + i] * stride + v * W;
                    store(at, load(at) + sum[i][v]);
                }
        }
    }
};

template <int DH>
void forward_low(const LowTile<DH>& low, const bf16* q, const bf16* k, bf16* o, float* lse, i64 head,
                 std::vector<float>& work) {
    const Tile<DH>& tile = low.tile;
    const TreeTokens& t = tile.t;
    const i64 kv = head / (t.H / t.HKV) * DH;
    work.assign((DH + low.S) * W, 0.0f);
    float *out = work.data(), *z = out + DH * W;
    low.dots(q, t.H, head, k + kv, t.HKV * DH, 1.0f / std::sqrt((float)DH), z);
    tile.hide(z);
    Vec top = all(HIDDEN), sum = {};
    for (i64 j = 0; j < low.S; j++) top = larger(top, load(z + j * W));
    for (i64 j = 0; j < low.S; j++) {
        const Vec e = exp(load(z + j * W) - top);
        store(z + j * W, e);
        sum += e;
    }
    low.weigh(z, low.values.data(), out);
    for (int lane = 0; lane < tile.count; lane++) {
        alignas(64) float row[DH];
        for (int d = 0; d < DH; d++) row[d] = out[d * W + lane] / sum[lane];
        for (int d = 0; d < DH; d += W) store(o + ((tile.first + lane) * t.H + head) * DH + d, load(row + d));
        lse[head * t.T + tile.first + lane] = top[lane] + std::log(sum[lane]);
    }
}

template <int DH>
void backward_low(const LowTile<DH>& low, const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse,
                  const bf16* d_o, bf16* dq, float* dk, float* dv, i64 head, std::vector<float>& work, i64 begin,
                  i64 end) {
    const Tile<DH>& tile = low.tile;
    const TreeTokens& t = tile.t;
    const i64 kv = head / (t.H / t.HKV) * DH, stride = t.HKV * DH;
    const float scale = 1.0f / std::sqrt((float)DH);
    work.assign((DH + 2 * low.S) * W, 0.0f);
    float *dx = work.data(), *p = dx + DH * W, *ds = p + low.S * W;
    Vec delta = {}, norm = {};
    for (int lane = 0; lane < tile.count; lane++) {
        Vec sum = {};
        const bf16 *g = low.row(d_o, t.H, head, lane), *out = low.row(o, t.H, head, lane);
        for (int d = 0; d < DH; d += W) sum += load(g + d) * load(out + d);
        delta[lane] = sum_of(sum);
        norm[lane] = lse[head * t.T + tile.first + lane];
    }
    low.dots(q, t.H, head, k + kv, stride, scale, p);
    tile.hide(p);
    low.dots(d_o, t.H, head, v + kv, stride, 1.0f, ds);
    for (i64 j = 0; j < low.S; j++) {
        const Vec e = exp(load(p + j * W) - norm);
        store(p + j * W, e);
        store(ds + j * W, e * (load(ds + j * W) - delta) * scale);
    }
    low.scatter(ds, q, t.H, head, dk + kv, stride, begin, end);
    low.scatter(p, d_o, t.H, head, dv + kv, stride, begin, end);
    if (tile.first < begin) return;
    low.weigh(ds, low.keys.data(), dx);
    for (int lane = 0; lane < tile.count; lane++) {
        alignas(64) float row[DH];
        for (int d = 0; d < DH; d++) row[d] = dx[d * W + lane];
        for (int d = 0; d < DH; d += W) store(dq + ((tile.first + lane) * t.H + head) * DH + d, load(row + d));
    }
}

#endif

// Run work(tile, head, space, begin, end) for all query heads and all tiles with queries in the run [begin, end) of
// trees. What a run adds to is its own, for each KV head, and is added in the order of the tiles: the same bits on any
// number of threads. A tile that lies across two runs is visited in both.
template <int DH, class Space = std::vector<float>, class Work>
void all_tiles(const TreeTokens& t, i64 threads, Work work) {
    std::vector<Tile<DH>> tiles;
    for (i64 first = 0; first < t.T; first += W) tiles.emplace_back(t, first);
    const auto cuts = cut(t, threads);
    const i64 G = t.H / t.HKV, runs = cuts.size() - 1;
    share(runs * t.HKV, threads, [&](i64 i) {
        Space space;
        const i64 begin = cuts[i % runs], end = cuts[i % runs + 1];
        for (i64 tile = begin / W; tile * W < end; tile++)
            for (i64 head = i / runs * G; head < i / runs * G + G; head++) work(tiles[tile], head, space, begin, end);
    });
}

template <int DH>
void forward_tree(const TreeTokens& t, i64 threads, const float* q, const float* k, const float* v, float* o,
                  float* lse) {
    all_tiles<DH>(t, threads, [&](const Tile<DH>& tile, i64 head, std::vector<float>& space, i64 begin, i64) {
        if (tile.first >= begin) forward_head<DH>(tile, q, k, v, o, lse, head, space);
    });
}

template <int DH>
void backward_tree(const TreeTokens& t, i64 threads, const float* q, const float* k, const float* v, const float* o,
                   const float* lse, const float* d_o, float* dq, float* dk, float* dv) {
    all_tiles<DH>(t, threads, [&](const Tile<DH>& tile, i64 head, std::vector<float>& space, i64 begin, i64 end) {
        backward_head<DH>(tile, q, k, v, o, lse, d_o, dq, dk, dv, head, space, begin, end);
    });
}

#ifdef __AVX512BF16__

template <int DH>
struct LowSpace {
    std::vector<float> work;
    std::unique_ptr<LowTile<DH>> low;

    // Prepare a tile for its KV head's first query head.
    void take(const Tile<DH>& tile, i64 head, const bf16* k, const bf16* v) {
        const i64 G = tile.t.H / tile.t.HKV, stride = tile.t.HKV * DH, kv = head / G * DH;
        if (head % G) return;
        low = std::make_unique<LowTile<DH>>(tile);
        if (k) low->keys = low->by_twos(k + kv, stride);
        if (v) low->values = low->by_twos(v + kv, stride);
    }
};

template <int DH>
void forward_tree_low(const TreeTokens& t, i64 threads, const bf16* q, const bf16* k, const bf16* v, bf16* o,
                      float* lse) {
    using Space = LowSpace<DH>;
    all_tiles<DH, Space>(t, threads, [&](const Tile<DH>& tile, i64 head, Space& space, i64 begin, i64) {
        if (tile.first < begin) return;
        space.take(tile, head, nullptr, v);
        forward_low<DH>(*space.low, q, k, o, lse, head, space.work);
    });
}

template <int DH>
void backward_tree_low(const TreeTokens& t, i64 threads, const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                       const float* lse, const bf16* d_o, bf16* dq, float* dk, float* dv) {
    using Space = LowSpace<DH>;
    all_tiles<DH, Space>(t, threads, [&](const Tile<DH>& tile, i64 head, Space& space, i64 begin, i64 end) {
        space.take(tile, head, k, nullptr);
        backward_low<DH>(*space.low, q, k, v, o, lse, d_o, dq, dk, dv, head, space.work, begin, end);
    });
}

#endif

}  // namespace

extern "C" {  // head_dim is 16, 32, 64 or 128

// o and lse of q, k and v.
void tree_forward(const TreeTokens* t, i64 head_dim, i64 threads, const float* q, const float* k, const float* v,
                  float* o, float* lse) {
    auto run = head_dim == 16 ? forward_tree<16> : head_dim == 32 ? forward_tree<32>
               : head_dim == 64 ? forward_tree<64> : forward_tree<128>;
    run(*t, threads, q, k, v, o, lse);
}

// dq of an upstream gradient d_o, and dk and dv on top of what they hold.
void tree_backward(const TreeTokens* t, i64 head_dim, i64 threads, const float* q, const float* k, const float* v,
                   const float* o, const float* lse, const float* d_o, float* dq, float* dk, float* dv) {
    auto run = head_dim == 16 ? backward_tree<16> : head_dim == 32 ? backward_tree<32>
               : head_dim == 64 ? backward_tree<64> : backward_tree<128>;
    run(*t, threads, q, k, v, o, lse, d_o, dq, dk, dv);
}

// The same for bf16, where has_bf16(): lse, dk and dv are fp32.
void tree_forward_low(const TreeTokens* t, i64 head_dim, i64 threads, const bf16* q, const bf16* k, const bf16* v,
                      bf16* o, float* lse) {
#ifdef __AVX512BF16__
    auto run = head_dim == 16 ? forward_tree_low<16> : head_dim == 32 ? forward_tree_low<32>
               : head_dim == 64 ? forward_tree_low<64> : forward_tree_low<128>;
    run(*t, threads, q, k, v, o, lse);
#endif
}

void tree_backward_low(const TreeTokens* t, i64 head_dim, i64 threads, const bf16* q, const bf16* k, const bf16* v,
                       const bf16* o, const float* lse, const bf16* d_o, bf16* dq, float* dk, float* dv) {
#ifdef __AVX512BF16__
    auto run = head_dim == 16 ? backward_tree_low<16> : head_dim == 32 ? backward_tree_low<32>
               : head_dim == 64 ? backward_tree_low<64> : backward_tree_low<128>;
    run(*t, threads, q, k, v, o, lse, d_o, dq, dk, dv);
#endif
}

}  // extern "C"
