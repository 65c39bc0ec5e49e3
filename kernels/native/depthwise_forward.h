#pragma once

// y or z of a range of rows: x is widened into the ring, convolved a row at a time, and each row is finished while it
// is in the L1 cache.

#include "depthwise_ring.h"
#include "depthwise_tasks.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

// Small images share their float32 sums up to so many values a channel before these go to float64.
constexpr Index kValuesPerFlush = 512;

// Sums about a shift near the mean, [vector][lane] each, of the rows of some images.
struct ShiftedSums {
  float *shift, *sum, *square;
};

// Stores a row in the tensor's dtype.
template <class T>
struct Store {
  T* out;
  Index step;  // from an output to the next
  const Channels& channels;

  struct Row {
    T* out;
    Index step;
    int lanes;

    FASTCIFAR_INLINE Row(const Store& target, int v)
        : out(target.out + v * kLanes), step(target.step), lanes(target.channels.full(v) ? kLanes : target.channels.last) {}
    template <int N>
    FASTCIFAR_INLINE void finish(Index o, const Vec (&sum)[N]) const {
      T* p = out + o * step;
      if (lanes == kLanes) {
        repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store(p + i.value * step, sum[i.value]); });
      } else {
        repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store_first(p + i.value * step, sum[i.value], lanes); });
      }
    }
    FASTCIFAR_INLINE void end() const {}
  };
};

// Stores a row and adds its float32 values to the sums.
template <class T>
struct StoreAndSum {
  Store<T> target;
  const ShiftedSums& sums;

  struct Row {
    typename Store<T>::Row target;
    float *total, *total_square;
    Vec shift, sum = zero(), square = zero();

    FASTCIFAR_INLINE Row(const StoreAndSum& both, int v)
        : target(both.target, v),
          total(both.sums.sum + v * kLanes),
          total_square(both.sums.square + v * kLanes),
          shift(load(both.sums.shift + v * kLanes)) {}
    template <int N>
    FASTCIFAR_INLINE void finish(Index o, const Vec (&values)[N]) {
      target.finish(o, values);
      Vec sums[2] = {zero(), zero()}, squares[2] = {zero(), zero()};
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
        const Vec d = values[i.value] - shift;
        sums[i.value % 2] = sums[i.value % 2] + d;
        squares[i.value % 2] = fma(d, d, squares[i.value % 2]);
      });
      sum = sum + (sums[0] + sums[1]);
      square = square + (squares[0] + squares[1]);
    }
    FASTCIFAR_INLINE void end() const {
      store(total, load(total) + sum);
      store(total_square, load(total_square) + square);
    }
  };
};

// Keeps a row as float32, [vector][output][lane].
struct Keep {
  float* out;
  Index vector_step;

  struct Row {
    float* out;

    FASTCIFAR_INLINE Row(const Keep& target, int v) : out(target.out + v * target.vector_step) {}
    template <int N>
    FASTCIFAR_INLINE void finish(Index o, const Vec (&sum)[N]) const {
      repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { store(out + (o + i.value) * kLanes, sum[i.value]); });
    }
    FASTCIFAR_INLINE void end() const {}
  };
};

// Chan's merge of the sums of `count` values into (seen, mean, m2).
void merge_sums(const ShiftedSums& sums, int lanes, double count, double seen, double* mean, double* m2) {
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
  float* row;  // [vector][output][lane]
  bool fresh = true;  // the sums begin anew
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
    const Index width = direct ? 1 : shape.kernel_width;
    taps.count = 0;
    for (Index r = 0; r < shape.kernel_height; ++r) {
      const Index input = first + r * shape.dilation_height;
      if (input < 0 || input >= shape.height) continue;
      const float* source = ring.row(input);
      const float* weight = task.weight + r * shape.kernel_width * padded + channels.begin;
      for (Index s = 0; s < width; ++s) {
        taps.source[taps.count] = source + s * shape.dilation_width * kLanes;
        taps.weight[taps.count++] = weight + s * padded;
      }
    }
  }

  template <class Epilogue>
  FASTCIFAR_INLINE void run(const Taps& used, Index count, const Epilogue& epilogue) const {
    if (direct) {
      find_convolve_row<Epilogue>(shape.kernel_width, shape.stride_width, 1)(used, count, epilogue);
    } else {
      gather_row(used, shape.stride_width, count, epilogue);
    }
  }

  // What to subtract: the mean of the images before or, for the first one, of its first row; next to nothing cancels.
  void choose_shift(Index n) {
    if (n > task.range.image_begin) {
      for (Index i = 0; i < channels.vectors * kLanes; ++i) {
        sums.shift[i] = float(task.mean[task.range.channel_begin + i]);
      }
    } else {
      run(taps, shape.out_width, Keep{row, shape.out_width * kLanes});
      for (int v = 0; v < channels.vectors; ++v) {
        Vec total = zero();
        for (Index o = 0; o < shape.out_width; ++o) total = total + load(row + (v * shape.out_width + o) * kLanes);
        store(sums.shift + v * kLanes, total * set(1.0f / float(shape.out_width)));
      }
    }
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
        run(taps, shape.out_width, Keep{row, shape.out_width * kLanes});
        activate_row(row, shape.out_width, *task.normaliser, channels, out_row, shape.channels);
        continue;
      }
      if (fresh) choose_shift(n);
      fresh = false;
      run(taps, shape.out_width, StoreAndSum<T>{{out_row, shape.channels, channels}, sums});
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
  double seen = 0.0, pending = 0.0;
  for (Index n = range.image_begin; n < range.image_end; ++n) {
    sweep.image(n);
    if (task.normaliser != nullptr) continue;
    pending += count;
    if (pending < double(kValuesPerFlush) && n + 1 < range.image_end) continue;
    merge_sums(sweep.sums, lanes, pending, seen, task.mean + range.channel_begin, task.m2 + range.channel_begin);
    seen += pending;
    pending = 0.0;
    sweep.fresh = true;
  }
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
