// 16 lanes on AVX-512 with VNNI and BF16.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace ownlm::ISA {

struct vf { __m512 v; };   // 16 floats
struct vi { __m512i v; };  // 16 int32
struct vb { __m512i v; };  // 64 bytes

constexpr bool UNSIGNED_INT8 = true;  // products read int8 weights as byte = value + 128
constexpr bool TILES_IN_PAIRS = true;  // of integers: registers hold the sums of two tiles and eight rows

inline vf zero() { return {_mm512_setzero_ps()}; }
inline vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline vf abs(vf a) { return {_mm512_abs_ps(a.v)}; }
inline vf round(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline vf pow2(vf whole) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), whole.v)}; }
inline float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(vf a) { return _mm512_reduce_max_ps(a.v); }
inline vf from_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline vf from_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline void to_bf16(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Rounds to int8 and gives back the sum of the 16.
inline int32_t to_int8(int8_t* p, vf a) {
    __m512i whole = _mm512_cvtps_epi32(a.v);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
}

inline vi ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline vb load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline vb low_halves(vb a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline vb high_halves(vb a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Lane r: acc + sum over i of weight byte [r][i] * x[i], for the four bytes at x.
inline __m512i four_bytes(const void* p) {
    typedef int32_t __attribute__((may_alias, aligned(1))) Four;
    return _mm512_set1_epi32(*(const Four*)p);
}
inline vi dot_int8(vi acc, vb weights, const uint8_t* x) { return {_mm512_dpbusd_epi32(acc.v, weights.v, four_bytes(x))}; }
inline vi dot_int4(vi acc, vb weights, const uint8_t* x) { return dot_int8(acc, weights, x); }
// Lane r: acc + weights [r][0] * x[0] + weights [r][1] * x[1], the two at x; all bf16.
inline vf dot_bf16(vf acc, vb weights, const uint8_t* x) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)weights.v, (__m512bh)four_bytes(x))};
}
inline __m512i four_times(__m128i table) { return _mm512_broadcast_i32x4(table); }
// Codes of E4M3 as bf16: of each quarter of 16 the first eight and the last eight. The upper byte of a bf16 follows from the upper half
// of a code, the lower from the lower half, but in numbers below 2^-6, which have no bit before the point.
inline void e4m3_to_bf16(vb codes, vb& first, vb& second) {
    const __m512i uppers = four_times(_mm_setr_epi8(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
    const __m512i small_uppers = four_times(_mm_setr_epi8(60, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));  // what they differ in
    const __m512i small_lowers = four_times(_mm_setr_epi8(0, 0, -128, -64, 0, 32, 64, 96, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i low = low_halves(codes).v, high = high_halves(codes).v;
    const __mmask64 small = _mm512_testn_epi8_mask(codes.v, _mm512_set1_epi8(0x78));
    const __m512i upper = _mm512_xor_si512(_mm512_shuffle_epi8(uppers, high), _mm512_maskz_shuffle_epi8(small, small_uppers, low));
    const __m512i lower = _mm512_mask_shuffle_epi8(_mm512_slli_epi16(low, 4), small, small_lowers, low);
    first.v = _mm512_unpacklo_epi8(lower, upper), second.v = _mm512_unpackhi_epi8(lower, upper);
}
inline vb first_of_pairs(vb bf16) { return {_mm512_and_si512(bf16.v, _mm512_set1_epi32(0xffff))}; }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace ownlm::ISA
