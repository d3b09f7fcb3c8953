// CPU kernels for everything except large matrix multiplications: attention within the examples of a packed
// sequence, norms, rotary positions, gated activations, the passes over the vocabulary, and int8 weights.
//
// For short examples, the overhead of a library call exceeds the time of its computation, and each pass over
// a tensor costs as much as a multiplication. These kernels compute in fp32 while the data is in a core's
// cache, and round each result once to the input type T: fp32 or bf16. `kernels.py` compiles and calls this
// file. Results do not depend on the number of threads, because sums are taken in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float value(float x) { return x; }

inline float value(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float &to, float x) { to = x; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline void store(bf16 &to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t(x == x ? nearest : 0x7fc0);
}

template <typename T> inline float rounded(float x) {
    T result;
    store(result, x);
    return value(result);
}

// e^x for x <= 88, with a relative error of 2e-7: 2^n e^r, where |r| <= ln(2) / 2 and e^r is its truncated
// series. Below -87 the result is e^-87.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = std::rint(x * 1.44269504f);
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f; // ln(2) in two parts
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return e * power;
}

// ---- Small matrix products ----

#ifdef __AVX512F__
constexpr int LANES = 16, WIDE = 4;
#else
constexpr int LANES = 8, WIDE = 2;
#endif
constexpr int TALL = 4; // a tile of TALL x WIDE * LANES sums stays in registers
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct alignas(64) Line {
    float numbers[16];
};

// Thread-local memory that is reused from call to call: at least `count` numbers, aligned to a cache line.
// Fresh pages from the system for each call would cost as much time as the computation.
enum Purpose {
    KEYS,
    KEY_COLUMNS,
    VALUES,
    VALUE_COLUMNS,
    D_KEYS,
    D_VALUES,
    QUERIES,
    GRADS,
    RESULT,
    P,
    D_P,
    D_SHARED,
    PURPOSES
};

float *memory(Purpose purpose, int64_t count) {
    thread_local std::vector<Line> kept[PURPOSES];
    const size_t lines = 1 + count / 16;
    if (kept[purpose].size() < lines) {
        kept[purpose].clear();
        kept[purpose].resize(lines);
    }
    return kept[purpose][0].numbers;
}

struct Strided {
    const float *data;
    int64_t row, column;
};

template <int N>
inline void multiply_tile(Strided a, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t depth,
                          bool add) {
    Lanes sums[TALL][N];
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < N; j++)
            sums[i][j] = add ? *(const Lanes *)(c + i * c_row + j * LANES) : Lanes{};
    for (int64_t k = 0; k < depth; k++) {
        Lanes row[N];
        for (int j = 0; j < N; j++)
            row[j] = *(const Lanes *)(b + k * b_row + j * LANES);
        for (int i = 0; i < TALL; i++) {
            const float factor = a.data[i * a.row + k * a.column];
            for (int j = 0; j < N; j++)
                sums[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < N; j++)
            *(Lanes *)(c + i * c_row + j * LANES) = sums[i][j];
}

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]; rows a multiple of TALL, columns of LANES.
void multiply(Strided a, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t rows,
              int64_t columns, int64_t depth, bool add) {
    for (int64_t j = 0; j < columns; j += WIDE * LANES) {
        const int64_t left = std::min<int64_t>(WIDE, (columns - j) / LANES);
        for (int64_t i = 0; i < rows; i += TALL) {
            const Strided part = {a.data + i * a.row, a.row, a.column};
            float *to = c + i * c_row + j;
            if (left >= 4)
                multiply_tile<4>(part, b + j, b_row, to, c_row, depth, add);
            else if (left == 3)
                multiply_tile<3>(part, b + j, b_row, to, c_row, depth, add);
            else if (left == 2)
                multiply_tile<2>(part, b + j, b_row, to, c_row, depth, add);
            else
                multiply_tile<1>(part, b + j, b_row, to, c_row, depth, add);
        }
    }
}

// ---- Attention ----

constexpr int64_t BLOCK = 32; // queries per block

