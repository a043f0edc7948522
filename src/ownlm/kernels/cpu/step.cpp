// One step of a decoder: rows of (token, sequence, position) in, logits of the wanted rows out. Prefill, decoding and any
// mixture of both are the same call. The last rows may go through some of the layers only, and through the next ones in a later
// step: so a long prompt takes a little of every step, however long it is (layered prefill, arXiv:2510.08055).
// Every thread of the team runs `Step::run`; the loops of Member meet at barriers.
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>

#include "lora.h"

namespace ownlm {

void Prepared::shape(Kind kind, int rows, int k) {
    const size_t groups = (k + GROUP - 1) / GROUP, blocks = (rows + BLOCK - 1) / BLOCK, all = groups * blocks;
    if (data.size() < all * input_bytes(kind)) data.resize(all * input_bytes(kind));
    if (scale.size() < all * BLOCK) scale.resize(all * BLOCK), zero.resize(all * BLOCK), sum.resize(all * BLOCK);
    in = {data.data(), scale.data(), zero.data(), sum.data(), int(groups)};
}

namespace {

constexpr int QUERIES = 8;  // successive rows of a prompt that attend together

struct Run {
    int first, count;
};

// The rows that go through a layer, and how many runs they make.
struct Part {
    int rows, runs;
};

class Step {
  public:
    Step(Model& model, Cache& cache, const Rows& rows) : m(model), cache(cache), kernels(*model.kernels), rows(rows), T(rows.count), D(model.spec.hidden) {
        whole = {T - rows.partial, 0};
        for (int r = 0; r < T; r++) {
            if (rows.wanted[r]) wanted.push_back(r);
            if (r == whole.rows) whole.runs = int(runs.size());
            const bool goes_on = !runs.empty() && r > 0 && r != whole.rows && rows.sequence[r] == rows.sequence[r - 1] &&
                                 rows.position[r] == rows.position[r - 1] + 1 && runs.back().count < QUERIES;
            if (goes_on) runs.back().count++;
            else runs.push_back({r, 1});
        }
        all = {T, int(runs.size())};
        if (!rows.partial) whole = all;
        int widest_qkv = 0, widest_a = 0, widest_up = 0, widest_inner = 0;
        for (auto& layer : m.layers) {
            widest_qkv = std::max(widest_qkv, layer.qkv.padded() + layer.v.padded());
            widest_a = std::max(widest_a, layer.o.k);
            for (auto& ff : layer.mlp) widest_up = std::max(widest_up, ff.up.padded()), widest_inner = std::max(widest_inner, ff.down.k);
        }
        const int hidden = round_up(D, TILE);
        m.x.shape(T, hidden), m.h.shape(T, hidden), m.y.shape(T, hidden), m.last.shape(int(wanted.size()), hidden);
        m.qkv.shape(T, widest_qkv), m.a.shape(T, widest_a), m.up.shape(T, widest_up), m.act.shape(T, widest_inner);
        m.scratch.resize(m.pool->size());
        adapting.emplace(m, rows, wanted);
    }

    void run(Member member) {
        begin(member);
        for (int l = 0; l < int(m.layers.size()); l++) {
            const Part part = l >= rows.from_layer && l < rows.to_layer ? all : whole;
            if (part.rows) layer(member, m.layers[l], l, part);
        }
        if (rows.partial && rows.to_layer < int(m.layers.size())) keep(member);
        finish(member);
    }

  private:
    Model& m;
    Cache& cache;
    const Kernels& kernels;
    const Rows& rows;
    const int T, D;
    std::vector<Run> runs;
    Part all, whole;  // whole: those that go through all layers
    std::vector<int> wanted;
    std::optional<Adapting> adapting;
    // Of the mixture of experts: who goes where, and how much of the answer counts.
    std::vector<int> chosen;
    std::vector<float> share_of;
    std::vector<std::vector<int>> members, places;

