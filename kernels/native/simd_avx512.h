#pragma once

#include <immintrin.h>

#include "storage.h"

namespace fastcifar {
namespace FASTCIFAR_ISA {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;
};
using Mask = __mmask16;

// Keeps a value that is used several times in a register, where the compiler would load it again for each use.
FASTCIFAR_INLINE Vec pin(Vec a) {
  __asm__("" : "+v"(a.v));
  return a;
}

FASTCIFAR_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FASTCIFAR_INLINE Vec set(float s) { return {_mm512_set1_ps(s)}; }
FASTCIFAR_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTCIFAR_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTCIFAR_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
FASTCIFAR_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
FASTCIFAR_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTCIFAR_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

FASTCIFAR_INLINE Mask first(int n) { return Mask((1u << n) - 1u); }

FASTCIFAR_INLINE __m512 widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

FASTCIFAR_INLINE __m256i narrow_bfloat16(__m512 v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

FASTCIFAR_INLINE __m256i narrow_float16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTCIFAR_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTCIFAR_INLINE Vec load(const BFloat16* p) { return {widen_bfloat16(_mm256_loadu_si256((const __m256i*)p))}; }
FASTCIFAR_INLINE Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
FASTCIFAR_INLINE Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FASTCIFAR_INLINE Vec load_first(const BFloat16* p, int n) {
  return {widen_bfloat16(_mm256_maskz_loadu_epi16(first(n), p))};
}
FASTCIFAR_INLINE Vec load_first(const Float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

FASTCIFAR_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FASTCIFAR_INLINE void store(BFloat16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_bfloat16(a.v)); }
FASTCIFAR_INLINE void store(Float16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_float16(a.v)); }
FASTCIFAR_INLINE void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
FASTCIFAR_INLINE void store_first(BFloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bfloat16(a.v));
}
FASTCIFAR_INLINE void store_first(Float16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_float16(a.v));
}

FASTCIFAR_INLINE Vec load_byte(const std::uint32_t* p, int byte) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_loadu_si512(p), unsigned(8 * byte));
  return {_mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)))};
}
FASTCIFAR_INLINE Mask load_flag(const std::uint32_t* p, std::uint32_t flag) {
  return _mm512_test_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(flag)));
}
FASTCIFAR_INLINE bool any(Mask m) { return m != 0; }

template <bool kReversed>
FASTCIFAR_INLINE void pack_pixels(const std::uint8_t* from, std::uint32_t* to) {
  // Four pixels, three words, to each quarter; then a word to each pixel.
  alignas(64) static constexpr struct Places {
    std::int32_t words[16] = {};
    std::int8_t bytes[64] = {};
    constexpr Places() {
      for (int i = 0; i < 16; ++i) {
        const int quarter = kReversed ? 3 - i / 4 : i / 4, pixel = kReversed ? 3 - i % 4 : i % 4;
        words[i] = 3 * quarter + i % 4 % 3;
        for (int byte = 0; byte < 4; ++byte) bytes[4 * i + byte] = std::int8_t(byte < 3 ? 3 * pixel + byte : -1);
      }
    }
  } places;
  const __m512i all = _mm512_maskz_loadu_epi8((std::uint64_t{1} << 48) - 1, from);
  const __m512i quarters = _mm512_permutexvar_epi32(_mm512_load_si512(places.words), all);
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(quarters, _mm512_load_si512(places.bytes)));
}

// Lanes of the K-th third of a0 b0 c0 a1 b1 c1 …: `first` takes those of a and b, `second` adds those of c.
template <int K>
FASTCIFAR_INLINE Vec interleaved(Vec a, Vec b, Vec c) {
  alignas(64) static constexpr struct Places {
    int first[16] = {}, second[16] = {};
    constexpr Places() {
      for (int i = 0; i < 16; ++i) {
        const int pixel = (16 * K + i) / 3, channel = (16 * K + i) % 3;
        first[i] = channel == 1 ? 16 + pixel : pixel;
        second[i] = channel == 2 ? 16 + pixel : i;
      }
    }
  } places;
  const __m512 ab = _mm512_permutex2var_ps(a.v, _mm512_load_si512(places.first), b.v);
  return {_mm512_permutex2var_ps(ab, _mm512_load_si512(places.second), c.v)};
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace fastcifar