// [tokens, heads, size], the last dimension contiguous.
template <typename T> struct Heads {
    T *data;
    int64_t token, head;
    T *at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// Consecutive tokens, which also attend to the first `before` keys of an earlier sequence: a shared prefix, an
// example behind it, or a branch that continues the beginning of an example.
struct Sequence {
    int64_t first, count, before;
    const Sequence *parent;
    int64_t shared; // of its own tokens, the first ones that other sequences attend to
    int64_t keys() const { return before + count; }
    int64_t width() const { return round_up(keys(), LANES); }
    int64_t token(int64_t key) const {
        const Sequence *s = this;
        while (key < s->before)
            s = s->parent;
        return s->first + key - s->before;
    }
    bool descends_from(const Sequence *other) const {
        const Sequence *s = this;
        while (s && s != other)
            s = s->parent;
        return s;
    }
};

// segments [count, 4]: the first token of each, their number, the number of its parent, and `before`.
std::vector<Sequence> sequences_of(const int64_t *segments, int64_t count) {
    std::vector<Sequence> sequences;
    sequences.reserve(count); // so that none moves away from those that point to it
    for (int64_t i = 0; i < count; i++, segments += 4) {
        Sequence *const parent = segments[3] > 0 ? &sequences[segments[2]] : nullptr;
        if (parent)
            parent->shared = std::max(parent->shared, segments[3] - parent->before);
        sequences.push_back({segments[0], segments[1], segments[3], parent, 0});
    }
    return sequences;
}

int64_t widest_of(const std::vector<Sequence> &sequences) {
    int64_t widest = 0;
    for (const Sequence &s : sequences)
        widest = std::max(widest, s.width());
    return widest;
}

// `size` numbers as fp32, padded with zeros.
template <typename T> inline void load(const T *from, float scale, int64_t size, int64_t padded, float *to) {
    for (int64_t d = 0; d < size; d++)
        to[d] = scale * value(from[d]);
    for (int64_t d = size; d < padded; d++)
        to[d] = 0;
}

// The keys or values that a sequence attends to: fp32 rows [width, padded], padded with zeros.
template <typename T>
void gather(const Sequence &s, Heads<const T> from, int64_t head, int64_t size, int64_t padded, float *rows) {
    for (int64_t j = 0; j < s.keys(); j++)
        load(from.at(s.token(j), head), 1, size, padded, rows + j * padded);
    std::fill(rows + s.keys() * padded, rows + s.width() * padded, 0.0f);
}

// rows [width, padded] as columns [padded, width]
void transpose(const float *rows, int64_t width, int64_t padded, float *columns) {
    for (int64_t j = 0; j < width; j += LANES)
        for (int64_t d = 0; d < padded; d++)
            for (int64_t i = 0; i < LANES; i++)
                columns[d * width + j + i] = rows[(j + i) * padded + d];
}

// `count` queries of a block, or gradients of its outputs: fp32 [count, padded], padded with zeros to a
// multiple of TALL rows.
template <typename T>
void load_block(Heads<const T> from, int64_t first, int64_t count, int64_t head, int64_t size, int64_t padded,
                float scale, float *to) {
    for (int64_t i = 0; i < count; i++)
        load(from.at(first + i, head), scale, size, padded, to + i * padded);
    std::fill(to + count * padded, to + round_up(count, TALL) * padded, 0.0f);
}

template <typename T> inline void store_all(const float *from, float scale, int64_t size, T *to) {
    for (int64_t d = 0; d < size; d++)
        store(to[d], scale * from[d]);
}

// Replaces row [width] of scores by the softmax of its first `visible` scores, followed by zeros.
void softmax(float *row, int64_t visible, int64_t width) {
    float most = row[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < visible; j++)
        most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < visible; j++) {
        row[j] = exponential(row[j] - most);
        sum += row[j];
    }
    const float share = 1 / sum;
    for (int64_t j = 0; j < visible; j++)
        row[j] *= share;
    for (int64_t j = visible; j < width; j++)
        row[j] = 0;
}

// Replaces d [width], the gradient of the probabilities p, by the gradient of the scores.
void softmax_backward(const float *p, float *d, int64_t width) {
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < width; j++)
        mean += p[j] * d[j];
    for (int64_t j = 0; j < width; j++)
        d[j] = p[j] * (d[j] - mean);
}

// The probabilities [count, width] of `count` queries [count, padded]. The first of them is query `start` of
// the sequence.
void probabilities(const Sequence &s, const float *queries, const float *key_columns, int64_t start,
                   int64_t count, int64_t padded, float *p, int64_t width) {
    multiply({queries, padded, 1}, key_columns, s.width(), p, width, round_up(count, TALL), width, padded,
             false);
    for (int64_t i = 0; i < count; i++)
        softmax(p + i * width, s.before + start + i + 1, width);
}

