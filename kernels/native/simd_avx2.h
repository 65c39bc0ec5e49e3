#pragma once

#include <immintrin.h>

#include "storage.h"

namespace fastcifar {
namespace FASTCIFAR_ISA {
namespace {

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;
};
struct Mask {
  __m256 m;
};

// Keeps a value that is used several times in a register, where the compiler would load it again for each use.
FASTCIFAR_INLINE Vec pin(Vec a) {
  __asm__("" : "+x"(a.v));
  return a;
}

FASTCIFAR_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
FASTCIFAR_INLINE Vec set(float s) { return {_mm256_set1_ps(s)}; }
FASTCIFAR_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTCIFAR_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Mask greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTCIFAR_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
FASTCIFAR_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTCIFAR_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

FASTCIFAR_INLINE __m256 widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

FASTCIFAR_INLINE __m128i narrow_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i kept = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  const __m256i high = _mm256_srli_epi32(kept, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

FASTCIFAR_INLINE __m128i narrow_float16(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTCIFAR_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTCIFAR_INLINE Vec load(const BFloat16* p) { return {widen_bfloat16(_mm_loadu_si128((const __m128i*)p))}; }
FASTCIFAR_INLINE Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
FASTCIFAR_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FASTCIFAR_INLINE void store(BFloat16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_bfloat16(a.v)); }
FASTCIFAR_INLINE void store(Float16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_float16(a.v)); }

template <class T>
FASTCIFAR_INLINE Vec load_first(const T* p, int n) {
  T lanes[Vec::lanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
FASTCIFAR_INLINE void store_first(T* p, Vec a, int n) {
  T lanes[Vec::lanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

FASTCIFAR_INLINE Vec load_byte(const std::uint32_t* p, int byte) {
  const __m256i shifted = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)p), 8 * byte);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(255)))};
}
FASTCIFAR_INLINE Mask load_flag(const std::uint32_t* p, std::uint32_t flag) {
  const __m256i wanted = _mm256_set1_epi32(int(flag));
  const __m256i found = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), wanted);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(found, wanted))};
}
FASTCIFAR_INLINE bool any(Mask m) { return _mm256_movemask_ps(m.m) != 0; }

template <bool kReversed>
FASTCIFAR_INLINE void pack_pixels(const std::uint8_t* from, std::uint32_t* to) {
  // The last four pixels are the last 12 of 16 bytes, so that nothing beyond them is read.
  alignas(32) static constexpr struct Places {
    std::int8_t bytes[32] = {};
    constexpr Places() {
      for (int i = 0; i < 8; ++i) {
        const int pixel = kReversed ? 3 - i % 4 : i % 4, start = (i < 4) == kReversed ? 4 : 0;
        for (int byte = 0; byte < 4; ++byte) {
          bytes[4 * i + byte] = std::int8_t(byte < 3 ? start + 3 * pixel + byte : -1);
        }
      }
    }
  } places;
  const __m128i low = _mm_loadu_si128((const __m128i*)from), high = _mm_loadu_si128((const __m128i*)(from + 8));
  const __m256i both = kReversed ? _mm256_set_m128i(low, high) : _mm256_set_m128i(high, low);
  _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8(both, _mm256_load_si256((const __m256i*)places.bytes)));
}

// Lanes of the K-th third of a0 b0 c0 a1 b1 c1 …
template <int K>
FASTCIFAR_INLINE Vec interleaved(Vec a, Vec b, Vec c) {
  constexpr int kFirst = 8 * K;
  const __m256i pixel = _mm256_setr_epi32(kFirst / 3, (kFirst + 1) / 3, (kFirst + 2) / 3, (kFirst + 3) / 3,
                                          (kFirst + 4) / 3, (kFirst + 5) / 3, (kFirst + 6) / 3, (kFirst + 7) / 3);
  constexpr int kSecond[3] = {0x92, 0x24, 0x49}, kThird[3] = {0x24, 0x49, 0x92};
  const __m256 ab = _mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, pixel), _mm256_permutevar8x32_ps(b.v, pixel),
                                    kSecond[K]);
  return {_mm256_blend_ps(ab, _mm256_permutevar8x32_ps(c.v, pixel), kThird[K])};
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace fastcifar
