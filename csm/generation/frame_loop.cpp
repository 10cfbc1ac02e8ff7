// One frame of a CSM on CPU cores: the backbone's step over its cache, and the depth decoder's K-1 steps with sampling.
//
// csm/generation/native.py packs the weights, compiles this file with the system's compiler and calls it. A step at batch 1
// reads every weight once and does little with it, so all is laid out for reading: weights in panels of 32 outputs that
// follow one another in memory, norms folded into the product behind them, no temporaries outside the caches. Products of
// float32 weights run in float32; bfloat16 weights meet activations rounded to bfloat16 and sum in float32; int8 weights meet
// activations as 16-bit fixed point, a scale a row, in two bytes, and sum exactly. The last two run in AMX tiles where the
// machine has them. A row's result does not depend on the other rows, nor on the number of threads.
//
// For one row of float32 a second, int16 copy of the depth decoder may guess: it draws the whole frame, which reads half the
// bytes, then the float32 weights, read once for all positions, draw each code anew from what was guessed before it. The
// first code that differs is put right and the guessing goes on behind it, so the frame is the float32 loop's, bit for bit.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#define CSM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t s16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t c16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int PANEL = 32;

// The structures below are mirrored, field by field, by ctypes structures in native.py.
enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT16 = 3 };

// weight: FLOAT32 and INT16 [out / 32][in][32], BFLOAT16 [out / 32][in / 32][2][16 pairs of inputs][16 outputs][2], INT8 [out / 32]
// [in / 64][2][16 fours of inputs][16 outputs][4].
struct Linear {
    const void* weight;
    const float* scale;  // [out], INT8 and INT16 only
    int64_t in, out, kind;  // out padded to a multiple of 32, in to one of 32, or 64 for INT8
};

struct Layer {
    Linear qkv, output, gate_up, down;  // gate_up: a panel is 16 gates and their 16 ups
};

struct Stack {
    const Layer* layers;
    const float *cos, *sin;  // [positions, head_dim / 2]
    const float* last_scale;  // [width]; null: folded into what follows
    int64_t num_layers, width, num_heads, num_kv_heads, head_dim, use_tiles;
    float eps;
};

struct Cache {  // [layers][B][kv heads][max_len][head_dim]
    void *keys, *values;
    int64_t is_bfloat16, batch_size, max_len;
};

struct Depth {
    Stack stack;
    const Linear* heads;  // K: codebook 0's on the backbone's state, then K-1 with the last norm folded in
    Linear projection;
    const void* tables;  // [K][V][E], projected
    int64_t tables_are_bfloat16, num_codebooks, vocab_size;
};

static float from_bfloat16(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static uint16_t to_bfloat16(float value) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void store(float& place, float value) { place = value; }
static void store(uint16_t& place, float value) { place = to_bfloat16(value); }
static float load(float value) { return value; }
static float load(uint16_t value) { return from_bfloat16(value); }
static v16 load16(const float* from) { return *(const v16*)from; }
static v16 load16(const uint16_t* from) { return (v16)(__builtin_convertvector(*(const h16*)from, u16) << 16); }

static v16 all16(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }  // from memory a load, no more

static v16 exp16(v16 x) {  // Cephes' expf: relative error below 2e-7 in the range kept
    const v16 low = v16{} - 87.0f, high = v16{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    v16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    v16 n = shifted - 12582912.0f;
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16 power = ((i16)shifted - 0x4b400000 + 127) << 23;
    return p * (v16)power;
}

class Barrier {
   public:
    explicit Barrier(int size) : size_(size) {}
    void wait() {
        if (size_ == 1) return;
        int phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins > 2000) sched_yield();  // someone else wants the core
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }

   private:
    const int size_;
    std::atomic<int> arrived_{0}, phase_{0};
};

struct Team {
    int index, size;
    Barrier* barrier;
    void range(int64_t count, int64_t& first, int64_t& last) const {
        first = count * index / size;
        last = count * (index + 1) / size;
    }
};

// What one thread keeps to itself.
struct Scratch {
    std::vector<float> normed, laid, scores, candidates;
    std::vector<uint16_t> narrow;  // bfloat16 rows
    std::vector<int8_t> high;  // 16-bit fixed point rows: the upper bytes,
    std::vector<uint8_t> low;  // the lower bytes,
    std::vector<float> unit;  // and what their last bit is worth
    std::vector<int> places;
    alignas(64) float tile[16 * PANEL];
    alignas(64) int32_t high_sums[16 * PANEL], low_sums[16 * PANEL];
    bool use_tiles = false;
    int tile_rows = 0;  // as the tiles are set
};

static v16 weight16(const float* from) { return load16(from); }
static v16 weight16(const int16_t* from) {
#ifdef __AVX512F__  // GCC 12 makes two halves of the portable form
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from)));
#else
    return __builtin_convertvector(*(const s16*)from, v16);
