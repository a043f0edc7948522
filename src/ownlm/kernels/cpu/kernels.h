// What a step of a decoder is made of, as one table of functions for each instruction set. step.cpp calls through it.
#pragma once
#include <vector>

#include "layout.h"

namespace ownlm {

enum Activation : int32_t { SILU = 0, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2 };

struct Norm {
    const float* weight = nullptr;  // none: there is no norm
    const float* bias = nullptr;
    float eps = 0;
    bool centred = false;  // LayerNorm; otherwise RMSNorm
};

struct Gate {
    Activation activation = SILU;
    bool gated = true;
    float limit = 0, up_offset = 0;  // limit 0: none
};

// Attention of one layer: everything but who asks.
struct Heads {
    int heads = 0, kv_heads = 0, d = 0;  // d: head width
    float scale = 1, softcap = 0;        // softcap 0: none
    int window = 0;                      // 0: none
    const float* sinks = nullptr;
};

// The cache of one layer. A page's keys of head h begin at keys + (page * page_stride + h * head_stride) * element size.
struct Pages {
    const void *keys = nullptr, *values = nullptr;
    size_t page_stride = 0, head_stride = 0;
    Kind kind = BF16;  // F32, BF16 or INT8
};

// The pages of a key head that are met, in this order.
struct Met {
    const int32_t* pages = nullptr;
    int count = 0, kv_head = 0;
};

// Rows [first, first + count) of one sequence at successive positions, asking with heads [head, head + group) of one key head.
struct Query {
    const float* q = nullptr;  // of the first row and head
    float* out = nullptr;      // likewise
    size_t q_stride = 0, out_stride = 0;
    int count = 0, position = 0, head = 0, group = 0;
    const int32_t* pages = nullptr;  // the sequence's page numbers
    Met next;                        // of what this thread is asked next, which is fetched from memory meanwhile
};

// What codes are worth: code * scale; `zero` as in Input.
struct Codes {
    float scale = 0;
    int32_t zero = 0;
};

struct Scratch {
    std::vector<float> queries, out, most, total;
    std::vector<Codes> codes;  // of queries in int8
};

// Rows as they come to be packed, from memory or a file: numbers, codes with their scales and minimums, or blocks of ggml's. Codes and blocks go
// into a matrix of the kind that holds their values; blocks of four bits also into one of int8.
enum Form : int32_t { FLOATS = 0, BF16S, CODES, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

struct Block {
    int bytes, groups;
};

constexpr Block block_of(Form form) {
    constexpr Block blocks[] = {{34, 1}, {18, 1}, {20, 1}, {22, 1}, {24, 1}, {144, 8}, {176, 8}, {210, 8}};
    return blocks[form - Q8_0];
}

struct Source {
    Form form = FLOATS;
    const uint8_t* values = nullptr;
    const uint16_t *scales = nullptr, *minimums = nullptr;  // of codes: half precision, one for each group; minimums of UINT4 only;
                                                          // of FP8 floats, one for each row

    size_t row_bytes(const Matrix& matrix) const {
        switch (form) {
            case FLOATS: return size_t(matrix.k) * 4;
            case BF16S: return size_t(matrix.k) * 2;
            case CODES: return matrix.groups() * code_bytes(matrix.kind);
            default: return size_t(matrix.groups() / block_of(form).groups) * block_of(form).bytes;
        }
    }

    // From the r-th row on.
    Source from(size_t r, const Matrix& matrix) const {
        const size_t groups = r * matrix.groups(), halves = matrix.kind == FP8 ? 2 * r : groups;
        return {form, values + r * row_bytes(matrix), scales ? scales + halves : nullptr, minimums ? minimums + groups : nullptr};
    }
};

struct Kernels {
    const char* name;
    // Fill rows [first, first + count) of a matrix; others of the same tile stay as they are.
    void (*pack)(Matrix& matrix, int first, int count, const Source& source);
    // Put columns of groups [g0, g1) of a row of x (padded with zeros to whole groups) where a matrix of `kind` reads them.
    void (*prepare)(Kind kind, const float* x, int row, int g0, int g1, Input& in);
    // y[row][output] = (or +=) W x + bias for tiles [t0, t1); rows of y stand `stride` apart.
    void (*matmul)(const Matrix& w, const Input& in, int rows, float* y, size_t stride, bool add, int t0, int t1);
    void (*norm)(const Norm& norm, const float* x, int n, float* out);
    // out = act(gate) * up over n columns (a multiple of 16 is touched).
    void (*activate)(const Gate& spec, const float* gate, const float* up, int n, float* out);
    // Turn the pairs (x[i], x[i + half]) of a head by the angle of cos[i], sin[i].
    void (*rotate)(float* x, const float* cos, const float* sin, int half);
    // Keep a head's key and value at place `slot` of their page.
    void (*keep)(const Pages& pages, size_t offset, int slot, const float* key, const float* value, int d);
    void (*attend)(const Heads& heads, const Pages& pages, int kv_head, const Query& query, Scratch& scratch);
    // The K inputs of output n, as floats (an embedding).
    void (*read_row)(const Matrix& w, int n, float* out);
    // A token of n logits: the largest where temperature is 0, else the one at which the running sum of exp(x / temperature)
    // passes uniform * total. With its log-probability at temperature 1.
    void (*choose)(const float* x, int n, float temperature, double uniform, int32_t* id, float* logprob);
    void (*softcap)(float* x, size_t n, float scale, float cap);
};

extern const Kernels plain_kernels;
#ifdef OWNLM_X86
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels;
#endif
#ifdef OWNLM_ARM
extern const Kernels neon_kernels, neondot_kernels, neonbf16_kernels;
#endif

// Those that this processor has, best first.
std::vector<const Kernels*> supported();

}  // namespace ownlm
