// A decode step, whole, on a few CPU cores: cpu.py says what it computes and why it is here.
//
// A block is up to 32 tokens ("lanes"), each the newest of some row of the KV cache. Activations lie feature by
// feature, x[feature][lane], so that every operation but attention is vertical: one vector instruction serves 16 lanes,
// weights are read as they are stored, and nothing is summed across a vector. A block's activations fit in the cache.
//
// Weights and cache are fp32, or both bf16 with every sum in fp32. Then what a product reads is rounded to bf16, as
// torch rounds it; the residual stream is not. Where the processor multiplies pairs of bf16 (AVX512-BF16) they stay as
// they are, elsewhere they are widened in registers.
//
// Threads take parts of a product's outputs, or queries: no sum is cut, and any number of threads gives the same bits.

#include "cpu_team.h"
#include "cpu_vectors.h"

typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));

namespace {

constexpr int QUERIES = 4;  // that share one read of keys and values
constexpr int MOST = 32;  // lanes of a block
constexpr int IDS = 2048;  // of the vocabulary, whose probabilities are summed by themselves

struct Linear {  // weights as Hugging Face stores them: (out, in)
    const void* weight;
    const float* bias;  // null: none
    const void *A, *B;  // LoRA's (rank, in) and (out, rank), which add scale * B A x; null: none
    i64 rank;
    float scale;
};

// ------------------------------------------------------------------------------------------ products, norms, the gate

// Accumulators that stay in registers: OUT rows of weights at once.
#ifdef __AVX512F__
template <int N>
constexpr int ROWS = 8;
#else
template <int N>
constexpr int ROWS = 64 / N;
#endif

// y[o][lane] = Σ_i w[o][i] x[i][lane] + bias[o], for OUT rows of w; `add`: on top of what y holds.
template <class L, int NV, int OUT>
inline void products(const float* w, const float* bias, const float* x, float* y, i64 in, bool add) {
    constexpr int N = L::N;
    typedef typename L::V V;
    V total[OUT][NV];
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) {
            total[o][v] = V{} + (bias ? bias[o] : 0.0f);
            if (add) total[o][v] += L::load(y + (o * NV + v) * N);
        }
    for (i64 start = 0; start < in; start += PART) {
        V sum[OUT][NV] = {};
        for (int o = 0; o < OUT; o++)
            for (int i = 0; i < PART; i += 16) __builtin_prefetch(w + (OUT + o) * in + start + i, 0, 2);
        for (i64 i = start; i < std::min(in, start + PART); i++) {
            V column[NV];
            for (int v = 0; v < NV; v++) column[v] = L::load(x + (i * NV + v) * N);
            for (int o = 0; o < OUT; o++)
                for (int v = 0; v < NV; v++) sum[o][v] = L::fma(V{} + w[o * in + i], column[v], sum[o][v]);
        }
        for (int o = 0; o < OUT; o++)
            for (int v = 0; v < NV; v++) total[o][v] += sum[o][v];
    }
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) store(y + (o * NV + v) * N, total[o][v]);
}

#ifdef __AVX512BF16__

// The same of bf16. A vector holds four features of eight lanes, x[feature / 4][lane][4]: an instruction multiplies two
// pairs of features for each lane, and four weights are one operand. The pairs' sums are added at the end.
constexpr bool QUADS = true;

template <class L, int NV, int OUT>
inline void products(const bf16* w, const float* bias, const float* x, float* y, i64 in, bool add) {
    constexpr int N = NV * L::N, VECTORS = N / 8, LINE = 32;  // LINE: weights in a cache line
    Vec sum[OUT][VECTORS] = {};
    for (i64 start = 0; start < in; start += LINE) {
        for (int o = 0; o < OUT; o++) __builtin_prefetch(w + (OUT + o) * in + start, 0, 2);  // the next rows
        for (i64 i = start; i < std::min(in, start + LINE); i += 4) {
            Vec column[VECTORS];
            for (int v = 0; v < VECTORS; v++) column[v] = load(x + (i / 4 * VECTORS + v) * W);
            for (int o = 0; o < OUT; o++) {
                Long four = Long{} + *(const Quad*)(w + o * in + i);
                for (int v = 0; v < VECTORS; v++)
                    sum[o][v] = (Vec)_mm512_dpbf16_ps((__m512)sum[o][v], (__m512bh)column[v], (__m512bh)four);
            }
        }
    }
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < VECTORS; v++) {
            Vec s = sum[o][v];
            Vec8 found = __builtin_shufflevector(s, s, 0, 2, 4, 6, 8, 10, 12, 14) +
                         __builtin_shufflevector(s, s, 1, 3, 5, 7, 9, 11, 13, 15) + (bias ? bias[o] : 0.0f);
            float* to = y + o * N + v * 8;
            store(to, add ? found + *(Vec8*)to : found);
        }
}

