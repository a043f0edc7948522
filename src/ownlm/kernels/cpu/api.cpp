// The C interface: what native.py calls through ctypes. Every function that can fail gives 0 when it went well.
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "model.h"

using namespace ownlm;

namespace {

// One team for each number of threads, kept for the life of the process; a step has it to itself.
struct Team {
    explicit Team(int size) : pool(size) {}
    Pool pool;
    std::mutex busy;
};

Team& team(int threads) {
    static std::mutex mutex;
    static auto& teams = *new std::map<int, std::unique_ptr<Team>>();  // never torn down: its threads may outlive main
    std::lock_guard lock(mutex);
    auto& found = teams[threads];
    if (!found) found = std::make_unique<Team>(threads);
    return *found;
}

struct Handle {
    Model model;
    Team* team;
};

enum VectorSlot { INPUT_NORM, ATTENTION_NORM, POST_NORM, MLP_NORM, Q_NORM, K_NORM, SINKS, FINAL_NORM, POSITIONS };
enum MatrixSlot { QKV, OUT, ROUTER, UP, DOWN, EMBED, HEAD, VALUE };

const float* keep(Model& model, const float* values, int64_t count) {
    model.vectors.push_back(std::make_unique<float[]>(count));
    std::memcpy(model.vectors.back().get(), values, count * sizeof(float));
    return model.vectors.back().get();
}

Packed& matrix(Model& model, int layer, int slot, int expert) {
    if (slot == EMBED) return model.embed;
    if (slot == HEAD) return model.head;
    Layer& l = model.layers[layer];
    if (slot == QKV) return l.qkv;
    if (slot == VALUE) return l.v;
    if (slot == OUT) return l.o;
    if (slot == ROUTER) return l.router;
    if (l.mlp.size() <= size_t(expert)) l.mlp.resize(expert + 1);
    return slot == UP ? l.mlp[expert].up : l.mlp[expert].down;
}

Norm& norm_of(Model& model, int layer, int slot) {
    if (slot == FINAL_NORM) return model.norm;
    Layer& l = model.layers[layer];
    Norm* norms[] = {&l.input, &l.attention_out, &l.post_attention, &l.mlp_out, &l.q, &l.k};
    return *norms[slot];
}

const Kernels* kernels_named(const char* instruction_set) {
    for (auto* kernels : supported())
        if (!std::strcmp(kernels->name, instruction_set)) return kernels;
    return nullptr;
}

void put_bias(Packed& packed, const float* bias) {
    packed.bias_values.assign(packed.padded(), 0.0f);
    std::copy(bias, bias + packed.n, packed.bias_values.begin());
    packed.bias = packed.bias_values.data();
}

void fill(Team& team, Packed& packed, int first, int count, const Source& source) {
    std::lock_guard lock(team.busy);
    Pool& pool = team.pool;
    // Threads take whole tiles, for two rows of a tile share its bytes.
    const int offset = first % TILE, tiles = (offset + count + TILE - 1) / TILE;
    pool.run([&](int id) {
        Member(pool, id).split(tiles, [&](int t0, int t1) {
            const int r0 = std::max(0, t0 * TILE - offset), r1 = std::min(count, t1 * TILE - offset);
            pack(packed, first + r0, r1 - r0, source.from(r0, packed));
        });
    });
}

// A matrix by itself, for models whose steps are PyTorch's.
struct Alone {
    Packed matrix;
    Memory memory;  // what its tiles lie in
    const Kernels* kernels;
    Team* team;
    Prepared in;
    Buffer padded, inner;  // rows of x, where they don't end with a group; of a feed-forward, what stands between its layers

    void shape(int rows) {
        in.shape(matrix.kind, rows, matrix.k);
        if (matrix.k % GROUP) padded.shape(rows, matrix.k);
    }

    void prepare(Member& member, const float* x, int rows) {
        member.split(rows, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) {
                const float* row = x + size_t(r) * matrix.k;
                if (matrix.k % GROUP) row = (const float*)std::memcpy(padded.row(r), row, matrix.k * sizeof(float));
                kernels->prepare(matrix.kind, row, r, 0, matrix.groups(), in.in);
            }
        });
    }

    // An even number of tiles for whoever is free: two of them make a group of what reads their outputs.
    int piece(const Member& member) const { return std::max(2, std::min(8, matrix.tile_count() / (member.threads() * 8) & ~1)); }

    void multiply(Member& member, int rows, float* y) {
        member.share(matrix.tile_count(), piece(member), [&](int t0, int t1) {
            kernels->matmul(matrix, in.in, rows, y, matrix.padded(), false, t0, t1);
        });
    }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The instruction sets this processor has, best first, separated by spaces.
