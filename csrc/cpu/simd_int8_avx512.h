// Products of 8-bit codes for AVX-512, with VNNI or without. simd_int8_avx2.h and simd_int8_portable.h have the same
// contents: Int8 is an arithmetic as in simd_avx512.h, of int32 accumulators. A unit of its left operand holds kPack
// elements of type Left, one of its right operand kPack signed codes. Where kHasZero, the left operand holds unsigned
// codes as they are, and what the zero point adds is taken off the sums; otherwise it holds code - zero point.
#pragma once

#include "cpu/simd_avx512.h"

namespace mixrank {
namespace {

struct Int8 {
  using Acc = int32_t;
  using Unit = uint32_t;
  using V = __m512i;
  using UnitV = __m512i;
#if defined(MIXRANK_VNNI)
  using Left = uint8_t;
  static constexpr bool kHasZero = true;
  static constexpr int kPack = 4;
#else
  using Left = int16_t;
  static constexpr bool kHasZero = false;
  static constexpr int kPack = 2;
#endif
  static constexpr int kLanes = 16, kRows = 12, kVecs = 2;

  static V zero() { return _mm512_setzero_si512(); }
  static Unit one() { return 1; }
  static V load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static V broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static V subtract(V a, V b) { return _mm512_sub_epi32(a, b); }
  static void store(int32_t* p, V v) { _mm512_storeu_si512(p, v); }
#if defined(MIXRANK_VNNI)
  static UnitV load(const Codes<4>* p) { return _mm512_loadu_si512(p); }
  // Not the intrinsic, with which gcc 12 keeps the accumulators of some loops in memory.
  static V fma(UnitV a, UnitV b, V c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static void store_left(uint8_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
#else
  static UnitV load(const Codes<2>* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V fma(UnitV a, UnitV b, V c) { return _mm512_add_epi32(c, _mm512_madd_epi16(a, b)); }
  static void store_left(int16_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
#endif

  static V all(int32_t value) { return _mm512_set1_epi32(value); }
  static V clamp(V v, int32_t low, int32_t high) { return _mm512_max_epi32(_mm512_min_epi32(v, all(high)), all(low)); }
  static V subtract_product(V c, V a, V b) { return _mm512_sub_epi32(c, _mm512_mullo_epi32(a, b)); }
  static V round(__m512 v) { return _mm512_cvtps_epi32(v); }  // to nearest even
  static __m512 to_float(V v) { return _mm512_cvtepi32_ps(v); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 least(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
  static __m512 largest(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

}  // namespace
}  // namespace mixrank
