#pragma once

// One row of a convolution or correlation on float32 rows in the L1 cache: [column][lane], Vec::lanes channels.

#include <cstddef>

#include "simd.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

using namespace fastcifar::FASTCIFAR_ISA;
using Index = std::int64_t;

constexpr int kLanes = Vec::lanes;
constexpr int kBlock = 8;  // output pixels held in registers

// Calls f(Constant<0>), …, f(Constant<N − 1>): loops whose index selects registers.
template <int I>
struct Constant {
  static constexpr int value = I;
};

template <int Begin, int End, class F>
FASTCIFAR_INLINE void repeat(F&& f) {
  if constexpr (Begin < End) {
    f(Constant<Begin>{});
    repeat<Begin + 1, End>(f);
  }
}

// Runs f(first output, Constant<number of outputs>) for blocks that cover [0, count).
template <class F>
FASTCIFAR_INLINE void for_blocks(Index count, F&& f) {
  Index o = 0;
  for (; o + kBlock <= count; o += kBlock) f(o, Constant<kBlock>{});
  if (o + 4 <= count) {
    f(o, Constant<4>{});
    o += 4;
  }
  switch (count - o) {
    case 1: return f(o, Constant<1>{});
    case 2: return f(o, Constant<2>{});
    case 3: return f(o, Constant<3>{});
    default: return;
  }
}

// Rows of a kernel, or its single taps, that meet the image: where each one's first column and first weight lie for the
// first vector of channels, and how far it is to those of the next vector.
struct Taps {
  Index count;
  const float** source;
  const float** weight;
  Index source_vector_step;
  Index weight_tap_step;  // from a weight of a kernel row to the next
  int vectors;
};

// An Epilogue takes the sums of a row as they come, in registers: start(v), finish(first output, sums) for each block
// of outputs, end(v), for each vector v of channels.

// Σ_r Σ_s weight[r][s] · source[r][S·o + s] for each o < count, the kernel's width K and the stride S known.
template <int K, int S, class Epilogue>
void convolve_row(const Taps& rows, Index count, Epilogue& result) {
  Epilogue epilogue = result;
  for (int v = 0; v < rows.vectors; ++v) {
    epilogue.start(v);
    for_blocks(count, [&](Index o, auto size) FASTCIFAR_LAMBDA_INLINE {
      constexpr int N = decltype(size)::value;
      Vec sum[N];
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { sum[i.value] = zero(); });
      for (Index r = 0; r < rows.count; ++r) {
        const float* source = rows.source[r] + v * rows.source_vector_step + o * S * kLanes;
        const float* weights = rows.weight[r] + v * kLanes;
        Vec weight[K];
        repeat<0, K>([&](auto s) FASTCIFAR_LAMBDA_INLINE {
          weight[s.value] = load(weights + s.value * rows.weight_tap_step);
        });
        repeat<0, S*(N - 1) + K>([&](auto column) FASTCIFAR_LAMBDA_INLINE {
          constexpr int c = decltype(column)::value;
          const Vec value = load(source + c * kLanes);
          repeat<0, K>([&](auto tap) FASTCIFAR_LAMBDA_INLINE {
            constexpr int s = decltype(tap)::value;
            if constexpr (c >= s && (c - s) % S == 0 && (c - s) / S < N) {
              sum[(c - s) / S] = fma(value, weight[s], sum[(c - s) / S]);
            }
          });
        });
      }
      epilogue.finish(o, sum);
    });
    epilogue.end(v);
  }
  result = epilogue;
}

// Σ_t weight[t] · source[t][o·step] for each o < count: single taps of a kernel of any shape.
template <class Epilogue>
void gather_row(const Taps& taps, Index step, Index count, Epilogue& result) {
  Epilogue epilogue = result;
  for (int v = 0; v < taps.vectors; ++v) {
    epilogue.start(v);
    for_blocks(count, [&](Index o, auto size) FASTCIFAR_LAMBDA_INLINE {
      constexpr int N = decltype(size)::value;
      Vec sum[N];
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { sum[i.value] = zero(); });
      for (Index t = 0; t < taps.count; ++t) {
        const float* source = taps.source[t] + v * taps.source_vector_step + o * step * kLanes;
        const Vec weight = load(taps.weight[t] + v * kLanes);
        repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
          sum[i.value] = fma(load(source + i.value * step * kLanes), weight, sum[i.value]);
        });
      }
      epilogue.finish(o, sum);
    });
    epilogue.end(v);
  }
  result = epilogue;
}

// The same taps with the place of each one's sum, [tap][vector][lane], for the correlation.
struct Sums {
  Index count;
  const float** source;
  float** sum;
  Index source_vector_step;
  Index sum_tap_step;
  Index gradient_vector_step;
  int vectors;
};

