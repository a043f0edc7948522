// Adapters: what they add to a step, and their part of the C interface.
#include "lora.h"

#include <cstring>
#include <new>
#include <numeric>

namespace ownlm {

namespace {

constexpr int PIECE = 16, WHOLE = 1 << 20;  // tiles of a piece of work: while chunks are few, and otherwise

int low_width(const Pair& pair) { return round_up(pair.a.n, GROUP); }

}  // namespace

size_t Adapter::bytes() const {
    size_t total = head.bytes();
    for (auto& site : pairs)
        for (auto& pair : site) total += pair.a.bytes() + pair.b.bytes();
    return total;
}

Adapting::Adapting(Model& model, const Rows& rows, const std::vector<int>& wanted) : m(model), kernels(*model.kernels) {
    if (!rows.adapter) return;
    std::vector<int> every(rows.count);
    std::iota(every.begin(), every.end(), 0);
    all = chunks(rows, every, false), with_head = chunks(rows, wanted, true);
    int heads = 0;
    for (auto& chunk : with_head) heads += chunk.count;
    all_heads_ = heads > 0 && heads == int(wanted.size());
    size_t low = 0;
    for (auto& chunk : all) chunk.low = low, low += BLOCK * chunk.adapter->width;
    if (m.low.size() < low) m.low.resize(low);
    m.adapter_in.resize(m.pool->size()), m.adapter_out.resize(m.pool->size());
    for (auto& out : m.adapter_out) out.resize(BLOCK * PIECE * TILE);
}

// Places in `of` by the adapter of the row that stands there, at most a block each.
std::vector<Adapting::Chunk> Adapting::chunks(const Rows& rows, const std::vector<int>& of, bool with_head) {
    std::vector<Chunk> found;
    std::vector<int> open(rows.adapter_count, -1);  // of each adapter the chunk that still has room
    for (int i = 0; i < int(of.size()); i++) {
        const int number = rows.adapter[of[i]];
        if (number < 0 || (with_head && !rows.adapters[number]->head.n)) continue;
        int& at = open[number];
        if (at < 0 || found[at].count == BLOCK) at = int(found.size()), found.push_back({rows.adapters[number], 0, {}, 0});
        found[at].rows[found[at].count++] = i;
    }
    return found;
}

// f(chunk, how many of its rows stand below `count`, pair, where its A x stands, t0, t1) on pieces of `tiles(pair)` of every pair.
template <class Tiles, class F>
void Adapting::share(Member& member, bool wait, size_t layer, Site site, int count, const Tiles& tiles, const F& f) {
    const int piece = int(all.size()) < 2 * member.threads() ? PIECE : WHOLE;
    const auto pieces = [&](const Pair& pair) { return (tiles(pair) + piece - 1) / piece; };
    int total = 0;
    for (auto& chunk : all)
        for (auto& pair : chunk.adapter->at(layer, site)) total += pieces(pair);
    const auto take = [&](int begin, int end) {
        int first = 0;
        for (auto& chunk : all) {
            float* low = m.low.data() + chunk.low;
            const int rows = int(std::lower_bound(chunk.rows, chunk.rows + chunk.count, count) - chunk.rows);
            for (auto& pair : chunk.adapter->at(layer, site)) {
                for (int p = std::max(0, begin - first); rows && p < std::min(pieces(pair), end - first); p++)
                    f(chunk, rows, pair, low, p * piece, std::min(tiles(pair), (p + 1) * piece));
                first += pieces(pair), low += BLOCK * low_width(pair);
            }
        }
    };
    wait ? member.share(total, 1, take) : member.share_and_go_on(total, 1, take);
}

// put(row, first output, values, how many) of the outputs of tiles [t0, t1).
template <class F>
void Adapting::multiply(Member& member, const Matrix& w, const Input& in, int rows, int t0, int t1, const F& put) {
    float* out = m.adapter_out[member.id].data();
    for (int t = t0; t < t1; t += PIECE) {
        const int tiles = std::min(PIECE, t1 - t);
        Matrix part = w;
        part.tiles += t * w.tile_bytes(), part.n = tiles * TILE;
        if (part.bias) part.bias += t * TILE;
        kernels.matmul(part, in, rows, out, PIECE * TILE, false, 0, tiles);
        for (int i = 0; i < rows; i++) put(i, t * TILE, out + i * PIECE * TILE, tiles * TILE);
    }
}

const Input& Adapting::prepared(Member& member, Kind kind, int rows, int k, const std::function<const float*(int)>& row) {
    Prepared& to = m.adapter_in[member.id];
    to.shape(kind, BLOCK, k);
    for (int i = 0; i < rows; i++) kernels.prepare(kind, row(i), i, 0, to.in.groups, to.in);
    return to.in;
}

void Adapting::shrink(Member& member, size_t layer, Site site, Buffer& x, int count) {
    if (all.empty()) return;
    const auto tiles = [](const Pair& pair) { return pair.a.tile_count(); };
    const Chunk* ready = nullptr;  // whose rows this thread has prepared, for all pairs of the site read the same
    share(member, false, layer, site, count, tiles, [&](const Chunk& chunk, int rows, const Pair& pair, float* low, int t0, int t1) {
        if (ready != &chunk) prepared(member, pair.a.kind, rows, pair.a.k, [&](int i) { return x.row(chunk.rows[i]); });
        ready = &chunk;
        const int width = low_width(pair);
        multiply(member, pair.a, m.adapter_in[member.id].in, rows, t0, t1, [&](int i, int at, const float* values, int n) {
            std::memcpy(low + i * width + at, values, n * sizeof(float));
        });
        // What B's last group holds beyond the rank.
        if (t1 == pair.a.tile_count())
            for (int i = 0; i < rows; i++) std::fill(low + i * width + pair.a.padded(), low + (i + 1) * width, 0.0f);
    });
}

void Adapting::expand(Member& member, size_t layer, Site site, Buffer& y, int count) {
    if (all.empty()) return;
    const auto tiles = [](const Pair& pair) { return pair.b.tile_count(); };
    share(member, true, layer, site, count, tiles, [&](const Chunk& chunk, int rows, const Pair& pair, const float* low, int t0, int t1) {
        const int width = low_width(pair);
        const Input& in = prepared(member, pair.b.kind, rows, pair.b.k, [&](int i) { return low + i * width; });
        multiply(member, pair.b, in, rows, t0, t1, [&](int i, int at, const float* values, int n) {
            float* to = y.row(chunk.rows[i]) + pair.at + at;
            for (int j = 0; j < n; j++) to[j] += values[j];
        });
    });
}

void Adapting::heads(Member& member, Buffer& x, float* logits, size_t stride) {
    if (with_head.empty()) return;
    const int tiles = m.output().tile_count(), pieces = (tiles + PIECE - 1) / PIECE;
    member.share(int(with_head.size()) * pieces, 1, [&](int begin, int end) {
        for (int p = begin; p < end; p++) {
            const Chunk& chunk = with_head[p / pieces];
            const Packed& head = chunk.adapter->head;
            const int t0 = p % pieces * PIECE, t1 = std::min(tiles, t0 + PIECE);
            const Input& in = prepared(member, head.kind, chunk.count, head.k, [&](int i) { return x.row(chunk.rows[i]); });
            multiply(member, head, in, chunk.count, t0, t1, [&](int i, int at, const float* values, int n) {
                std::memcpy(logits + chunk.rows[i] * stride + at, values, n * sizeof(float));
            });
        }
    });
}

}  // namespace ownlm

