#pragma once

// y or z of a range of rows: x is widened into the ring, convolved a row at a time, and each row is finished while it
// is in the L1 cache.

#include "depthwise_elements.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

// Sums about a shift near the mean, [vector][lane] each, of the rows of one image.
struct ShiftedSums {
  float *shift, *sum, *square;
};

// Stores a row in the tensor's dtype.
template <class T>
struct Store {
  T* out;
  Index step;  // from an output to the next
  Channels channels;
  T* at = nullptr;
  bool full = true;

  FASTCIFAR_INLINE void start(int v) {
    at = out + v * kLanes;
    full = channels.full(v);
  }
  template <int N>
  FASTCIFAR_INLINE void finish(Index o, const Vec (&sum)[N]) const {
    T* p = at + o * step;
    if (full) {
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store(p + i.value * step, sum[i.value]); });
    } else {
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
        store_first(p + i.value * step, sum[i.value], channels.last);
      });
    }
  }
  FASTCIFAR_INLINE void end(int) const {}
};

// Stores a row and adds its float32 values to the sums.
template <class T>
struct StoreAndSum {
  Store<T> target;
  ShiftedSums sums;
  Vec shift = zero(), sum = zero(), square = zero();

  FASTCIFAR_INLINE void start(int v) {
    target.start(v);
    shift = load(sums.shift + v * kLanes);
    sum = square = zero();
  }
  template <int N>
  FASTCIFAR_INLINE void finish(Index o, const Vec (&values)[N]) {
    target.finish(o, values);
    Vec totals[2] = {zero(), zero()}, squares[2] = {zero(), zero()};
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
      const Vec d = values[i.value] - shift;
      totals[i.value % 2] = totals[i.value % 2] + d;
      squares[i.value % 2] = fma(d, d, squares[i.value % 2]);
    });
    sum = sum + (totals[0] + totals[1]);
    square = square + (squares[0] + squares[1]);
  }
  FASTCIFAR_INLINE void end(int v) const {
    store(sums.sum + v * kLanes, load(sums.sum + v * kLanes) + sum);
    store(sums.square + v * kLanes, load(sums.square + v * kLanes) + square);
  }
};

// Keeps a row as float32, [vector][output][lane].
struct Keep {
  float* out;
  Index vector_step;
  float* at = nullptr;

  FASTCIFAR_INLINE void start(int v) { at = out + v * vector_step; }
  template <int N>
  FASTCIFAR_INLINE void finish(Index o, const Vec (&sum)[N]) const {
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store(at + (o + i.value) * kLanes, sum[i.value]); });
  }
  FASTCIFAR_INLINE void end(int) const {}
};

// Chan's merge of an image's sums into (seen, mean, m2).
void merge_image(const ShiftedSums& sums, int lanes, double count, double seen, double* mean, double* m2) {
  const double weight = count / (seen + count);
  for (int i = 0; i < lanes; ++i) {
    const double sum = sums.sum[i];
    const double difference = double(sums.shift[i]) + sum / count - mean[i];
    mean[i] += difference * weight;
    m2[i] += (double(sums.square[i]) - sum * sum / count) + difference * difference * seen * weight;
  }
}

template <class T>
void activate_row(const float* row, Index count, const Normaliser& n, const Channels& channels, T* out, Index step) {
  const Vec slope = set(n.negative_slope);
  with_activation(n.activation, [&](auto tag) FASTCIFAR_LAMBDA_INLINE {
    for (int v = 0; v < channels.vectors; ++v, row += count * kLanes) {
      const Index c = channels.begin + v * kLanes;
      const Vec mean = load(n.mean + c), scale = load(n.scale + c), shift = load(n.shift + c);
      for (Index o = 0; o < count; ++o) {
        const Vec value = fma(load(row + o * kLanes) - mean, scale, shift);
        store_channels(out + o * step, channels, v, activate<decltype(tag)::value>(value, slope));
      }
    }
  });
}

template <class T>
struct Forward {
  const ForwardTask& task;
  const Shape& shape;
  Channels channels;
  Index padded;
  bool direct;
  Taps taps;
  ShiftedSums sums;
  float* row;  // [vector][output][lane], inference only
  Ring ring;

