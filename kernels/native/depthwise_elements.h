#pragma once

// The passes without a convolution: pixels [pixel][channel], four of them at a time for each vector of channels.

#include "depthwise_ring.h"
#include "depthwise_tasks.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

constexpr int kPixels = 4;
constexpr Index kPixelsPerFlush = 512;  // float32 sums go to float64 after so many pixels

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

template <class T, Activation A, int N>
FASTCIFAR_INLINE void normalise_pixels(const T* y, T* z, const Normaliser& n, const Channels& channels, Index step) {
  const Vec slope = set(n.negative_slope);
  for (int v = 0; v < channels.vectors; ++v) {
    const Index c = channels.begin + v * kLanes;
    const Vec mean = load(n.mean + c), scale = load(n.scale + c), shift = load(n.shift + c);
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
      const Vec value = load_channels(y + i.value * step, channels, v);
      store_channels(z + i.value * step, channels, v, activate<A>(fma(value - mean, scale, shift), slope));
    });
  }
}

template <class T, Activation A>
void normalise_range(const ElementTask& task) {
  const Channels channels(0, task.channels);
  const T* y = static_cast<const T*>(task.y);
  T* z = static_cast<T*>(task.z);
  Index p = task.pixel_begin;
  for (; p + kPixels <= task.pixel_end; p += kPixels) {
    const Index at = p * task.channels;
    normalise_pixels<T, A, kPixels>(y + at, z + at, task.normaliser, channels, task.channels);
  }
  for (; p < task.pixel_end; ++p) {
    const Index at = p * task.channels;
    normalise_pixels<T, A, 1>(y + at, z + at, task.normaliser, channels, task.channels);
  }
}

template <class T>
void normalise(const ElementTask& task) {
  with_activation(task.normaliser.activation,
                  [&](auto tag) FASTCIFAR_LAMBDA_INLINE { normalise_range<T, decltype(tag)::value>(task); });
}

// sums [2, padded C] += dA and dA·(y − mean) of N pixels.
template <class T, Activation A, int N>
FASTCIFAR_INLINE void reduce_pixels(const T* y, const T* dz, const Normaliser& n, const Channels& channels, Index step,
                                    float* sums, Index padded) {
  const Vec slope = set(n.negative_slope);
  for (int v = 0; v < channels.vectors; ++v) {
    const Index c = v * kLanes;
    const Vec mean = load(n.mean + c), scale = load(n.scale + c), shift = load(n.shift + c);
    Vec first = zero(), second = zero();
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
      const Vec centred = load_channels(y + i.value * step, channels, v) - mean;
      const Vec gradient = activation_gradient<A>(fma(centred, scale, shift),
                                                  load_channels(dz + i.value * step, channels, v), slope);
      first = first + gradient;
      second = fma(gradient, centred, second);
    });
    store(sums + c, load(sums + c) + first);
    store(sums + padded + c, load(sums + padded + c) + second);
  }
}

template <class T, Activation A>
void reduce_range(const ElementTask& task) {
  const Channels channels(0, task.channels);
  const T* y = static_cast<const T*>(task.y);
  const T* dz = static_cast<const T*>(task.dz);
  const Index padded = (task.channels + kChannelAlign - 1) / kChannelAlign * kChannelAlign;
  for (Index begin = task.pixel_begin; begin < task.pixel_end; begin += kPixelsPerFlush) {
    const Index end = task.pixel_end - begin < kPixelsPerFlush ? task.pixel_end : begin + kPixelsPerFlush;
    for (Index i = 0; i < 2 * padded; ++i) task.scratch[i] = 0.0f;
    Index p = begin;
    for (; p + kPixels <= end; p += kPixels) {
      const Index at = p * task.channels;
      reduce_pixels<T, A, kPixels>(y + at, dz + at, task.normaliser, channels, task.channels, task.scratch, padded);
    }
    for (; p < end; ++p) {
      const Index at = p * task.channels;
      reduce_pixels<T, A, 1>(y + at, dz + at, task.normaliser, channels, task.channels, task.scratch, padded);
    }
    for (Index i = 0; i < 2 * padded; ++i) task.sums[i] += double(task.scratch[i]);
  }
}

template <class T>
void reduce(const ElementTask& task) {
  with_activation(task.normaliser.activation,
                  [&](auto tag) FASTCIFAR_LAMBDA_INLINE { reduce_range<T, decltype(tag)::value>(task); });
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