    void begin(Member& member) {
        member.split(T, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) {
                float* x = m.x.row(r);
                if (r >= whole.rows && rows.from_layer > 0) {
                    std::memcpy(x, cache.held.row(r - whole.rows), D * sizeof(float));
                    continue;
                }
                if (rows.embeds) {
                    std::memcpy(x, rows.embeds + size_t(r) * D, D * sizeof(float));
                } else {
                    kernels.read_row(m.embed, rows.token[r], x);
                    if (m.spec.embed_scale != 1)
                        for (int i = 0; i < D; i++) x[i] *= m.spec.embed_scale;
                }
                if (m.learned_positions)
                    for (int i = 0; i < D; i++) x[i] += m.learned_positions[size_t(rows.position[r]) * D + i];
            }
        });
    }

    // The states of rows that go on from here in a later step.
    void keep(Member& member) {
        member.once([&] { cache.held.shape(rows.partial, D); });
        member.split(rows.partial, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) std::memcpy(cache.held.row(r), m.x.row(whole.rows + r), D * sizeof(float));
        });
    }

    void layer(Member& member, Layer& layer, size_t index, Part part) {
        const LayerSpec& spec = layer.spec;
        prepared(member, layer.input, layer.qkv.kind, part.rows, m.first_in);
        adapting->shrink(member, index, AT_QKV, m.h, part.rows);
        if (spec.residual == PARALLEL) prepared(member, layer.post_attention, layer.mlp[0].up.kind, part.rows, m.second_in);
        const bool after = layer.attention_out.weight != nullptr;
        attention(member, layer, index, part, after);
        if (after) rejoin(member, layer.attention_out, spec.norms, part.rows);
        // The experts read the normed states once more, so the router's input and theirs are made in `mixture`.
        Prepared& in = spec.residual == PARALLEL ? m.second_in : m.first_in;
        if (spec.residual == SEQUENTIAL) prepared(member, layer.post_attention, layer.mlp[0].up.kind, part.rows, m.first_in);
        const bool mlp_after = layer.mlp_out.weight != nullptr;
        if (spec.experts) mixture(member, layer, part.rows, mlp_after);
        else feed_forward(member, layer.spec, layer.mlp[0], in, part.rows, mlp_after ? m.y : m.x, !mlp_after, int(index));
        if (mlp_after) rejoin(member, layer.mlp_out, spec.norms, part.rows);
    }

    // x += norm(y), or x = norm(x + y).
    void rejoin(Member& member, const Norm& norm, int32_t norms, int count) {
        member.split(count, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) {
                float *x = m.x.row(r), *y = m.y.row(r);
                if (norms == AFTER) {
                    for (int i = 0; i < D; i++) y[i] += x[i];
                    kernels.norm(norm, y, D, x);
                } else {
                    kernels.norm(norm, y, D, y);
                    for (int i = 0; i < D; i++) x[i] += y[i];
                }
            }
        });
    }

    // The normed rows of x, as `h` and ready for a matrix of `kind`.
    void prepared(Member& member, const Norm& norm, Kind kind, int count, Prepared& to) {
        member.once([&] { to.shape(kind, count, D); });
        member.split(count, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) {
                if (norm.weight) kernels.norm(norm, m.x.row(r), D, m.h.row(r));
                else std::memcpy(m.h.row(r), m.x.row(r), D * sizeof(float));
                kernels.prepare(kind, m.h.row(r), r, 0, to.in.groups, to.in);
            }
        });
    }

    void product(Member& member, const Matrix& w, const Input& in, int count, float* y, size_t stride, bool add) {
        const int tiles = w.tile_count();
        int piece = std::max(1, std::min(8, tiles / (member.threads() * 8)));
        if (piece > 1) piece = round_up(piece, 2);  // tiles are computed in pairs
        member.share(tiles, piece, [&](int t0, int t1) { kernels.matmul(w, in, count, y, stride, add, t0, t1); });
    }

    void attention(Member& member, Layer& layer, size_t index, Part part, bool after) {
        const LayerSpec& spec = layer.spec;
        const int d = m.spec.heads_d, H = spec.heads, K = spec.kv_heads;
        product(member, layer.qkv, m.first_in.in, part.rows, m.qkv.row(0), m.qkv.stride, false);
        if (layer.v.n) product(member, layer.v, m.first_in.in, part.rows, m.qkv.row(0) + layer.qkv.padded(), m.qkv.stride, false);
        adapting->expand(member, index, AT_QKV, m.qkv, part.rows);
        const Pages pages = cache.layer(index);
        member.split(part.rows * (H + K), [&](int from, int to) {
            for (int i = from; i < to; i++) place(layer, pages, i / (H + K), i % (H + K));
        });
        // One key head and its queries are a piece of work; where there are fewer pieces than threads, fewer queries.
        const int group = H / K, parts = pieces(part.runs * K, group, member.threads());
        const Heads heads{H, K, d, spec.scale, spec.softcap, spec.window, layer.sinks};
        const auto met = [&](int i) {
            const Run run = runs[i / (K * parts)];
            const int first = spec.window ? std::max(0, rows.position[run.first] - spec.window + 1) / PAGE : 0;
            return Met{rows.pages + size_t(rows.sequence[run.first]) * rows.pages_of_each + first,
                       (rows.position[run.first] + run.count - 1) / PAGE - first + 1, i / parts % K};
        };
        const int items = part.runs * K * parts;
        member.share(items, std::max(1, std::min(16, items / (8 * member.threads()))), [&](int begin, int end) {
            for (int i = begin; i < end; i++) {
                const Run run = runs[i / (K * parts)];
                const int kv_head = i / parts % K, head = kv_head * group + i % parts * (group / parts);
                const Query query{m.qkv.row(run.first) + size_t(head) * d, m.a.row(run.first) + size_t(head) * d, m.qkv.stride, m.a.stride,
                                  run.count, rows.position[run.first], head, group / parts,
                                  rows.pages + size_t(rows.sequence[run.first]) * rows.pages_of_each, i + 1 < end ? met(i + 1) : Met{}};
                kernels.attend(heads, pages, kv_head, query, m.scratch[member.id]);
            }
        });
        member.once([&] { m.inner_in.shape(layer.o.kind, part.rows, layer.o.k); });
        const int groups = m.inner_in.in.groups;
        member.split(part.rows * groups, [&](int begin, int end) { each_row(begin, end, groups, [&](int r, int g0, int g1) {
            kernels.prepare(layer.o.kind, m.a.row(r), r, g0, g1, m.inner_in.in);
        }); });
        Buffer& to = after ? m.y : m.x;
        adapting->shrink(member, index, AT_OUT, m.a, part.rows);
        product(member, layer.o, m.inner_in.in, part.rows, to.row(0), to.stride, !after);
        adapting->expand(member, index, AT_OUT, to, part.rows);
    }

    static int pieces(int items, int group, int threads) {
        int parts = 1;
        while (items * parts < 2 * threads && group % (2 * parts) == 0) parts *= 2;
        return parts;
    }

    // Norm and turn one head of a row, and keep it if it is a key (its value with it).
    void place(Layer& layer, const Pages& pages, int r, int head) {
        const int d = m.spec.heads_d, H = layer.spec.heads, K = layer.spec.kv_heads;
        float* x = m.qkv.row(r) + size_t(head) * d;
        const Norm& norm = head < H ? layer.q : layer.k;
        if (norm.weight) kernels.norm(norm, x, layer.spec.qk_norm, x);
        const int position = rows.position[r];
        if (layer.spec.rotary >= 0) {
            const Rotary& rotary = m.rotaries[layer.spec.rotary];
            const size_t at = size_t(position) * rotary.half;
            const bool is_long = rows.is_long[r] != 0;
            kernels.rotate(x, (is_long ? rotary.long_cos : rotary.cos) + at, (is_long ? rotary.long_sin : rotary.sin) + at, rotary.half);
        }
        if (head < H) return;
        const int page = rows.pages[size_t(rows.sequence[r]) * rows.pages_of_each + position / PAGE];
        const size_t offset = page * pages.page_stride + (head - H) * pages.head_stride;
        kernels.keep(pages, offset, position % PAGE, x, x + size_t(K) * d, d);
    }

    template <class F>
    static void each_row(int begin, int end, int groups, const F& f) {
        while (begin < end) {
            const int row = begin / groups, stop = std::min(end, (row + 1) * groups);
            f(row, begin - row * groups, stop - row * groups);
            begin = stop;
        }
    }

    // y = (or +=) down(act(gate, up)) of `count` rows that are ready in `in`. `index`: of the layer, whose adapters count; -1: an expert.
    void feed_forward(Member& member, const LayerSpec& spec, FeedForward& ff, Prepared& in, int count, Buffer& y, bool add, int index = -1) {
        if (index >= 0) adapting->shrink(member, index, AT_UP, m.h, count);
        product(member, ff.up, in.in, count, m.up.row(0), m.up.stride, false);
        if (index >= 0) adapting->expand(member, index, AT_UP, m.up, count);
        const Kind kind = ff.down.kind;
        member.once([&] { m.inner_in.shape(kind, count, ff.down.k); });
        const int groups = m.inner_in.in.groups;
        const Gate gate{Activation(spec.activation), spec.gated != 0, spec.limit, spec.up_offset};
        const int up_at = spec.gated ? ff.down.k : 0;
        member.split(count * groups, [&](int begin, int end) { each_row(begin, end, groups, [&](int r, int g0, int g1) {
            const float* from = m.up.row(r) + g0 * GROUP;
            const int columns = std::min(g1 * GROUP, ff.down.k) - g0 * GROUP;
            kernels.activate(gate, from, from + up_at, columns, m.act.row(r) + g0 * GROUP);
            // The last group may hold more columns than the matrix.
            for (int i = g0 * GROUP + columns; i < g1 * GROUP; i++) m.act.row(r)[i] = 0;
            kernels.prepare(kind, m.act.row(r), r, g0, g1, m.inner_in.in);
        }); });
        if (index >= 0) adapting->shrink(member, index, AT_DOWN, m.act, count);
        product(member, ff.down, m.inner_in.in, count, y.row(0), y.stride, add);
        if (index >= 0) adapting->expand(member, index, AT_DOWN, y, count);
    }

    // Every row goes through the experts its router likes best (arXiv:2401.04088), which are computed one after the other.
    void mixture(Member& member, Layer& layer, int T, bool after) {
        const LayerSpec& spec = layer.spec;
        const int E = spec.experts, top = spec.per_token;
        member.once([&] {
            m.router_in.shape(layer.router.kind, T, D);
            chosen.assign(size_t(T) * top, 0), share_of.assign(size_t(T) * top, 0.0f);
            members.assign(E, {}), places.assign(E, {});
            m.router.shape(T, layer.router.padded());
        });
        member.split(T, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) kernels.prepare(layer.router.kind, m.h.row(r), r, 0, m.router_in.in.groups, m.router_in.in);
        });
        product(member, layer.router, m.router_in.in, T, m.router.row(0), m.router.stride, false);
        member.split(T, [&](int r0, int r1) {
            for (int r = r0; r < r1; r++) choose(spec, m.router.row(r), &chosen[size_t(r) * top], &share_of[size_t(r) * top]);
        });
        member.once([&] {
            for (int i = 0; i < T * top; i++) members[chosen[i]].push_back(i / top), places[chosen[i]].push_back(i);
            m.expert.shape(T, round_up(D, TILE));
        });
        member.split(T, [&](int r0, int r1) {
            if (after) for (int r = r0; r < r1; r++) std::fill(m.y.row(r), m.y.row(r) + D, 0.0f);
        });
        Buffer& to = after ? m.y : m.x;
        for (int e = 0; e < E; e++) {
            const int count = int(members[e].size());
            if (!count) continue;
            FeedForward& ff = layer.mlp[e];
            member.once([&] { m.second_in.shape(ff.up.kind, count, D); });
            member.split(count, [&](int i0, int i1) {
                for (int i = i0; i < i1; i++) kernels.prepare(ff.up.kind, m.h.row(members[e][i]), i, 0, m.second_in.in.groups, m.second_in.in);
            });
            feed_forward(member, spec, ff, m.second_in, count, m.expert, false);
            member.split(count, [&](int i0, int i1) {
                for (int i = i0; i < i1; i++) {
                    float* x = to.row(members[e][i]);
                    const float* y = m.expert.row(i);
                    const float share = share_of[places[e][i]];
                    for (int k = 0; k < D; k++) x[k] += share * y[k];
                }
            });
        }
    }

    static void choose(const LayerSpec& spec, float* scores, int* chosen, float* share) {
        const int E = spec.experts;
        const float most = *std::max_element(scores, scores + E);
        float total = 0;
        for (int e = 0; e < E; e++) scores[e] = std::exp(scores[e] - most), total += scores[e];
        float kept = 0;
        for (int i = 0; i < spec.per_token; i++) {
            const int best = int(std::max_element(scores, scores + E) - scores);
            chosen[i] = best, share[i] = scores[best] / total, kept += share[i];
            scores[best] = -1;
        }
        if (spec.renormalise)
            for (int i = 0; i < spec.per_token; i++) share[i] /= kept;
    }

    void finish(Member& member) {
        const int count = int(wanted.size());
        if (!count) return;
        const Matrix& out = m.output();
        member.once([&] { m.first_in.shape(out.kind, count, D); });
        member.split(count, [&](int i0, int i1) {
            for (int i = i0; i < i1; i++) {
                float* h = m.last.row(i);
                if (m.norm.weight) kernels.norm(m.norm, m.x.row(wanted[i]), D, h);
                else std::memcpy(h, m.x.row(wanted[i]), D * sizeof(float));
                kernels.prepare(out.kind, h, i, 0, m.first_in.in.groups, m.first_in.in);
            }
        });
        const size_t V = out.padded();
        if (!adapting->all_heads()) product(member, out, m.first_in.in, count, rows.logits, V, false);
        adapting->heads(member, m.last, rows.logits, V);
        if (m.spec.logit_scale == 1 && m.spec.logit_softcap == 0) return;
        member.split(count * int(V / TILE), [&](int begin, int end) {
            kernels.softcap(rows.logits + size_t(begin) * TILE, size_t(end - begin) * TILE, m.spec.logit_scale, m.spec.logit_softcap);
        });
    }
};

}  // namespace

