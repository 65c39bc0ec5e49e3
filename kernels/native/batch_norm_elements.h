#pragma once

// Passes over pixels [pixel][channel]: eight pixels at a time for each vector of channels.

#include "batch_norm_tasks.h"
#include "simd.h"

namespace fastcifar {
namespace batch_norm {
namespace FASTCIFAR_ISA {
namespace {

using namespace fastcifar::FASTCIFAR_ISA;
using Index = std::int64_t;

constexpr int kLanes = Vec::lanes;
constexpr int kPixels = 8;
constexpr Index kPixelsPerFlush = 64;  // float32 sums go to float64 after so many pixels

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

// f(first channel, lanes) for every vector of channels; lanes is a compile-time kLanes but for a cut last one.
struct WholeVector {
  template <class T>
  FASTCIFAR_INLINE Vec read(const T* p) const { return load(p); }
  template <class T>
  FASTCIFAR_INLINE void write(T* p, Vec v) const { store(p, v); }
};

struct CutVector {
  int lanes;
  template <class T>
  FASTCIFAR_INLINE Vec read(const T* p) const { return load_first(p, lanes); }
  template <class T>
  FASTCIFAR_INLINE void write(T* p, Vec v) const { store_first(p, v, lanes); }
};

template <class F>
FASTCIFAR_INLINE void each_vector(Index channels, F&& f) {
  Index c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, WholeVector{});
  if (c < channels) f(c, CutVector{int(channels - c)});
}

// f(first pixel, count) in groups of kPixels, then one by one; the count is compile-time.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class F>
FASTCIFAR_INLINE void each_pixels(Index begin, Index end, F&& f) {
  Index p = begin;
  for (; p + kPixels <= end; p += kPixels) f(p, Count<kPixels>{});
  for (; p < end; ++p) f(p, Count<1>{});
}

// Runs f over runs of pixels with the scratch sums at zero, and adds them to the task's float64 sums after each.
template <class F>
FASTCIFAR_INLINE void flushed(const Task& task, F&& f) {
  const Index padded = (task.channels + kChannelAlign - 1) / kChannelAlign * kChannelAlign;
  for (Index begin = task.pixel_begin; begin < task.pixel_end; begin += kPixelsPerFlush) {
    const Index end = task.pixel_end - begin < kPixelsPerFlush ? task.pixel_end : begin + kPixelsPerFlush;
    for (Index i = 0; i < 2 * padded; ++i) task.scratch[i] = 0.0f;
    f(begin, end, task.scratch, task.scratch + padded);
    for (Index i = 0; i < 2 * padded; ++i) task.sums[i] += double(task.scratch[i]);
  }
}

template <class T>
void statistics(const Task& task) {
  const T* x = static_cast<const T*>(task.x);
  flushed(task, [&](Index begin, Index end, float* first, float* second) FASTCIFAR_LAMBDA_INLINE {
    each_pixels(begin, end, [&](Index pixel, auto count) FASTCIFAR_LAMBDA_INLINE {
      const T* row = x + pixel * task.channels;
      each_vector(task.channels, [&](Index c, auto vector) FASTCIFAR_LAMBDA_INLINE {
        const Vec pivot = load(task.mean + c);
        Vec sum = zero(), square = zero();
        for (int i = 0; i < count.value; ++i) {
          const Vec centred = vector.read(row + i * task.channels + c) - pivot;
          sum = sum + centred;
          square = fma(centred, centred, square);
        }
        store(first + c, load(first + c) + sum);
        store(second + c, load(second + c) + square);
      });
    });
  });
}

template <class T, Activation A, bool kResidual>
void normalise_range(const Task& task) {
  const T* x = static_cast<const T*>(task.x);
  const T* residual = static_cast<const T*>(task.residual);
  T* z = static_cast<T*>(task.out);
  const Vec slope = set(task.negative_slope);
  each_pixels(task.pixel_begin, task.pixel_end, [&](Index pixel, auto count) FASTCIFAR_LAMBDA_INLINE {
    const Index start = pixel * task.channels;
    each_vector(task.channels, [&](Index c, auto vector) FASTCIFAR_LAMBDA_INLINE {
      const Vec mean = load(task.mean + c), scale = load(task.scale + c), shift = load(task.shift + c);
      for (int i = 0; i < count.value; ++i) {
        const Index at = start + i * task.channels + c;
        Vec value = fma(vector.read(x + at) - mean, scale, shift);
        if constexpr (kResidual) value = value + vector.read(residual + at);
        vector.write(z + at, activate<A>(value, slope));
      }
    });
  });
}

template <class T>
void normalise(const Task& task) {
  with_activation(task.activation, [&](auto tag) FASTCIFAR_LAMBDA_INLINE {
    constexpr Activation kActivation = decltype(tag)::value;
    return task.residual == nullptr ? normalise_range<T, kActivation, false>(task)
                                    : normalise_range<T, kActivation, true>(task);
  });
}

template <class T, Activation A, bool kResidual>
void reduce_range(const Task& task) {
  const T* x = static_cast<const T*>(task.x);
  const T* residual = static_cast<const T*>(task.residual);
  const T* dz = static_cast<const T*>(task.dz);
  T* da = static_cast<T*>(task.out);
  const Vec negative_slope = set(task.negative_slope);
  flushed(task, [&](Index begin, Index end, float* first, float* second) FASTCIFAR_LAMBDA_INLINE {
    each_pixels(begin, end, [&](Index pixel, auto count) FASTCIFAR_LAMBDA_INLINE {
      const Index start = pixel * task.channels;
      each_vector(task.channels, [&](Index c, auto vector) FASTCIFAR_LAMBDA_INLINE {
        const Vec mean = load(task.mean + c), scale = load(task.scale + c), shift = load(task.shift + c);
        Vec sum = zero(), product = zero();
        for (int i = 0; i < count.value; ++i) {
          const Index at = start + i * task.channels + c;
          const Vec centred = vector.read(x + at) - mean;
          Vec value = fma(centred, scale, shift);
          if constexpr (kResidual) value = value + vector.read(residual + at);
          const Vec gradient = activation_gradient<A>(value, vector.read(dz + at), negative_slope);
          if constexpr (kResidual) vector.write(da + at, gradient);
          sum = sum + gradient;
          product = fma(gradient, centred, product);
        }
        store(first + c, load(first + c) + sum);
        store(second + c, load(second + c) + product);
      });
    });
  });
}

template <class T>
void reduce(const Task& task) {
  with_activation(task.activation, [&](auto tag) FASTCIFAR_LAMBDA_INLINE {
    constexpr Activation kActivation = decltype(tag)::value;
    return task.residual == nullptr ? reduce_range<T, kActivation, false>(task)
                                    : reduce_range<T, kActivation, true>(task);
  });
}

template <class T, Activation A>
void gradient_range(const Task& task) {
  const T* x = static_cast<const T*>(task.x);
  const T* dz = static_cast<const T*>(task.dz);
  T* dx = static_cast<T*>(task.out);
  const Vec negative_slope = set(task.negative_slope);
  each_pixels(task.pixel_begin, task.pixel_end, [&](Index pixel, auto count) FASTCIFAR_LAMBDA_INLINE {
    const Index start = pixel * task.channels;
    each_vector(task.channels, [&](Index c, auto vector) FASTCIFAR_LAMBDA_INLINE {
      const Vec mean = load(task.mean + c), scale = load(task.scale + c), shift = load(task.shift + c);
      const Vec offset = load(task.offset + c), slope = load(task.slope + c);
      for (int i = 0; i < count.value; ++i) {
        const Index at = start + i * task.channels + c;
        const Vec centred = vector.read(x + at) - mean;
        const Vec da = activation_gradient<A>(fma(centred, scale, shift), vector.read(dz + at), negative_slope);
        vector.write(dx + at, fma(scale, da, zero() - fma(slope, centred, offset)));
      }
    });
  });
}

template <class T>
void gradient(const Task& task) {
  with_activation(task.activation,
                  [&](auto tag) FASTCIFAR_LAMBDA_INLINE { gradient_range<T, decltype(tag)::value>(task); });
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace batch_norm
}  // namespace fastcifar
