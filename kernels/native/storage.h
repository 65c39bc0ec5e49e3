#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define FASTCIFAR_INLINE inline __attribute__((always_inline))
#define FASTCIFAR_LAMBDA_INLINE __attribute__((always_inline))
#else
#define FASTCIFAR_INLINE inline
#define FASTCIFAR_LAMBDA_INLINE
#endif

namespace fastcifar {

// 16-bit storage formats; arithmetic is float32 throughout.
struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

enum class Dtype : int { float32, bfloat16, float16 };
enum class Activation : int { none, relu, relu6, leaky_relu, silu, hardswish };

// Red, green and blue in the lower bytes of a word.
FASTCIFAR_INLINE std::uint32_t packed_pixel(const std::uint8_t* p) {
  return std::uint32_t(p[0]) | std::uint32_t(p[1]) << 8 | std::uint32_t(p[2]) << 16;
}

constexpr int kDtypes = 3;
constexpr int kActivations = 6;

}  // namespace fastcifar