// The inputs of both passes, and the sizes that follow from them.
template <typename T> struct Attention {
    Heads<const T> queries, keys, values;
    int64_t size;
    float scale;
    std::vector<Sequence> sequences;
    int64_t padded; // size, rounded up to whole LANES
    int64_t group;  // query heads per key head
    int64_t widest; // of the sequences

    // q [tokens, heads, size], k and v [tokens, key_heads, size]. `strides` holds the token stride and the
    // head stride of q, k and v in turn.
    Attention(const T *q, const T *k, const T *v, const int64_t *strides, const int64_t *segments,
              int64_t count, int64_t heads, int64_t key_heads, int64_t size, float scale)
        : queries{q, strides[0], strides[1]}, keys{k, strides[2], strides[3]},
          values{v, strides[4], strides[5]}, size(size), scale(scale),
          sequences(sequences_of(segments, count)), padded(round_up(size, LANES)),
          group(heads / key_heads), widest(widest_of(sequences)) {}
};

// A thread's fp32 copies of the keys and values that a sequence attends to, and of a block of its queries.
template <typename T> struct Workspace {
    const Attention<T> &in;
    float *const keys, *const key_columns, *const values;
    float *const queries, *const p, *const result;

    explicit Workspace(const Attention<T> &in)
        : in(in), keys(memory(KEYS, in.widest * in.padded)),
          key_columns(memory(KEY_COLUMNS, in.widest * in.padded)),
          values(memory(VALUES, in.widest * in.padded)), queries(memory(QUERIES, BLOCK * in.padded)),
          p(memory(P, BLOCK * in.widest)), result(memory(RESULT, BLOCK * in.padded)) {}

    void load_sequence(const Sequence &s, int64_t key_head) const {
        gather(s, in.keys, key_head, in.size, in.padded, keys);
        gather(s, in.values, key_head, in.size, in.padded, values);
        transpose(keys, s.width(), in.padded, key_columns);
    }
};

// A block of a sequence's queries in one head.
struct Block {
    int64_t head, first, count; // of the queries: `first` is a token of the packed sequence
    int64_t rows;               // count, rounded up to whole TALL
    int64_t seen, width;        // keys up to the last query, and that number rounded up to whole LANES
};

// Calls `function` for each block of the query heads that share `key_head`, with the block's queries and
// probabilities in `work`.
template <typename T, typename Function>
inline void for_each_block(const Workspace<T> &work, const Sequence &s, int64_t key_head, Function function) {
    const Attention<T> &in = work.in;
    for (int64_t head = key_head * in.group; head < (key_head + 1) * in.group; head++)
        for (int64_t start = 0; start < s.count; start += BLOCK) {
            const int64_t count = std::min(BLOCK, s.count - start), seen = s.before + start + count;
            const int64_t rows = round_up(count, TALL), width = round_up(seen, LANES);
            const Block block{head, s.first + start, count, rows, seen, width};
            load_block(in.queries, block.first, count, head, in.size, in.padded, in.scale, work.queries);
            probabilities(s, work.queries, work.key_columns, start, count, in.padded, work.p, width);
            function(block);
        }
}

template <typename T>
void attention_forward(const T *q, const T *k, const T *v, T *out, const int64_t *strides,
                       const int64_t *segments, int64_t count, int64_t heads, int64_t key_heads, int64_t size,
                       float scale, int64_t threads) {
    const Attention<T> in(q, k, v, strides, segments, count, heads, key_heads, size, scale);
    const Heads<T> outputs{out, heads * size, size};
    const int64_t num = in.sequences.size(), padded = in.padded;
#pragma omp parallel num_threads(threads)
    {
        const Workspace<T> work(in);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < num; n++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                const Sequence &s = in.sequences[n];
                work.load_sequence(s, key_head);
                for_each_block(work, s, key_head, [&](const Block &b) {
                    multiply({work.p, b.width, 1}, work.values, padded, work.result, padded, b.rows, padded,
                             b.seen, false);
                    for (int64_t i = 0; i < b.count; i++)
                        store_all(work.result + i * padded, 1, size, outputs.at(b.first + i, b.head));
                });
            }
    }
}

// Where the gradients of shared keys and values lie: of each sequence and key head, what it adds to those of its
// first `before + shared` keys, then to their values.
struct SharedKeys {
    std::vector<int64_t> starts, rows;
    std::vector<std::pair<int64_t, int64_t>> keys; // sequence and key of each shared token, in its own sequence
    std::vector<std::vector<int64_t>> descendants; // of each sequence, in order
    int64_t size = 0, padded;

