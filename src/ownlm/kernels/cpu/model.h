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

// Memory of weights, one matrix behind the other in ever larger chunks: with chunks of their own, each would end in the middle of a huge
// page. What of a chunk is never written takes nothing.
class Arena {
  public:
    uint8_t* take(size_t bytes);  // in whole cache lines; lives as long as the arena

  private:
    std::vector<Memory> chunks_;
    uint8_t* next_ = nullptr;
    size_t left_ = 0, next_size_ = size_t(32) << 10;
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
    std::vector<float> bias_values;
};

struct FeedForward {
    Packed up, down;  // up: gate and up, one under the other, where gated
};

struct Layer {
    LayerSpec spec{};
    Norm input, attention_out, post_attention, mlp_out, q, k;
    Packed qkv, o, router;
    Packed v;  // by itself where its codes are of another kind than those of q and k, which read the same activations: UINT4 beside INT8
    std::vector<FeedForward> mlp;  // one, or the experts
    const float* sinks = nullptr;
};

struct Adapter;  // lora.h

struct Rows {
    int32_t count, pages_of_each;
    int32_t partial, from_layer, to_layer;  // the last `partial` rows go through layers [from_layer, to_layer) only
    const int32_t *token, *sequence, *position, *wanted, *is_long;
    const float* embeds;  // (count, D) in place of embeddings, or none
    const int32_t* pages; // (sequences, pages_of_each)
    float* logits;  // (wanted rows, V rounded up to 16)
    const int32_t* adapter;  // of each row which of `adapters`, -1: none; or none for all
    const Adapter* const* adapters;
    int64_t adapter_count;
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
    std::vector<float> scale, sum;
    std::vector<int32_t> zero;
    Input in;
    void shape(Kind kind, int rows, int k);
};

// The keys and values of `pages` pages; strides in elements. Memory that was never written takes none: all layers of a page lie together,
// so that a short text touches few huge pages.
struct Cache {
    Cache(const ModelSpec& spec, Kind kind, int pages);
    Pages layer(size_t index) const;
    void copy(size_t page, size_t onto);
    const Kind kind;
    const size_t head_stride, layer_stride, page_stride;
    Memory keys, values;
    Buffer held;  // the states of partial rows between two steps
};

struct Model {
    ModelSpec spec{};
    const Kernels* kernels = nullptr;
    Pool* pool = nullptr;
    Arena arena;  // what the tiles of all matrices lie in
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
    std::vector<float> low;  // these three: of adapters
    std::vector<Prepared> adapter_in;
    std::vector<std::vector<float>> adapter_out;
};

void allocate(Arena& arena, Packed& matrix, Kind kind, int n, int k);
// Fill rows [first, first + count) of a packed matrix.
void pack(Matrix& matrix, int first, int count, const Source& source);

}  // namespace ownlm
