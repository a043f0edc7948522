// Runs the same random numbers through the tables of kernels.h and the plain one, and compares what comes out.
//
//     against_plain [NAME …]
//
// Without names: all tables that this processor has, whose names it prints first. Ends with 1 where one is further from the plain
// one than rounding explains.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "model.h"

using namespace ownlm;

namespace {

using Floats = std::vector<float>;
int faults = 0;

Floats normal(size_t count, unsigned seed, float width = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw(0, width);
    Floats values(count);
    for (auto& value : values) value = draw(random);
    return values;
}

// The largest difference as a share of the largest number expected.
void compare(const Kernels& kernels, const std::string& what, const Floats& found, const Floats& expected, double bar) {
    double worst = 0, most = 1e-6;
    bool finite = found.size() == expected.size();
    for (size_t i = 0; i < std::min(found.size(), expected.size()); i++) {
        worst = std::max(worst, std::fabs(double(found[i]) - expected[i])), most = std::max(most, std::fabs(double(expected[i])));
        finite = finite && std::isfinite(found[i]);
    }
    const bool good = finite && worst / most <= bar;
    if (!good) faults++;
    std::printf("%s %s: %.1e (at most %.0e)%s\n", kernels.name, what.c_str(), worst / most, bar, good ? "" : "  FAULT");
}

const char* const KIND_NAMES[] = {"f32", "bf16", "int8", "int4", "uint4", "fp8"};

// Rows of activations as a matrix of this kind reads them, with memory of their own.
struct Ready {
    Ready(const Kernels& kernels, Kind kind, const Floats& x, int rows, int k) {
        const int groups = (k + GROUP - 1) / GROUP, blocks = (rows + BLOCK - 1) / BLOCK;
        data.assign(size_t(groups) * blocks * input_bytes(kind), 0);
        scale.assign(size_t(groups) * blocks * BLOCK, 0), sum.assign(scale.size(), 0), zero.assign(scale.size(), 0);
        in = {data.data(), scale.data(), zero.data(), sum.data(), groups};
        for (int r = 0; r < rows; r++) kernels.prepare(kind, &x[size_t(r) * groups * GROUP], r, 0, groups, in);
    }
    std::vector<uint8_t> data;
    Floats scale, sum;
    std::vector<int32_t> zero;
    Input in;
};

// A matrix, whose bytes both tables write alike.
Packed filled(const Kernels& kernels, const Kernels& plain, Arena& arena, Kind kind, int n, int k, const Source& source) {
    Packed packed, expected;
    allocate(arena, packed, kind, n, k), allocate(arena, expected, kind, n, k);
    for (const auto& [by, to] : {std::pair{&kernels, &packed}, std::pair{&plain, &expected}})
        by->pack(*to, 0, 5, source), by->pack(*to, 5, n - 5, source.from(5, *to));  // ends within a tile
    const Floats same(std::memcmp(packed.tiles, expected.tiles, packed.bytes()) ? 1 : 0);
    compare(kernels, std::string("bytes of ") + KIND_NAMES[kind] + " from form " + std::to_string(source.form), same, {}, 0);
    return packed;
}

// Codes and blocks of ggml's, by chance but for their half-precision numbers, which are below 2.
void packing(const Kernels& kernels, const Kernels& plain) {
    constexpr int N = 40, K = 512;
    std::mt19937 random(14);
    const auto bytes = [&](size_t count, int most) {
        std::vector<uint8_t> all(count);
        for (auto& byte : all) byte = uint8_t(random() % (most + 1));
        return all;
    };
    const auto codes = bytes(N * K, 255), scales = bytes(N * K / GROUP * 2, 0x3f), minimums = bytes(N * K / GROUP * 2, 0x3f);
    for (Kind kind : {INT8, INT4, UINT4, FP8}) {
        Arena arena;
        filled(kernels, plain, arena, kind, N, K, {CODES, codes.data(), (const uint16_t*)scales.data(), (const uint16_t*)minimums.data()});
    }
    for (Form form : {Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K}) {
        const Block block = block_of(form);
        auto raw = bytes(size_t(N) * K / GROUP / block.groups * block.bytes, 255);
        for (size_t at = 0; at < raw.size(); at += block.bytes)
            for (int half : {0, 2, block.bytes - 2})  // where scales stand, in one type or another
                raw[at + half + 1] &= 0x3f;
        const Kind own = form == Q4_0 ? INT4 : form == Q4_1 || form == Q4_K ? UINT4 : INT8;
        for (Kind kind : {own, INT8}) {
            Arena arena;
            filled(kernels, plain, arena, kind, N, K, {form, raw.data()});
        }
    }
}

void products(const Kernels& kernels, const Kernels& plain) {
    constexpr int N = 40, K = 96, ROWS = 13;
    const Floats weights = normal(N * K, 1), x = normal(ROWS * K, 2), bias = normal(48, 3);
    for (Kind kind : {F32, BF16, INT8, INT4, UINT4, FP8}) {
        Arena arena;
        Packed packed = filled(kernels, plain, arena, kind, N, K, {FLOATS, (const uint8_t*)weights.data()});
        packed.bias = bias.data();
        const auto run = [&](const Kernels& by, int rows) {
            Ready ready(by, kind == UINT4 ? INT8 : kind, x, rows, K);  // they read the same
            Floats y(size_t(rows) * 48, 0.5f);
            by.matmul(packed, ready.in, rows, y.data(), 48, true, 0, packed.tile_count());
            return y;
        };
        const std::string name = std::string("product ") + KIND_NAMES[kind];
        const Floats all = run(kernels, ROWS);
        compare(kernels, name, all, run(plain, ROWS), kind == BF16 || kind == FP8 ? 1e-4 : 1e-5);
        for (int rows = 1; rows < ROWS; rows++) {
            Floats first(all.begin(), all.begin() + rows * 48);
            compare(kernels, name + " of " + std::to_string(rows) + " rows", run(kernels, rows), first, 0);
        }
        Floats row(96), expected(96);
        kernels.read_row(packed, 37, row.data()), plain.read_row(packed, 37, expected.data());
        compare(kernels, std::string("row ") + KIND_NAMES[kind], row, expected, 0);
    }
}

struct Case {
    const char* name;
    int count, position, window;
    float softcap;
    bool sinks;
};

void attention(const Kernels& kernels, const Kernels& plain) {
    constexpr int D = 48, GROUPED = 2, LENGTH = 101, COUNT = 5, PAGES = 4;
    const Floats keys = normal(LENGTH * D, 4), values = normal(LENGTH * D, 5), q = normal(COUNT * GROUPED * D, 6, 2), sinks = normal(GROUPED, 7);
    const int32_t pages[] = {2, 0, 3, 1};
    const Case cases[] = {{"alone", 1, LENGTH - 1, 0, 0, false}, {"a prompt", COUNT, LENGTH - COUNT, 0, 0, false}, {"a beginning", COUNT, 0, 0, 0, false},
                          {"a window", COUNT, 61, 40, 0, false}, {"a softcap", COUNT, 61, 0, 5, false}, {"sinks", COUNT, 61, 0, 0, true}};
    for (Kind kind : {F32, BF16, INT8}) {
        const size_t head = head_elements(kind, D), bytes = PAGES * head * element_bytes(kind);
        const auto filled = [&](const Kernels& by, std::vector<uint8_t>& k, std::vector<uint8_t>& v) {
            k.assign(bytes, 0x2a), v.assign(bytes, 0x2a);  // what another text left there
            const Pages cache{k.data(), v.data(), head, head, kind};
            for (int p = 0; p < LENGTH; p++) by.keep(cache, pages[p / PAGE] * head, p % PAGE, &keys[p * D], &values[p * D], D);
            return cache;
        };
        std::vector<uint8_t> k, v, plain_k, plain_v;
        const Pages cache = filled(kernels, k, v), plain_cache = filled(plain, plain_k, plain_v);
        const Floats same(k != plain_k || v != plain_v ? 1 : 0);
        compare(kernels, std::string("kept ") + KIND_NAMES[kind], same, {}, 0);
        for (const Case& each : cases) {
            const Heads heads{GROUPED, 1, D, 0.15f, each.softcap, each.window, each.sinks ? sinks.data() : nullptr};
            const auto run = [&](const Kernels& by, const Pages& from, int first, int count) {
                Floats out(size_t(count) * GROUPED * D);
                const size_t stride = GROUPED * D;
                const Query query{&q[first * stride], out.data(), stride, stride, count, each.position + first, 0, GROUPED, pages};
                Scratch scratch;
                by.attend(heads, from, 0, query, scratch);
                return out;
            };
            const std::string name = std::string("attention ") + KIND_NAMES[kind] + " " + each.name;
            const Floats all = run(kernels, cache, 0, each.count);
            // A share at the edge of two codes may fall on either side.
            compare(kernels, name, all, run(plain, plain_cache, 0, each.count), kind == F32 ? 1e-5 : kind == BF16 ? 2e-3 : 5e-3);
            const Floats last(all.end() - GROUPED * D, all.end());
            compare(kernels, name + ", its last row alone", run(kernels, cache, each.count - 1, 1), last, 0);
        }
    }
}

void between(const Kernels& kernels, const Kernels& plain) {
    constexpr int N = 80;
    const Floats x = normal(N, 8, 3), up = normal(N, 9, 3), weight = normal(N, 10), bias = normal(N, 11);
    const auto both = [&](const std::string& name, double bar, const auto& f) { compare(kernels, name, f(kernels), f(plain), bar); };
    for (bool centred : {false, true})
        for (int n : {N, 71})
            both(centred ? "LayerNorm" : "RMSNorm", 1e-5, [&](const Kernels& by) {
                Floats out(n);
                by.norm({weight.data(), centred ? bias.data() : nullptr, 1e-6f, centred}, x.data(), n, out.data());
                return out;
            });
    for (int activation = SILU; activation <= RELU2; activation++)
        for (bool gated : {false, true})
            both("activation " + std::to_string(activation), 1e-5, [&](const Kernels& by) {
                Floats out(N);
                by.activate({Activation(activation), gated, gated ? 4.0f : 0, gated ? 1.0f : 0}, x.data(), up.data(), N, out.data());
                return out;
            });
    both("rotation", 1e-6, [&](const Kernels& by) {
        Floats out = x;
        by.rotate(out.data(), weight.data(), bias.data(), N / 2);
        return out;
    });
    both("softcap", 1e-5, [&](const Kernels& by) {
        Floats out = x;
        by.softcap(out.data(), N, 0.5f, 2);
        return out;
    });
}

void choices(const Kernels& kernels, const Kernels& plain) {
    std::mt19937 random(12);
    std::uniform_real_distribution<double> draw;
    for (int n : {1, 15, 700, 5000})
        for (float temperature : {0.0f, 0.7f}) {
            const Floats logits = normal(n, 13 + n, 3);
            Floats found, expected;
            for (int i = 0; i < 20; i++) {
                const double uniform = draw(random);
                int32_t id;
                float logprob;
                kernels.choose(logits.data(), n, temperature, uniform, &id, &logprob), found.insert(found.end(), {float(id), logprob});
                plain.choose(logits.data(), n, temperature, uniform, &id, &logprob), expected.insert(expected.end(), {float(id), logprob});
            }
            compare(kernels, "choice of " + std::to_string(n), found, expected, 1e-5);
        }
}

}  // namespace

int main(int count, char** names) {
    std::vector<const Kernels*> tables;
#ifdef OWNLM_X86
    const Kernels* const all[] = {&avx512_kernels, &avxvnni_kernels, &avx2_kernels};
#elif defined(OWNLM_ARM)
    const Kernels* const all[] = {&neonbf16_kernels, &neondot_kernels, &neon_kernels};
#else
    const Kernels* const all[] = {&plain_kernels};
#endif
    for (auto* kernels : supported()) std::printf("%s ", kernels->name), tables.push_back(kernels);
    std::printf("\n");
    if (count > 1) tables.clear();
    for (int i = 1; i < count; i++)
        for (auto* kernels : all)
            if (!std::strcmp(kernels->name, names[i])) tables.push_back(kernels);
    for (auto* kernels : tables) {
        packing(*kernels, plain_kernels);
        products(*kernels, plain_kernels);
        attention(*kernels, plain_kernels);
        between(*kernels, plain_kernels);
        choices(*kernels, plain_kernels);
    }
    std::printf("%d faults\n", faults);
    return faults != 0;
}
