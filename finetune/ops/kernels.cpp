// What a CPU computes besides its large matrix multiplications: attention within the examples of a packed
// row, norms, rotary positions, gated activations, the passes over the vocabulary, int8 weights.
//
// Of short examples, calling a library takes longer than what it computes, and each pass over a tensor costs
// as much as a multiplication. Here everything is computed once, in fp32, while it lies in a core's cache,
// and results are rounded once, to the type T of the inputs: fp32 or bf16. `kernels.py` compiles and calls
// this file. Nothing depends on the number of threads: sums are made in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// To the nearest, ties to even; what is no number stays none.
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

// e^x for x <= 88, to 2e-7 of it: 2^n e^r with |r| <= ln(2) / 2, and the first terms of e^r's series. Below
// -87, e^-87.
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

// A thread's own memory, kept from call to call: at least `count` numbers from the start of a cache line. To
// have the system hand out fresh pages for each call would cost as much as what is computed.
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
    D_PREFIX,
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

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]; rows in whole TALL, columns in whole LANES.
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

constexpr int64_t BLOCK = 32; // queries at a time

// [tokens, heads, size], the last dimension contiguous.
template <typename T> struct Heads {
    T *data;
    int64_t token, head;
    T *at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// An example, with the `before` tokens of the row's beginning that it sees too; or that beginning itself.
struct Sequence {
    int64_t first, count, before;
    int64_t keys() const { return before + count; }
    int64_t width() const { return round_up(keys(), LANES); }
    int64_t token(int64_t key) const { return key < before ? key : first + key - before; }
};

std::vector<Sequence> sequences_of(const int64_t *lengths, int64_t count, int64_t prefix) {
    std::vector<Sequence> sequences;
    if (prefix > 0)
        sequences.push_back({0, prefix, 0});
    int64_t first = prefix;
    for (int64_t i = 0; i < count; first += lengths[i++])
        sequences.push_back({first, lengths[i], prefix});
    return sequences;
}

int64_t widest_of(const std::vector<Sequence> &sequences) {
    int64_t widest = 0;
    for (const Sequence &s : sequences)
        widest = std::max(widest, s.width());
    return widest;
}

// `size` numbers as fp32, filled up with zeros.
template <typename T> inline void load(const T *from, float scale, int64_t size, int64_t padded, float *to) {
    for (int64_t d = 0; d < size; d++)
        to[d] = scale * value(from[d]);
    for (int64_t d = size; d < padded; d++)
        to[d] = 0;
}

// The keys or values that a sequence sees: fp32 rows [width, padded], filled up with zeros.
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

// Of a block, `count` queries or gradients of outputs: fp32 [count, padded], filled up to whole TALL with
// zeros.
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

// row [width] of scores becomes the softmax of its first `visible`, and zeros.
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

// d [width], the gradient of probabilities p, becomes that of the scores.
void softmax_backward(const float *p, float *d, int64_t width) {
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < width; j++)
        mean += p[j] * d[j];
    for (int64_t j = 0; j < width; j++)
        d[j] = p[j] * (d[j] - mean);
}

// The probabilities [count, width] of `count` queries [count, padded], of which the first is the sequence's
// number `start`.
void probabilities(const Sequence &s, const float *queries, const float *key_columns, int64_t start,
                   int64_t count, int64_t padded, float *p, int64_t width) {
    multiply({queries, padded, 1}, key_columns, s.width(), p, width, round_up(count, TALL), width, padded,
             false);
    for (int64_t i = 0; i < count; i++)
        softmax(p + i * width, s.before + start + i + 1, width);
}

// q [tokens, heads, size], k and v [tokens, key_heads, size]: `strides` has those of tokens and of heads, of
// each in turn. `lengths` [count] of the examples behind the `prefix` tokens that all begin with.
template <typename T>
void attention_forward(const T *q, const T *k, const T *v, T *out, const int64_t *strides,
                       const int64_t *lengths, int64_t count, int64_t prefix, int64_t heads,
                       int64_t key_heads, int64_t size, float scale, int64_t threads) {
    const Heads<const T> queries{q, strides[0], strides[1]};
    const Heads<const T> keys{k, strides[2], strides[3]}, values{v, strides[4], strides[5]};
    const Heads<T> outputs{out, heads * size, size};
    const auto sequences = sequences_of(lengths, count, prefix);
    const int64_t num = sequences.size(), widest = widest_of(sequences);
    const int64_t padded = round_up(size, LANES), group = heads / key_heads;
#pragma omp parallel num_threads(threads)
    {
        float *const key_rows = memory(KEYS, widest * padded);
        float *const value_rows = memory(VALUES, widest * padded);
        float *const key_columns = memory(KEY_COLUMNS, widest * padded);
        float *const p = memory(P, BLOCK * widest);
        float *const block = memory(QUERIES, BLOCK * padded), *const result = memory(RESULT, BLOCK * padded);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < num; n++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                const Sequence &s = sequences[n];
                gather(s, keys, key_head, size, padded, key_rows);
                gather(s, values, key_head, size, padded, value_rows);
                transpose(key_rows, s.width(), padded, key_columns);
                for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
                    for (int64_t start = 0; start < s.count; start += BLOCK) {
                        const int64_t here = std::min(BLOCK, s.count - start), rows = round_up(here, TALL);
                        const int64_t seen = s.before + start + here, width = round_up(seen, LANES);
                        load_block(queries, s.first + start, here, h, size, padded, scale, block);
                        probabilities(s, block, key_columns, start, here, padded, p, width);
                        multiply({p, width, 1}, value_rows, padded, result, padded, rows, padded, seen,
                                 false);
                        for (int64_t i = 0; i < here; i++)
                            store_all(result + i * padded, 1, size, outputs.at(s.first + start + i, h));
                    }
            }
    }
}