#else

// The same of bf16, widened in registers: x[feature][lane], its numbers rounded.
constexpr bool QUADS = false;

template <class L, int NV, int OUT>
inline void products(const bf16* w, const float* bias, const float* x, float* y, i64 in, bool add) {
    constexpr int N = L::N, LINE = 32;
    typedef typename L::V V;
    typedef typename L::B B;
    V sum[OUT][NV];
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) {
            sum[o][v] = V{} + (bias ? bias[o] : 0.0f);
            if (add) sum[o][v] += L::load(y + (o * NV + v) * N);
        }
    for (i64 start = 0; start < in; start += LINE) {
        for (int o = 0; o < OUT; o++) __builtin_prefetch(w + (OUT + o) * in + start, 0, 2);
        for (i64 i = start; i < std::min(in, start + LINE); i += 2)
            for (int o = 0; o < OUT; o++) {
                B pair = B{} + *(const Pair*)(w + o * in + i);
                V low = (V)(pair << 16), high = (V)(pair & 0xffff0000);
                for (int v = 0; v < NV; v++)
                    sum[o][v] = L::fma(low, L::load(x + (i * NV + v) * N),
                                       L::fma(high, L::load(x + ((i + 1) * NV + v) * N), sum[o][v]));
            }
    }
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) store(y + (o * NV + v) * N, sum[o][v]);
}

#endif

// Rows [first, last) of a product.
template <class T, class L, int NV>
void linear(const Linear& layer, const float* x, float* y, i64 in, i64 first, i64 last, bool add = false) {
    constexpr int N = NV * L::N, OUT = sizeof(T) == 2 && QUADS && N == 32 ? 4 : ROWS<N>;
    const T* w = (const T*)layer.weight;
    const float* bias = layer.bias;
    i64 o = first;
    for (; o + OUT <= last; o += OUT)
        products<L, NV, OUT>(w + o * in, bias ? bias + o : nullptr, x, y + o * N, in, add);
    for (; o < last; o++) products<L, NV, 1>(w + o * in, bias ? bias + o : nullptr, x, y + o * N, in, add);
}

// Make of x, `in` features of N lanes, what products of weights T read. Returns where it is: in `to`, or still in x.
template <class T, class L, int N>
const float* prepare(const float* x, float* to, i64 in) {
    if (sizeof(T) == sizeof(float)) return x;
    auto near = [&](i64 feature, int lane) { return rounded<Lanes8>(Lanes8::load(x + feature * N + lane)); };
    for (i64 i = 0; i < in; i += QUADS ? 4 : 1)
        for (int lane = 0; lane < N; lane += 8) {
            if (QUADS) {
                Bits8 a = near(i, lane) | near(i + 1, lane) << 16, b = near(i + 2, lane) | near(i + 3, lane) << 16;
                Bits both = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
                store(to + (i / 4 * N + lane) * 2, (Vec)both);
            } else {
                store(to + i * N + lane, (Vec8)(near(i, lane) << 16));
            }
        }
    return to;
}

// y = weight * x / sqrt(mean(x^2) + eps), over the D features of each lane.
template <class L, int NV>
void rmsnorm(const float* x, const float* weight, float* y, i64 D, float eps) {
    constexpr int N = L::N;
    typedef typename L::V V;
    for (int v = 0; v < NV; v++) {
        V sum = {}, r = {};
        for (i64 d = 0; d < D; d++) {
            V part = L::load(x + (d * NV + v) * N);
            sum = L::fma(part, part, sum);
        }
        for (int lane = 0; lane < N; lane++) r[lane] = 1.0f / std::sqrt(sum[lane] / D + eps);
        for (i64 d = 0; d < D; d++) store(y + (d * NV + v) * N, weight[d] * (L::load(x + (d * NV + v) * N) * r));
    }
}

