// A decoder as the step sees it: what Python's DecoderConfig says, in numbers, and its packed weights.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace ownlm {

// Memory in huge pages where the system has them: weights are read from end to end for every token, and address
// translation costs a third of the bandwidth with small ones.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes);
    ~Memory();
    Memory(Memory&& other) noexcept { swap(other); }
    Memory& operator=(Memory&& other) noexcept { swap(other); return *this; }
    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    void swap(Memory& other) { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_), std::swap(mapped_, other.mapped_); }
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0, mapped_ = 0;
};

enum NormPlace : int32_t { BEFORE = 0, AFTER, AROUND };
enum Residual : int32_t { SEQUENTIAL = 0, PARALLEL, SHARED };

// The C structs of the interface: 4-byte fields only, mirrored in native.py.
struct ModelSpec {
    int32_t hidden, layers, heads_d, rotaries, kv_heads;
    float embed_scale, logit_scale, logit_softcap;
};

struct LayerSpec {
    int32_t heads, kv_heads, qk_norm, window, rotary;  // rotary -1: none
    float scale, softcap;
    int32_t norms, residual;
    int32_t activation, gated, experts, per_token, renormalise, centred;
    float limit, up_offset, eps;
};

struct Rotary {
    int half = 0, rows = 0;
    const float *cos = nullptr, *sin = nullptr;            // (rows, half)
    const float *long_cos = nullptr, *long_sin = nullptr;  // for texts beyond the original context; may be the same
};

struct Packed : Matrix {
    Memory memory;
    std::vector<float> bias_values;
};

struct FeedForward {
    Packed up, down;  // up: gate and up, one under the other, where gated
};

struct Layer {
    LayerSpec spec{};
    Norm input, attention_out, post_attention, mlp_out, q, k;
    Packed qkv, o, router;
    std::vector<FeedForward> mlp;  // one, or the experts
    const float* sinks = nullptr;
};

struct Rows {
    int32_t count, pages_of_each;
    int32_t partial, from_layer, to_layer;  // the last `partial` rows go through layers [from_layer, to_layer) only
    const int32_t *token, *sequence, *position, *wanted, *is_long;
    const float* embeds;  // (count, D) in place of embeddings, or none
    const int32_t* pages; // (sequences, pages_of_each)
    float *logits, *hidden;  // (wanted rows, V rounded up to 16), (wanted rows, D); either may be none
};

struct Buffer {
    std::vector<float> values;
    size_t stride = 0;
    // Rows of n columns, padded with zeros to whole groups.
    void shape(int rows, int n) {
        stride = round_up(n, GROUP);
        if (values.size() < rows * stride) values.assign(rows * stride, 0.0f);
    }
    float* row(size_t r) { return values.data() + r * stride; }
};

struct Prepared {
    std::vector<uint8_t> data;
    std::vector<float> scale;
    std::vector<int32_t> zero;
    Input in;
    void shape(Kind kind, int rows, int k);
};

// The keys and values of `pages` pages; strides in elements. Memory that was never written takes none.
struct Cache {
    Cache(const ModelSpec& spec, Kind kind, int pages);
    Pages layer(size_t index) const;
    void copy(size_t page, size_t onto);
    const Kind kind;
    const size_t head_stride, page_stride, layer_stride;
    Memory keys, values;
    Buffer held;  // the states of partial rows between two steps
};

struct Model {
    ModelSpec spec{};
    const Kernels* kernels = nullptr;
    Pool* pool = nullptr;
    std::vector<Layer> layers;
    std::vector<Rotary> rotaries;
    Packed embed, head;
    bool tied = false;
    Norm norm;
    std::vector<std::unique_ptr<float[]>> vectors;  // what norms, biases, tables and sinks point into
    const float* learned_positions = nullptr;

    const Matrix& output() const { return tied ? embed : head; }
    void step(Cache& cache, const Rows& rows);
    size_t bytes() const;

    // Working memory of a step, kept from one to the next.
    Buffer x, h, y, qkv, a, up, act, last, router, expert;
    Prepared first_in, second_in, inner_in, router_in;
    std::vector<Scratch> scratch;
};

// Fill rows [first, first + count) of a packed matrix from floats (quantising to nearest) or from codes and scales.
void allocate(Packed& matrix, Kind kind, int n, int k);
void pack_floats(Matrix& matrix, int first, int count, const float* rows);
void pack_bf16(Matrix& matrix, int first, int count, const uint16_t* rows);
// int8: codes (count, k) signed; int4: (count, k / 2), the even column in the low half, value + 8. scales: (count, groups) half.
void pack_codes(Matrix& matrix, int first, int count, const uint8_t* codes, const uint16_t* scales);

}  // namespace ownlm
