// Attention over a line, forward and backward, for CPUs: scores of a few queries at a time, which stay in the cache.
// `fused.py` compiles it for the processor it runs on, and describes what it is given.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// As many sums as the registers hold, beside a value of each side of a product.
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
    int64_t first, stop;              // tokens that ask
    int64_t whole_start, whole_stop;  // tokens that all of them see
    int64_t own_start, own_stop;      // tokens that they see too: if causal, up to themselves
    int64_t causal;
};

inline vec load(const float* from) { return *(const vec*)from; }
inline void store(float* to, vec value) { *(vec*)to = value; }
inline vec all(float value) { return value - vec{}; }

// Within 1e-7 of it; 2^-126 for all that is less.
inline vec exp2_of(vec x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: added, it leaves the integer in the lowest bits
    x = x < all(-126.0f) ? all(-126.0f) : x;
    vec shifted = x + round, rest = x - (shifted - round), power = all(1.5403530e-4f);
    for (float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = power * rest + next;
    return (vec)((ivec)power + ((ivec)shifted << 23));
}

// e^x as vLLM's attention on CPUs has it (and torch's), to the last bit: coarser than it could be, by up to 1e-6.
inline vec exp_of(vec x) {
    const vec least = all(-87.33655f), inside = x < least ? least : x, nearest = inside * LOG2_E + 0.5f;
    const vec whole = __builtin_convertvector(__builtin_convertvector(nearest, ivec), vec);
    const vec exponent = whole > nearest ? whole - 1.0f : whole, rest = inside - exponent * 0.693147182f;
    vec power = all(0.00828929059f);
    for (float next : {0.0418978221f, 0.166676521f, 0.499991506f, 0.999999701f, 1.0f}) power = rest * power + next;
    power = (vec)((ivec)power + (__builtin_convertvector(exponent, ivec) << 23));
    return x < least ? vec{} : power;
}

// Halves of the lanes are added until one is left, which is what the processor's own instructions suggest.
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

// sum[row] += sum over keys of shares[row][key] * values[key]
void gather(const float* shares, int64_t pitch, const float* values, int64_t stride, int64_t keys, vec (&sum)[ROWS][2]) {
    vec own[ROWS][2];
    std::memcpy(own, sum, sizeof own);
    for (int64_t key = 0; key < keys; key++) {
        vec low = load(values + key * stride), high = load(values + key * stride + LANES);
        for (int row = 0; row < ROWS; row++) {
            vec share = all(shares[row * pitch + key]);
            own[row][0] += share * low, own[row][1] += share * high;
        }
    }
    std::memcpy(sum, own, sizeof own);
}

// out[key] += sum over rows of shares[row][key] * rows[row], for COUNT keys
template <int COUNT>
void scatter_some(const float* shares, int64_t pitch, const float* rows, int64_t depth, float* out, int64_t stride) {
    vec sum[COUNT][2];
    for (int key = 0; key < COUNT; key++)
        sum[key][0] = load(out + key * stride), sum[key][1] = load(out + key * stride + LANES);
    for (int row = 0; row < ROWS; row++) {
        vec low = load(rows + row * depth), high = load(rows + row * depth + LANES);
        for (int key = 0; key < COUNT; key++) {
            vec share = all(shares[row * pitch + key]);
            sum[key][0] += share * low, sum[key][1] += share * high;
        }
    }
    for (int key = 0; key < COUNT; key++)
        store(out + key * stride, sum[key][0]), store(out + key * stride + LANES, sum[key][1]);
}

void scatter(const float* shares, int64_t pitch, const float* rows, int64_t depth, float* out, int64_t stride,
             int64_t keys) {
    int64_t key = 0;
    for (; key + KEYS <= keys; key += KEYS)
        scatter_some<KEYS>(shares + key, pitch, rows, depth, out + key * stride, stride);
    for (; key < keys; key++) scatter_some<1>(shares + key, pitch, rows, depth, out + key * stride, stride);
}

}  // namespace

extern "C" {

struct Inputs {
    const float *query, *key, *value;  // of a head and a token D numbers in a row
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int64_t tokens, heads, key_heads, depth;
    const Block* blocks;
    int64_t block_count;
    float scale;
    int32_t as_vllm;  // forward rounds where vLLM's kernel does: the same half-precision numbers come out
};

int64_t part() { return PART; }
int64_t deepest() { return DEEPEST; }
}

