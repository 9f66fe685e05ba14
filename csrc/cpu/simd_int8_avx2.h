// Products of 8-bit codes for AVX2; simd_int8_avx512.h explains the members.
#pragma once

#include "cpu/simd_avx2.h"

namespace mixrank {
namespace {

// Of pairs: the instruction that multiplies four at a time (vpmaddubsw) would saturate their sums at 16 bits.
struct Int8 {
  using Acc = int32_t;
  using Unit = uint32_t;
  using V = __m256i;
  using UnitV = __m256i;
  using Left = int16_t;
  static constexpr bool kHasZero = false;
  static constexpr int kPack = 2, kLanes = 8, kRows = 6, kVecs = 2;

  static V zero() { return _mm256_setzero_si256(); }
  static Unit one() { return 1; }
  static V load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static UnitV load(const Codes<2>* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static V broadcast(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  static V fma(UnitV a, UnitV b, V c) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static V subtract(V a, V b) { return _mm256_sub_epi32(a, b); }
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store_left(int16_t* p, V v) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(v, v), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static V all(int32_t value) { return _mm256_set1_epi32(value); }
  static V clamp(V v, int32_t low, int32_t high) { return _mm256_max_epi32(_mm256_min_epi32(v, all(high)), all(low)); }
  static V round(__m256 v) { return _mm256_cvtps_epi32(v); }  // to nearest even
  static __m256 to_float(V v) { return _mm256_cvtepi32_ps(v); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 least(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
  static __m256 largest(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
};

}  // namespace
}  // namespace mixrank
