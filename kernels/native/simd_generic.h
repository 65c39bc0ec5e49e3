#pragma once

// The compiler's own vectors: SSE2 or NEON where there are such registers, scalar code elsewhere.

#include "storage.h"

namespace fastcifar {
namespace FASTCIFAR_ISA {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));

struct Vec {
  static constexpr int lanes = 4;
  Floats v;
};
struct Mask {
  Ints m;
};

FASTCIFAR_INLINE Vec pin(Vec a) { return a; }
FASTCIFAR_INLINE Vec set(float s) { return {Floats{s, s, s, s}}; }
FASTCIFAR_INLINE Vec zero() { return set(0.0f); }
FASTCIFAR_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTCIFAR_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTCIFAR_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTCIFAR_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FASTCIFAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

FASTCIFAR_INLINE Mask greater(Vec a, Vec b) { return {a.v > b.v}; }
FASTCIFAR_INLINE Vec select(Mask m, Vec a, Vec b) {
  return {(Floats)((m.m & (Ints)a.v) | (~m.m & (Ints)b.v))};
}
FASTCIFAR_INLINE Vec min(Vec a, Vec b) { return select(greater(b, a), a, b); }
FASTCIFAR_INLINE Vec max(Vec a, Vec b) { return select(greater(a, b), a, b); }

FASTCIFAR_INLINE Vec round(Vec a) {
  // Adding 1.5·2²³ leaves no fractional bits; right for |a| < 2²².
  const Vec magic = set(12582912.0f);
  return (a + magic) - magic;
}

FASTCIFAR_INLINE Vec scale_by_power(Vec a, Vec n) {
  const Ints exponent = __builtin_convertvector(n.v, Ints) + 127;
  return {a.v * (Floats)(exponent << 23)};
}

FASTCIFAR_INLINE Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}

FASTCIFAR_INLINE void store(float* p, Vec a) { __builtin_memcpy(p, &a.v, sizeof a.v); }

FASTCIFAR_INLINE Words load_words(const std::uint16_t* p) { return Words{p[0], p[1], p[2], p[3]}; }

FASTCIFAR_INLINE Vec load(const BFloat16* p) { return {(Floats)(load_words(&p->bits) << 16)}; }

FASTCIFAR_INLINE void store(BFloat16* p, Vec a) {
  const Words bits = (Words)a.v;
  const Words nan = (Words)(a.v != a.v);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words kept = ((nan & (bits | 0x400000u)) | (~nan & rounded)) >> 16;
  for (int i = 0; i < Vec::lanes; ++i) p[i].bits = std::uint16_t(kept[i]);
}

FASTCIFAR_INLINE Vec load(const Float16* p) {
  const Words bits = load_words(&p->bits);
  const Words magnitude = (bits & 0x7fffu) << 13;
  // The exponent's bias grows from 15 to 127 by a multiplication, which also normalises subnormal numbers.
  const Floats scaled = (Floats)magnitude * 0x1p112f;
  const Words special = (Words)(scaled >= 65536.0f);
  const Words value = (special & (magnitude | 0x7f800000u)) | (~special & (Words)scaled);
  return {(Floats)(value | ((bits & 0x8000u) << 16))};
}

FASTCIFAR_INLINE std::uint16_t narrow_float16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  // From 65520 = the middle between the largest number and the next power of two.
  if (bits >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);
  if (bits < 0x38800000u) {
    // Subnormal: adding ½ rounds to multiples of 2⁻²⁴.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    return std::uint16_t(sign | (bits - 0x3f000000u));
  }
  return std::uint16_t(sign | ((bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13));
}

FASTCIFAR_INLINE void store(Float16* p, Vec a) {
  for (int i = 0; i < Vec::lanes; ++i) p[i].bits = narrow_float16(a.v[i]);
}

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
  const Words words{p[0], p[1], p[2], p[3]};
  return {__builtin_convertvector((Ints)((words >> std::uint32_t(8 * byte)) & 255u), Floats)};
}
FASTCIFAR_INLINE Mask load_flag(const std::uint32_t* p, std::uint32_t flag) {
  return {(Ints)((Words{p[0], p[1], p[2], p[3]} & flag) != 0u)};
}
FASTCIFAR_INLINE bool any(Mask m) { return (m.m[0] | m.m[1] | m.m[2] | m.m[3]) != 0; }

template <bool kReversed>
FASTCIFAR_INLINE void pack_pixels(const std::uint8_t* from, std::uint32_t* to) {
  for (int i = 0; i < Vec::lanes; ++i) to[kReversed ? Vec::lanes - 1 - i : i] = packed_pixel(from + 3 * i);
}

// Lanes of the K-th third of a0 b0 c0 a1 b1 c1 …
template <int K>
FASTCIFAR_INLINE Vec interleaved(Vec a, Vec b, Vec c) {
  if constexpr (K == 0) return {Floats{a.v[0], b.v[0], c.v[0], a.v[1]}};
  if constexpr (K == 1) return {Floats{b.v[1], c.v[1], a.v[2], b.v[2]}};
  return {Floats{c.v[2], a.v[3], b.v[3], c.v[3]}};
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace fastcifar
