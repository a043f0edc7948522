// 16 lanes as two halves on AVX2 with FMA and F16C; with AVX-VNNI where the compiler was told so.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace ownlm::ISA {

struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
struct vb { __m256i a, b; };

#ifdef __AVXVNNI__
constexpr bool UNSIGNED_INT8 = true;
#else
constexpr bool UNSIGNED_INT8 = false;  // the product of bytes saturates beyond 127 * 127, so int8 weights keep their sign
#endif
constexpr bool TILES_IN_PAIRS = false;

inline vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline vf operator+(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf operator-(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf operator*(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf operator/(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf abs(vf x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline vf round(vf x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline __m256 pow2_half(__m256 whole) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), 23));
}
inline vf pow2(vf whole) { return {pow2_half(whole.a), pow2_half(whole.b)}; }
inline float sum(vf x) {
    __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
inline float largest(vf x) {
    __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
}
inline vf from_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 widen_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf from_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline void narrow_bf16(uint16_t* p, __m256 x) {  // to the nearest, ties to even
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i high = _mm256_srli_epi32(up, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void to_bf16(uint16_t* p, vf x) { narrow_bf16(p, x.a), narrow_bf16(p + 8, x.b); }
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline int32_t to_int8(int8_t* p, vf x) {
    alignas(32) int32_t whole[16];
    _mm256_store_si256((__m256i*)whole, _mm256_cvtps_epi32(x.a));
    _mm256_store_si256((__m256i*)(whole + 8), _mm256_cvtps_epi32(x.b));
    int32_t total = 0;
    for (int i = 0; i < 16; i++) p[i] = int8_t(whole[i]), total += whole[i];
    return total;
}

inline vi ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline vi operator+(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline vb load_bytes(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
inline vb low_halves(vb x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline vb high_halves(vb x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
inline __m256i four_bytes(const void* p) {
    typedef int32_t __attribute__((may_alias, aligned(1))) Four;
    return _mm256_set1_epi32(*(const Four*)p);
}
#ifdef __AVXVNNI__
inline vi dot_int8(vi acc, vb w, const uint8_t* x) {
    const __m256i v = four_bytes(x);
    return {_mm256_dpbusd_avx_epi32(acc.a, w.a, v), _mm256_dpbusd_avx_epi32(acc.b, w.b, v)};
}
inline vi dot_int4(vi acc, vb w, const uint8_t* x) { return dot_int8(acc, w, x); }
#else
inline __m256i fours(__m256i unsigned_bytes, __m256i signed_bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), _mm256_set1_epi16(1));
}
inline __m256i signed_fours(__m256i w, __m256i x) {
    const __m256i value = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // byte - 128
    return fours(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value));
}
inline vi dot_int8(vi acc, vb w, const uint8_t* x) {
    const __m256i v = four_bytes(x);
    return {_mm256_add_epi32(acc.a, signed_fours(w.a, v)), _mm256_add_epi32(acc.b, signed_fours(w.b, v))};
}
inline vi dot_int4(vi acc, vb w, const uint8_t* x) {
    const __m256i v = four_bytes(x);
    return {_mm256_add_epi32(acc.a, fours(w.a, v)), _mm256_add_epi32(acc.b, fours(w.b, v))};
}
#endif
inline __m256 dot_bf16_half(__m256 acc, __m256i w, __m256i x) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(x, high)), acc);
}
inline vf dot_bf16(vf acc, vb w, const uint8_t* x) {
    const __m256i v = four_bytes(x);
    return {dot_bf16_half(acc.a, w.a, v), dot_bf16_half(acc.b, w.b, v)};
}
inline void e4m3_half(__m256i codes, __m256i& first, __m256i& second) {
    const auto twice = [](__m128i table) { return _mm256_broadcastsi128_si256(table); };
    const __m256i uppers = twice(_mm_setr_epi8(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
    const __m256i small_uppers = twice(_mm_setr_epi8(60, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));  // what they differ in
    const __m256i small_lowers = twice(_mm_setr_epi8(0, 0, -128, -64, 0, 32, 64, 96, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256i half = _mm256_set1_epi8(15), low = _mm256_and_si256(codes, half), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
    const __m256i small = _mm256_cmpeq_epi8(_mm256_and_si256(codes, _mm256_set1_epi8(0x78)), _mm256_setzero_si256());
    const __m256i upper = _mm256_xor_si256(_mm256_shuffle_epi8(uppers, high), _mm256_and_si256(small, _mm256_shuffle_epi8(small_uppers, low)));
    const __m256i lower = _mm256_blendv_epi8(_mm256_slli_epi16(low, 4), _mm256_shuffle_epi8(small_lowers, low), small);
    first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
}
// Codes of E4M3 as bf16: of each quarter of 16 the first eight and the last eight. The upper byte of a bf16 follows from the upper half
// of a code, the lower from the lower half, but in numbers below 2^-6, which have no bit before the point.
inline void e4m3_to_bf16(vb codes, vb& first, vb& second) {
    e4m3_half(codes.a, first.a, second.a), e4m3_half(codes.b, first.b, second.b);
}
inline vb first_of_pairs(vb bf16) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(bf16.a, low), _mm256_and_si256(bf16.b, low)};
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace ownlm::ISA