    SharedKeys(const std::vector<Sequence> &sequences, int64_t key_heads, int64_t padded)
        : descendants(sequences.size()), padded(padded) {
        for (size_t n = 0; n < sequences.size(); n++) {
            const Sequence &s = sequences[n];
            starts.push_back(size);
            rows.push_back(s.before + s.shared);
            size += rows[n] * 2 * padded * key_heads;
            for (int64_t j = s.before; j < rows[n]; j++)
                keys.push_back({n, j});
            for (size_t m = n + 1; s.shared > 0 && m < sequences.size(); m++)
                if (sequences[m].descends_from(&s))
                    descendants[n].push_back(m);
        }
    }
    int64_t place(int64_t n, int64_t key_head) const { return starts[n] + key_head * 2 * rows[n] * padded; }
};

// With P the probabilities and S the scores: dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)),
// dQ = scale dS K, dK = scale dS' Q. P is recomputed. All gradients are contiguous.
template <typename T>
void attention_backward(const T *q, const T *k, const T *v, const T *d_out, T *d_q, T *d_k, T *d_v,
                        const int64_t *strides, const int64_t *segments, int64_t count, int64_t heads,
                        int64_t key_heads, int64_t size, float scale, int64_t threads) {
    const Attention<T> in(q, k, v, strides, segments, count, heads, key_heads, size, scale);
    const Heads<const T> grads{d_out, heads * size, size};
    const Heads<T> d_queries{d_q, heads * size, size};
    const Heads<T> d_keys{d_k, key_heads * size, size}, d_values{d_v, key_heads * size, size};
    const int64_t num = in.sequences.size(), padded = in.padded, widest = in.widest;
    const SharedKeys of_sequence(in.sequences, key_heads, padded);
    float *const d_shared = memory(D_SHARED, of_sequence.size);
#pragma omp parallel num_threads(threads)
    {
        const Workspace<T> work(in);
        float *const value_columns = memory(VALUE_COLUMNS, widest * padded);
        float *const d_key_rows = memory(D_KEYS, widest * padded);
        float *const d_value_rows = memory(D_VALUES, widest * padded);
        float *const grad = memory(GRADS, BLOCK * padded), *const d_p = memory(D_P, BLOCK * widest);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < num; n++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                const Sequence &s = in.sequences[n];
                work.load_sequence(s, key_head);
                transpose(work.values, s.width(), padded, value_columns);
                std::fill(d_key_rows, d_key_rows + s.width() * padded, 0.0f);
                std::fill(d_value_rows, d_value_rows + s.width() * padded, 0.0f);
                for_each_block(work, s, key_head, [&](const Block &b) {
                    load_block(grads, b.first, b.count, b.head, size, padded, 1, grad);
                    multiply({work.p, 1, b.width}, grad, padded, d_value_rows, padded, b.width, padded,
                             b.count, true);
                    multiply({grad, padded, 1}, value_columns, s.width(), d_p, b.width, b.rows, b.width,
                             padded, false);
                    for (int64_t i = 0; i < b.count; i++)
                        softmax_backward(work.p + i * b.width, d_p + i * b.width, b.width);
                    multiply({d_p, 1, b.width}, work.queries, padded, d_key_rows, padded, b.width, padded,
                             b.count, true);
                    multiply({d_p, b.width, 1}, work.keys, padded, work.result, padded, b.rows, padded,
                             b.seen, false);
                    for (int64_t i = 0; i < b.count; i++)
                        store_all(work.result + i * padded, scale, size, d_queries.at(b.first + i, b.head));
                });
                const int64_t shared = s.before + s.shared;
                float *const to = d_shared + of_sequence.place(n, key_head);
                std::copy(d_key_rows, d_key_rows + shared * padded, to);
                std::copy(d_value_rows, d_value_rows + shared * padded, to + shared * padded);
                for (int64_t j = shared; j < s.keys(); j++) { // already scaled, as the queries are
                    store_all(d_key_rows + j * padded, 1, size, d_keys.at(s.token(j), key_head));
                    store_all(d_value_rows + j * padded, 1, size, d_values.at(s.token(j), key_head));
                }
            }
        const int64_t num_shared = of_sequence.keys.size();
#pragma omp for collapse(2)
        for (int64_t i = 0; i < num_shared; i++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                const auto [n, j] = of_sequence.keys[i];
                const Sequence &s = in.sequences[n];
                float *const d_key = d_shared + of_sequence.place(n, key_head) + j * padded;
                float *const d_value = d_key + (s.before + s.shared) * padded;
                for (const int64_t m : of_sequence.descendants[n]) {
                    const Sequence &other = in.sequences[m];
                    if (other.before <= j)
                        continue;
                    const float *const more = d_shared + of_sequence.place(m, key_head) + j * padded;
                    const int64_t values = (other.before + other.shared) * padded;
                    for (int64_t d = 0; d < padded; d++) {
                        d_key[d] += more[d];
                        d_value[d] += more[values + d];
                    }
                }
                store_all(d_key, 1, size, d_keys.at(s.token(j), key_head));
                store_all(d_value, 1, size, d_values.at(s.token(j), key_head));
            }
    }
}