template <class L>
void gate(const float* up, float* a, i64 count) {  // a = a σ(a) up
    for (i64 i = 0; i < count; i += L::N) {
        typename L::V x = L::load(a + i);
        store(a + i, x / (1.0f + exp(-x)) * L::load(up + i));
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

inline Vec4 fold(Vec8 half) {  // partial sums to 4
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
inline Vec4 fold(Vec x) { return fold(lower(x) + upper(x)); }

inline Vec4 sums_of(Vec4 a, Vec4 b, Vec4 c, Vec4 d) {  // of each of four
    Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);  // a b a b
    Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Slots of one row and KV head: count of them, `step` floats apart. Keys and values are read once a step, from memory,
// which is faster with two streams under way than with one: while keys are read, the same slots' values are fetched, and
// while these are weighed, the keys of the head that comes next.
template <class C>
struct Slots {
    const C *keys, *values;
    i64 step;
    int count;
    const C* next;  // keys that are read afterwards; null: nothing is fetched
};

template <class C>
inline void fetch(const C* x, int count) {
    for (int i = 0; i < count; i += 64 / sizeof(C)) __builtin_prefetch(x + i);
}

// z[query][slot] = q · k, for Q queries (each DH floats) at once.
template <class C, int DH, int Q>
void scores(const float* const* q, Slots<C> s, float* const* z) {
    constexpr int NV = DH / Lanes::N, N = Lanes::N;
    Lanes::V query[Q][NV];
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < NV; v++) query[j][v] = Lanes::load(q[j] + v * N);
    auto dot = [&](int j, const C* key) {
        Lanes::V sum = query[j][0] * Lanes::load(key);
        for (int v = 1; v < NV; v++) sum += query[j][v] * Lanes::load(key + v * N);
        return fold(sum);
    };
    int i = 0;
    for (; i + 4 <= s.count; i += 4) {
        const C* key = s.keys + i * s.step;
        if (s.next) fetch(s.values + i * s.step, 4 * DH);
        for (int j = 0; j < Q; j++)
            *(Vec4*)(z[j] + i) = sums_of(dot(j, key), dot(j, key + s.step), dot(j, key + 2 * s.step),
                                         dot(j, key + 3 * s.step));
    }
    for (; i < s.count; i++)
        for (int j = 0; j < Q; j++) {
            Vec4 part = dot(j, s.keys + i * s.step);
            z[j][i] = (part[0] + part[1]) + (part[2] + part[3]);
        }
}

// out[query] += Σ p[query][slot] v
template <class C, int DH, int Q>
void weigh(float* const* p, Slots<C> s, float* const* out) {
    constexpr int NV = DH / Lanes::N, N = Lanes::N;
    for (int start = 0; start < s.count; start += PART) {
        Lanes::V sum[Q][NV] = {};
        for (int i = start; i < std::min(s.count, start + PART); i++) {
            const C* value = s.values + i * s.step;
            if (s.next) fetch(s.next + i * s.step, DH);
            for (int v = 0; v < NV; v++) {
                Lanes::V x = Lanes::load(value + v * N);
                for (int j = 0; j < Q; j++) sum[j][v] += p[j][i] * x;
            }
        }
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < NV; v++) store(out[j] + v * N, Lanes::load(out[j] + v * N) + sum[j][v]);
    }
}

// Turn scores into probabilities: z = exp((z - max) scale) / Σ
void softmax(float* z, int count, float scale) {
    float top = z[0];
    for (int i = 1; i < count; i++) top = std::max(top, z[i]);
    int i = 0;
    Lanes::V sums = {};
    for (; i + Lanes::N <= count; i += Lanes::N) {
        Lanes::V e = exp((Lanes::load(z + i) - top) * scale);
        store(z + i, e);
        sums += e;
    }
    float sum = 0.0f;
    for (; i < count; i++) sum += z[i] = std::exp((z[i] - top) * scale);
    for (int lane = 0; lane < Lanes::N; lane++) sum += sums[lane];
    for (int j = 0; j < count; j++) z[j] *= 1.0f / sum;
}

// A query sees the first `shared` slots of its row, and then every nth from `first` on.
struct Sight {
    int shared, first, own;
};

// Attend with Q queries of one row and KV head: what all see is read once for all.
template <class C, int DH, int Q>
void attend(const float* const* q, const Sight* sight, const C* keys, const C* values, i64 capacity, int n,
            float scale, float* work, i64 width, float* const* out) {
    int common = sight[0].shared;
    for (int j = 1; j < Q; j++) common = std::min(common, sight[j].shared);
    float* z[Q];
    Slots<C> rest[Q];
    for (int j = 0; j < Q; j++) {
        z[j] = work + j * width;
        bool more = sight[j].shared > common;  // a prompt's own tokens: each sees one more than the one before it
        i64 first = more ? common : sight[j].first, step = more ? DH : (i64)n * DH;
        rest[j] = {keys + first * DH, values + first * DH, step, more ? sight[j].shared - common : sight[j].own,
                   nullptr};
    }
    Slots<C> prefix = {keys, values, DH, common, keys + capacity * DH};  // the next head's, or the next row's
    scores<C, DH, Q>(q, prefix, z);
    for (int j = 0; j < Q; j++) {
        float* own[1] = {z[j] + common};
        scores<C, DH, 1>(q + j, rest[j], own);
        softmax(z[j], common + rest[j].count, scale);
        std::fill(out[j], out[j] + DH, 0.0f);
    }
    weigh<C, DH, Q>(z, prefix, out);
    for (int j = 0; j < Q; j++) {
        float* own[1] = {z[j] + common};
        weigh<C, DH, 1>(own, rest[j], out + j);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- the model

struct Layer {
    const float *norm1, *norm2;
    Linear q, k, v, o, gate, up, down;
    void *keys, *values;  // (B, HKV, capacity, DH) of the weights' type
};

struct Model {
    i64 layers, D, H, HKV, DH, inner, V, positions;
    float eps, unused;
    const void* embedding;  // (V, D) of the weights' type
    const float *norm, *cos, *sin;  // (D,), (positions, DH / 2) twice
};

struct Tokens {  // what a forward computes: N tokens, and where they stand
    i64 N, B, capacity, n;
    const i64 *ids, *positions, *rows, *slots;
    const i64 *prompt;  // (B,) slots that all candidates of a row see; null: each token sees its row up to itself
    float* hidden;  // out (N, D)
};

namespace {

Sight sight_of(const Tokens& t, i64 token) {
    i64 slot = t.slots[token], prompt = t.prompt ? t.prompt[t.rows[token]] : slot + 1;
    if (slot < prompt) return {int(slot + 1), 0, 0};
    i64 candidate = (slot - prompt) % t.n;
    return {int(prompt), int(prompt + candidate), int((slot - prompt) / t.n + 1)};
}

template <class C>
using Attend = void (*)(const float* const*, const Sight*, const C*, const C*, i64, int, float, float*, i64,
                        float* const*);

template <class C, int DH>
Attend<C> attend_with(int queries) {
    return queries == 4 ? attend<C, DH, 4> : queries == 3 ? attend<C, DH, 3> : queries == 2 ? attend<C, DH, 2>
           : attend<C, DH, 1>;
}

template <class C>
Attend<C> attend_with(i64 DH, int queries) {
    return DH == 16 ? attend_with<C, 16>(queries) : DH == 32 ? attend_with<C, 32>(queries)
           : DH == 64 ? attend_with<C, 64>(queries) : attend_with<C, 128>(queries);
}

// One forward; T: the type of weights and cache. All members of the team run `block`, and meet where one needs what
// others have computed. What is as cheap to compute as to wait for, each computes for itself.
template <class T>
struct Step {
    const Model& m;
    const Layer* layers;
    const Tokens& t;
    Team& team;
    const i64 D, QD, KD, width;  // width: floats that a query's scores may take
    i64 rank = 0;  // the largest
    std::vector<float> work, own;
    float *x, *q, *k, *v, *up, *inner, *down, *cos, *sin, *q_rows, *out;
    i64 own_size;

    Step(const Model& m, const Layer* layers, const Tokens& t, int members, Team& team)
        : m(m), layers(layers), t(t), team(team), D(m.D), QD(m.H * m.DH), KD(m.HKV * m.DH), width(t.capacity + W) {
        for (i64 l = 0; l < m.layers; l++)
            for (const Linear* w = &layers[l].q; w <= &layers[l].down; w++) rank = std::max(rank, w->rank);
        own_size = 2 * MOST * std::max(D, QD) + 4 * MOST * rank + QUERIES * width;
        const i64 features[] = {D, QD, KD, KD, m.inner, m.inner, m.inner, m.DH / 2, m.DH / 2, QD, QD};
        float** parts[] = {&x, &q, &k, &v, &up, &inner, &down, &cos, &sin, &q_rows, &out};
        i64 total = 0;
        for (i64 size : features) total += size * MOST;
        work.resize(total), own.resize(own_size * members);
        float* at = work.data();
        for (int i = 0; i < 11; i++) *parts[i] = at, at += features[i] * MOST;
    }

    void run(int me) {
        for (i64 first = 0; first < t.N; first += MOST) {
            int count = std::min<i64>(MOST, t.N - first);
            if (count > 16) block<Lanes, 32 / Lanes::N>(me, first, count);
            else if (count > 8) block<Lanes, 16 / Lanes::N>(me, first, count);
            else block<Lanes8, 1>(me, first, count);
        }
    }

    Part part(i64 count, i64 step, int me) const { return part_of(count, step, me, team.size); }

    // Compute tokens [first, first + count); lanes in excess repeat the first.
    template <class L, int NV>
    void block(int me, i64 first, int count) {
        constexpr int N = NV * L::N;
        float* y = own.data() + me * own_size;  // the norm of x, then what is made of it
        float *made = y + MOST * std::max(D, QD), *low = made + MOST * std::max(D, QD);
        float* scores = low + 4 * MOST * rank;
        begin<N>(me, first, count);
        const Part to_q = part(QD, 8, me), to_kv = part(KD, 8, me), to_D = part(D, 8, me);
        const Part to_inner = part(m.inner, 64, me), heads = part(m.H + m.HKV, 1, me), lanes = part(count, 1, me);
        for (i64 l = 0; l < m.layers; l++) {
            const Layer& w = layers[l];
            rmsnorm<L, NV>(x, w.norm1, y, D, m.eps);
            const float* read = prepare<T, L, N>(y, made, D);
            adapted<L, NV>(w.q, read, through_A<L, NV>(w.q, read, D, low), q, D, to_q);
            adapted<L, NV>(w.k, read, through_A<L, NV>(w.k, read, D, low), k, D, to_kv);
            adapted<L, NV>(w.v, read, through_A<L, NV>(w.v, read, D, low), v, D, to_kv);
            team.meet();
            for (i64 head = heads.first; head < heads.last; head++)
                head < m.H ? turn_query<L, NV>(head, count) : store_key<L, NV>(w, head - m.H, first, count);
            team.meet();
            attend_rows<N>(w, me, first, count, scores);
            team.meet();
            gather<N>(y, count);
            read = prepare<T, L, N>(y, made, QD);
            adapted<L, NV>(w.o, read, through_A<L, NV>(w.o, read, QD, low), x, QD, to_D, true);
            team.meet();
            rmsnorm<L, NV>(x, w.norm2, y, D, m.eps);
            read = prepare<T, L, N>(y, made, D);
            const float *to_gate = through_A<L, NV>(w.gate, read, D, low);
            const float *to_up = through_A<L, NV>(w.up, read, D, low + 2 * MOST * rank);
            for (i64 o = to_inner.first; o < to_inner.last; o += 64) {
                const Part some = {o, std::min(o + 64, to_inner.last)};
                adapted<L, NV>(w.gate, read, to_gate, inner, D, some);
                adapted<L, NV>(w.up, read, to_up, up, D, some);
                gate<L>(up + o * N, inner + o * N, (some.last - o) * N);
                prepare<T, L, N>(inner + o * N, down + (QUADS ? o / 2 : o) * N, some.last - o);
            }
            team.meet();
            read = sizeof(T) == sizeof(float) ? inner : down;
            adapted<L, NV>(w.down, read, through_A<L, NV>(w.down, read, m.inner, low), x, m.inner, to_D, true);
            team.meet();
        }
        rmsnorm<L, NV>(x, m.norm, y, D, m.eps);
        for (i64 lane = lanes.first; lane < lanes.last; lane++)
            for (i64 d = 0; d < D; d++) t.hidden[(first + lane) * D + d] = y[d * N + lane];
        team.meet();
    }

    // scale * A x, as products read it; null without an adapter. `to` has room for it twice.
    template <class L, int NV>
    const float* through_A(const Linear& w, const float* x, i64 in, float* to) const {
        constexpr int N = NV * L::N;
        if (!w.A) return nullptr;
        linear<T, L, NV>({w.A}, x, to, in, 0, w.rank);
        for (i64 i = 0; i < w.rank * N; i += L::N) store(to + i, L::load(to + i) * w.scale);
        return prepare<T, L, N>(to, to + MOST * rank, w.rank);
    }

    // A part of W x + b + B (scale * A x).
    template <class L, int NV>
    void adapted(const Linear& w, const float* x, const float* low, float* y, i64 in, Part rows, bool add = false) {
        linear<T, L, NV>(w, x, y, in, rows.first, rows.last, add);
        if (low) linear<T, L, NV>({w.B}, low, y, w.rank, rows.first, rows.last, true);
    }

    // Look up embeddings and angles.
    template <int N>
    void begin(int me, i64 first, int count) {
        const Part own_D = part(D, 8, me), own_angles = part(m.DH / 2, 8, me);
        for (int lane = 0; lane < N; lane++) {
            i64 token = first + (lane < count ? lane : 0), p = t.positions[token] * (m.DH / 2);
            const T* row = (const T*)m.embedding + t.ids[token] * D;
            for (i64 d = own_D.first; d < own_D.last; d++) x[d * N + lane] = widen(row[d]);
            for (i64 i = own_angles.first; i < own_angles.last; i++)
                cos[i * N + lane] = m.cos[p + i], sin[i * N + lane] = m.sin[p + i];
        }
        team.meet();
    }

    // Rotary positions: channels i and i + DH/2 of a head are a pair.
    template <class L, int NV>
    void turn(float* head) const {
        constexpr int N = L::N;
        typedef typename L::V V;
        for (i64 i = 0; i < m.DH / 2; i++)
            for (int v = 0; v < NV; v++) {
                float *a = head + (i * NV + v) * N, *b = a + m.DH / 2 * NV * N;
                V c = L::load(cos + (i * NV + v) * N), s = L::load(sin + (i * NV + v) * N);
                V x1 = L::load(a), x2 = L::load(b);
                store(a, x1 * c - x2 * s);
                store(b, x2 * c + x1 * s);
            }
    }

    template <class L, int NV>
    void turn_query(i64 head, int count) {
        constexpr int N = NV * L::N;
        turn<L, NV>(q + head * m.DH * N);
        for (i64 d = head * m.DH; d < (head + 1) * m.DH; d++)
            for (int lane = 0; lane < count; lane++) q_rows[lane * QD + d] = q[d * N + lane];
    }

    template <class L, int NV>
    void store_key(const Layer& w, i64 head, i64 first, int count) {
        constexpr int N = NV * L::N;
        turn<L, NV>(k + head * m.DH * N);
        for (int lane = 0; lane < count; lane++) {
            i64 token = first + lane;
            i64 at = ((t.rows[token] * m.HKV + head) * t.capacity + t.slots[token]) * m.DH;
            for (i64 d = 0; d < m.DH; d++) {
                narrow(k[(head * m.DH + d) * N + lane], (T*)w.keys + at + d);
                narrow(v[(head * m.DH + d) * N + lane], (T*)w.values + at + d);
            }
        }
    }

    // Attend with all lanes: those of one row and KV head share what is read of it, some at a time.
    template <int N>
    void attend_rows(const Layer& w, int me, i64 first, int count, float* scratch) {
        i64 unit = 0;
        for (int lane = 0, size; lane < count; lane += size) {
            size = 1;
            while (lane + size < count && t.rows[first + lane + size] == t.rows[first + lane]) size++;
            for (i64 h = 0; h < m.HKV; h++)
                for (i64 j = 0; j < size * (m.H / m.HKV); j += QUERIES)
                    if (unit++ % team.size == me) attend_some(w, first, lane, size, h, j, scratch);
        }
    }

    // Attend with up to QUERIES of the size * G queries of KV head h, from the jth on.
    void attend_some(const Layer& w, i64 first, int lane0, int size, i64 h, i64 j, float* scratch) {
        const i64 G = m.H / m.HKV, at = (t.rows[first + lane0] * m.HKV + h) * t.capacity * m.DH;
        int some = std::min<i64>(QUERIES, size * G - j);
        const float* queries[QUERIES];
        float* found[QUERIES];
        Sight sight[QUERIES];
        for (int i = 0; i < some; i++) {
            i64 lane = lane0 + (j + i) / G, head = h * G + (j + i) % G;
            queries[i] = q_rows + lane * QD + head * m.DH;
            found[i] = out + lane * QD + head * m.DH;
            sight[i] = sight_of(t, first + lane);
        }
        attend_with<T>(m.DH, some)(queries, sight, (const T*)w.keys + at, (const T*)w.values + at, t.capacity, t.n,
                                   1.0f / std::sqrt((float)m.DH), scratch, width, found);
    }

    // What attention found, feature by feature.
    template <int N>
    void gather(float* y, int count) const {
        for (i64 d = 0; d < QD; d++)
            for (int lane = 0; lane < N; lane++) y[d * N + lane] = lane < count ? out[lane * QD + d] : 0.0f;
    }
};

template <class T>
void compute(const Model& m, const Layer* layers, const Tokens& t, int threads) {
    Team& team = Team::of_this_process();
    Step<T> step(m, layers, t, threads, team);
    team.run(threads, [&](int me) { step.run(me); });
}

// ------------------------------------------------------------------------------------------------------------ sampling

// Draw ids for rows of hidden states; T: the head's type. The vocabulary is cut into chunks of IDS ids. Of each, and of
// each lane, its largest logit is kept and Σ exp of the others less that one; these say in which chunk a draw falls.
template <class T>
struct Draws {
    const float* hidden;
    const T* weight;
    const float* uniforms;
    const float temperature, inverse;
    const i64 R, D, V, chunks;
    i64* ids;
    float* logprobs;
    Team& team;
    std::vector<float> z, own, top;  // (V, lanes): logits, then exp; per member; (chunks, lanes)
    std::vector<double> sum;
    std::vector<i64> best;

    Draws(const float* hidden, const void* weight, const float* uniforms, float temperature, i64 R, i64 D, i64 V,
          i64* ids, float* logprobs, int members, Team& team)
        : hidden(hidden), weight((const T*)weight), uniforms(uniforms), temperature(temperature),
          inverse(temperature > 0 ? 1.0f / temperature : 1.0f), R(R), D(D), V(V), chunks((V + IDS - 1) / IDS), ids(ids),
          logprobs(logprobs), team(team) {
        i64 lanes = R > W ? 2 * W : W;
        z.resize(V * lanes), own.resize(2 * D * lanes * members), top.resize(chunks * lanes);
        sum.resize(chunks * lanes), best.resize(chunks * lanes);
    }

    void run(int me) {
        for (i64 first = 0; first < R; first += MOST) {
            int count = std::min<i64>(MOST, R - first);
            if (count > 16) block<Lanes, 32 / Lanes::N>(me, first, count);
            else if (count > 8) block<Lanes, 16 / Lanes::N>(me, first, count);
            else block<Lanes8, 1>(me, first, count);
        }
    }

    template <class L, int NV>
    void block(int me, i64 first, int count) {
        constexpr int N = NV * L::N;
        float* x = own.data() + me * 2 * D * N;
        for (int lane = 0; lane < N; lane++)
            for (i64 d = 0; d < D; d++) x[d * N + lane] = hidden[(first + (lane < count ? lane : 0)) * D + d];
        const float* read = prepare<T, L, N>(x, x + D * N, D);
        const Part mine = part_of(chunks, 1, me, team.size);
        for (i64 c = mine.first; c < mine.last; c++) {
            linear<T, L, NV>({weight}, read, z.data(), D, c * IDS, std::min(V, (c + 1) * IDS));
            for (int v = 0; v < NV; v++) reduce<L, N>(c, v * L::N);
        }
        team.meet();
        const Part lanes = part_of(count, 1, me, team.size);
        for (int lane = lanes.first; lane < lanes.last; lane++) draw<N>(lane, first + lane);
        team.meet();
    }

    // Reduce a chunk's logits, of a vector of lanes, to the largest, its id and Σ exp; they become their exponentials.
    template <class L, int N>
    void reduce(i64 c, int lane) {
        typedef typename L::V Lane;
        typedef typename L::Wide Wide;
        const i64 begin = c * IDS, end = std::min(V, begin + IDS);
        Lane high = L::load(&z[begin * N + lane]);
        for (i64 v = begin + 1; v < end; v++) {
            Lane x = L::load(&z[v * N + lane]);
            high = high > x ? high : x;
        }
        typename L::B at = {};
        for (i64 v = end - 1; v >= begin; v--) {
            auto equal = L::load(&z[v * N + lane]) == high;
            at = equal ? at * 0 + (uint32_t)v : at;
        }
        Wide total = {};
        for (i64 v = begin; v < end; v++) {
            Lane e = exp((L::load(&z[v * N + lane]) - high) * inverse);
            store(&z[v * N + lane], e);
            total += __builtin_convertvector(e, Wide);
        }
        for (int i = 0; i < L::N; i++) {
            top[c * N + lane + i] = high[i], sum[c * N + lane + i] = total[i], best[c * N + lane + i] = at[i];
        }
    }

    // Draw one lane's id: the first whose cumulated probability exceeds its uniform number.
    template <int N>
    void draw(int lane, i64 row) {
        float high = top[lane];
        i64 id = best[lane], c = 0;
        for (i64 i = 1; i < chunks; i++)
            if (top[i * N + lane] > high) high = top[i * N + lane], id = best[i * N + lane], c = i;
        auto share = [&](i64 i) { return std::exp(((double)top[i * N + lane] - high) * inverse); };
        double total = 0.0;
        for (i64 i = 0; i < chunks; i++) total += sum[i * N + lane] * share(i);
        if (temperature > 0) {
            double left = (double)uniforms[row] * total;  // what the ids before the drawn one add up to, at most
            c = 0;
            while (c + 1 < chunks && !(sum[c * N + lane] * share(c) > left)) left -= sum[c * N + lane] * share(c), c++;
            const i64 end = std::min(V, (c + 1) * IDS);
            double target = left / share(c), cdf = 0.0;
            for (i64 v = c * IDS; v < end && cdf <= target; v++) {
                cdf += z[v * N + lane];
                if (z[v * N + lane] > 0) id = v;  // the last possible one, should rounding leave none
            }
        }
        ids[row] = id;
        logprobs[row] = (float)std::log(z[id * N + lane] * share(c) / total);
    }
};

template <class T>
void draw_all(const float* hidden, const void* weight, const float* uniforms, float temperature, i64 R, i64 D, i64 V,
              i64 threads, i64* ids, float* logprobs) {
    Team& team = Team::of_this_process();
    Draws<T> draws(hidden, weight, uniforms, temperature, R, D, V, ids, logprobs, threads, team);
    team.run(threads, [&](int me) { draws.run(me); });
}

}  // namespace

extern "C" {

// Compute the tokens' hidden states after the final norm; -1, or the first token that stands outside cache or table.
// `half`: weights and cache are bf16. DH is 16, 32, 64 or 128; with bf16 all widths are even.
i64 forward(const Model* m, const Layer* layers, const Tokens* t, i64 half, i64 threads) {
    for (i64 i = 0; i < t->N; i++) {
        bool inside = 0 <= t->rows[i] && t->rows[i] < t->B && 0 <= t->slots[i] && t->slots[i] < t->capacity;
        if (!inside || t->positions[i] < 0 || t->positions[i] >= m->positions || t->ids[i] < 0 || t->ids[i] >= m->V)
            return i;
    }
    half ? compute<bf16>(*m, layers, *t, threads) : compute<float>(*m, layers, *t, threads);
    return -1;
}

// Draw an id for each row of hidden (R, D) from softmax(hidden @ weight.T / temperature), at uniforms (R,); temperature
// 0 takes the likeliest. ids (R,), and logprobs (R,). `half`: weight (V, D) is bf16, and hidden is rounded to it.
void sample(const float* hidden, const void* weight, i64 half, const float* uniforms, float temperature, i64 R, i64 D,
            i64 V, i64 threads, i64* ids, float* logprobs) {
    auto run = half ? draw_all<bf16> : draw_all<float>;
    run(hidden, weight, uniforms, temperature, R, D, V, threads, ids, logprobs);
}

}  // extern "C"
