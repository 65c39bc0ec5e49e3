#pragma once

// dx and dweight in one sweep down the rows: each row of dy is made once, kept in a ring for dx, and meets the rows of
// x in another ring for dweight.

#include "depthwise_forward.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

constexpr int kDyPixels = 4;

struct DyVectors {
  Vec mean, scale, shift, offset, slope, negative_slope;
};

// dy = scale·dA + offset + slope·(y − mean) of N pixels of one vector of channels, into the ring's row. Only the first
// `lanes` channels are there unless Full.
template <class T, Activation A, int N, bool Full>
FASTCIFAR_INLINE void dy_pixels(const T* y, const T* dz, Index step, const DyVectors& d, float* out, int lanes) {
  repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
    const T* p = y + i.value * step;
    const T* q = dz + i.value * step;
    const Vec centred = (Full ? load(p) : load_first(p, lanes)) - d.mean;
    const Vec gradient = activation_gradient<A>(fma(centred, d.scale, d.shift), Full ? load(q) : load_first(q, lanes),
                                                d.negative_slope);
    store(out + i.value * kLanes, fma(gradient, d.scale, fma(centred, d.slope, d.offset)));
  });
}

template <class T, Activation A, bool Full>
FASTCIFAR_INLINE void dy_vector(const T* y, const T* dz, Index count, Index step, const DyVectors& d, float* out,
                                int lanes) {
  Index o = 0;
  for (; o + kDyPixels <= count; o += kDyPixels) {
    dy_pixels<T, A, kDyPixels, Full>(y + o * step, dz + o * step, step, d, out + o * kLanes, lanes);
  }
  for (; o < count; ++o) dy_pixels<T, A, 1, Full>(y + o * step, dz + o * step, step, d, out + o * kLanes, lanes);
}

template <class T, Activation A>
void dy_row(const GradientTask& task, const Channels& channels, Index pixel, float* out, Index vector_step) {
  const Index count = task.shape.out_width, step = task.shape.channels;
  const Normaliser n = task.normaliser;
  const int vectors = channels.vectors, last = channels.last;
  const T* y = static_cast<const T*>(task.y) + pixel * step + channels.begin;
  const T* dz = static_cast<const T*>(task.dz) + pixel * step + channels.begin;
  for (Index o = 0; o < count; ++o) {
    prefetch_pixel(y + (kRowsAhead * count + o) * step, vectors);
    prefetch_pixel(dz + (kRowsAhead * count + o) * step, vectors);
  }
  for (int v = 0; v < vectors; ++v) {
    const Index c = channels.begin + v * kLanes;
    const DyVectors d{load(n.mean + c),  load(n.scale + c), load(n.shift + c),
                      load(n.offset + c), load(n.slope + c), set(n.negative_slope)};
    const Index at = v * kLanes;
    if (v + 1 < vectors || last == kLanes) {
      dy_vector<T, A, true>(y + at, dz + at, count, step, d, out + v * vector_step, kLanes);
    } else {
      dy_vector<T, A, false>(y + at, dz + at, count, step, d, out + v * vector_step, last);
    }
  }
}

template <class T>
struct Sweep {
  const GradientTask& task;
  const Shape& shape;
  const Range& range;
  Channels channels;
  Index padded;
  ConvolveRow<Store<T>> convolve;
  CorrelateRow correlate;
  Taps taps;
  Sums sums;
  float* dweight;  // of some images, [tap][vector][lane]
  Ring x_ring, dy_ring;

  FASTCIFAR_INLINE explicit Sweep(const GradientTask& t)
      : task(t),
        shape(t.shape),
        range(t.range),
        channels(range.channel_begin, range.channel_end),
        padded((shape.channels + kChannelAlign - 1) / kChannelAlign * kChannelAlign),
        convolve(shape.stride_width == 1 ? find_convolve_row<Store<T>>(shape.kernel_width, 1, shape.dilation_width)
                                         : nullptr),
        correlate(find_correlate_row(shape.kernel_width, shape.stride_width, shape.dilation_width)),
        taps{0, reinterpret_cast<const float**>(t.scratch), nullptr, t.rings.dy_columns * kLanes,
             convolve == nullptr ? padded : -padded, channels.vectors},
        sums{0, taps.source, nullptr, t.rings.x_columns * kLanes, channels.vectors * kLanes,
             t.rings.dy_columns * kLanes, channels.vectors},
        dweight(t.scratch + pointer_scratch(shape)),
        x_ring(dweight + shape.taps() * channels.vectors * kLanes, t.rings.x_left, t.rings.x_columns, t.rings.x_rows,
               channels.vectors),
        dy_ring(x_ring.data + x_ring.size(), t.rings.dy_left, t.rings.dy_columns, t.rings.dy_rows, channels.vectors) {
    taps.weight = taps.source + shape.taps();
    sums.sum = reinterpret_cast<float**>(t.scratch) + shape.taps();
  }

  FASTCIFAR_INLINE float* dy_row_of(Index q) const { return dy_ring.row(q) + dy_ring.left * kLanes; }

  void make_dy(Index image, Index q) const {
    float* out = dy_row_of(q);
    const Index pixel = (image * shape.out_height + q) * shape.out_width;
    with_activation(task.normaliser.activation, [&](auto tag) FASTCIFAR_LAMBDA_INLINE {
      dy_row<T, decltype(tag)::value>(task, channels, pixel, out, dy_ring.vector_step());
    });
  }

