// 16 lanes as four quarters on NEON; with products of bytes (dotprod) and of bf16 where the compiler was told so.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace ownlm::ISA {

struct vf { float32x4_t v[4]; };
struct vi { int32x4_t v[4]; };
struct vb { uint8x16_t v[4]; };

constexpr bool UNSIGNED_INT8 = false;  // the products are of signed bytes, so int8 weights keep their sign
constexpr bool TILES_IN_PAIRS = false;

// Each quarter i by itself.
#define OWNLM_QUARTERS(type, expression)         \
    type r;                                      \
    for (int i = 0; i < 4; i++) r.v[i] = expression; \
    return r
inline vf set1(float x) { OWNLM_QUARTERS(vf, vdupq_n_f32(x)); }
inline vf zero() { return set1(0); }
inline vf load(const float* p) { OWNLM_QUARTERS(vf, vld1q_f32(p + 4 * i)); }
inline void store(float* p, vf a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
inline vf operator+(vf a, vf b) { OWNLM_QUARTERS(vf, vaddq_f32(a.v[i], b.v[i])); }
inline vf operator-(vf a, vf b) { OWNLM_QUARTERS(vf, vsubq_f32(a.v[i], b.v[i])); }
inline vf operator*(vf a, vf b) { OWNLM_QUARTERS(vf, vmulq_f32(a.v[i], b.v[i])); }
inline vf operator/(vf a, vf b) { OWNLM_QUARTERS(vf, vdivq_f32(a.v[i], b.v[i])); }
inline vf fma(vf a, vf b, vf c) { OWNLM_QUARTERS(vf, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline vf max(vf a, vf b) { OWNLM_QUARTERS(vf, vmaxnmq_f32(a.v[i], b.v[i])); }
inline vf min(vf a, vf b) { OWNLM_QUARTERS(vf, vminnmq_f32(a.v[i], b.v[i])); }
inline vf abs(vf a) { OWNLM_QUARTERS(vf, vabsq_f32(a.v[i])); }
inline vf round(vf a) { OWNLM_QUARTERS(vf, vrndnq_f32(a.v[i])); }
inline float32x4_t pow2_quarter(float32x4_t whole) {
    const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(whole), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(vmaxq_s32(biased, vdupq_n_s32(0)), 23));
}
inline vf pow2(vf whole) { OWNLM_QUARTERS(vf, pow2_quarter(whole.v[i])); }
inline float sum(vf a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
inline float largest(vf a) { return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.v[0], a.v[1]), vmaxnmq_f32(a.v[2], a.v[3]))); }
inline vf from_half(const uint16_t* p) { OWNLM_QUARTERS(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
inline vf from_bf16(const uint16_t* p) { OWNLM_QUARTERS(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
inline void to_bf16(uint16_t* p, vf a) {  // to the nearest, ties to even
    for (int i = 0; i < 4; i++) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
}
inline vf to_float(vi a) { OWNLM_QUARTERS(vf, vcvtq_f32_s32(a.v[i])); }
// Rounds to int8 and gives back the sum of the 16.
inline int32_t to_int8(int8_t* p, vf a) {
    int32x4_t whole[4];
    for (int i = 0; i < 4; i++) whole[i] = vcvtnq_s32_f32(a.v[i]);
    const int16x8_t low = vcombine_s16(vmovn_s32(whole[0]), vmovn_s32(whole[1])), high = vcombine_s16(vmovn_s32(whole[2]), vmovn_s32(whole[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    return vaddvq_s32(vaddq_s32(vaddq_s32(whole[0], whole[1]), vaddq_s32(whole[2], whole[3])));
}

inline vi ints(int32_t x) { OWNLM_QUARTERS(vi, vdupq_n_s32(x)); }
inline vi operator+(vi a, vi b) { OWNLM_QUARTERS(vi, vaddq_s32(a.v[i], b.v[i])); }
inline vb load_bytes(const uint8_t* p) { OWNLM_QUARTERS(vb, vld1q_u8(p + 16 * i)); }
inline vb low_halves(vb a) { OWNLM_QUARTERS(vb, vandq_u8(a.v[i], vdupq_n_u8(15))); }
inline vb high_halves(vb a) { OWNLM_QUARTERS(vb, vshrq_n_u8(a.v[i], 4)); }

inline uint32x4_t four_bytes(const void* p) {
    typedef uint32_t __attribute__((may_alias, aligned(1))) Four;
    return vdupq_n_u32(*(const Four*)p);
}
// Lane r: acc + sum over i of [r][i] * x[i].
inline int32x4_t fours(int32x4_t acc, int8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(acc, w, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
inline vi dot_int8(vi acc, vb w, const uint8_t* x) {
    const int8x16_t v = vreinterpretq_s8_u32(four_bytes(x));
    OWNLM_QUARTERS(vi, fours(acc.v[i], vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128))), v));  // byte - 128
}
inline vi dot_int4(vi acc, vb w, const uint8_t* x) {
    const int8x16_t v = vreinterpretq_s8_u32(four_bytes(x));
    OWNLM_QUARTERS(vi, fours(acc.v[i], vreinterpretq_s8_u8(w.v[i]), v));
}
// Lane r: acc + [r][0] * x[0] + [r][1] * x[1], all bf16.
inline float32x4_t pairs(float32x4_t acc, uint32x4_t w, uint32x4_t x) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    return vbfdotq_f32(acc, vreinterpretq_bf16_u32(w), vreinterpretq_bf16_u32(x));
#else
    const uint32x4_t high = vdupq_n_u32(0xffff0000);
    acc = vfmaq_f32(acc, vreinterpretq_f32_u32(vshlq_n_u32(w, 16)), vreinterpretq_f32_u32(vshlq_n_u32(x, 16)));
    return vfmaq_f32(acc, vreinterpretq_f32_u32(vandq_u32(w, high)), vreinterpretq_f32_u32(vandq_u32(x, high)));
#endif
}
inline vf dot_bf16(vf acc, vb w, const uint8_t* x) {
    const uint32x4_t v = four_bytes(x);
    OWNLM_QUARTERS(vf, pairs(acc.v[i], vreinterpretq_u32_u8(w.v[i]), v));
}
// Codes of E4M3 as bf16: of each quarter of 16 the first eight and the last eight. The upper byte of a bf16 follows from the upper half
// of a code, the lower from the lower half, but in numbers below 2^-6, which have no bit before the point.
inline void e4m3_to_bf16(vb codes, vb& first, vb& second) {
    static const uint8_t tables[3][16] = {{60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195},
                                          {60, 7, 7, 7},  // what the upper bytes of small ones differ in
                                          {0, 0, 128, 192, 0, 32, 64, 96}};
    const uint8x16_t uppers = vld1q_u8(tables[0]), small_uppers = vld1q_u8(tables[1]), small_lowers = vld1q_u8(tables[2]);
    for (int i = 0; i < 4; i++) {
        const uint8x16_t code = codes.v[i], low = vandq_u8(code, vdupq_n_u8(15));
        const uint8x16_t small = vceqq_u8(vandq_u8(code, vdupq_n_u8(0x78)), vdupq_n_u8(0));
        const uint8x16_t upper = veorq_u8(vqtbl1q_u8(uppers, vshrq_n_u8(code, 4)), vandq_u8(small, vqtbl1q_u8(small_uppers, low)));
        const uint8x16_t lower = vbslq_u8(small, vqtbl1q_u8(small_lowers, low), vshlq_n_u8(low, 4));
        first.v[i] = vzip1q_u8(lower, upper), second.v[i] = vzip2q_u8(lower, upper);
    }
}
inline vb first_of_pairs(vb bf16) {
    OWNLM_QUARTERS(vb, vreinterpretq_u8_u32(vandq_u32(vreinterpretq_u32_u8(bf16.v[i]), vdupq_n_u32(0xffff))));
}
#undef OWNLM_QUARTERS
inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace ownlm::ISA