// With P the probabilities and S the scores: dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)),
// dQ = scale dS K, dK = scale dS' Q. P is computed again. All gradients are contiguous.
template <typename T>
void attention_backward(const T *q, const T *k, const T *v, const T *d_out, T *d_q, T *d_k, T *d_v,
                        const int64_t *strides, const int64_t *lengths, int64_t count, int64_t prefix,
                        int64_t heads, int64_t key_heads, int64_t size, float scale, int64_t threads) {
    const Heads<const T> queries{q, strides[0], strides[1]}, grads{d_out, heads * size, size};
    const Heads<const T> keys{k, strides[2], strides[3]}, values{v, strides[4], strides[5]};
    const Heads<T> d_queries{d_q, heads * size, size};
    const Heads<T> d_keys{d_k, key_heads * size, size}, d_values{d_v, key_heads * size, size};
    const auto sequences = sequences_of(lengths, count, prefix);
    const int64_t num = sequences.size(), widest = widest_of(sequences);
    const int64_t padded = round_up(size, LANES), group = heads / key_heads;
    // What each sequence adds to the gradients of what all begin with: to its keys, then to its values.
    const int64_t of_prefix = prefix * padded;
    float *const d_prefix = memory(D_PREFIX, num * key_heads * 2 * of_prefix);
#pragma omp parallel num_threads(threads)
    {
        float *const key_rows = memory(KEYS, widest * padded);
        float *const value_rows = memory(VALUES, widest * padded);
        float *const key_columns = memory(KEY_COLUMNS, widest * padded);
        float *const value_columns = memory(VALUE_COLUMNS, widest * padded);
        float *const d_key_rows = memory(D_KEYS, widest * padded);
        float *const d_value_rows = memory(D_VALUES, widest * padded);
        float *const block = memory(QUERIES, BLOCK * padded), *const grad = memory(GRADS, BLOCK * padded);
        float *const p = memory(P, BLOCK * widest), *const d_p = memory(D_P, BLOCK * widest);
        float *const result = memory(RESULT, BLOCK * padded);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < num; n++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                const Sequence &s = sequences[n];
                gather(s, keys, key_head, size, padded, key_rows);
                gather(s, values, key_head, size, padded, value_rows);
                transpose(key_rows, s.width(), padded, key_columns);
                transpose(value_rows, s.width(), padded, value_columns);
                std::fill(d_key_rows, d_key_rows + s.width() * padded, 0.0f);
                std::fill(d_value_rows, d_value_rows + s.width() * padded, 0.0f);
                for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
                    for (int64_t start = 0; start < s.count; start += BLOCK) {
                        const int64_t here = std::min(BLOCK, s.count - start), rows = round_up(here, TALL);
                        const int64_t seen = s.before + start + here, width = round_up(seen, LANES);
                        load_block(queries, s.first + start, here, h, size, padded, scale, block);
                        load_block(grads, s.first + start, here, h, size, padded, 1, grad);
                        probabilities(s, block, key_columns, start, here, padded, p, width);
                        multiply({p, 1, width}, grad, padded, d_value_rows, padded, width, padded, here,
                                 true);
                        multiply({grad, padded, 1}, value_columns, s.width(), d_p, width, rows, width, padded,
                                 false);
                        for (int64_t i = 0; i < here; i++)
                            softmax_backward(p + i * width, d_p + i * width, width);
                        multiply({d_p, 1, width}, block, padded, d_key_rows, padded, width, padded, here,
                                 true);
                        multiply({d_p, width, 1}, key_rows, padded, result, padded, rows, padded, seen,
                                 false);
                        for (int64_t i = 0; i < here; i++)
                            store_all(result + i * padded, scale, size, d_queries.at(s.first + start + i, h));
                    }
                float *const shared = d_prefix + (n * key_heads + key_head) * 2 * of_prefix;
                std::copy(d_key_rows, d_key_rows + of_prefix, shared);
                std::copy(d_value_rows, d_value_rows + of_prefix, shared + of_prefix);
                for (int64_t j = prefix; j < s.keys(); j++) { // scaled already, since the queries were
                    store_all(d_key_rows + j * padded, 1, size, d_keys.at(s.token(j), key_head));
                    store_all(d_value_rows + j * padded, 1, size, d_values.at(s.token(j), key_head));
                }
            }
#pragma omp for collapse(2)
        for (int64_t j = 0; j < prefix; j++)
            for (int64_t key_head = 0; key_head < key_heads; key_head++) {
                float *const first = d_prefix + key_head * 2 * of_prefix + j * padded;
                for (int64_t n = 1; n < num; n++) {
                    const float *const more = first + n * key_heads * 2 * of_prefix;
                    for (int64_t d = 0; d < padded; d++) {
                        first[d] += more[d];
                        first[of_prefix + d] += more[of_prefix + d];
                    }
                }
                store_all(first, 1, size, d_keys.at(j, key_head));
                store_all(first + of_prefix, 1, size, d_values.at(j, key_head));
            }
    }
}

