// 16 lanes as arrays, for any processor: the compiler turns the loops into what it has (NEON, SVE, SSE).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ownlm::ISA {

struct vf { float v[16]; };
struct vi { int32_t v[16]; };
struct vb { uint8_t v[64]; };

constexpr bool UNSIGNED_INT8 = false;

#define OWNLM_LANES(expression)                     \
    vf r;                                           \
    for (int i = 0; i < 16; i++) r.v[i] = expression; \
    return r
inline vf zero() { return {}; }
inline vf set1(float x) { OWNLM_LANES(x); }
inline vf load(const float* p) { OWNLM_LANES(p[i]); }
inline void store(float* p, vf a) { std::memcpy(p, a.v, sizeof a.v); }
inline vf operator+(vf a, vf b) { OWNLM_LANES(a.v[i] + b.v[i]); }
inline vf operator-(vf a, vf b) { OWNLM_LANES(a.v[i] - b.v[i]); }
inline vf operator*(vf a, vf b) { OWNLM_LANES(a.v[i] * b.v[i]); }
inline vf operator/(vf a, vf b) { OWNLM_LANES(a.v[i] / b.v[i]); }
inline vf fma(vf a, vf b, vf c) { OWNLM_LANES(a.v[i] * b.v[i] + c.v[i]); }
inline vf max(vf a, vf b) { OWNLM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf min(vf a, vf b) { OWNLM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline vf abs(vf a) { OWNLM_LANES(std::fabs(a.v[i])); }
inline vf round(vf a) { OWNLM_LANES(std::nearbyintf(a.v[i])); }
inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline vf pow2(vf whole) { OWNLM_LANES(whole.v[i] < -126 ? 0.0f : as_float(uint32_t(int32_t(whole.v[i]) + 127) << 23)); }
#undef OWNLM_LANES
inline float sum(vf a) {
    float total = 0;
    for (float x : a.v) total += x;
    return total;
}
inline float largest(vf a) {
    float most = a.v[0];
    for (float x : a.v) most = x > most ? x : most;
    return most;
}
inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) return as_float(sign | as_bits(std::ldexp(float(mantissa), -24)));
    if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
    return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline vf from_half(const uint16_t* p) {
    vf r;
    for (int i = 0; i < 16; i++) r.v[i] = half_to_float(p[i]);
    return r;
}
inline vf from_bf16(const uint16_t* p) {
    vf r;
    for (int i = 0; i < 16; i++) r.v[i] = as_float(uint32_t(p[i]) << 16);
    return r;
}
inline void to_bf16(uint16_t* p, vf a) {
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = as_bits(a.v[i]);
        p[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
inline vf to_float(vi a) {
    vf r;
    for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]);
    return r;
}
inline int32_t to_int8(int8_t* p, vf a) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) {
        const int32_t whole = int32_t(std::nearbyintf(a.v[i]));
        p[i] = int8_t(whole), total += whole;
    }
    return total;
}

inline vi ints(int32_t x) {
    vi r;
    for (int i = 0; i < 16; i++) r.v[i] = x;
    return r;
}
inline vi operator+(vi a, vi b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}
inline vb load_bytes(const uint8_t* p) {
    vb r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline vb low_halves(vb a) {
    for (auto& x : a.v) x &= 15;
    return a;
}
inline vb high_halves(vb a) {
    for (auto& x : a.v) x >>= 4;
    return a;
}
inline vi dot_bytes(vi acc, vb w, const uint8_t* x, int32_t offset) {
    const int8_t* four = (const int8_t*)x;
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) acc.v[r] += (int32_t(w.v[4 * r + i]) - offset) * four[i];
    return acc;
}
inline vi dot_int8(vi acc, vb w, const uint8_t* x) { return dot_bytes(acc, w, x, 128); }
inline vi dot_int4(vi acc, vb w, const uint8_t* x) { return dot_bytes(acc, w, x, 0); }
inline vf dot_bf16(vf acc, vb w, const uint8_t* x) {
    uint16_t pairs[32], two[2];
    std::memcpy(pairs, w.v, 64), std::memcpy(two, x, 4);
    const float x0 = as_float(uint32_t(two[0]) << 16), x1 = as_float(uint32_t(two[1]) << 16);
    for (int r = 0; r < 16; r++)
        acc.v[r] += as_float(uint32_t(pairs[2 * r]) << 16) * x0 + as_float(uint32_t(pairs[2 * r + 1]) << 16) * x1;
    return acc;
}
inline vb first_of_pairs(vb bf16) {
    for (int i = 0; i < 64; i += 4) bf16.v[i + 2] = bf16.v[i + 3] = 0;
    return bf16;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace ownlm::ISA
