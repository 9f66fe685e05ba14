// The vector layer for AVX-512 (and AVX512_BF16). simd_avx2.h and simd_portable.h have the same contents:
// each arithmetic (F32, F64, Bf16Pairs) names its accumulator Acc, its stored operand Unit (kPack elements of the
// product's inner dimension), its register tile kRows x kVecs (kGramRows x kVecs for Gram matrices), its dot-product
// tile kDotRows x kDotCols, whether a vector of 16-bit elements widens in one or two instructions, Wide, the arithmetic
// of single widened elements, and Narrow, the same arithmetic on half a vector where that is faster, else void. Wide
// arithmetic can choose: lane i of the result is lane lanes[i] of a, or lane lanes[i] - kLanes of b. Where kExpands,
// expand moves the first lanes of a vector to those that are set in `lanes`, in their order, and fma_where leaves others
// as they are in c.
#pragma once

#include <immintrin.h>

#include "cpu/scalar.h"

namespace mixrank {
namespace {

struct F32Half;

struct F32 {
  using Wide = F32;
  using Narrow = F32Half;
  using Acc = float;
  using Unit = float;
  using Lane = int32_t;
  using V = __m512;
  using UnitV = __m512;
  static constexpr int kLanes = 16, kPack = 1, kRows = 12, kVecs = 2, kDotRows = 4, kDotCols = 4, kGramRows = 8;
  static constexpr bool kWidensFast = true, kExpands = true;

  static V zero() { return _mm512_setzero_ps(); }
  static Unit one() { return 1; }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const BFloat* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static V load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const Codes<1>* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static V broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V expand(uint32_t lanes, V v) { return _mm512_maskz_expand_ps(static_cast<__mmask16>(lanes), v); }
  static V fma_where(uint32_t lanes, V a, V b, V c) {
    return _mm512_mask3_fmadd_ps(a, b, c, static_cast<__mmask16>(lanes));
  }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static float reduce(V v) { return _mm512_reduce_add_ps(v); }
  static V choose(V a, V b, const Lane* lanes) { return _mm512_permutex2var_ps(a, _mm512_loadu_si512(lanes), b); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat* p, V v) {
    // Not vcvtneps2bf16, which flushes subnormals.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_blend_epi32(is_nan, rounded, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static void store(Half* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

// The same on half a vector, for the last few columns of a panel: where 512-bit operations take two cycles, eight lanes
// cost half of sixteen.
struct F32Half {
  using Acc = float;
  using Unit = float;
  using V = __m256;
  using UnitV = __m256;
  static constexpr int kLanes = 8, kPack = 1;

  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const BFloat* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V broadcast(const float* p) { return _mm256_set1_ps(*p); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
};

struct F64 {
  using Wide = F64;
  using Narrow = void;
  using Acc = double;
  using Unit = double;
  using Lane = int64_t;
  using V = __m512d;
  using UnitV = __m512d;
  static constexpr int kLanes = 8, kPack = 1, kRows = 12, kVecs = 2, kDotRows = 4, kDotCols = 4, kGramRows = 8;
  static constexpr bool kWidensFast = false, kExpands = true;

  static V zero() { return _mm512_setzero_pd(); }
  static Unit one() { return 1; }
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static V expand(uint32_t lanes, V v) { return _mm512_maskz_expand_pd(static_cast<__mmask8>(lanes), v); }
  static V fma_where(uint32_t lanes, V a, V b, V c) {
    return _mm512_mask3_fmadd_pd(a, b, c, static_cast<__mmask8>(lanes));
  }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static double reduce(V v) { return _mm512_reduce_add_pd(v); }
  static V choose(V a, V b, const Lane* lanes) { return _mm512_permutex2var_pd(a, _mm512_loadu_si512(lanes), b); }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
};

#if defined(MIXRANK_BF16_PAIRS)
// Two neighbours of the inner dimension in one 32-bit unit, the first in the low half.
struct Bf16PairsHalf;

struct Bf16Pairs {
  using Wide = F32;
  using Narrow = Bf16PairsHalf;
  using Acc = float;
  using Unit = uint32_t;
  using V = __m512;
  using UnitV = __m512i;
  static constexpr int kLanes = 16, kPack = 2, kRows = 12, kVecs = 2, kDotRows = 4, kDotCols = 4, kGramRows = 8;
  static constexpr bool kWidensFast = false;

  static V zero() { return _mm512_setzero_ps(); }
  static Unit one() { return 0x3f803f80; }
  static UnitV load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static UnitV load(const BFloat* p) { return _mm512_loadu_si512(p); }
  static UnitV broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static V fma(UnitV a, UnitV b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static float reduce(V v) { return _mm512_reduce_add_ps(v); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }

  // sixteen sums as eight units, rounded to nearest even
  static void store_units(uint32_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

struct Bf16PairsHalf {
  using Acc = float;
  using Unit = uint32_t;
  using V = __m256;
  using UnitV = __m256i;
  static constexpr int kLanes = 8, kPack = 2;

  static V zero() { return _mm256_setzero_ps(); }
  static UnitV load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static UnitV broadcast(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  static V fma(UnitV a, UnitV b, V c) {
    return _mm256_dpbf16_ps(c, reinterpret_cast<__m256bh>(a), reinterpret_cast<__m256bh>(b));
  }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_units(uint32_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)));
  }
};
#endif

// dst[c * dst_stride + r] = rows[r][c] for 16 x 16 elements of 32 bits, given as the 16 loaded rows.
inline void store_transposed(const __m512* rows, float* dst, int64_t dst_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // b[4g + c]: column c of each 4-wide slice, rows 4g .. 4g + 3.
  for (int g = 0; g < 4; ++g) {
    const __m512d lo0 = _mm512_castps_pd(a[4 * g]), lo1 = _mm512_castps_pd(a[4 * g + 2]);
    const __m512d hi0 = _mm512_castps_pd(a[4 * g + 1]), hi1 = _mm512_castps_pd(a[4 * g + 3]);
    b[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    b[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    b[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    b[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * dst_stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * dst_stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * dst_stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * dst_stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}

}  // namespace
}  // namespace mixrank
