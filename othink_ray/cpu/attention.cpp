// CPU attention over a packed sequence, forward and backward: scores of a few queries at a time, which stay in cache.
// `kernels.py` compiles it for the processor it runs on, and prepares its inputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// As many accumulators as fit in the registers, next to one value of each factor.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PART = 2 * LANES, KEYS = 6, DEEPEST = 256;
constexpr float LOG2_E = 1.44269504f;

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct Block {
    int64_t first, stop;                  // query tokens
    int64_t prefix_start, prefix_stop;    // key tokens visible to all queries (an answer's prompt)
    int64_t segment_start, segment_stop;  // further key tokens; if causal, visible up to the query itself
    int64_t causal;
};

inline vec load(const float* from) { return *(const vec*)from; }
inline void store(float* to, vec value) { *(vec*)to = value; }
inline vec all(float value) { return value - vec{}; }

// 2^x to within 1e-7; 2^-126 for anything smaller.
inline vec exp2_of(vec x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: added, it leaves the integer in the lowest bits
    x = x < all(-126.0f) ? all(-126.0f) : x;
    vec shifted = x + round, rest = x - (shifted - round), power = all(1.5403530e-4f);
    for (float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = power * rest + next;
    return (vec)((ivec)power + ((ivec)shifted << 23));
}

// e^x as in the CPU attention of vLLM (and torch), bit for bit: less accurate than it could be, by up to 1e-6.
inline vec exp_of(vec x) {
    const vec least = all(-87.33655f), inside = x < least ? least : x, nearest = inside * LOG2_E + 0.5f;
    const vec whole = __builtin_convertvector(__builtin_convertvector(nearest, ivec), vec);
    const vec exponent = whole > nearest ? whole - 1.0f : whole, rest = inside - exponent * 0.693147182f;
    vec power = all(0.00828929059f);
    for (float next : {0.0418978221f, 0.166676521f, 0.499991506f, 0.999999701f, 1.0f}) power = rest * power + next;
    power = (vec)((ivec)power + (__builtin_convertvector(exponent, ivec) << 23));
    return x < least ? vec{} : power;
}

// Sum of the lanes by repeated halving, the order of the processor's reduction instructions.
inline float sum_of(vec lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// out[row][key] = start[row] + sum over depth of left[depth][row] * right[depth][key]
void score(const float* left, const float* right, int64_t pitch, int64_t keys, int64_t depth, const float* start,
           float* out, int64_t out_pitch) {
    for (int64_t key = 0; key < keys; key += PART) {
        vec sum[ROWS][2];
        for (int row = 0; row < ROWS; row++) sum[row][0] = sum[row][1] = all(start[row]);
        for (int64_t d = 0; d < depth; d++) {
            vec low = load(right + d * pitch + key), high = load(right + d * pitch + key + LANES);
            for (int row = 0; row < ROWS; row++) {
                vec factor = all(left[d * ROWS + row]);
                sum[row][0] += factor * low, sum[row][1] += factor * high;
            }
        }
        for (int row = 0; row < ROWS; row++)
            store(out + row * out_pitch + key, sum[row][0]), store(out + row * out_pitch + key + LANES, sum[row][1]);
    }
}

// sum[row] += sum over keys of probs[row][key] * values[key]
void gather(const float* probs, int64_t pitch, const float* values, int64_t stride, int64_t keys, vec (&sum)[ROWS][2]) {
    vec local[ROWS][2];
    std::memcpy(local, sum, sizeof local);
    for (int64_t key = 0; key < keys; key++) {
        vec low = load(values + key * stride), high = load(values + key * stride + LANES);
        for (int row = 0; row < ROWS; row++) {
            vec prob = all(probs[row * pitch + key]);
            local[row][0] += prob * low, local[row][1] += prob * high;
        }
    }
    std::memcpy(sum, local, sizeof local);
}

// out[key] += sum over rows of probs[row][key] * rows[row], for COUNT keys
template <int COUNT>
void scatter_keys(const float* probs, int64_t pitch, const float* rows, int64_t depth, float* out, int64_t stride) {
    vec sum[COUNT][2];
    for (int key = 0; key < COUNT; key++)
        sum[key][0] = load(out + key * stride), sum[key][1] = load(out + key * stride + LANES);
    for (int row = 0; row < ROWS; row++) {
        vec low = load(rows + row * depth), high = load(rows + row * depth + LANES);
        for (int key = 0; key < COUNT; key++) {
            vec prob = all(probs[row * pitch + key]);
            sum[key][0] += prob * low, sum[key][1] += prob * high;
        }
    }
    for (int key = 0; key < COUNT; key++)
        store(out + key * stride, sum[key][0]), store(out + key * stride + LANES, sum[key][1]);
}

void scatter(const float* probs, int64_t pitch, const float* rows, int64_t depth, float* out, int64_t stride,
             int64_t keys) {
    int64_t key = 0;
    for (; key + KEYS <= keys; key += KEYS)
        scatter_keys<KEYS>(probs + key, pitch, rows, depth, out + key * stride, stride);
    for (; key < keys; key++) scatter_keys<1>(probs + key, pitch, rows, depth, out + key * stride, stride);
}

}  // namespace

extern "C" {

struct Inputs {
    const float *query, *key, *value;  // D contiguous numbers per head and token
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int64_t tokens, heads, key_heads, depth;
    const Block* blocks;
    int64_t block_count;
    float scale;
    int32_t as_vllm;  // forward rounds as vLLM's kernel does, so that half-precision outputs are equal
};

int64_t part() { return PART; }
int64_t deepest() { return DEEPEST; }
}

namespace {

// Transpose one head's keys or values to [depth][token], zero-padded to `pitch` tokens.
std::vector<float> transposed(const float* from, int64_t stride, int64_t tokens, int64_t depth, int64_t pitch) {
    std::vector<float> to(depth * pitch);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t d = 0; d < depth; d++) to[d * pitch + token] = from[token * stride + d];
    return to;
}

// One key head of the inputs; `room` is the number of scores that a row of a tile may need.
struct Head {
    const Inputs& in;
    int64_t number, each, pitch, room;
    std::vector<float> keys, values;

    Head(const Inputs& in, int64_t number, bool with_values) : in(in), number(number), each(in.heads / in.key_heads) {
        pitch = in.tokens + PART + LANES, room = 0;
        keys = transposed(key(0), in.key_token, in.tokens, in.depth, pitch);
        if (with_values) values = transposed(value(0), in.value_token, in.tokens, in.depth, pitch);
        for (int64_t i = 0; i < in.block_count; i++) {
            const Block& block = in.blocks[i];
            const int64_t seen = block.prefix_stop - block.prefix_start + block.segment_stop - block.segment_start;
            room = std::max(room, seen + PART + LANES);
        }
    }
    const float* key(int64_t token) const { return in.key + number * in.key_head + token * in.key_token; }
    const float* value(int64_t token) const { return in.value + number * in.value_head + token * in.value_token; }
};

// ROWS consecutive queries of a block, token by token, including all query heads that share the key head.
struct Tile {
    const Head& head;
    const Block& block;
    int64_t begin, rows, prefix, segment, seen, end;

    Tile(const Head& head, const Block& block, int64_t begin) : head(head), block(block), begin(begin) {
        rows = std::min<int64_t>(ROWS, (block.stop - block.first) * head.each - begin);
        prefix = block.prefix_stop - block.prefix_start;
        segment = (block.causal ? token(rows - 1) + 1 : block.segment_stop) - block.segment_start;
        seen = prefix + segment, end = (seen + LANES - 1) / LANES * LANES;
    }
    int64_t token(int64_t row) const { return block.first + (begin + row) / head.each; }
    int64_t query_head(int64_t row) const { return head.number * head.each + (begin + row) % head.each; }
    const float* query(int64_t row) const {
        return head.in.query + query_head(row) * head.in.query_head + token(row) * head.in.query_token;
    }
    int64_t index(int64_t row) const { return token(row) * head.in.heads + query_head(row); }  // in (N, heads)

    void dot(const std::vector<float>& right, const float* left, const float* start, float* out) const {
        const int64_t depth = head.in.depth, pitch = head.pitch, room = head.room;
        score(left, right.data() + block.prefix_start, pitch, prefix, depth, start, out, room);
        score(left, right.data() + block.segment_start, pitch, segment, depth, start, out + prefix, room);
    }
    void mask_future(float* scores) const {
        for (int64_t row = 0; row < ROWS; row++) {
            int64_t limit = block.causal && row < rows ? prefix + token(row) + 1 - block.segment_start : seen;
            for (int64_t key = limit; key < end; key++) scores[row * head.room + key] = -INFINITY;
        }
    }
};

// Calls `work` with every tile of one part of the sequence; the parts are about equal in size.
template <class Work>
void for_each_tile(const Head& head, int64_t part, int64_t parts, Work work) {
    int64_t count = 0;
    for (int64_t i = 0; i < head.in.block_count; i++) {
        const Block& block = head.in.blocks[i];
        for (int64_t begin = 0; begin < (block.stop - block.first) * head.each; begin += ROWS)
            if (count++ % parts == part) work(Tile(head, block, begin));
    }
}

}  // namespace