// ---- Norms, rotary positions, gated activations ----

// y = w x / sqrt(mean(x^2) + eps) for each row; scales [rows]. With `delta`, x + delta takes the place of x,
// and is stored in `total`.
template <typename T>
void rms_norm(const T *x, const T *delta, const T *weight, T *total, T *y, float *scales, int64_t rows,
              int64_t size, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *from = x + i * size;
        if (delta) {
            for (int64_t d = 0; d < size; d++)
                store(total[i * size + d], value(from[d]) + value(delta[i * size + d]));
            from = total + i * size;
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < size; d++)
            sum += value(from[d]) * value(from[d]);
        const float scale = 1 / std::sqrt(sum / size + eps);
        scales[i] = scale;
        for (int64_t d = 0; d < size; d++)
            store(y[i * size + d], value(weight[d]) * (scale * value(from[d])));
    }
}

template <typename T>
void apply_rms_norm(const T *x, const T *weight, const float *scales, T *y, int64_t rows, int64_t size,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < size; d++)
            store(y[i * size + d], value(weight[d]) * (scales[i] * value(x[i * size + d])));
}

// The gradient minus its component along x, scaled; with `d_total`, plus that.
template <typename T>
void rms_norm_backward(const T *x, const T *weight, const float *scales, const T *dy, const T *d_total, T *dx,
                       int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *from = x + i * size, *grad = dy + i * size;
        const float scale = scales[i];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < size; d++)
            along += value(weight[d]) * value(grad[d]) * scale * value(from[d]);
        along /= size;
        if (d_total)
            for (int64_t d = 0; d < size; d++)
                store(dx[i * size + d],
                      scale * (value(weight[d]) * value(grad[d]) - along * scale * value(from[d])) +
                          value(d_total[i * size + d]));
        else
            for (int64_t d = 0; d < size; d++)
                store(dx[i * size + d],
                      scale * (value(weight[d]) * value(grad[d]) - along * scale * value(from[d])));
    }
}

// The halves (a, b) of each head of x become (a cos - b sin, b cos + a sin); direction -1 rotates back. x
// [tokens, heads, size], its tokens `stride` apart; y [tokens, heads, size]; cos, sin [tokens, size], of which
// only the first halves are read.
template <typename T>
void rotate(const T *x, const T *cos, const T *sin, T *y, int64_t stride, int64_t tokens, int64_t heads,
            int64_t size, float direction, int64_t threads) {
    const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + t * stride + h * size, *c = cos + t * size, *s = sin + t * size;
            T *to = y + (t * heads + h) * size;
#pragma omp simd
            for (int64_t d = 0; d < half; d++) {
                const float a = value(from[d]), b = value(from[half + d]), turn = direction * value(s[d]);
                store(to[d], a * value(c[d]) - b * turn);
                store(to[half + d], b * value(c[d]) + a * turn);
            }
        }
}

inline float sigmoid(float x) { return x < -87 ? 0 : 1 / (1 + exponential(x < -87 ? 87 : -x)); }

// y = silu(gate) up, each [rows, size]; the rows of gate and up are `stride` apart.
template <typename T>
void gated_silu(const T *gate, const T *up, T *y, int64_t stride, int64_t rows, int64_t size,
                int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *g = gate + i * stride, *u = up + i * stride;
#pragma omp simd
        for (int64_t d = 0; d < size; d++)
            store(y[i * size + d], value(g[d]) * sigmoid(value(g[d])) * value(u[d]));
    }
}