  FASTCIFAR_INLINE explicit Forward(const ForwardTask& t)
      : task(t),
        shape(t.shape),
        channels(t.range.channel_begin, t.range.channel_end),
        padded((shape.channels + kChannelAlign - 1) / kChannelAlign * kChannelAlign),
        direct(find_convolve_row<Keep>(shape.kernel_width, shape.stride_width, shape.dilation_width) != nullptr),
        taps{0, reinterpret_cast<const float**>(t.scratch), nullptr, t.rings.x_columns * kLanes, padded,
             channels.vectors},
        sums{t.scratch + pointer_scratch(shape), nullptr, nullptr},
        row(sums.shift + 4 * channels.vectors * kLanes),
        ring(row + channels.vectors * shape.out_width * kLanes, t.rings.x_left, t.rings.x_columns, t.rings.x_rows,
             channels.vectors) {
    taps.weight = taps.source + shape.taps();
    sums.sum = sums.shift + channels.vectors * kLanes;
    sums.square = sums.sum + channels.vectors * kLanes;
  }

  // Brings the input rows of output row `o` into the ring and lists the taps that meet them.
  void prepare(const T* image, Index o) {
    const Index first = o * shape.stride_height - shape.padding_height;
    const Index last = first + (shape.kernel_height - 1) * shape.dilation_height;
    fill(ring, image, shape.width, shape.channels, channels, first, last < shape.height ? last : shape.height - 1);
    const KernelSpan span(first, shape.dilation_height, shape.kernel_height, shape.height);
    const Index width = direct ? 1 : shape.kernel_width;
    taps.count = 0;
    for (Index r = span.begin; r < span.end; ++r) {
      const float* source = ring.row(first + r * shape.dilation_height);
      const float* weight = task.weight + r * shape.kernel_width * padded + channels.begin;
      for (Index s = 0; s < width; ++s) {
        taps.source[taps.count] = source + s * shape.dilation_width * kLanes;
        taps.weight[taps.count++] = weight + s * padded;
      }
    }
  }

  template <class Epilogue>
  FASTCIFAR_INLINE void run(const Taps& used, Index count, Epilogue& epilogue) const {
    if (direct) {
      find_convolve_row<Epilogue>(shape.kernel_width, shape.stride_width, 1)(used, count, epilogue);
    } else {
      gather_row(used, shape.stride_width, count, epilogue);
    }
  }

  // A value of each channel in the middle of the row: near enough to the mean to subtract.
  void choose_shift() {
    const Index offset = shape.out_width / 2 * shape.stride_width * kLanes;
    for (Index t = 0; t < taps.count; ++t) taps.source[t] += offset;
    Keep keep{sums.shift, kLanes};
    run(taps, 1, keep);
    for (Index t = 0; t < taps.count; ++t) taps.source[t] -= offset;
    for (Index i = 0; i < channels.vectors * kLanes; ++i) sums.sum[i] = sums.square[i] = 0.0f;
  }

  void image(Index n) {
    const T* x = static_cast<const T*>(task.x) + n * shape.height * shape.width * shape.channels;
    T* out = static_cast<T*>(task.out) + n * shape.out_height * shape.out_width * shape.channels + channels.begin;
    ring.next = 0;
    for (Index o = task.range.row_begin; o < task.range.row_end; ++o) {
      T* out_row = out + o * shape.out_width * shape.channels;
      prepare(x, o);
      if (task.normaliser != nullptr) {
        Keep keep{row, shape.out_width * kLanes};
        run(taps, shape.out_width, keep);
        activate_row(row, shape.out_width, *task.normaliser, channels, out_row, shape.channels);
        continue;
      }
      if (o == task.range.row_begin) choose_shift();
      StoreAndSum<T> epilogue{{out_row, shape.channels, channels}, sums};
      run(taps, shape.out_width, epilogue);
    }
  }
};

template <class T>
void forward(const ForwardTask& task) {
  Forward<T> sweep(task);
  const Range& range = task.range;
  const int lanes = sweep.channels.vectors * kLanes;
  const double count = double((range.row_end - range.row_begin) * task.shape.out_width);
  if (task.normaliser == nullptr) {
    for (Index i = 0; i < lanes; ++i) task.mean[range.channel_begin + i] = task.m2[range.channel_begin + i] = 0.0;
  }
  for (Index n = range.image_begin; n < range.image_end; ++n) {
    sweep.image(n);
    if (task.normaliser != nullptr) continue;
    merge_image(sweep.sums, lanes, count, count * double(n - range.image_begin), task.mean + range.channel_begin,
                task.m2 + range.channel_begin);
  }
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