  void add_to_dweight(Index image, Index q) {
    const T* x = static_cast<const T*>(task.x) + image * shape.height * shape.width * shape.channels;
    const Index first = q * shape.stride_height - shape.padding_height;
    const Index last = first + (shape.kernel_height - 1) * shape.dilation_height;
    fill(x_ring, x, shape.width, shape.channels, channels, first, last < shape.height ? last : shape.height - 1);
    const Index width = correlate != nullptr ? 1 : shape.kernel_width;
    sums.count = 0;
    for (Index r = 0; r < shape.kernel_height; ++r) {
      const Index input = first + r * shape.dilation_height;
      if (input < 0 || input >= shape.height) continue;
      const float* source = x_ring.row(input);
      float* sum = dweight + r * shape.kernel_width * sums.sum_tap_step;
      for (Index s = 0; s < width; ++s) {
        sums.source[sums.count] = source + s * shape.dilation_width * kLanes;
        sums.sum[sums.count++] = sum + s * sums.sum_tap_step;
      }
    }
    if (correlate != nullptr) {
      correlate(sums, dy_row_of(q), shape.out_width);
    } else {
      correlate_any(sums, dy_row_of(q), shape.stride_width, shape.out_width);
    }
  }

  // The rows of dy that row i of dx needs: [first, last].
  FASTCIFAR_INLINE Index last_dy(Index i) const {
    const Index last = (i + shape.padding_height) / shape.stride_height;
    return last < shape.out_height ? last : shape.out_height - 1;
  }
  FASTCIFAR_INLINE Index first_dy(Index i) const {
    const Index first = i + shape.padding_height - (shape.kernel_height - 1) * shape.dilation_height;
    return first <= 0 ? 0 : (first + shape.stride_height - 1) / shape.stride_height;
  }

  // Lists the taps that columns phase, phase + stride, … of row i of dx take, whole kernel rows with `convolve`.
  void list_taps(Index i, Index phase) {
    taps.count = 0;
    for (Index r = 0; r < shape.kernel_height; ++r) {
      const Index t = i + shape.padding_height - r * shape.dilation_height;
      const Index q = shape.stride_height == 1 ? t : t / shape.stride_height;
      if (t < 0 || q >= shape.out_height || q * shape.stride_height != t) continue;
      const float* source = dy_row_of(q);
      const float* weight = task.weight + r * shape.kernel_width * padded + channels.begin;
      if (convolve != nullptr) {
        taps.source[taps.count] = source + (shape.padding_width - (shape.kernel_width - 1)) * kLanes;
        taps.weight[taps.count++] = weight + (shape.kernel_width - 1) * padded;
        continue;
      }
      for (Index s = 0; s < shape.kernel_width; ++s) {
        const Index u = phase + shape.padding_width - s * shape.dilation_width;
        if (u % shape.stride_width != 0) continue;
        taps.source[taps.count] = source + u / shape.stride_width * kLanes;
        taps.weight[taps.count++] = weight + s * padded;
      }
    }
  }

  void make_dx(Index i, T* out) {
    for (Index phase = 0; phase < shape.stride_width && phase < shape.width; ++phase) {
      list_taps(i, phase);
      const Store<T> epilogue{out + phase * shape.channels, shape.stride_width * shape.channels, channels};
      if (convolve != nullptr) {
        convolve(taps, shape.width, epilogue);
      } else {
        gather_row(taps, 1, (shape.width - phase + shape.stride_width - 1) / shape.stride_width, epilogue);
      }
    }
  }

  void clear_dweight() {
    for (Index i = 0; i < shape.taps() * sums.sum_tap_step; ++i) dweight[i] = 0.0f;
  }

  void flush_dweight() {
    for (Index t = 0; t < shape.taps(); ++t) {
      double* total = task.dweight + t * padded + channels.begin;
      const float* part = dweight + t * sums.sum_tap_step;
      for (Index i = 0; i < sums.sum_tap_step; ++i) total[i] += double(part[i]);
    }
    clear_dweight();
  }

  void image(Index n) {
    x_ring.next = 0;
    Index q = range.row_begin;
    const auto advance = [&](Index end) FASTCIFAR_LAMBDA_INLINE {
      for (; q < end; ++q) {
        make_dy(n, q);
        if (task.dweight != nullptr && q >= range.row_begin && q < range.row_end) add_to_dweight(n, q);
      }
    };
    if (task.dx != nullptr && range.dx_row_begin < range.dx_row_end) {
      const Index first = first_dy(range.dx_row_begin);
      if (first < q) q = first;
      T* dx = static_cast<T*>(task.dx) + n * shape.height * shape.width * shape.channels + channels.begin;
      for (Index i = range.dx_row_begin; i < range.dx_row_end; ++i) {
        advance(last_dy(i) + 1);
        make_dx(i, dx + i * shape.width * shape.channels);
      }
    }
    if (task.dweight != nullptr) advance(range.row_end);
  }
};

template <class T>
void gradients(const GradientTask& task) {
  Sweep<T> sweep(task);
  const Range& range = task.range;
  const Index values = (range.row_end - range.row_begin) * task.shape.out_width;
  Index pending = 0;
  sweep.clear_dweight();
  for (Index n = range.image_begin; n < range.image_end; ++n) {
    sweep.image(n);
    pending += values;
    if (task.dweight == nullptr || (pending < kValuesPerFlush && n + 1 < range.image_end)) continue;
    sweep.flush_dweight();
    pending = 0;
  }
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