// sum[r][s] += Σ_o gradient[o] · source[r][S·o + s] for R kernel rows of width K from row `first` on.
template <int K, int S, int R>
FASTCIFAR_INLINE void correlate_some(const Sums& rows, Index first, int v, const float* gradient, Index count) {
  const float* source[R];
  Vec sum[R * K];
  repeat<0, R>([&](auto r) FASTCIFAR_LAMBDA_INLINE {
    source[r.value] = rows.source[first + r.value] + v * rows.source_vector_step;
  });
  repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    sum[t.value] = load(rows.sum[first + t.value / K] + v * kLanes + (t.value % K) * rows.sum_tap_step);
  });
  for (Index o = 0; o < count; ++o) {
    const Vec value = load(gradient + o * kLanes);
    repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
      sum[t.value] = fma(value, load(source[t.value / K] + (S * o + t.value % K) * kLanes), sum[t.value]);
    });
  }
  repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    store(rows.sum[first + t.value / K] + v * kLanes + (t.value % K) * rows.sum_tap_step, sum[t.value]);
  });
}

template <int K, int S>
void correlate_row(const Sums& rows, const float* gradient, Index count) {
  constexpr int R = K == 3 ? 3 : K == 5 ? 2 : 1;  // enough sums to hide the latency, few enough for the registers
  for (int v = 0; v < rows.vectors; ++v, gradient += rows.gradient_vector_step) {
    Index r = 0;
    for (; r + R <= rows.count; r += R) correlate_some<K, S, R>(rows, r, v, gradient, count);
    if constexpr (R == 3) {
      if (r + 2 <= rows.count) {
        correlate_some<K, S, 2>(rows, r, v, gradient, count);
        r += 2;
      }
    }
    if constexpr (R > 1) {
      if (r < rows.count) correlate_some<K, S, 1>(rows, r, v, gradient, count);
    }
  }
}

// sum[t] += Σ_o gradient[o] · source[t][o·step] for N single taps from tap `first` on.
template <int N>
FASTCIFAR_INLINE void correlate_taps(const Sums& taps, Index first, int v, const float* gradient, Index step,
                                     Index count) {
  Vec sum[N];
  const float* source[N];
  repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    sum[t.value] = load(taps.sum[first + t.value] + v * kLanes);
    source[t.value] = taps.source[first + t.value] + v * taps.source_vector_step;
  });
  for (Index o = 0; o < count; ++o) {
    const Vec value = load(gradient + o * kLanes);
    repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
      sum[t.value] = fma(value, load(source[t.value] + o * step * kLanes), sum[t.value]);
    });
  }
  repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    store(taps.sum[first + t.value] + v * kLanes, sum[t.value]);
  });
}

inline void correlate_any(const Sums& taps, const float* gradient, Index step, Index count) {
  for (int v = 0; v < taps.vectors; ++v, gradient += taps.gradient_vector_step) {
    Index t = 0;
    for (; t + 8 <= taps.count; t += 8) correlate_taps<8>(taps, t, v, gradient, step, count);
    for (; t < taps.count; ++t) correlate_taps<1>(taps, t, v, gradient, step, count);
  }
}

// Code for kernels whose width and stride are known when it is compiled; null for all others.
template <class Epilogue>
using ConvolveRow = void (*)(const Taps&, Index, Epilogue&);
using CorrelateRow = void (*)(const Sums&, const float*, Index);

template <class Epilogue>
ConvolveRow<Epilogue> find_convolve_row(Index width, Index stride, Index dilation) {
  if (dilation != 1 || stride > 2) return nullptr;
  if (width == 3) return stride == 1 ? &convolve_row<3, 1, Epilogue> : &convolve_row<3, 2, Epilogue>;
  if (width == 5) return stride == 1 ? &convolve_row<5, 1, Epilogue> : &convolve_row<5, 2, Epilogue>;
  if (width == 7) return stride == 1 ? &convolve_row<7, 1, Epilogue> : &convolve_row<7, 2, Epilogue>;
  return nullptr;
}

inline CorrelateRow find_correlate_row(Index width, Index stride, Index dilation) {
  if (dilation != 1 || stride > 2) return nullptr;
  if (width == 3) return stride == 1 ? &correlate_row<3, 1> : &correlate_row<3, 2>;
  if (width == 5) return stride == 1 ? &correlate_row<5, 1> : &correlate_row<5, 2>;
  if (width == 7) return stride == 1 ? &correlate_row<7, 1> : &correlate_row<7, 2>;
  return nullptr;
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