// ---- Norms, rotary positions, gated activations ----

// y = w x / sqrt(mean(x^2) + eps) of each row, rounded before w as well, as models do; scales [rows].
template <typename T>
void norm_forward(const T *x, const T *weight, T *y, float *scales, int64_t rows, int64_t size, float eps,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *from = x + i * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < size; d++)
            sum += value(from[d]) * value(from[d]);
        const float scale = 1 / std::sqrt(sum / size + eps);
        scales[i] = scale;
        for (int64_t d = 0; d < size; d++)
            store(y[i * size + d], value(weight[d]) * rounded<T>(scale * value(from[d])));
    }
}

// The gradient less its part along x, scaled.
template <typename T>
void norm_backward(const T *x, const T *weight, const float *scales, const T *dy, T *dx, int64_t rows,
                   int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *from = x + i * size, *grad = dy + i * size;
        const float scale = scales[i];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < size; d++)
            along += value(weight[d]) * value(grad[d]) * scale * value(from[d]);
        along /= size;
        for (int64_t d = 0; d < size; d++)
            store(dx[i * size + d],
                  scale * (value(weight[d]) * value(grad[d]) - along * scale * value(from[d])));
    }
}

// Halves (a, b) of x's heads become (a cos - b sin, b cos + a sin); direction -1 turns back. x, y
// [tokens, heads, size]; cos, sin [tokens, size], of which the first halves count.
template <typename T>
void rotate(const T *x, const T *cos, const T *sin, T *y, int64_t tokens, int64_t heads, int64_t size,
            float direction, int64_t threads) {
    const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + (t * heads + h) * size, *c = cos + t * size, *s = sin + t * size;
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

// y = silu(gate) up
template <typename T> void silu_forward(const T *gate, const T *up, T *y, int64_t count, int64_t threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < count; i++)
        store(y[i], value(gate[i]) * sigmoid(value(gate[i])) * value(up[i]));
}

template <typename T>
void silu_backward(const T *gate, const T *up, const T *dy, T *d_gate, T *d_up, int64_t count,
                   int64_t threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        const float x = value(gate[i]), share = sigmoid(x), grad = value(dy[i]);
        store(d_up[i], grad * x * share);
        store(d_gate[i], grad * value(up[i]) * share * (1 + x * (1 - share)));
    }
}

// ---- The vocabulary ----

// Of each row of logits and its target: nll and entropy in nats, and 1 where the target is the first of the
// largest. With `gradient` the logits become what the nll's gradient is: softmax - one_hot(target).
template <typename T>
void token_stats(T *logits, const int64_t *targets, float *values, int64_t rows, int64_t size,
                  int64_t gradient, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        T *row = logits + i * size;
        const int64_t target = targets[i];
        const float own = value(row[target]);
        float most = value(row[0]), sum = 0, mean = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < size; j++)
            most = value(row[j]) > most ? value(row[j]) : most;
#pragma omp simd reduction(+ : sum, mean)
        for (int64_t j = 0; j < size; j++) {
            float x = value(row[j]) - most;
            x = x < -87 ? -87 : x; // so that of -infinity 0 remains
            const float e = exponential(x);
            sum += e;
            mean += e * x;
        }
        int64_t as_large_before = own < most;
        if (own == most)
            for (int64_t j = 0; j < target; j++)
                as_large_before += value(row[j]) == most;
        values[3 * i] = std::log(sum) - (own - most);
        values[3 * i + 1] = std::log(sum) - mean / sum;
        values[3 * i + 2] = as_large_before == 0 && own == most;
        if (gradient) {
            const float share = 1 / sum;
            for (int64_t j = 0; j < size; j++)
                store(row[j], share * exponential(value(row[j]) - most));
            store(row[target], share * exponential(own - most) - 1);
        }
    }
}

// ---- int8 weights ----

// codes [rows, size] by scales [rows].
template <typename T>
void scale_rows(const int8_t *codes, const float *scales, T *weight, int64_t rows, int64_t size,
                int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < size; d++)
            store(weight[i * size + d], float(codes[i * size + d]) * scales[i]);
}

} // namespace

// As pointers: of fp32 and of bf16.
#define EXPORT(name) extern "C" void *const name##_of[] = {(void *)name<float>, (void *)name<bf16>};

EXPORT(attention_forward)
EXPORT(attention_backward)
EXPORT(norm_forward)
EXPORT(norm_backward)
EXPORT(rotate)
EXPORT(silu_forward)
EXPORT(silu_backward)
EXPORT(token_stats)
EXPORT(scale_rows)