#endif
}

// R rows by one panel of float32 or int16; x: [in][R], side by side, so that a step's inputs share a cache line.
template <int R, class Number>
static void block_float32(const Number* weight, const float* x, int64_t in, float* out) {
    constexpr int CHAINS = sizeof(Number) == 2 && R == 1 ? 2 : 1;  // a sum waits 4 cycles for its last product: longer than for int16
    v16 sums[CHAINS][R][2] = {};
    for (int64_t i = 0; i < in; i += CHAINS)
#pragma GCC unroll 2
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Number* at = weight + PANEL * (i + chain);
            // 2 kB ahead, over the end of the panel into what is read next: at 8 rows 30 instead of 26 GB/s.
            constexpr int64_t AHEAD = 2048 / sizeof(Number), LINE = 64 / sizeof(Number);
            for (int64_t line = 0; line < PANEL; line += LINE) __builtin_prefetch(at + AHEAD + line);
            const v16 w0 = weight16(at), w1 = weight16(at + 16);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const v16 value = all16(x[(i + chain) * R + r]);
                sums[chain][r][0] += w0 * value;
                sums[chain][r][1] += w1 * value;
            }
        }
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) *(v16*)(out + r * PANEL + 16 * half) = sums[0][r][half] + (CHAINS > 1 ? sums[CHAINS - 1][r][half] : v16{});
}

static int rows_in_block(int rows) { return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

// Rows of x one block after the other, each [in][rows of the block].
static void lay_side_by_side(const float* x, int64_t stride, int64_t in, int rows, std::vector<float>& laid) {
    laid.resize(size_t(rows) * in);
    float* to = laid.data();
    while (rows > 0) {
        const int taken = rows_in_block(rows);
        for (int64_t i = 0; i < in; ++i)
            for (int r = 0; r < taken; ++r) *to++ = x[r * stride + i];
        rows -= taken, x += taken * stride;
    }
}

template <class Number>
static void rows_float32(const Number* weight, const float* x, int64_t in, int rows, float* out) {
    while (rows > 0) {
        const int taken = rows_in_block(rows);
        if (taken == 8) block_float32<8>(weight, x, in, out);
        else if (taken == 4) block_float32<4>(weight, x, in, out);
        else if (taken == 2) block_float32<2>(weight, x, in, out);
        else block_float32<1>(weight, x, in, out);
        rows -= taken, x += taken * in, out += taken * PANEL;
    }
}

// Without tiles: the same products, written out. x: bfloat16 [rows][in].
static void rows_bfloat16(const Linear& linear, const char* panel, const uint16_t* x, int rows, float* out) {
    for (int r = 0; r < rows; ++r, x += linear.in, out += PANEL) {
        v16 sums[2] = {};
        for (int64_t block = 0; block < linear.in / 32; ++block)
            for (int half = 0; half < 2; ++half)
                for (int pair = 0; pair < 16; ++pair) {
                    const u16 both = *(const u16*)(panel + ((block * 2 + half) * 16 + pair) * 64);
                    sums[half] += (v16)(both << 16) * from_bfloat16(x[block * 32 + 2 * pair]);
                    sums[half] += (v16)(both & 0xffff0000u) * from_bfloat16(x[block * 32 + 2 * pair + 1]);
                }
        *(v16*)out = sums[0], *(v16*)(out + 16) = sums[1];
    }
}

static void rows_int8(const Linear& linear, const int8_t* panel, const int8_t* high, const uint8_t* low, int rows, Scratch& scratch) {
    for (int r = 0; r < rows; ++r, high += linear.in, low += linear.in) {
        int32_t sums[2][PANEL] = {};
        for (int64_t i = 0; i < linear.in; ++i)
            for (int o = 0; o < PANEL; ++o) {
                const int32_t weight = panel[(((i / 64 * 2 + o / 16) * 16 + i % 64 / 4) * 16 + o % 16) * 4 + i % 4];
                sums[0][o] += weight * high[i], sums[1][o] += weight * low[i];
            }
        std::copy_n(sums[0], PANEL, scratch.high_sums + r * PANEL);
        std::copy_n(sums[1], PANEL, scratch.low_sums + r * PANEL);
    }
}

#ifdef CSM_AMX
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

static void set_tiles(int rows, Scratch& scratch) {
    if (scratch.tile_rows == rows) return;
    scratch.tile_rows = rows;
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) config.rows[tile] = rows, config.bytes[tile] = 64;  // sums and inputs
    for (int tile : {6, 7}) config.rows[tile] = 16, config.bytes[tile] = 64;  // weights of 16 outputs
    _tile_loadconfig(&config);
}

