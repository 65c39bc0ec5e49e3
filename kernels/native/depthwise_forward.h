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

FASTCIFAR_INLINE void add_row(const float* row, Index count, const ShiftedSums& sums, int v) {
  constexpr int N = 4;  // independent chains of additions
  const Vec shift = load(sums.shift + v * kLanes);
  Vec sum[N], square[N];
  repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE { sum[i.value] = square[i.value] = zero(); });
  Index o = 0;
  for (; o + N <= count; o += N) {
    repeat<0, N>([&](auto i) FASTCIFAR_LAMBDA_INLINE {
      const Vec d = load(row + (o + i.value) * kLanes) - shift;
      sum[i.value] = sum[i.value] + d;
      square[i.value] = fma(d, d, square[i.value]);
    });
  }
  for (; o < count; ++o) {
    const Vec d = load(row + o * kLanes) - shift;
    sum[0] = sum[0] + d;
    square[0] = fma(d, d, square[0]);
  }
  const Vec total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  const Vec total_square = (square[0] + square[1]) + (square[2] + square[3]);
  store(sums.sum + v * kLanes, load(sums.sum + v * kLanes) + total);
  store(sums.square + v * kLanes, load(sums.square + v * kLanes) + total_square);
}

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
FASTCIFAR_INLINE void store_row(const float* row, Index count, T* out, Index step, const Channels& channels, int v) {
  if (v + 1 < channels.vectors || channels.whole()) {
    for (Index o = 0; o < count; ++o) store(out + o * step + v * kLanes, load(row + o * kLanes));
  } else {
    for (Index o = 0; o < count; ++o) store_first(out + o * step + v * kLanes, load(row + o * kLanes), channels.last);
  }
}

FASTCIFAR_INLINE void activate_row(float* row, Index count, const Normaliser& n, Index channel) {
  const Vec mean = load(n.mean + channel), scale = load(n.scale + channel), shift = load(n.shift + channel);
  const Vec slope = set(n.negative_slope);
  with_activation(n.activation, [&](auto tag) FASTCIFAR_LAMBDA_INLINE {
    for (Index o = 0; o < count; ++o) {
      const Vec value = fma(load(row + o * kLanes) - mean, scale, shift);
      store(row + o * kLanes, activate<decltype(tag)::value>(value, slope));
    }
  });
}

struct ForwardRow {
  const ForwardTask& task;
  const Shape& shape;
  RowFunctions functions;
  const float** source;  // [KH·KW]
  const float** weight;  // [KH·KW]
  Index padded;

  FASTCIFAR_INLINE explicit ForwardRow(const ForwardTask& t, float* pointers)
      : task(t),
        shape(t.shape),
        functions(row_functions(shape.kernel_width, shape.stride_width, shape.dilation_width)),
        source(reinterpret_cast<const float**>(pointers)),
        weight(source + shape.taps()),
        padded((shape.channels + kChannelAlign - 1) / kChannelAlign * kChannelAlign) {}

  // Output row `o` of vector `v`, float32.
  FASTCIFAR_INLINE void run(Index o, const Ring& ring, const Channels& channels, int v, float* out) const {
    const Index first = o * shape.stride_height - shape.padding_height;
    const KernelSpan span(first, shape.dilation_height, shape.kernel_height, shape.height);
    const float* weights = task.weight + channels.begin + v * kLanes;
    Index count = 0;
    for (Index r = span.begin; r < span.end; ++r) {
      const float* row = ring.row(first + r * shape.dilation_height) + v * ring.vector_step();
      if (functions.convolve != nullptr) {
        source[count] = row;
        weight[count++] = weights + r * shape.kernel_width * padded;
        continue;
      }
      for (Index s = 0; s < shape.kernel_width; ++s) {
        source[count] = row + s * shape.dilation_width * kLanes;
        weight[count++] = weights + (r * shape.kernel_width + s) * padded;
      }
    }
    if (functions.convolve != nullptr) {
      functions.convolve({int(count), source, weight, padded}, shape.out_width, out);
    } else {
      gather_row({count, source, weight}, shape.stride_width, shape.out_width, out, 1);
    }
  }
};

template <class T>
void forward(const ForwardTask& task) {
  const Shape& shape = task.shape;
  const Range& range = task.range;
  const Channels channels(range.channel_begin, range.channel_end);
  float* scratch = task.scratch;
  const ForwardRow conv(task, scratch);
  scratch += pointer_scratch(shape);
  const Index lanes = channels.vectors * kLanes;
  const ShiftedSums sums{scratch, scratch + lanes, scratch + 2 * lanes};
  scratch += 4 * lanes;
  float* row = scratch;
  scratch += shape.out_width * kLanes;
  Ring ring(scratch, task.rings.x_left, task.rings.x_columns, task.rings.x_rows, channels.vectors);

  double seen = 0.0;
  const double count = double((range.row_end - range.row_begin) * shape.out_width);
  if (task.normaliser == nullptr) {
    for (Index i = 0; i < lanes; ++i) task.mean[channels.begin + i] = task.m2[channels.begin + i] = 0.0;
  }
  for (Index n = range.image_begin; n < range.image_end; ++n) {
    const T* image = static_cast<const T*>(task.x) + n * shape.height * shape.width * shape.channels;
    T* out = static_cast<T*>(task.out) + n * shape.out_height * shape.out_width * shape.channels + channels.begin;
    ring.next = 0;
    for (Index i = 0; i < 2 * lanes; ++i) sums.sum[i] = 0.0f;
    for (Index o = range.row_begin; o < range.row_end; ++o) {
      const Index first = o * shape.stride_height - shape.padding_height;
      const Index last = first + (shape.kernel_height - 1) * shape.dilation_height;
      fill(ring, image, shape.width, shape.channels, channels, first, last < shape.height ? last : shape.height - 1);
      for (int v = 0; v < channels.vectors; ++v) {
        conv.run(o, ring, channels, v, row);
        if (task.normaliser != nullptr) {
          activate_row(row, shape.out_width, *task.normaliser, channels.begin + v * kLanes);
        } else {
          if (o == range.row_begin) store(sums.shift + v * kLanes, load(row + shape.out_width / 2 * kLanes));
          add_row(row, shape.out_width, sums, v);
        }
        store_row(row, shape.out_width, out + o * shape.out_width * shape.channels, shape.channels, channels, v);
      }
    }
    if (task.normaliser == nullptr) {
      merge_image(sums, int(lanes), count, seen, task.mean + channels.begin, task.m2 + channels.begin);
      seen += count;
    }
  }
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