Cache::Cache(const ModelSpec& spec, Kind kind, int pages)
    : kind(kind), head_stride(head_elements(kind, spec.heads_d)), layer_stride(head_stride * spec.kv_heads),
      page_stride(layer_stride * spec.layers), keys(page_stride * pages * element_bytes(kind)), values(keys.bytes()) {}

Pages Cache::layer(size_t index) const {
    const size_t base = index * layer_stride * element_bytes(kind);
    return {keys.data() + base, values.data() + base, page_stride, head_stride, kind};
}

// All layers' keys and values of a page.
void Cache::copy(size_t page, size_t onto) {
    const size_t bytes = page_stride * element_bytes(kind);
    for (Memory* memory : {&keys, &values}) std::memcpy(memory->data() + onto * bytes, memory->data() + page * bytes, bytes);
}

void Model::step(Cache& cache, const Rows& rows) {
    Step step(*this, cache, rows);
    pool->run([&](int id) { step.run(Member(*pool, id)); });
}

size_t Model::bytes() const {
    size_t total = embed.bytes() + head.bytes();
    for (auto& layer : layers) {
        total += layer.qkv.bytes() + layer.v.bytes() + layer.o.bytes() + layer.router.bytes();
        for (auto& ff : layer.mlp) total += ff.up.bytes() + ff.down.bytes();
    }
    return total;
}

}  // namespace ownlm
