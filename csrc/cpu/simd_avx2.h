// The vector layer for AVX2, FMA and F16C; simd_avx512.h explains the members.
#pragma once

#include <immintrin.h>

#include "cpu/scalar.h"

namespace mixrank {
namespace {

struct F32 {
  using Wide = F32;
  using Narrow = void;
  using Acc = float;
  using Unit = float;
  using Lane = int32_t;
  using V = __m256;
  using UnitV = __m256;
  static constexpr int kLanes = 8, kPack = 1, kRows = 6, kVecs = 2, kDotRows = 4, kDotCols = 2, kGramRows = 4;
  static constexpr bool kWidensFast = true, kExpands = false;

  static V zero() { return _mm256_setzero_ps(); }
  static Unit one() { return 1; }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const BFloat* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load(const Codes<1>* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static V broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static float reduce(V v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static V choose(V a, V b, const Lane* lanes) {
    const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));  // the instruction takes lane % 8
    const __m256 of_b = _mm256_castsi256_ps(_mm256_slli_epi32(lane, 28));  // the sign bit where lane >= 8
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, lane), _mm256_permutevar8x32_ps(b, lane), of_b);
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat* p, V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Half* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct F64 {
  using Wide = F64;
  using Narrow = void;
  using Acc = double;
  using Unit = double;
  using Lane = int64_t;
  using V = __m256d;
  using UnitV = __m256d;
  static constexpr int kLanes = 4, kPack = 1, kRows = 6, kVecs = 2, kDotRows = 4, kDotCols = 2, kGramRows = 4;
  static constexpr bool kWidensFast = false, kExpands = false;

  static V zero() { return _mm256_setzero_pd(); }
  static Unit one() { return 1; }
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static double reduce(V v) {
    const __m128d sum = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
  }
  static V choose(V a, V b, const Lane* lanes) {
    const __m256i lane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    // As halves of 32 bits, 2 lane and 2 lane + 1, of which the instruction takes the remainders by 8.
    const __m256i twice = _mm256_slli_epi32(_mm256_or_si256(lane, _mm256_slli_epi64(lane, 32)), 1);
    const __m256i halves = _mm256_add_epi32(twice, _mm256_set1_epi64x(int64_t{1} << 32));
    const __m256d of_a = _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a), halves));
    const __m256d of_b = _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(b), halves));
    return _mm256_blendv_pd(of_a, of_b, _mm256_castsi256_pd(_mm256_slli_epi64(lane, 61)));  // where lane >= 4
  }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
};

// dst[c * dst_stride + r] = rows[r][c] for 8 x 8 elements of 32 bits, given as the 8 loaded rows.
inline void store_transposed(const __m256* rows, float* dst, int64_t dst_stride) {
  __m256 b[8];
  for (int g = 0; g < 2; ++g) {
    const __m256 lo0 = _mm256_unpacklo_ps(rows[4 * g], rows[4 * g + 1]);
    const __m256 hi0 = _mm256_unpackhi_ps(rows[4 * g], rows[4 * g + 1]);
    const __m256 lo1 = _mm256_unpacklo_ps(rows[4 * g + 2], rows[4 * g + 3]);
    const __m256 hi1 = _mm256_unpackhi_ps(rows[4 * g + 2], rows[4 * g + 3]);
    b[4 * g] = _mm256_shuffle_ps(lo0, lo1, 0x44);
    b[4 * g + 1] = _mm256_shuffle_ps(lo0, lo1, 0xee);
    b[4 * g + 2] = _mm256_shuffle_ps(hi0, hi1, 0x44);
    b[4 * g + 3] = _mm256_shuffle_ps(hi0, hi1, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(dst + c * dst_stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
    _mm256_storeu_ps(dst + (4 + c) * dst_stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
  }
}

}  // namespace
}  // namespace mixrank
