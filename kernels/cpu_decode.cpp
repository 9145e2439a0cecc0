// The decode step of a small model, whole, on one CPU core: cpu.py says what it computes and why it is here.
//
// A block is up to 32 tokens ("lanes"), each the newest of some row of the KV cache. Activations lie feature by
// feature, x[feature][lane], so that every operation but attention is vertical: one vector instruction serves 16 lanes,
// weights are read as they are stored, and nothing is summed across a vector. A block's activations fit in the cache.

#include "cpu_vectors.h"

typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(128)));
typedef i64 Long __attribute__((vector_size(128)));

namespace {

constexpr int QUERIES = 4;  // that share one read of keys and values

// ------------------------------------------------------------------------------------------ products, norms, the gate

// y[o][lane] = Σ_i w[o][i] x[i][lane] + bias[o], for OUT rows of w; `add`: on top of what y holds.
template <int NV, int OUT>
inline void products(const float* w, const float* bias, const float* x, float* y, int in, bool add) {
    Vec total[OUT][NV];
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) {
            total[o][v] = all(bias ? bias[o] : 0.0f);
            if (add) total[o][v] += load(y + (o * NV + v) * W);
        }
    for (int start = 0; start < in; start += PART) {
        Vec sum[OUT][NV] = {};
        for (int i = start; i < std::min(in, start + PART); i++) {
            Vec column[NV];
            for (int v = 0; v < NV; v++) column[v] = load(x + (i * NV + v) * W);
            for (int o = 0; o < OUT; o++)
                for (int v = 0; v < NV; v++) sum[o][v] += w[(i64)o * in + i] * column[v];
        }
        for (int o = 0; o < OUT; o++)
            for (int v = 0; v < NV; v++) total[o][v] += sum[o][v];
    }
    for (int o = 0; o < OUT; o++)
        for (int v = 0; v < NV; v++) store(y + (o * NV + v) * W, total[o][v]);
}

template <int NV>
void linear(const float* w, const float* bias, const float* x, float* y, int out, int in, bool add = false) {
    int o = 0;
    for (; o + 8 <= out; o += 8)
        products<NV, 8>(w + (i64)o * in, bias ? bias + o : nullptr, x, y + o * NV * W, in, add);
    for (; o < out; o++) products<NV, 1>(w + (i64)o * in, bias ? bias + o : nullptr, x, y + o * NV * W, in, add);
}

// y = weight * x / sqrt(mean(x^2) + eps), over the D features of each lane.
template <int NV>
void rmsnorm(const float* x, const float* weight, float* y, int D, float eps) {
    for (int v = 0; v < NV; v++) {
        Vec sum = all(0.0f), r;
        for (int d = 0; d < D; d++) sum += load(x + (d * NV + v) * W) * load(x + (d * NV + v) * W);
        for (int lane = 0; lane < W; lane++) r[lane] = 1.0f / std::sqrt(sum[lane] / D + eps);
        for (int d = 0; d < D; d++) store(y + (d * NV + v) * W, weight[d] * (load(x + (d * NV + v) * W) * r));
    }
}