// At most 16 rows of x, bfloat16 [rows][in], by one panel.
static void tiles_bfloat16(const Linear& linear, const char* panel, const uint16_t* x, int rows, float* out, Scratch& scratch) {
    set_tiles(rows, scratch);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t block = 0; block < linear.in / 32; ++block) {
        _tile_loadd(4, x + block * 32, linear.in * 2);
        _tile_loadd(6, panel + block * 2048, 64);
        _tile_loadd(7, panel + block * 2048 + 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, PANEL * 4);
    _tile_stored(1, out + 16, PANEL * 4);
}

static void tiles_int8(const Linear& linear, const int8_t* panel, const int8_t* high, const uint8_t* low, int rows, Scratch& scratch) {
    set_tiles(rows, scratch);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < linear.in / 64; ++block) {
        _tile_loadd(4, high + block * 64, linear.in);
        _tile_loadd(5, low + block * 64, linear.in);
        _tile_loadd(6, panel + block * 2048, 64);
        _tile_loadd(7, panel + block * 2048 + 1024, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, scratch.high_sums, PANEL * 4);
    _tile_stored(1, scratch.high_sums + 16, PANEL * 4);
    _tile_stored(2, scratch.low_sums, PANEL * 4);
    _tile_stored(3, scratch.low_sums + 16, PANEL * 4);
}
#endif

