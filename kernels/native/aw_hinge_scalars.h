#pragma once

// 16-bit floating-point numbers as bits: the same code for compilers with and without such types.

#include <cstdint>
#include <cstring>

#include "aw_hinge.h"

namespace fastcifar::aw_hinge {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

FASTCIFAR_HD inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTCIFAR_HD inline float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTCIFAR_HD inline double load(float value) { return value; }
FASTCIFAR_HD inline double load(double value) { return value; }
FASTCIFAR_HD inline double load(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

FASTCIFAR_HD inline double load(Float16 value) {
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponent and mantissa moved into place are the value times 2^-112, subnormal numbers included.
  return double(float_of(sign | magnitude << 13)) * 0x1p112;
}

FASTCIFAR_HD inline void store(float& target, double value) { target = float(value); }
FASTCIFAR_HD inline void store(double& target, double value) { target = value; }

FASTCIFAR_HD inline void store(BFloat16& target, double value) {
  const std::uint32_t bits = bits_of(float(value));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target.bits = nan ? 0x7fc0u : std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

FASTCIFAR_HD inline void store(Float16& target, double value) {
  const std::uint32_t bits = bits_of(float(value));
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to even by the addition.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  target.bits = std::uint16_t(sign | half);
}

// Calls function(From{}) with the type that `scalar` stands for.
template <class Function>
inline void with_scalar(Scalar scalar, Function function) {
  switch (scalar) {
    case Scalar::float32: return function(float{});
    case Scalar::float64: return function(double{});
    case Scalar::bfloat16: return function(BFloat16{});
    case Scalar::float16: return function(Float16{});
  }
}

}  // namespace fastcifar::aw_hinge
