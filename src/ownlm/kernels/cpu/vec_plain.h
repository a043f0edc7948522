// 16 lanes for any processor: the compiler's own vectors, which it turns into what the processor has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

#define OWNLM_UNROLL  // registers don't hold a block of rows here, and compilers take minutes to find that out

namespace ownlm::ISA {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct vf { Floats v; };
struct vi { Ints v; };
struct vb { Words v; };  // 64 bytes, lane by lane

constexpr bool UNSIGNED_INT8 = false;
constexpr bool TILES_IN_PAIRS = false;

inline vf zero() { return {Floats{}}; }
inline vf set1(float x) { return {Floats{} + x}; }
inline vf load(const float* p) {
    vf r;
    std::memcpy(&r.v, p, 64);
    return r;
}
inline void store(float* p, vf a) { std::memcpy(p, &a.v, 64); }
inline vf operator+(vf a, vf b) { return {a.v + b.v}; }
inline vf operator-(vf a, vf b) { return {a.v - b.v}; }
inline vf operator*(vf a, vf b) { return {a.v * b.v}; }
inline vf operator/(vf a, vf b) { return {a.v / b.v}; }
inline vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
inline vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
inline vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
inline vf abs(vf a) { return {(Floats)((Words)a.v & 0x7fffffffu)}; }
inline vf round(vf a) {  // to the nearest, ties to even: beyond 2^23 there are no fractions, and adding it leaves none
    const Floats big = Floats{} + 8388608.0f, size = abs(a).v, whole = (size + big) - big;
    const Words sign = (Words)a.v & 0x80000000u;
    return {size < big ? (Floats)((Words)whole | sign) : a.v};
}
inline vi whole(vf a) { return {__builtin_convertvector(round(a).v, Ints)}; }
inline vf pow2(vf whole) {
    const Ints exponent = __builtin_convertvector(whole.v, Ints) + 127;
    return {(Floats)((exponent > 0 ? exponent : Ints{}) << 23)};
}
inline float sum(vf a) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += a.v[i];
    return total;
}
inline float largest(vf a) {
    float most = a.v[0];
    for (int i = 1; i < 16; i++) most = a.v[i] > most ? a.v[i] : most;
    return most;
}
inline vf from_half(const uint16_t* p) {
    Words bits;
    for (int i = 0; i < 16; i++) bits[i] = p[i];
    const Words sign = (bits & 0x8000u) << 16, exponent = bits & 0x7c00u, size = (bits & 0x7fffu) << 13;
    const Floats small = __builtin_convertvector((Ints)(bits & 0x3ffu), Floats) * 0x1p-24f;
    const Words wide = exponent == 0x7c00u ? size | 0x7f800000u : exponent == 0u ? (Words)small : size + (112u << 23);
    return {(Floats)(wide | sign)};
}
inline vf from_bf16(const uint16_t* p) {
    Words bits;
    for (int i = 0; i < 16; i++) bits[i] = p[i];
    return {(Floats)(bits << 16)};
}
inline void to_bf16(uint16_t* p, vf a) {
    const Words bits = (Words)a.v, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    for (int i = 0; i < 16; i++) p[i] = uint16_t(rounded[i]);
}
inline vf to_float(vi a) { return {__builtin_convertvector(a.v, Floats)}; }
// Rounds to int8 and gives back the sum of the 16.
inline int32_t to_int8(int8_t* p, vf a) {
    const Ints codes = whole(a).v;
    int32_t total = 0;
    for (int i = 0; i < 16; i++) p[i] = int8_t(codes[i]), total += codes[i];
    return total;
}

inline vi ints(int32_t x) { return {Ints{} + x}; }
inline vi operator+(vi a, vi b) { return {a.v + b.v}; }
inline vb load_bytes(const uint8_t* p) {
    vb r;
    std::memcpy(&r.v, p, 64);
    return r;
}
inline vb low_halves(vb a) { return {a.v & 0x0f0f0f0fu}; }
inline vb high_halves(vb a) { return {a.v >> 4 & 0x0f0f0f0fu}; }
inline vi dot_bytes(vi acc, vb w, const uint8_t* x, int32_t offset) {
    const int8_t* four = (const int8_t*)x;
    for (int i = 0; i < 4; i++) acc.v += ((Ints)(w.v >> 8 * i & 0xffu) - offset) * int32_t(four[i]);
    return acc;
}
inline vi dot_int8(vi acc, vb w, const uint8_t* x) { return dot_bytes(acc, w, x, 128); }
inline vi dot_int4(vi acc, vb w, const uint8_t* x) { return dot_bytes(acc, w, x, 0); }
inline vf dot_bf16(vf acc, vb w, const uint8_t* x) {
    uint32_t two, halves[2];
    std::memcpy(&two, x, 4);
    halves[0] = two << 16, halves[1] = two & 0xffff0000u;
    float each[2];
    std::memcpy(each, halves, 8);
    return {acc.v + ((Floats)(w.v << 16) * each[0] + (Floats)(w.v & 0xffff0000u) * each[1])};
}
// Codes of E4M3 as bf16: of each quarter of 16 the first eight and the last eight.
inline void e4m3_to_bf16(vb codes, vb& first, vb& second) {
    uint8_t bytes[64];
    std::memcpy(bytes, &codes.v, 64);
    uint16_t halves[2][32];
    for (int i = 0; i < 64; i++) {
        const float value = from_e4m3(bytes[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        halves[i / 8 % 2][i / 16 * 8 + i % 8] = uint16_t(bits >> 16);
    }
    std::memcpy(&first.v, halves[0], 64), std::memcpy(&second.v, halves[1], 64);
}
inline vb first_of_pairs(vb bf16) { return {bf16.v & 0xffffu}; }
inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace ownlm::ISA
