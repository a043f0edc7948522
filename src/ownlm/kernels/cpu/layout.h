// How weights, activations and the cache lie in memory. Shared by every instruction set; sizes are in elements unless told.
//
// Weights. A matrix of N outputs and K inputs is cut into tiles of 16 outputs; a tile is a run of groups of 32 inputs, read
// front to back. One copy serves decoding, batched decoding and prefill. A group holds, for its 16 rows x 32 columns:
//   F32    for each column:           16 floats
//   BF16   for each pair of columns:  16 rows x 2; a last group of 16 columns or fewer is half as long
//   INT8   16 scales (half precision), then for each four columns: 16 rows x 4 bytes, value = (byte - 128) * scale
//   INT4   16 scales, then for each c in 0..3: 16 rows x 4 bytes; the low half is column 4c + i, the high half 16 + 4c + i,
//          value = (half - 8) * scale
//   UINT4  16 scales, 16 minimums (half precision too), then bytes as of INT4, value = half * scale + minimum
//   FP8    for each four columns, for each four rows: 4 rows x the first 2 columns, then x the other 2; a byte each (E4M3). Their
//          scales are those of whole rows: 16 floats ahead of the tile's first group
//
// Activations. Rows are cut into blocks of 8; a block is a run of groups of 8 rows x 32 columns, in the type the weights ask
// for: floats, bf16 (for FP8 too), or int8 with a scale for each row of the group (its largest magnitude / 127) and the sum of the
// row's numbers, with which minimums are multiplied.
//
// Cache. A page holds PAGE positions of one sequence for all layers and heads: floats stand as keys (d, PAGE), so that one
// query meets 16 positions at a time, and values (PAGE, d); bf16 in the pairs that its products read: keys (d / 2, PAGE, 2),
// values (PAGE / 2, d, 2); int8 in fours, as byte - 128: keys (d / 4, PAGE, 4), values (PAGE / 4, d, 4), and behind each of them
// the scales (half precision) of the PAGE positions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ownlm {

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, UINT4 = 4, FP8 = 5 };

constexpr bool is_integer(Kind kind) { return kind == INT8 || kind == INT4 || kind == UINT4; }

constexpr int TILE = 16, GROUP = 32, BLOCK = 8, PAGE = 32;

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Of 32 codes of a row.
constexpr size_t code_bytes(Kind kind) { return kind == INT8 || kind == FP8 ? GROUP : GROUP / 2; }

// Of a group the scales, and the minimums behind them: what stands before its codes.
constexpr size_t scale_bytes(Kind kind) { return kind == FP8 ? 0 : kind == UINT4 ? TILE * 4 : TILE * 2; }

constexpr size_t group_bytes(Kind kind) {
    switch (kind) {
        case F32: return TILE * GROUP * 4;
        case BF16: return TILE * GROUP * 2;
        default: return scale_bytes(kind) + TILE * code_bytes(kind);
    }
}

// What a tile begins with, ahead of its groups: the scales of whole rows.
constexpr size_t head_bytes(Kind kind) { return kind == FP8 ? TILE * sizeof(float) : 0; }

// Where a group of FP8 has column k of a row.
constexpr int fp8_place(int row, int k) { return k / 4 * 4 * TILE + row / 4 * 16 + k / 2 % 2 * 8 + row % 4 * 2 + k % 2; }

// Of a head's keys (or values) in a page, in elements and in bytes of each.
constexpr size_t head_elements(Kind kind, int d) { return size_t(d) * PAGE + (kind == INT8 ? 2 * PAGE : 0); }
constexpr size_t element_bytes(Kind kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }

// Bytes of one group of a block of activations, without scales.
constexpr size_t input_bytes(Kind kind) { return size_t(BLOCK) * GROUP * element_bytes(kind == FP8 ? BF16 : kind); }

#ifdef __aarch64__
typedef __fp16 Half;  // its C++ had no _Float16 before g++ 13
#else
typedef _Float16 Half;
#endif

static inline uint16_t to_half(float x) {  // static: each instruction set its own
    const Half h = Half(x);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}

// What a code of E4M3 stands for, the two of NaN left out (pack.inc).
static inline float from_e4m3(uint8_t code) {
    const uint32_t exponent = code >> 3 & 15, fraction = code & 7, bits = (exponent + 120) << 23 | fraction << 20;
    float size = float(fraction) * 0x1p-9f;
    if (exponent) std::memcpy(&size, &bits, 4);
    return code & 0x80 ? -size : size;
}

struct Matrix {
    uint8_t* tiles = nullptr;
    const float* bias = nullptr;  // N, or none
    Kind kind = F32;
    int n = 0, k = 0;

    int groups() const { return (k + GROUP - 1) / GROUP; }
    int tile_count() const { return (n + TILE - 1) / TILE; }
    bool halved() const { return kind == BF16 && k % GROUP && k % GROUP <= GROUP / 2; }
    size_t tile_bytes() const { return head_bytes(kind) + groups() * group_bytes(kind) - (halved() ? group_bytes(kind) / 2 : 0); }
    size_t bytes() const { return tile_count() * tile_bytes(); }
    int padded() const { return round_up(n, TILE); }  // outputs as they are written
};

// Activations on their way into a matrix. `zero` is what an instruction that reads weights as unsigned adds too much, negated; `sum` what
// the numbers that `data` and `scale` stand for add up to.
struct Input {
    uint8_t* data = nullptr;
    float* scale = nullptr;  // these three: [block][group][BLOCK]
    int32_t* zero = nullptr;
    float* sum = nullptr;
    int groups = 0;
};

}  // namespace ownlm