// The gradients of gate and up, whose rows are `stride` apart like those of gate and up, and y once more.
template <typename T>
void gated_silu_backward(const T *gate, const T *up, const T *dy, T *d_gate, T *d_up, T *y, int64_t stride,
                         int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *g = gate + i * stride, *u = up + i * stride, *grads = dy + i * size;
        T *dg = d_gate + i * stride, *du = d_up + i * stride, *to = y + i * size;
#pragma omp simd
        for (int64_t d = 0; d < size; d++) {
            const float x = value(g[d]), share = sigmoid(x), grad = value(grads[d]), factor = value(u[d]);
            store(du[d], grad * x * share);
            store(dg[d], grad * factor * share * (1 + x * (1 - share)));
            store(to[d], x * share * factor);
        }
    }
}

// ---- The vocabulary ----

// So many numbers are summed in fp32, and such sums in fp64. A long fp32 sum loses its small terms: over a
// vocabulary of 49,152, that takes 7e-6 from every loss.
constexpr int64_t SUMMED = 512;

// For each row of logits and its target: nll and entropy in nats, and 1 if the target is the argmax (the
// first of equal logits). With `gradient`, the logits become the gradient of the nll: softmax -
// one_hot(target).
template <typename T>
void token_stats(T *logits, const int64_t *targets, float *values, int64_t rows, int64_t size,
                  int64_t gradient, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        T *row = logits + i * size;
        const int64_t target = targets[i];
        const float own = value(row[target]);
        float most = value(row[0]);
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < size; j++)
            most = value(row[j]) > most ? value(row[j]) : most;
        double sum = 0, mean = 0;
        for (int64_t start = 0; start < size; start += SUMMED) {
            const int64_t end = std::min(start + SUMMED, size);
            float some_sum = 0, some_mean = 0;
#pragma omp simd reduction(+ : some_sum, some_mean)
            for (int64_t j = start; j < end; j++) {
                float x = value(row[j]) - most;
                x = x < -87 ? -87 : x; // keeps e * x finite for a logit of -infinity
                const float e = exponential(x);
                some_sum += e;
                some_mean += e * x;
            }
            sum += some_sum;
            mean += some_mean;
        }
        int64_t as_large_before = own < most;
        if (own == most)
            for (int64_t j = 0; j < target; j++)
                as_large_before += value(row[j]) == most;
        values[3 * i] = float(std::log(sum) - (double(own) - most));
        values[3 * i + 1] = float(std::log(sum) - mean / sum);
        values[3 * i + 2] = as_large_before == 0 && own == most;
        if (gradient) {
            const float share = float(1 / sum);
            for (int64_t j = 0; j < size; j++)
                store(row[j], share * exponential(value(row[j]) - most));
            store(row[target], share * exponential(own - most) - 1);
        }
    }
}

// ---- int8 weights ----

// codes [rows, size] times largest [rows] / 127.
template <typename T>
void dequantize_int8(const int8_t *codes, const float *largest, T *weight, int64_t rows, int64_t size,
                     int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const float scale = largest[i] / 127;
        for (int64_t d = 0; d < size; d++)
            store(weight[i * size + d], float(codes[i * size + d]) * scale);
    }
}

// ---- Dropout noise ----

// pool [4 words]: for each 16 bits of the words, all bits set if they are at least `threshold` as a signed
// number, else none. `dropout.py` says which words; M is an integer as wide as T.
template <typename T>
void fill_noise(void *pool, int64_t key, int64_t threshold, int64_t words, int64_t threads) {
    typedef typename std::conditional<sizeof(T) == 4, int32_t, int16_t>::type M;
    M *const masks = static_cast<M *>(pool);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < words; i++) {
        uint64_t z = uint64_t(key) + uint64_t(i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        for (int part = 0; part < 4; part++)
            masks[4 * i + part] = M(-(int16_t(z >> (16 * part)) >= threshold));
    }
}

} // namespace

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C"
#endif

// Exports each kernel as two function pointers: fp32 and bf16.
#define EXPORT(name) EXPORTED void *const name##_of[] = {(void *)name<float>, (void *)name<bf16>};

EXPORT(attention_forward)
EXPORT(attention_backward)
EXPORT(rms_norm)
EXPORT(apply_rms_norm)
EXPORT(rms_norm_backward)
EXPORT(rotate)
EXPORT(gated_silu)
EXPORT(gated_silu_backward)
EXPORT(token_stats)
EXPORT(dequantize_int8)
EXPORT(fill_noise)