namespace {

// Of one head's keys or values: depth by depth, with zeros behind the last.
std::vector<float> across(const float* from, int64_t stride, int64_t tokens, int64_t depth, int64_t pitch) {
    std::vector<float> to(depth * pitch);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t d = 0; d < depth; d++) to[d * pitch + token] = from[token * stride + d];
    return to;
}

// One key head of the inputs, and room for the scores of a tile against all that it may see.
struct Head {
    const Inputs& in;
    int64_t number, each, pitch, room;
    std::vector<float> keys, values;

    Head(const Inputs& in, int64_t number, bool with_values) : in(in), number(number), each(in.heads / in.key_heads) {
        pitch = in.tokens + PART + LANES, room = 0;
        keys = across(key(0), in.key_token, in.tokens, in.depth, pitch);
        if (with_values) values = across(value(0), in.value_token, in.tokens, in.depth, pitch);
        for (int64_t i = 0; i < in.block_count; i++) {
            const Block& one = in.blocks[i];
            room = std::max(room, one.whole_stop - one.whole_start + one.own_stop - one.own_start + PART + LANES);
        }
    }
    const float* key(int64_t token) const { return in.key + number * in.key_head + token * in.key_token; }
    const float* value(int64_t token) const { return in.value + number * in.value_head + token * in.value_token; }
};

// ROWS queries of a block, one after the other: those of all heads that share the key head, token by token.
struct Tile {
    const Head& head;
    const Block& block;
    int64_t begin, rows, whole, own, seen, end;

    Tile(const Head& head, const Block& block, int64_t begin) : head(head), block(block), begin(begin) {
        rows = std::min<int64_t>(ROWS, (block.stop - block.first) * head.each - begin);
        whole = block.whole_stop - block.whole_start;
        own = (block.causal ? token(rows - 1) + 1 : block.own_stop) - block.own_start;
        seen = whole + own, end = (seen + LANES - 1) / LANES * LANES;
    }
    int64_t token(int64_t row) const { return block.first + (begin + row) / head.each; }
    int64_t query_head(int64_t row) const { return head.number * head.each + (begin + row) % head.each; }
    const float* query(int64_t row) const {
        return head.in.query + query_head(row) * head.in.query_head + token(row) * head.in.query_token;
    }
    int64_t place(int64_t row) const { return token(row) * head.in.heads + query_head(row); }  // in (N, heads)

    void against(const std::vector<float>& right, const float* left, const float* start, float* out) const {
        const int64_t depth = head.in.depth, pitch = head.pitch, room = head.room;
        score(left, right.data() + block.whole_start, pitch, whole, depth, start, out, room);
        score(left, right.data() + block.own_start, pitch, own, depth, start, out + whole, room);
    }
    void hide_the_future(float* scores) const {
        for (int64_t row = 0; row < ROWS; row++) {
            int64_t limit = block.causal && row < rows ? whole + token(row) + 1 - block.own_start : seen;
            for (int64_t key = limit; key < end; key++) scores[row * head.room + key] = -INFINITY;
        }
    }
};

// Calls `work` with every tile of a part of the line; the parts are alike in size.
template <class Work>
void each_tile(const Head& head, int64_t part, int64_t parts, Work work) {
    int64_t count = 0;
    for (int64_t i = 0; i < head.in.block_count; i++) {
        const Block& block = head.in.blocks[i];
        for (int64_t begin = 0; begin < (block.stop - block.first) * head.each; begin += ROWS)
            if (count++ % parts == part) work(Tile(head, block, begin));
    }
}

}  // namespace