// A row as 16-bit fixed point; returns what the last bit is worth. x: [stride], the rest up to `in` is zero.
static float to_fixed_point(const float* x, int64_t stride, int64_t in, int8_t* high, uint8_t* low) {
    v16 most = {}, broken = {};
    for (int64_t i = 0; i < stride; i += 16) {
        const v16 value = load16(x + i), negative = -value;
        const v16 size = value > negative ? value : negative;
        most = size > most ? size : most;
        broken += value * 0.0f;  // not a number where the row is not finite
    }
    float highest = 0, check = 0;
    for (int lane = 0; lane < 16; ++lane) highest = std::max(highest, most[lane]), check += broken[lane];
    const float unit = std::max(highest, 1e-30f) / 32767.0f, factor = 1.0f / unit;
    for (int64_t i = 0; i < stride; i += 16) {
        const i16 whole = (i16)(load16(x + i) * factor + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23 rounds
        *(b16*)(high + i) = __builtin_convertvector(whole >> 8, b16);
        *(c16*)(low + i) = __builtin_convertvector(whole & 255, c16);
    }
    std::fill(high + stride, high + in, int8_t(0));
    std::fill(low + stride, low + in, uint8_t(0));
    return unit + check;
}

// This thread's share of a product. x: [rows][stride]; where `in` is more than stride, the rest counts as zero.
// `then(panel, row, sums)` takes 32 sums at a time.
template <class Then>
static void multiply(const Linear& linear, const float* x, int64_t stride, int rows, const Team& team, Scratch& scratch, Then then) {
    int64_t first, last;
    team.range(linear.out / PANEL, first, last);
    const int64_t in = linear.in;
    if (linear.kind == FLOAT32 || linear.kind == INT16) {
        lay_side_by_side(x, stride, in, rows, scratch.laid);
    } else if (linear.kind == BFLOAT16) {
        scratch.narrow.resize(size_t(rows) * in);
        for (int r = 0; r < rows; ++r)
            for (int64_t i = 0; i < in; ++i) scratch.narrow[r * in + i] = to_bfloat16(x[r * stride + i]);
    } else {
        scratch.high.resize(size_t(rows) * in), scratch.low.resize(size_t(rows) * in), scratch.unit.resize(rows);
        for (int r = 0; r < rows; ++r)
            scratch.unit[r] = to_fixed_point(x + r * stride, std::min(stride, in), in, scratch.high.data() + r * in, scratch.low.data() + r * in);
    }
    const int64_t panel_bytes = in * PANEL * (linear.kind == FLOAT32 ? 4 : linear.kind == INT8 ? 1 : 2);
    for (int64_t p = first; p < last; ++p) {
        const char* panel = (const char*)linear.weight + p * panel_bytes;
        for (int start = 0; start < rows; start += 16) {
            const int taken = std::min(16, rows - start);
            const int64_t at = start * in;
            if (linear.kind == FLOAT32) {
                rows_float32((const float*)panel, scratch.laid.data() + at, in, taken, scratch.tile);
            } else if (linear.kind == INT16) {
                rows_float32((const int16_t*)panel, scratch.laid.data() + at, in, taken, scratch.tile);
                for (int i = 0; i < taken * PANEL; i += 16)
                    *(v16*)(scratch.tile + i) *= load16(linear.scale + p * PANEL + i % PANEL);
            } else if (linear.kind == BFLOAT16) {
#ifdef CSM_AMX
                if (scratch.use_tiles) tiles_bfloat16(linear, panel, scratch.narrow.data() + at, taken, scratch.tile, scratch);
                else
#endif
                    rows_bfloat16(linear, panel, scratch.narrow.data() + at, taken, scratch.tile);
            } else {
#ifdef CSM_AMX
                if (scratch.use_tiles) tiles_int8(linear, (const int8_t*)panel, scratch.high.data() + at, scratch.low.data() + at, taken, scratch);
                else
#endif
                    rows_int8(linear, (const int8_t*)panel, scratch.high.data() + at, scratch.low.data() + at, taken, scratch);
                for (int i = 0; i < taken * PANEL; i += 16) {
                    const v16 upper = __builtin_convertvector(*(i16*)(scratch.high_sums + i), v16);
                    const v16 lower = __builtin_convertvector(*(i16*)(scratch.low_sums + i), v16);
                    const v16 scale = load16(linear.scale + p * PANEL + i % PANEL) * scratch.unit[start + i / PANEL];
                    *(v16*)(scratch.tile + i) = (upper * 256.0f + lower) * scale;
                }
            }
            for (int r = 0; r < taken; ++r) then(p, start + r, (v16*)(scratch.tile + r * PANEL));
        }
    }
}

static int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

// Rows of x divided by their root mean square, every thread for itself.
static const float* normalise(const float* x, int64_t stride, int rows, int64_t width, float eps, const float* scale, Scratch& scratch) {
    scratch.normed.resize(size_t(rows) * stride);
    for (int r = 0; r < rows; ++r) {
        v16 squares = {};
        for (int64_t i = 0; i < stride; i += 16) squares += *(const v16*)(x + r * stride + i) * *(const v16*)(x + r * stride + i);
        float sum = 0;
        for (int lane = 0; lane < 16; ++lane) sum += squares[lane];
        const float factor = 1.0f / std::sqrt(sum / width + eps);
        for (int64_t i = 0; i < stride; ++i) scratch.normed[r * stride + i] = x[r * stride + i] * factor * (scale && i < width ? scale[i] : 1.0f);
    }
    return scratch.normed.data();
}

struct Rows {  // what the threads share: rows of one step
    std::vector<float> x, qkv, attended, inner;
    int64_t stride, qkv_stride, attended_stride, inner_stride;
    Rows(const Stack& stack, int rows) {
        stride = padded(stack.width);
        qkv_stride = padded((stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim);
        attended_stride = stack.layers[0].output.in;
        inner_stride = stack.layers[0].down.in;
        x.assign(rows * stride, 0), qkv.assign(rows * qkv_stride, 0);
        attended.assign(rows * attended_stride, 0), inner.assign(rows * inner_stride, 0);
    }
};

static void turn(float* head, const float* cos, const float* sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; ++i) {
        const float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cos[i] - b * sin[i];
        head[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

// Attention of one (row of the batch, kv head): num_new positions from `position` on; keys before `start` are padding.
template <class Number>
static void attend(const Stack& stack, const Cache& cache, Rows& rows, int64_t layer, int64_t b, int64_t kv_head, int num_new,
                   int64_t position, int64_t start, Scratch& scratch) {
    const int64_t head_dim = stack.head_dim, group = stack.num_heads / stack.num_kv_heads, half = head_dim / 2;
    const int64_t offset = ((layer * cache.batch_size + b) * stack.num_kv_heads + kv_head) * cache.max_len * head_dim;
    Number* keys = (Number*)cache.keys + offset;
    Number* values = (Number*)cache.values + offset;
    for (int n = 0; n < num_new; ++n) {
        float* qkv = rows.qkv.data() + (b * num_new + n) * rows.qkv_stride;
        float* key = qkv + (stack.num_heads + kv_head) * head_dim;
        const float* value = key + stack.num_kv_heads * head_dim;
        const int64_t at = position + n;
        turn(key, stack.cos + (at - start) * half, stack.sin + (at - start) * half, head_dim);
        for (int64_t i = 0; i < head_dim; ++i) store(keys[at * head_dim + i], key[i]), store(values[at * head_dim + i], value[i]);
    }
    const float scale = 1.0f / std::sqrt(float(head_dim));
    scratch.scores.resize(cache.max_len);
    float* scores = scratch.scores.data();
    for (int n = 0; n < num_new; ++n) {
        const int64_t at = position + n;
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = kv_head * group + g;
            float* query = rows.qkv.data() + (b * num_new + n) * rows.qkv_stride + head * head_dim;
            turn(query, stack.cos + (at - start) * half, stack.sin + (at - start) * half, head_dim);
            float highest = -std::numeric_limits<float>::infinity();
            for (int64_t s = start; s <= at; ++s) {
                const Number* key = keys + s * head_dim;
                v16 lanes = {};
                int64_t i = 0;
                for (; i + 16 <= head_dim; i += 16) lanes += load16(query + i) * load16(key + i);
                float dot = 0;
                for (int lane = 0; lane < 16; ++lane) dot += lanes[lane];
                for (; i < head_dim; ++i) dot += query[i] * load(key[i]);
                scores[s] = dot * scale;
                highest = std::max(highest, scores[s]);
            }
            float total = 0;
            for (int64_t s = start; s <= at; ++s) total += scores[s] = std::exp(scores[s] - highest);
            float* out = rows.attended.data() + (b * num_new + n) * rows.attended_stride + head * head_dim;
            std::fill(out, out + head_dim, 0.0f);
            for (int64_t s = start; s <= at; ++s) {
                const float share = scores[s] / total;
                const Number* value = values + s * head_dim;
                int64_t i = 0;
                for (; i + 16 <= head_dim; i += 16) *(v16*)(out + i) += share * load16(value + i);
                for (; i < head_dim; ++i) out[i] += share * load(value[i]);
            }
        }
    }
}

// All layers over batch_size * num_new rows; every thread of the team calls it, and it ends with a barrier.
static void run_layers(const Stack& stack, const Cache& cache, Rows& rows, int batch_size, int num_new, int64_t position, const int64_t* starts,
                       const Team& team, Scratch& scratch) {
    const int num_rows = batch_size * num_new;
    float* x = rows.x.data();
    const auto add = [&](int64_t panel, int row, v16* sums) {
        v16* place = (v16*)(x + row * rows.stride + panel * PANEL);
        place[0] += sums[0], place[1] += sums[1];
    };
    for (int64_t index = 0; index < stack.num_layers; ++index) {
        const Layer& layer = stack.layers[index];
        const float* normed = normalise(x, rows.stride, num_rows, stack.width, stack.eps, nullptr, scratch);
        multiply(layer.qkv, normed, rows.stride, num_rows, team, scratch, [&](int64_t panel, int row, v16* sums) {
            v16* place = (v16*)(rows.qkv.data() + row * rows.qkv_stride + panel * PANEL);
            place[0] = sums[0], place[1] = sums[1];
        });
        team.barrier->wait();
        int64_t first, last;
        team.range(batch_size * stack.num_kv_heads, first, last);
        for (int64_t unit = first; unit < last; ++unit) {
            const int64_t b = unit / stack.num_kv_heads, kv_head = unit % stack.num_kv_heads, start = starts ? starts[b] : 0;
            if (cache.is_bfloat16) attend<uint16_t>(stack, cache, rows, index, b, kv_head, num_new, position, start, scratch);
            else attend<float>(stack, cache, rows, index, b, kv_head, num_new, position, start, scratch);
        }
        team.barrier->wait();
        multiply(layer.output, rows.attended.data(), rows.attended_stride, num_rows, team, scratch, add);
        team.barrier->wait();
        normed = normalise(x, rows.stride, num_rows, stack.width, stack.eps, nullptr, scratch);
        multiply(layer.gate_up, normed, rows.stride, num_rows, team, scratch, [&](int64_t panel, int row, v16* sums) {
            *(v16*)(rows.inner.data() + row * rows.inner_stride + panel * 16) = sums[0] / (1.0f + exp16(-sums[0])) * sums[1];
        });
        team.barrier->wait();
        multiply(layer.down, rows.inner.data(), rows.inner_stride, num_rows, team, scratch, add);
        team.barrier->wait();
    }
}

// `csm.generation.sampling.sample_topk` for one row.
static int64_t sample(const float* logits, int64_t size, float uniform, float temperature, int64_t top_k, Scratch& scratch) {
    if (temperature == 0) return std::max_element(logits, logits + size) - logits;
    constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    std::vector<float>& candidates = scratch.candidates;
    std::vector<int>& places = scratch.places;
    candidates.clear(), places.clear();
    float kth = NOTHING;
    if (top_k > 0 && top_k < size) {
        // Split into strips, the k-th highest of their maxima is at most the k-th highest of all, and few are above it.
        constexpr int64_t STRIPS = 16, GROUP = 16 * STRIPS;
        if (size / GROUP * STRIPS >= top_k) {
            for (int64_t i = 0; i + GROUP <= size; i += GROUP) {
                v16 highest = load16(logits + i);
                for (int64_t j = 16; j < GROUP; j += 16) {
                    const v16 next = load16(logits + i + j);
                    highest = next > highest ? next : highest;
                }
                for (int64_t strip = 0; strip < STRIPS; ++strip) candidates.push_back(highest[strip]);
            }
            std::nth_element(candidates.begin(), candidates.begin() + top_k - 1, candidates.end(), std::greater<float>());
            kth = candidates[top_k - 1];
            candidates.clear();
        }
        for (int64_t i = 0; i < size; ++i)
            if (logits[i] >= kth) candidates.push_back(logits[i]);
        if (int64_t(candidates.size()) >= top_k) {
            std::nth_element(candidates.begin(), candidates.begin() + top_k - 1, candidates.end(), std::greater<float>());
            kth = candidates[top_k - 1];
        }
        candidates.clear();
    }
    const float lowest = kth / temperature, nearly = kth - std::abs(kth) * 1e-6f - 1e-37f;  // what is lower cannot tie once divided
    float highest = NOTHING;
    for (int64_t i = 0; i < size; ++i)
        if (!(logits[i] < nearly) && logits[i] / temperature >= lowest) {
            candidates.push_back(logits[i] / temperature);
            places.push_back(int(i));
            highest = std::max(highest, candidates.back());
        }
    double total = 0;
    for (float& value : candidates) total += value = std::exp(value - highest);
    double cumulative = 0;
    for (size_t i = 0; i < candidates.size(); ++i) {
        cumulative += candidates[i];
        if (cumulative > double(uniform) * total) return places[i];
    }
    return places.empty() ? 0 : places.back();
}

template <class Body>
static void run_team(int num_threads, bool use_tiles, Body body) {
    Barrier barrier(num_threads);
    const auto member = [&](int index) {
        Scratch scratch;
        scratch.use_tiles = use_tiles;
        body(Team{index, num_threads, &barrier}, scratch);
#ifdef CSM_AMX
        if (scratch.tile_rows) _tile_release();
#endif
    };
    std::vector<std::thread> threads;
    for (int index = 1; index < num_threads; ++index) threads.emplace_back(member, index);
    member(0);
    for (std::thread& thread : threads) thread.join();
}

// The drawing of a frame's codes, shared by the threads of a team.
struct Frame {
    const float *hidden, *noise;  // [B, D]; [K, B], null when greedy
    float temperature;
    int64_t top_k;
    bool forbids_eos;
    int64_t* codes;  // [B, K]
    float* logits_out;  // [B, K, V], or null
    int batch_size;
};

// A depth decoder at work: its caches, and room for the rows of a step.
struct Decoder {
    const Depth& depth;
    const Cache& cache;
    Rows rows;
    std::vector<float> logits, outputs;
    Decoder(const Depth& depth, const Cache& cache, int num_rows)
        : depth(depth), cache(cache), rows(depth.stack, num_rows), logits(cache.batch_size * depth.heads[0].out),
          outputs(cache.batch_size * rows.stride, 0) {}

    void project(const Frame& frame, const Team& team, Scratch& scratch) {  // the hidden state into every second row
        multiply(depth.projection, frame.hidden, depth.projection.in, frame.batch_size, team, scratch, [&](int64_t panel, int row, v16* sums) {
            v16* place = (v16*)(rows.x.data() + 2 * row * rows.stride + panel * PANEL);
            place[0] = sums[0], place[1] = sums[1];
        });
    }

    void read(int64_t codebook, int64_t code, float* x) const {  // the embedding of a code
        const int64_t width = depth.stack.width, at = (codebook * depth.vocab_size + code) * width;
        for (int64_t i = 0; i < width; ++i)
            x[i] = depth.tables_are_bfloat16 ? load(((const uint16_t*)depth.tables)[at + i]) : ((const float*)depth.tables)[at + i];
    }

    void predict(int64_t codebook, const float* x, int64_t stride, const Team& team, Scratch& scratch) {
        multiply(depth.heads[codebook], x, stride, int(cache.batch_size), team, scratch, [&](int64_t panel, int row, v16* sums) {
            v16* place = (v16*)(logits.data() + row * depth.heads[0].out + panel * PANEL);
            place[0] = sums[0], place[1] = sums[1];
        });
    }

    int64_t draw(const Frame& frame, int64_t codebook, int64_t b, bool keeps_logits, Scratch& scratch) {
        float* row = logits.data() + b * depth.heads[0].out;
        const int64_t vocab_size = depth.vocab_size;
        if (codebook == 0 && frame.forbids_eos) row[0] = -std::numeric_limits<float>::infinity();
        if (keeps_logits && frame.logits_out)
            std::copy_n(row, vocab_size, frame.logits_out + (b * depth.num_codebooks + codebook) * vocab_size);
        const float uniform = frame.noise ? frame.noise[codebook * frame.batch_size + b] : 0.0f;
        return sample(row, vocab_size, uniform, frame.temperature, frame.top_k, scratch);
    }

    void draw_first(const Frame& frame, const Team& team, Scratch& scratch) {
        predict(0, frame.hidden, depth.projection.in, team, scratch);
        team.barrier->wait();
        for (int b = team.index; b < frame.batch_size; b += team.size)
            frame.codes[b * depth.num_codebooks] = draw(frame, 0, b, true, scratch);
        team.barrier->wait();
    }

    // Codebooks `first` .. K-1, one after the other, behind codes that are there.
    void draw_rest(const Frame& frame, int64_t first, bool keeps_logits, const Team& team, Scratch& scratch) {
        if (first == 1) project(frame, team, scratch);
        for (int64_t step = first; step < depth.num_codebooks; ++step) {
            const int num_new = step == 1 ? 2 : 1;  // the hidden state and codebook 0 go in together
            for (int b = team.index; b < frame.batch_size; b += team.size)
                read(step - 1, frame.codes[b * depth.num_codebooks + step - 1], rows.x.data() + (num_new * b + num_new - 1) * rows.stride);
            team.barrier->wait();
            run_layers(depth.stack, cache, rows, frame.batch_size, num_new, step == 1 ? 0 : step, nullptr, team, scratch);
            const float* last = rows.x.data();
            if (num_new == 2) {  // of the two rows, the second predicts
                for (int b = team.index; b < frame.batch_size; b += team.size)
                    std::copy_n(rows.x.data() + (2 * b + 1) * rows.stride, rows.stride, outputs.data() + b * rows.stride);
                team.barrier->wait();
                last = outputs.data();
            }
            const float* normed = normalise(last, rows.stride, frame.batch_size, depth.stack.width, depth.stack.eps, nullptr, scratch);
            predict(step, normed, rows.stride, team, scratch);
            team.barrier->wait();
            for (int b = team.index; b < frame.batch_size; b += team.size)
                frame.codes[b * depth.num_codebooks + step] = draw(frame, step, b, keeps_logits, scratch);
        }  // the thread that drew a row's code is the one that reads it
        team.barrier->wait();
    }

    // Of a batch of one: draw codebooks `first` .. K-1 anew, all positions in one pass over guessed codes. Puts the first
    // wrong one right and returns the codebook behind it, or K.
    int64_t check(const Frame& frame, int64_t first, const Team& team, Scratch& scratch, int64_t& shared) {
        const int64_t num_codebooks = depth.num_codebooks, extra = first == 1, num_new = num_codebooks - first + extra;
        if (extra) project(frame, team, scratch);
        for (int64_t step = first + team.index; step < num_codebooks; step += team.size)
            read(step - 1, frame.codes[step - 1], rows.x.data() + (step - first + extra) * rows.stride);
        team.barrier->wait();
        run_layers(depth.stack, cache, rows, 1, int(num_new), first - extra, nullptr, team, scratch);
        for (int64_t step = first; step < num_codebooks; ++step) {
            const float* x = rows.x.data() + (step - first + extra) * rows.stride;
            predict(step, normalise(x, rows.stride, 1, depth.stack.width, depth.stack.eps, nullptr, scratch), rows.stride, team, scratch);
            team.barrier->wait();
            if (team.index == 0) shared = draw(frame, step, 0, true, scratch);
            team.barrier->wait();
            if (shared == frame.codes[step]) continue;
            team.barrier->wait();  // all have compared
            if (team.index == 0) frame.codes[step] = shared;
            team.barrier->wait();
            return step + 1;
        }
        return num_codebooks;
    }
};

extern "C" {

// Whether tiles can be used: asks the kernel for them, which it wants once a process.
int csm_has_tiles() {
#ifdef CSM_AMX
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

// One position a row through the backbone. embeds, hidden: [B, D]; starts: [B], padding in front of each row, or null.
void csm_backbone_step(const Stack* stack, const Cache* cache, const float* embeds, float* hidden, int64_t length, const int64_t* starts,
                       int num_threads) {
    const int batch_size = int(cache->batch_size);
    Rows rows(*stack, batch_size);
    for (int b = 0; b < batch_size; ++b) std::copy_n(embeds + b * stack->width, stack->width, rows.x.data() + b * rows.stride);
    run_team(num_threads, stack->use_tiles, [&](const Team& team, Scratch& scratch) {
        run_layers(*stack, *cache, rows, batch_size, 1, length, starts, team, scratch);
        if (team.index) return;
        const float* normed = normalise(rows.x.data(), rows.stride, batch_size, stack->width, stack->eps, stack->last_scale, scratch);
        for (int b = 0; b < batch_size; ++b) std::copy_n(normed + b * rows.stride, stack->width, hidden + b * stack->width);
    });
}

// Draw a frame from hidden [B, D]. noise: [K, B], null when greedy; codes: [B, K], written; logits_out: [B, K, V], written,
// or null. guess and guess_cache, for B = 1, or null: a copy of the decoder that is read faster.
// Returns how many times the guesses were checked.
int csm_frame(const Depth* depth, const Cache* cache, const Depth* guess, const Cache* guess_cache, const float* hidden, const float* noise,
              float temperature, int64_t top_k, int forbids_eos, int64_t* codes, float* logits_out, int num_threads) {
    const Frame frame{hidden, noise, temperature, top_k, forbids_eos != 0, codes, logits_out, int(cache->batch_size)};
    const int64_t num_codebooks = depth->num_codebooks;
    Decoder decoder(*depth, *cache, guess ? int(num_codebooks) : 2 * frame.batch_size);
    std::unique_ptr<Decoder> guesser(guess ? new Decoder(*guess, *guess_cache, 2) : nullptr);
    int num_checks = 0;
    int64_t shared = 0;
    run_team(num_threads, depth->stack.use_tiles, [&](const Team& team, Scratch& scratch) {
        decoder.draw_first(frame, team, scratch);
        if (!guesser) return decoder.draw_rest(frame, 1, true, team, scratch);
        for (int64_t first = 1; first < num_codebooks;) {
            guesser->draw_rest(frame, first, false, team, scratch);
            first = decoder.check(frame, first, team, scratch, shared);
            if (team.index == 0) ++num_checks;
        }
    });
    return num_checks;
}
}