using namespace ownlm;

#pragma GCC visibility push(default)
extern "C" {

void* ownlm_adapter_new(int layers) try {
    return new Adapter(layers);
} catch (const std::bad_alloc&) {
    return nullptr;
}

// From floats: A (rank, inputs) and B (outputs, rank), which is added to the outputs from `at` on.
int ownlm_adapter_pair(void* adapter, int layer, int site, int kind, int at, int inputs, int outputs, int rank, const float* a, const float* b) try {
    Adapter& to = *(Adapter*)adapter;
    auto& pairs = to.pairs[size_t(layer) * SITES + site];
    Pair pair;
    allocate(to.arena, pair.a, Kind(kind), rank, inputs), allocate(to.arena, pair.b, Kind(kind), outputs, rank);
    pack(pair.a, 0, rank, {FLOATS, (const uint8_t*)a}), pack(pair.b, 0, outputs, {FLOATS, (const uint8_t*)b});
    pair.at = at;
    pairs.push_back(std::move(pair));
    size_t width = 0;
    for (auto& each : pairs) width += low_width(each);
    to.width = std::max(to.width, width);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// A head of (n, k) floats in place of the model's, with a bias or none.
int ownlm_adapter_head(void* adapter, int kind, int n, int k, const float* weight, const float* bias) try {
    Adapter& to = *(Adapter*)adapter;
    Packed& head = to.head;
    allocate(to.arena, head, Kind(kind), n, k);
    pack(head, 0, n, {FLOATS, (const uint8_t*)weight});
    if (bias) {
        head.bias_values.assign(head.padded(), 0.0f);
        std::copy(bias, bias + n, head.bias_values.begin());
        head.bias = head.bias_values.data();
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

int64_t ownlm_adapter_bytes(void* adapter) { return int64_t(((Adapter*)adapter)->bytes()); }

void ownlm_adapter_delete(void* adapter) { delete (Adapter*)adapter; }

}  // extern "C"
#pragma GCC visibility pop
