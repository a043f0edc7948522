// Adapters (LoRA, arXiv:2106.09685) beside the weights of a model. After a product, rows that ask for an adapter get y += B (A x),
// with A and B packed like any matrix and the scale inside B. Rows of one adapter are computed in chunks of a block, wherever
// they stand in the batch, by the same operations in the same order whoever else is there.
#pragma once
#include "model.h"

namespace ownlm {

struct Pair {
    Packed a, b;  // (rank, inputs), (outputs, rank)
    int at = 0;   // the first output, a multiple of TILE
};

enum Site : int32_t { AT_QKV = 0, AT_OUT, AT_UP, AT_DOWN, SITES };

struct Adapter {
    explicit Adapter(int layers) : pairs(size_t(layers) * SITES) {}
    const std::vector<Pair>& at(size_t layer, Site site) const { return pairs[layer * SITES + site]; }
    size_t bytes() const;

    Arena arena;  // where all its matrices are
    std::vector<std::vector<Pair>> pairs;
    Packed head;      // in place of the model's; n 0: none
    size_t width = 0; // floats that the A x of one site take for a row, at most
};

// What the adapters do in one step. All members call the same functions in the same order.
class Adapting {
  public:
    // `wanted`: the rows whose logits are asked for.
    Adapting(Model& model, const Rows& rows, const std::vector<int>& wanted);

    // A x of the first `count` rows, kept for `expand`. Nobody waits: it goes beside the product that it is to be added to.
    void shrink(Member& member, size_t layer, Site site, Buffer& x, int count);
    // y += B (A x), after that product.
    void expand(Member& member, size_t layer, Site site, Buffer& y, int count);

    // True where every wanted row has a head of its adapter's.
    bool all_heads() const { return all_heads_; }
    // The logits of those that have: row i of x is the state of wanted row i.
    void heads(Member& member, Buffer& x, float* logits, size_t stride);

  private:
    struct Chunk {
        const Adapter* adapter;
        int count, rows[BLOCK];  // ascending
        size_t low;              // where its A x begins
    };

    static std::vector<Chunk> chunks(const Rows& rows, const std::vector<int>& of, bool with_head);
    template <class Tiles, class F>
    void share(Member& member, bool wait, size_t layer, Site site, int count, const Tiles& tiles, const F& f);
    template <class F>
    void multiply(Member& member, const Matrix& w, const Input& in, int rows, int t0, int t1, const F& put);
    // Rows of k columns, ready for a matrix of `kind`: of this thread, until it prepares others.
    const Input& prepared(Member& member, Kind kind, int rows, int k, const std::function<const float*(int)>& row);

    Model& m;
    const Kernels& kernels;
    std::vector<Chunk> all, with_head;
    bool all_heads_ = false;
};

}  // namespace ownlm
