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
  switch (count - o) {
    case 1: return f(o, Constant<1>{});
    case 2: return f(o, Constant<2>{});
    case 3: return f(o, Constant<3>{});
    case 4: return f(o, Constant<4>{});
    case 5: return f(o, Constant<5>{});
    case 6: return f(o, Constant<6>{});
    case 7: return f(o, Constant<7>{});
    default: return;
  }
}

// The kernel rows that meet the image: where each row's first column and first weight lie.
struct KernelRows {
  int count;
  const float* const* source;
  const float* const* weight;
  Index weight_step;
};

// out[o] = Σ_r Σ_s weight[r][s] · source[r][S·o + s], the kernel's width K and the stride S known.
template <int K, int S>
void convolve_row(const KernelRows& rows, Index count, float* out) {
  for_blocks(count, [&](Index o, auto size) FASTCIFAR_LAMBDA_INLINE {
    constexpr int N = decltype(size)::value;
    Vec sum[N];
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { sum[i.value] = zero(); });
    for (int r = 0; r < rows.count; ++r) {
      const float* source = rows.source[r] + o * S * kLanes;
      Vec weight[K];
      repeat<0, K>([&](auto s) FASTCIFAR_LAMBDA_INLINE {
        weight[s.value] = load(rows.weight[r] + s.value * rows.weight_step);
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
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store(out + (o + i.value) * kLanes, sum[i.value]); });
  });
}

// Single taps of a kernel of any shape: where each one's first column and its weight lie.
struct Taps {
  Index count;
  const float** source;
  const float** weight;
};

// out[o·out_step] = Σ_t weight[t] · source[t][o·source_step]; steps in columns.
inline void gather_row(const Taps& taps, Index source_step, Index count, float* out, Index out_step) {
  for_blocks(count, [&](Index o, auto size) FASTCIFAR_LAMBDA_INLINE {
    constexpr int N = decltype(size)::value;
    Vec sum[N];
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { sum[i.value] = zero(); });
    for (Index t = 0; t < taps.count; ++t) {
      const float* source = taps.source[t] + o * source_step * kLanes;
      const Vec weight = load(taps.weight[t]);
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
        sum[i.value] = fma(load(source + i.value * source_step * kLanes), weight, sum[i.value]);
      });
    }
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
      store(out + (o + i.value) * out_step * kLanes, sum[i.value]);
    });
  });
}

// sum[r][s] += Σ_o gradient[o] · source[r][S·o + s] for R kernel rows of width K.
template <int K, int S, int R>
FASTCIFAR_INLINE void correlate_some(const float* gradient, Index count, const float* const* source,
                                     float* const* sums, Index sum_step) {
  Vec sum[R * K];
  repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    sum[t.value] = load(sums[t.value / K] + (t.value % K) * sum_step);
  });
  for (Index o = 0; o < count; ++o) {
    const Vec value = load(gradient + o * kLanes);
    repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
      const float* p = source[t.value / K] + (S * o + t.value % K) * kLanes;
      sum[t.value] = fma(value, load(p), sum[t.value]);
    });
  }
  repeat<0, R * K>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
    store(sums[t.value / K] + (t.value % K) * sum_step, sum[t.value]);
  });
}

template <int K, int S>
void correlate_row(const float* gradient, Index count, const float* const* source, float* const* sums, Index sum_step,
                   int rows) {
  constexpr int R = K == 3 ? 3 : K == 5 ? 2 : 1;  // enough sums to hide the latency, few enough for the registers
  int r = 0;
  for (; r + R <= rows; r += R) correlate_some<K, S, R>(gradient, count, source + r, sums + r, sum_step);
  if constexpr (R == 3) {
    if (r + 2 <= rows) {
      correlate_some<K, S, 2>(gradient, count, source + r, sums + r, sum_step);
      r += 2;
    }
  }
  if constexpr (R > 1) {
    if (r < rows) correlate_some<K, S, 1>(gradient, count, source + r, sums + r, sum_step);
  }
}

// sums[t] += Σ_o gradient[o] · source[t][o·source_step] for N taps.
template <int N>
FASTCIFAR_INLINE void correlate_taps(const float* gradient, Index count, const float* const* source,
                                     Index source_step, float* const* sums) {
  Vec sum[N];
  repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE { sum[t.value] = load(sums[t.value]); });
  for (Index o = 0; o < count; ++o) {
    const Vec value = load(gradient + o * kLanes);
    repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE {
      sum[t.value] = fma(value, load(source[t.value] + o * source_step * kLanes), sum[t.value]);
    });
  }
  repeat<0, N>([&](auto t) FASTCIFAR_LAMBDA_INLINE { store(sums[t.value], sum[t.value]); });
}

using ConvolveRow = void (*)(const KernelRows&, Index, float*);
using CorrelateRow = void (*)(const float*, Index, const float* const*, float* const*, Index, int);

struct RowFunctions {
  ConvolveRow convolve;    // null: no special code for this kernel, gather_row does it
  CorrelateRow correlate;
};

template <int K>
RowFunctions row_functions_of_width(Index stride) {
  if (stride == 1) return {&convolve_row<K, 1>, &correlate_row<K, 1>};
  if (stride == 2) return {&convolve_row<K, 2>, &correlate_row<K, 2>};
  return {nullptr, nullptr};
}

RowFunctions row_functions(Index width, Index stride, Index dilation) {
  if (dilation != 1) return {nullptr, nullptr};
  if (width == 3) return row_functions_of_width<3>(stride);
  if (width == 5) return row_functions_of_width<5>(stride);
  if (width == 7) return row_functions_of_width<7>(stride);
  return {nullptr, nullptr};
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