void gate(const float* up, float* a, i64 count) {  // a = a σ(a) up
    for (i64 i = 0; i < count; i += W) {
        Vec x = load(a + i);
        store(a + i, x / (1.0f + exp(-x)) * load(up + i));
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

inline Vec4 fold(Vec x) {  // 16 partial sums to 4
    Vec8 half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

inline Vec4 sums_of(Vec4 a, Vec4 b, Vec4 c, Vec4 d) {  // of each of four
    Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);  // a b a b
    Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Slots of one row and KV head: count of them, `step` floats apart. Keys and values are read once a step, from memory,
// which is faster with two streams under way than with one: while keys are read, the same slots' values are fetched, and
// while these are weighed, the keys of the head that comes next.
struct Slots {
    const float *keys, *values;
    i64 step;
    int count;
    const float* next;  // keys that are read afterwards; null: nothing is fetched
};

inline void fetch(const float* x, int floats) {
    for (int i = 0; i < floats; i += W) __builtin_prefetch(x + i);
}

// z[query][slot] = q · k, for Q queries (each DH floats) at once.
template <int DH, int Q>
void scores(const float* const* q, Slots s, float* const* z) {
    constexpr int NV = DH / W;
    Vec query[Q][NV];
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < NV; v++) query[j][v] = load(q[j] + v * W);
    auto dot = [&](int j, const float* key) {
        Vec sum = query[j][0] * load(key);
        for (int v = 1; v < NV; v++) sum += query[j][v] * load(key + v * W);
        return fold(sum);
    };
    int i = 0;
    for (; i + 4 <= s.count; i += 4) {
        const float* key = s.keys + i * s.step;
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
template <int DH, int Q>
void weigh(float* const* p, Slots s, float* const* out) {
    constexpr int NV = DH / W;
    for (int start = 0; start < s.count; start += PART) {
        Vec sum[Q][NV] = {};
        for (int i = start; i < std::min(s.count, start + PART); i++) {
            const float* value = s.values + i * s.step;
            if (s.next) fetch(s.next + i * s.step, DH);
            for (int v = 0; v < NV; v++) {
                Vec x = load(value + v * W);
                for (int j = 0; j < Q; j++) sum[j][v] += p[j][i] * x;
            }
        }
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < NV; v++) store(out[j] + v * W, load(out[j] + v * W) + sum[j][v]);
    }
}

// Turn scores into probabilities: z = exp((z - max) scale) / Σ
void softmax(float* z, int count, float scale) {
    float top = z[0];
    for (int i = 1; i < count; i++) top = std::max(top, z[i]);
    int i = 0;
    Vec sums = all(0.0f);
    for (; i + W <= count; i += W) {
        Vec e = exp((load(z + i) - top) * scale);
        store(z + i, e);
        sums += e;
    }
    float sum = 0.0f;
    for (; i < count; i++) sum += z[i] = std::exp((z[i] - top) * scale);
    for (int lane = 0; lane < W; lane++) sum += sums[lane];
    for (int j = 0; j < count; j++) z[j] *= 1.0f / sum;
}

// A query sees the first `shared` slots of its row, and then every nth from `first` on.
struct Sight {
    int shared, first, own;
};

// Attend with Q queries of one row and KV head: what all see is read once for all.
template <int DH, int Q>
void attend(const float* const* q, const Sight* sight, const float* keys, const float* values, i64 capacity, int n,
            float scale, float* work, i64 width, float* const* out) {
    int common = sight[0].shared;
    for (int j = 1; j < Q; j++) common = std::min(common, sight[j].shared);
    float* z[Q];
    Slots rest[Q];
    for (int j = 0; j < Q; j++) {
        z[j] = work + j * width;
        bool more = sight[j].shared > common;  // a prompt's own tokens: each sees one more than the one before it
        i64 first = more ? common : sight[j].first, step = more ? DH : (i64)n * DH;
        rest[j] = {keys + first * DH, values + first * DH, step, more ? sight[j].shared - common : sight[j].own,
                   nullptr};
    }
    Slots prefix = {keys, values, DH, common, keys + capacity * DH};  // the next head's, or the next row's
    scores<DH, Q>(q, prefix, z);
    for (int j = 0; j < Q; j++) {
        float* own[1] = {z[j] + common};
        scores<DH, 1>(q + j, rest[j], own);
        softmax(z[j], common + rest[j].count, scale);
        std::fill(out[j], out[j] + DH, 0.0f);
    }
    weigh<DH, Q>(z, prefix, out);
    for (int j = 0; j < Q; j++) {
        float* own[1] = {z[j] + common};
        weigh<DH, 1>(own, rest[j], out + j);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- the model

struct Layer {  // weights as Hugging Face stores them: (out, in)
    const float *norm1, *q, *q_bias, *k, *k_bias, *v, *v_bias, *o, *norm2, *gate, *up, *down;
    float *keys, *values;  // (B, HKV, capacity, DH)
};

struct Model {
    i64 layers, D, H, HKV, inner, V, positions;
    float eps, unused;
    const float *embedding, *norm, *cos, *sin;  // (V, D), (D,), (positions, DH / 2) twice
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

template <int DH>
struct Step {
    const Model& m;
    const Tokens& t;
    i64 width;  // floats that a query's scores may take
    std::vector<float> work;

    Step(const Model& m, const Tokens& t) : m(m), t(t), width(t.capacity + W) {}

    // Compute tokens [first, first + count), count <= NV * W; lanes in excess repeat the first.
    template <int NV>
    void block(const Layer* layers, i64 first, int count) {
        constexpr int LANES = NV * W;
        const i64 D = m.D, QD = m.H * DH, KD = m.HKV * DH, HALF = DH / 2;
        work.resize(LANES * (2 * D + QD + 2 * KD + 2 * m.inner + 2 * HALF + 2 * QD) + QUERIES * width);
        float *x = work.data(), *y = x + LANES * D, *q = y + LANES * D, *k = q + LANES * QD, *v = k + LANES * KD;
        float *up = v + LANES * KD, *inner = up + LANES * m.inner, *cos = inner + LANES * m.inner;
        float *sin = cos + LANES * HALF, *q_rows = sin + LANES * HALF, *out = q_rows + LANES * QD;
        float* z = out + LANES * QD;
        for (int lane = 0; lane < LANES; lane++) {
            i64 token = first + (lane < count ? lane : 0), p = t.positions[token] * HALF;
            for (i64 d = 0; d < D; d++) x[d * LANES + lane] = m.embedding[t.ids[token] * D + d];
            for (i64 i = 0; i < HALF; i++)
                cos[i * LANES + lane] = m.cos[p + i], sin[i * LANES + lane] = m.sin[p + i];
        }
        for (i64 l = 0; l < m.layers; l++) {
            const Layer& w = layers[l];
            rmsnorm<NV>(x, w.norm1, y, D, m.eps);
            linear<NV>(w.q, w.q_bias, y, q, QD, D);
            linear<NV>(w.k, w.k_bias, y, k, KD, D);
            linear<NV>(w.v, w.v_bias, y, v, KD, D);
            turn<NV>(q, cos, sin, m.H);
            turn<NV>(k, cos, sin, m.HKV);
            cache<NV>(w, k, v, first, count);
            for (i64 d = 0; d < QD; d++)
                for (int lane = 0; lane < count; lane++) q_rows[lane * QD + d] = q[d * LANES + lane];
            for (int lane = 0; lane < count;) {
                int size = 1;  // lanes of one row share what is read of it
                while (lane + size < count && t.rows[first + lane + size] == t.rows[first + lane]) size++;
                attend_row(w, first + lane, size, q_rows + lane * QD, z, out + lane * QD);
                lane += size;
            }
            for (i64 d = 0; d < QD; d++)
                for (int lane = 0; lane < LANES; lane++) q[d * LANES + lane] = lane < count ? out[lane * QD + d] : 0.0f;
            linear<NV>(w.o, nullptr, q, x, D, QD, true);
            rmsnorm<NV>(x, w.norm2, y, D, m.eps);
            linear<NV>(w.gate, nullptr, y, inner, m.inner, D);
            linear<NV>(w.up, nullptr, y, up, m.inner, D);
            gate(up, inner, m.inner * LANES);
            linear<NV>(w.down, nullptr, inner, x, D, m.inner, true);
        }
        rmsnorm<NV>(x, m.norm, y, D, m.eps);
        for (int lane = 0; lane < count; lane++)
            for (i64 d = 0; d < D; d++) t.hidden[(first + lane) * D + d] = y[d * LANES + lane];
    }

    // Rotary positions: channels i and i + DH/2 of each head are a pair.
    template <int NV>
    void turn(float* x, const float* cos, const float* sin, i64 heads) {
        for (i64 h = 0; h < heads; h++)
            for (int i = 0; i < DH / 2; i++)
                for (int v = 0; v < NV; v++) {
                    float *a = x + ((h * DH + i) * NV + v) * W, *b = a + DH / 2 * NV * W;
                    Vec c = load(cos + (i * NV + v) * W), s = load(sin + (i * NV + v) * W);
                    Vec x1 = load(a), x2 = load(b);
                    store(a, x1 * c - x2 * s);
                    store(b, x2 * c + x1 * s);
                }
    }

    template <int NV>
    void cache(const Layer& w, const float* k, const float* v, i64 first, int count) {
        for (int lane = 0; lane < count; lane++)
            for (i64 h = 0; h < m.HKV; h++) {
                i64 token = first + lane, at = ((t.rows[token] * m.HKV + h) * t.capacity + t.slots[token]) * DH;
                for (int d = 0; d < DH; d++) {
                    w.keys[at + d] = k[(h * DH + d) * NV * W + lane];
                    w.values[at + d] = v[(h * DH + d) * NV * W + lane];
                }
            }
    }

    // Attend with `size` tokens of one row; q and out are (size, H, DH).
    void attend_row(const Layer& w, i64 first, int size, const float* q, float* z, float* out) {
        const i64 G = m.H / m.HKV;
        for (i64 h = 0; h < m.HKV; h++) {
            i64 at = (t.rows[first] * m.HKV + h) * t.capacity * DH;
            for (i64 j = 0; j < size * G; j += QUERIES) {
                int some = std::min<i64>(QUERIES, size * G - j);
                const float* queries[QUERIES];
                float* found[QUERIES];
                Sight sight[QUERIES];
                for (int i = 0; i < some; i++) {
                    i64 lane = (j + i) / G, head = h * G + (j + i) % G;
                    queries[i] = q + (lane * m.H + head) * DH;
                    found[i] = out + (lane * m.H + head) * DH;
                    sight[i] = sight_of(t, first + lane);
                }
                const float *keys = w.keys + at, *values = w.values + at, scale = 1.0f / std::sqrt((float)DH);
                auto call = some == 4 ? attend<DH, 4> : some == 3 ? attend<DH, 3>
                            : some == 2 ? attend<DH, 2> : attend<DH, 1>;
                call(queries, sight, keys, values, t.capacity, t.n, scale, z, width, found);
            }
        }
    }
};

template <int DH>
void compute(const Model& m, const Layer* layers, const Tokens& t) {
    Step<DH> step(m, t);
    for (i64 first = 0; first < t.N; first += 2 * W) {
        int count = std::min<i64>(2 * W, t.N - first);
        count > W ? step.template block<2>(layers, first, count) : step.template block<1>(layers, first, count);
    }
}

}  // namespace

extern "C" {

// Compute the tokens' hidden states after the final norm; -1, or the first token that stands outside cache or table.
// head_dim is 16, 32, 64 or 128.
i64 forward(const Model* m, const Layer* layers, const Tokens* t, i64 head_dim) {
    for (i64 i = 0; i < t->N; i++) {
        bool inside = 0 <= t->rows[i] && t->rows[i] < t->B && 0 <= t->slots[i] && t->slots[i] < t->capacity;
        if (!inside || t->positions[i] < 0 || t->positions[i] >= m->positions || t->ids[i] < 0 || t->ids[i] >= m->V)
            return i;
    }
    auto run = head_dim == 16 ? compute<16> : head_dim == 32 ? compute<32>
               : head_dim == 64 ? compute<64> : compute<128>;
    run(*m, layers, *t);
    return -1;
}

// Draw an id for each row of hidden (R, D): the first whose cumulated probability exceeds uniforms[row]; temperature 0
// takes the likeliest. ids (R,), and logprobs (R,): log softmax(hidden @ weight.T / temperature)[id].
void sample(const float* hidden, const float* weight, const float* uniforms, float temperature, i64 R, i64 D, i64 V,
            i64* ids, float* logprobs) {
    std::vector<float> work(W * (D + V));
    float *x = work.data(), *z = x + W * D;
    const float inverse = temperature > 0 ? 1.0f / temperature : 1.0f;
    for (i64 first = 0; first < R; first += W) {
        int count = std::min<i64>(W, R - first);
        for (int lane = 0; lane < W; lane++)
            for (i64 d = 0; d < D; d++) x[d * W + lane] = hidden[(first + (lane < count ? lane : 0)) * D + d];
        linear<1>(weight, nullptr, x, z, V, D);
        Vec top = load(z);
        for (i64 v = 1; v < V; v++) top = larger(top, load(z + v * W));
        Wide sum = {};
        Int best = {};
        for (i64 v = V - 1; v >= 0; v--) best = load(z + v * W) == top ? best * 0 + (int32_t)v : best;
        for (i64 v = 0; v < V; v++) {
            Vec e = exp((load(z + v * W) - top) * inverse);
            store(z + v * W, e);
            sum += __builtin_convertvector(e, Wide);
        }
        if (temperature > 0) {
            Wide target = {}, cdf = {};
            Long below = {};
            for (int lane = 0; lane < count; lane++) target[lane] = (double)uniforms[first + lane] * sum[lane];
            for (i64 v = 0; v < V; v++) {
                cdf += __builtin_convertvector(load(z + v * W), Wide);
                below -= cdf <= target;  // a true comparison is -1
            }
            best = __builtin_convertvector(below, Int);
        }
        for (int lane = 0; lane < count; lane++) {
            ids[first + lane] = best[lane];
            logprobs[first + lane] = (float)std::log((double)z[best[lane] * W + lane] / sum[lane]);
        }
    }
}

}  // extern "C"
