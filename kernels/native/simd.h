#pragma once

// One vector of float32 lanes, under the same names for each instruction set. A file that includes this is compiled
// once an instruction set, with that set's flags and FASTCIFAR_ISA as its namespace (see CMakeLists.txt).
//
// Everything here is in an unnamed namespace, and files that include it use nothing inline from the standard library:
// otherwise the linker could take, for the whole module, a copy compiled for a newer processor.
//
// Vec                         lanes, + − * /
// zero() set(s) load(p) store(p, v)             p: float*, BFloat16*, Float16*; narrowing rounds to nearest even
// load_first(p, n) store_first(p, v, n)         the first n lanes, 0 ≤ n ≤ lanes; the other lanes load as zero
// fma(a, b, c) min(a, b) max(a, b)              a·b + c; min and max return b when either is NaN
// greater(a, b) select(mask, a, b)              mask is false for NaN
// pin(v)                                        v, kept in a register
// round(v) scale_by_power(v, n)                 nearest integer; v·2ⁿ for whole n in [−127, 128], 2¹²⁸ is ∞
// load_byte(p, i) load_flag(p, bit) any(mask)   p: uint32*; the i-th byte of each word as a number; where a bit is set
// pack_pixels<reversed>(p, words)               one `packed_pixel` a lane
// interleaved<K>(a, b, c)                       the K-th third of a₀ b₀ c₀ a₁ b₁ c₁ …

#include "storage.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace fastcifar {
namespace FASTCIFAR_ISA {
namespace {

// eᵛ for v in [−87, 88], e⁻⁸⁷ below, infinity above; NaN stays. Relative error below 2 ulp.
FASTCIFAR_INLINE Vec exp(Vec v) {
  v = min(set(89.0f), max(set(-87.0f), v));
  const Vec n = round(v * set(1.44269504089f));
  Vec r = fma(n, set(-0.693359375f), v);
  r = fma(n, set(2.12194440e-4f), r);
  Vec p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.0f);
  return scale_by_power(p, n);
}

FASTCIFAR_INLINE Vec sigmoid(Vec v) { return set(1.0f) / (set(1.0f) + exp(zero() - v)); }

template <Activation A>
FASTCIFAR_INLINE Vec activate(Vec v, Vec negative_slope) {
  if constexpr (A == Activation::relu) return max(zero(), v);
  if constexpr (A == Activation::relu6) return min(set(6.0f), max(zero(), v));
  if constexpr (A == Activation::leaky_relu) return select(greater(v, zero()), v, v * negative_slope);
  if constexpr (A == Activation::silu) return v * sigmoid(v);
  if constexpr (A == Activation::hardswish) {
    return v * min(set(6.0f), max(zero(), v + set(3.0f))) * set(1.0f / 6.0f);
  }
  return v;
}

// gradient · activation′(v)
template <Activation A>
FASTCIFAR_INLINE Vec activation_gradient(Vec v, Vec gradient, Vec negative_slope) {
  if constexpr (A == Activation::relu) return select(greater(v, zero()), gradient, zero());
  if constexpr (A == Activation::relu6) {
    return select(greater(v, zero()), select(greater(set(6.0f), v), gradient, zero()), zero());
  }
  if constexpr (A == Activation::leaky_relu) {
    return select(greater(v, zero()), gradient, gradient * negative_slope);
  }
  if constexpr (A == Activation::silu) {
    const Vec s = sigmoid(v);
    return gradient * s * fma(v, set(1.0f) - s, set(1.0f));
  }
  if constexpr (A == Activation::hardswish) {
    const Vec inner = gradient * fma(v, set(1.0f / 3.0f), set(0.5f));
    return select(greater(v, set(-3.0f)), select(greater(set(3.0f), v), inner, gradient), zero());
  }
  return gradient;
}

// Calls f with the activation as a compile-time constant, decltype(tag)::value.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

template <class F>
FASTCIFAR_INLINE void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none: return f(ActivationTag<Activation::none>{});
    case Activation::relu: return f(ActivationTag<Activation::relu>{});
    case Activation::relu6: return f(ActivationTag<Activation::relu6>{});
    case Activation::leaky_relu: return f(ActivationTag<Activation::leaky_relu>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::hardswish: return f(ActivationTag<Activation::hardswish>{});
  }
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace fastcifar