extern "C" {

// out (N, heads, D); logs (N, heads): log2 of the sum of what a query's scores are powers of two of.
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
            each_tile(head, part, threads, [&](const Tile& tile) {
                float asked[ROWS * DEEPEST] = {}, nothing[ROWS] = {}, total[ROWS];
                for (int64_t row = 0; row < tile.rows; row++)
                    for (int64_t d = 0; d < depth; d++)
                        asked[d * ROWS + row] = tile.query(row)[d] * factor;
                tile.against(head.keys, asked, nothing, scores.data());
                tile.hide_the_future(scores.data());
                for (int64_t row = 0; row < tile.rows; row++) {
                    float *own = scores.data() + row * head.room, most = -INFINITY;
                    vec peak = load(own), sum = {};
                    for (int64_t key = LANES; key < tile.end; key += LANES)
                        peak = load(own + key) > peak ? load(own + key) : peak;
                    for (int lane = 0; lane < LANES; lane++) most = std::max(most, peak[lane]);
                    for (int64_t key = 0; key < tile.end; key += LANES) {
                        vec score = load(own + key) - most, share = as_vllm ? exp_of(score) : exp2_of(score);
                        store(own + key, share), sum += share;
                    }
                    total[row] = 0;
                    for (int lane = 0; lane < LANES; lane++) total[row] += sum[lane];
                    if (as_vllm) total[row] = sum_of(sum), most *= LOG2_E;
                    logs[tile.place(row)] = most + std::log2(total[row]);
                }
                for (int64_t at = 0; at < depth; at += PART) {
                    vec sum[ROWS][2] = {};
                    gather(scores.data(), head.room, head.value(tile.block.whole_start) + at, in.value_token, tile.whole, sum);
                    gather(scores.data() + tile.whole, head.room, head.value(tile.block.own_start) + at, in.value_token,
                           tile.own, sum);
                    for (int64_t row = 0; row < tile.rows; row++) {
                        float *to = out + tile.place(row) * depth + at, inverse = 1.0f / total[row];
                        if (as_vllm) store(to, sum[row][0] * inverse), store(to + LANES, sum[row][1] * inverse);
                        else store(to, sum[row][0] / total[row]), store(to + LANES, sum[row][1] / total[row]);
                    }
                }
            });
        }
}

// All gradients are (N, heads, D); those of keys and values come once for each thread, zeros before, to be summed.
void backward(const Inputs* inputs, const float* out, const float* logs, const float* grad, float* grad_query,
              float* grad_key, float* grad_value, int threads) {
    const Inputs& in = *inputs;
    const int64_t depth = in.depth, stride = in.key_heads * depth;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t number = 0; number < in.key_heads; number++)
        for (int64_t part = 0; part < threads; part++) {
            Head head(in, number, true);
            std::vector<float> shares(ROWS * head.room), changes(ROWS * head.room);
            float* to_key = grad_key + part * in.tokens * stride + number * depth;
            float* to_value = grad_value + part * in.tokens * stride + number * depth;
            each_tile(head, part, threads, [&](const Tile& tile) {
                float asked[ROWS * DEEPEST] = {}, came[ROWS * DEEPEST] = {};  // by row
                float asked_across[ROWS * DEEPEST] = {}, came_across[ROWS * DEEPEST] = {};  // by depth
                float less[ROWS] = {}, mean[ROWS] = {};
                for (int64_t row = 0; row < tile.rows; row++) {
                    const float *query = tile.query(row), *got = out + tile.place(row) * depth;
                    const float* own = grad + tile.place(row) * depth;
                    for (int64_t d = 0; d < depth; d++) {
                        asked[row * depth + d] = query[d] * in.scale;
                        asked_across[d * ROWS + row] = query[d] * (in.scale * LOG2_E);
                        came[row * depth + d] = came_across[d * ROWS + row] = own[d];
                        mean[row] -= own[d] * got[d];
                    }
                    less[row] = -logs[tile.place(row)];
                }
                tile.against(head.keys, asked_across, less, shares.data());
                tile.hide_the_future(shares.data());
                tile.against(head.values, came_across, mean, changes.data());
                for (int64_t row = 0; row < ROWS; row++)
                    for (int64_t at = row * head.room; at < row * head.room + tile.end; at += LANES) {
                        vec share = exp2_of(load(shares.data() + at));
                        store(shares.data() + at, share);
                        store(changes.data() + at, share * load(changes.data() + at));
                    }
                for (int64_t at = 0; at < depth; at += PART) {
                    vec sum[ROWS][2] = {};
                    for (bool whole : {true, false}) {
                        const int64_t start = whole ? tile.block.whole_start : tile.block.own_start;
                        const int64_t keys = whole ? tile.whole : tile.own, to = start * stride + at;
                        const float* share = shares.data() + (whole ? 0 : tile.whole);
                        const float* change = changes.data() + (whole ? 0 : tile.whole);
                        gather(change, head.room, head.key(start) + at, in.key_token, keys, sum);
                        scatter(share, head.room, came + at, depth, to_value + to, stride, keys);
                        scatter(change, head.room, asked + at, depth, to_key + to, stride, keys);
                    }
                    for (int64_t row = 0; row < tile.rows; row++) {
                        float* to = grad_query + tile.place(row) * depth + at;
                        store(to, sum[row][0] * in.scale), store(to + LANES, sum[row][1] * in.scale);
                    }
                }
            });
        }
}
}