extern "C" {

// out (N, heads, D); logs (N, heads): log2 of each query's softmax denominator (log-sum-exp in base 2).
void forward(const Inputs* inputs, float* out, float* logs, int threads) {
    const Inputs& in = *inputs;
    const int64_t depth = in.depth;
    const bool as_vllm = in.as_vllm;
    const float factor = as_vllm ? in.scale : in.scale * LOG2_E;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t number = 0; number < in.key_heads; number++)
        for (int64_t part = 0; part < threads; part++) {
            Head head(in, number, false);
            std::vector<float> scores(ROWS * head.room);
            for_each_tile(head, part, threads, [&](const Tile& tile) {
                float queries[ROWS * DEEPEST] = {}, zeros[ROWS] = {}, total[ROWS];
                for (int64_t row = 0; row < tile.rows; row++)
                    for (int64_t d = 0; d < depth; d++)
                        queries[d * ROWS + row] = tile.query(row)[d] * factor;
                tile.dot(head.keys, queries, zeros, scores.data());
                tile.mask_future(scores.data());
                for (int64_t row = 0; row < tile.rows; row++) {
                    float *score_row = scores.data() + row * head.room, most = -INFINITY;
                    vec peak = load(score_row), sum = {};
                    for (int64_t key = LANES; key < tile.end; key += LANES)
                        peak = load(score_row + key) > peak ? load(score_row + key) : peak;
                    for (int lane = 0; lane < LANES; lane++) most = std::max(most, peak[lane]);
                    for (int64_t key = 0; key < tile.end; key += LANES) {
                        vec score = load(score_row + key) - most, prob = as_vllm ? exp_of(score) : exp2_of(score);
                        store(score_row + key, prob), sum += prob;
                    }
                    total[row] = 0;
                    for (int lane = 0; lane < LANES; lane++) total[row] += sum[lane];
                    if (as_vllm) total[row] = sum_of(sum), most *= LOG2_E;
                    logs[tile.index(row)] = most + std::log2(total[row]);
                }
                for (int64_t at = 0; at < depth; at += PART) {
                    vec sum[ROWS][2] = {};
                    gather(scores.data(), head.room, head.value(tile.block.prefix_start) + at, in.value_token,
                           tile.prefix, sum);
                    gather(scores.data() + tile.prefix, head.room, head.value(tile.block.segment_start) + at,
                           in.value_token, tile.segment, sum);
                    for (int64_t row = 0; row < tile.rows; row++) {
                        float *to = out + tile.index(row) * depth + at, inverse = 1.0f / total[row];
                        if (as_vllm) store(to, sum[row][0] * inverse), store(to + LANES, sum[row][1] * inverse);
                        else store(to, sum[row][0] / total[row]), store(to + LANES, sum[row][1] / total[row]);
                    }
                }
            });
        }
}