const char* ownlm_instruction_sets() {
    static const std::string names = [] {
        std::string all;
        for (auto* kernels : supported()) all += (all.empty() ? "" : " ") + std::string(kernels->name);
        return all;
    }();
    return names.c_str();
}

void* ownlm_new(const ModelSpec* spec, const char* instruction_set, int threads) try {
    auto handle = std::make_unique<Handle>();
    Model& model = handle->model;
    model.kernels = kernels_named(instruction_set);
    if (!model.kernels) return nullptr;
    handle->team = &team(threads);
    model.pool = &handle->team->pool;
    model.spec = *spec;
    model.layers.resize(spec->layers);
    model.rotaries.resize(spec->rotaries);
    return handle.release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

void ownlm_delete(void* handle) { delete (Handle*)handle; }

void ownlm_layer(void* handle, int layer, const LayerSpec* spec) { ((Handle*)handle)->model.layers[layer].spec = *spec; }

void ownlm_rotary(void* handle, int index, int half, int rows, const float* cos, const float* sin, const float* long_cos, const float* long_sin) {
    Model& model = ((Handle*)handle)->model;
    const int64_t count = int64_t(half) * rows;
    Rotary& rotary = model.rotaries[index];
    rotary.half = half, rotary.rows = rows;
    rotary.cos = keep(model, cos, count), rotary.sin = keep(model, sin, count);
    rotary.long_cos = long_cos ? keep(model, long_cos, count) : rotary.cos;
    rotary.long_sin = long_sin ? keep(model, long_sin, count) : rotary.sin;
}

// A norm with its weight (count) and bias (count, or none), the sinks of a layer, or the table of learned positions.
void ownlm_vector(void* handle, int layer, int slot, int64_t count, const float* weight, const float* bias, float eps, int centred) {
    Model& model = ((Handle*)handle)->model;
    if (slot == SINKS) model.layers[layer].sinks = keep(model, weight, count);
    else if (slot == POSITIONS) model.learned_positions = keep(model, weight, count);
    else norm_of(model, layer, slot) = {keep(model, weight, count), bias ? keep(model, bias, count) : nullptr, eps, centred != 0};
}

int ownlm_matrix(void* handle, int layer, int slot, int expert, int kind, int n, int k, const float* bias) try {
    Model& model = ((Handle*)handle)->model;
    Packed& packed = matrix(model, layer, slot, expert);
    allocate(model.arena, packed, Kind(kind), n, k);
    if (bias) put_bias(packed, bias);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Fill rows [first, first + count) from a `Source`.
void ownlm_pack(void* handle, int layer, int slot, int expert, int first, int count, int form, const uint8_t* values, const uint16_t* scales,
                const uint16_t* minimums) {
    Handle* h = (Handle*)handle;
    fill(*h->team, matrix(h->model, layer, slot, expert), first, count, {Form(form), values, scales, minimums});
}

void ownlm_tie(void* handle) { ((Handle*)handle)->model.tied = true; }

int64_t ownlm_bytes(void* handle) { return int64_t(((Handle*)handle)->model.bytes()); }

void* ownlm_cache_new(void* handle, int kind, int pages) try {
    return new Cache(((Handle*)handle)->model.spec, Kind(kind), pages);
} catch (const std::bad_alloc&) {
    return nullptr;
}

void ownlm_cache_delete(void* cache) { delete (Cache*)cache; }

void ownlm_cache_copy(void* cache, int page, int onto) { ((Cache*)cache)->copy(page, onto); }

int ownlm_step(void* handle, void* cache, const Rows* rows) try {
    Handle* h = (Handle*)handle;
    std::lock_guard lock(h->team->busy);
    h->model.step(*(Cache*)cache, *rows);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// A token of n logits for each of `rows` rows of the table at `logits`, whose rows stand `stride` floats apart, on the threads of the team.
void ownlm_choose(const char* instruction_set, int threads, int rows, int n, int64_t stride, const float* logits, const int32_t* row,
                  const float* temperature, const double* uniform, int32_t* ids, float* logprobs) {
    const Kernels* kernels = supported().back();
    for (auto* each : supported())
        if (!std::strcmp(each->name, instruction_set)) kernels = each;
    Team& all = team(threads);
    std::lock_guard lock(all.busy);
    const auto choose = [&](int from, int to) {
        for (int i = from; i < to; i++) kernels->choose(logits + row[i] * stride, n, temperature[i], uniform[i], ids + i, logprobs + i);
    };
    if (rows == 1) return choose(0, 1);
    all.pool.run([&](int id) { Member(all.pool, id).split(rows, choose); });
}

// A linear layer of its own: weights (n, k) as in ownlm_pack, bias (n) or none. Null without memory.
void* ownlm_linear_new(const char* instruction_set, int threads, int kind, int n, int k, int form, const uint8_t* values, const uint16_t* scales,
                       const uint16_t* minimums, const float* bias) try {
    auto alone = std::make_unique<Alone>();
    alone->kernels = kernels_named(instruction_set);
    if (!alone->kernels) return nullptr;
    alone->team = &team(threads);
    Packed& matrix = alone->matrix;
    matrix.kind = Kind(kind), matrix.n = n, matrix.k = k;
    alone->memory = Memory(matrix.bytes());
    matrix.tiles = alone->memory.data();
    if (bias) put_bias(matrix, bias);
    fill(*alone->team, matrix, 0, n, {Form(form), values, scales, minimums});
    return alone.release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

void ownlm_linear_delete(void* linear) { delete (Alone*)linear; }

int64_t ownlm_linear_bytes(void* linear) { return int64_t(((Alone*)linear)->matrix.bytes()); }

// y = x W' + bias: x (rows, k), y (rows, n rounded up to 16).
int ownlm_linear(void* linear, int rows, const float* x, float* y) try {
    Alone& alone = *(Alone*)linear;
    std::lock_guard lock(alone.team->busy);
    alone.shape(rows);
    alone.team->pool.run([&](int id) {
        Member member(alone.team->pool, id);
        alone.prepare(member, x, rows);
        alone.multiply(member, rows, y);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// y = down(act(up x)), or down(act(gate x) * up x) where there is a gate; x and y as above.
int ownlm_feed_forward(void* gate, void* up, void* down, int activation, float limit, float up_offset, int rows, const float* x, float* y) try {
    Alone &first = *(Alone*)up, &last = *(Alone*)down, *other = (Alone*)gate;
    const Gate spec{Activation(activation), other != nullptr, limit, up_offset};
    const Kernels& kernels = *first.kernels;
    std::lock_guard lock(first.team->busy);
    first.shape(rows), last.shape(rows);
    first.inner.shape(rows, first.matrix.n);
    if (other) other->inner.shape(rows, other->matrix.n);
    const size_t stride = first.inner.stride;
    first.team->pool.run([&](int id) {
        Member member(first.team->pool, id);
        first.prepare(member, x, rows);
        member.share(first.matrix.tile_count(), first.piece(member), [&](int t0, int t1) {
            kernels.matmul(first.matrix, first.in.in, rows, first.inner.row(0), stride, false, t0, t1);
            if (other) kernels.matmul(other->matrix, first.in.in, rows, other->inner.row(0), stride, false, t0, t1);
            for (int r = 0; r < rows; r++) {
                float* u = first.inner.row(r) + t0 * TILE;
                kernels.activate(spec, other ? other->inner.row(r) + t0 * TILE : u, u, (t1 - t0) * TILE, u);
                kernels.prepare(last.matrix.kind, first.inner.row(r), r, t0 / 2, (t1 + 1) / 2, last.in.in);
            }
        });
        last.multiply(member, rows, y);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// The sum of `count` words, which the threads share: how fast memory is read.
uint64_t ownlm_read(int threads, const uint64_t* words, int64_t count) {
    Team& all = team(threads);
    std::lock_guard lock(all.busy);
    std::vector<uint64_t> sums(all.pool.size());
    all.pool.run([&](int id) {
        Member(all.pool, id).split(int(count / 4096), [&](int begin, int end) {
            uint64_t sum[8] = {};
            for (const uint64_t* at = words + begin * int64_t(4096); at < words + end * int64_t(4096); at += 8)
                for (int j = 0; j < 8; j++) sum[j] += at[j];
            for (uint64_t each : sum) sums[id] += each;
        });
    });
    uint64_t total = 0;
    for (uint64_t each : sums) total += each;
    for (int64_t i = count / 4096 * 4096; i < count; i++) total += words[i];
    return total;
}

}  // extern "C"
#pragma GCC visibility pop