// All gradients are (N, heads, D); those of keys and values are zero-initialized, one per thread, to be summed after.
void backward(const Inputs* inputs, const float* out, const float* logs, const float* grad, float* grad_query,
              float* grad_key, float* grad_value, int threads) {
    const Inputs& in = *inputs;
    const int64_t depth = in.depth, stride = in.key_heads * depth;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t number = 0; number < in.key_heads; number++)
        for (int64_t part = 0; part < threads; part++) {
            Head head(in, number, true);
            std::vector<float> probs(ROWS * head.room), grad_scores(ROWS * head.room);
            float* to_key = grad_key + part * in.tokens * stride + number * depth;
            float* to_value = grad_value + part * in.tokens * stride + number * depth;
            for_each_tile(head, part, threads, [&](const Tile& tile) {
                float queries[ROWS * DEEPEST] = {}, grads[ROWS * DEEPEST] = {};  // [row][depth]
                float queries_t[ROWS * DEEPEST] = {}, grads_t[ROWS * DEEPEST] = {};  // [depth][row]
                float minus_log[ROWS] = {}, minus_mean[ROWS] = {};
                for (int64_t row = 0; row < tile.rows; row++) {
                    const float *query = tile.query(row), *output = out + tile.index(row) * depth;
                    const float* grad_out = grad + tile.index(row) * depth;
                    for (int64_t d = 0; d < depth; d++) {
                        queries[row * depth + d] = query[d] * in.scale;
                        queries_t[d * ROWS + row] = query[d] * (in.scale * LOG2_E);
                        grads[row * depth + d] = grads_t[d * ROWS + row] = grad_out[d];
                        minus_mean[row] -= grad_out[d] * output[d];
                    }
                    minus_log[row] = -logs[tile.index(row)];
                }
                tile.dot(head.keys, queries_t, minus_log, probs.data());
                tile.mask_future(probs.data());
                tile.dot(head.values, grads_t, minus_mean, grad_scores.data());
                for (int64_t row = 0; row < ROWS; row++)
                    for (int64_t at = row * head.room; at < row * head.room + tile.end; at += LANES) {
                        vec prob = exp2_of(load(probs.data() + at));
                        store(probs.data() + at, prob);
                        store(grad_scores.data() + at, prob * load(grad_scores.data() + at));
                    }
                for (int64_t at = 0; at < depth; at += PART) {
                    vec sum[ROWS][2] = {};
                    for (bool in_prefix : {true, false}) {
                        const int64_t start = in_prefix ? tile.block.prefix_start : tile.block.segment_start;
                        const int64_t keys = in_prefix ? tile.prefix : tile.segment, to = start * stride + at;
                        const float* prob = probs.data() + (in_prefix ? 0 : tile.prefix);
                        const float* grad_score = grad_scores.data() + (in_prefix ? 0 : tile.prefix);
                        gather(grad_score, head.room, head.key(start) + at, in.key_token, keys, sum);
                        scatter(prob, head.room, grads + at, depth, to_value + to, stride, keys);
                        scatter(grad_score, head.room, queries + at, depth, to_key + to, stride, keys);
                    }
                    for (int64_t row = 0; row < tile.rows; row++) {
                        float* to = grad_query + tile.index(row) * depth + at;
                        store(to, sum[row][0] * in.scale), store(to + LANES, sum[row][1] * in.scale);
                    }
                }
            });
        }
}
}
