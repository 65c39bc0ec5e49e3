#pragma once

// The last rows of an image as float32, in the L1 cache, with columns of zeros beside them.

#include "depthwise_rows.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {
namespace {

// The channels of a task as vectors; only the last may hold fewer than kLanes channels.
struct Channels {
  Index begin;
  int vectors;
  int last;

  FASTCIFAR_INLINE Channels(Index first, Index end)
      : begin(first), vectors(int((end - first + kLanes - 1) / kLanes)), last(int(end - first - (vectors - 1) * kLanes)) {}
  FASTCIFAR_INLINE bool full(int v) const { return v + 1 < vectors || last == kLanes; }
};

template <class T>
FASTCIFAR_INLINE Vec load_channels(const T* p, const Channels& channels, int v) {
  return channels.full(v) ? load(p + v * kLanes) : load_first(p + v * kLanes, channels.last);
}

template <class T>
FASTCIFAR_INLINE void store_channels(T* p, const Channels& channels, int v, Vec value) {
  if (channels.full(v)) {
    store(p + v * kLanes, value);
  } else {
    store_first(p + v * kLanes, value, channels.last);
  }
}

// Rows are read, then computed on: without these the memory would idle meanwhile. Reading past the end is harmless.
constexpr Index kRowsAhead = 2;

template <class T>
FASTCIFAR_INLINE void prefetch_pixel(const T* p, int vectors) {
  for (int v = 0; v < vectors; v += 64 / (kLanes * int(sizeof(T))) > 0 ? 64 / (kLanes * int(sizeof(T))) : 1) {
    __builtin_prefetch(p + v * kLanes);
  }
}

struct Ring {
  float* data;  // [row mod rows][vector][column][lane]
  Index left, columns, rows;
  int vectors;
  Index next = 0;  // the first row that is not yet there

  FASTCIFAR_INLINE Ring(float* memory, Index left_columns, Index all_columns, Index all_rows, int all_vectors)
      : data(memory), left(left_columns), columns(all_columns), rows(all_rows), vectors(all_vectors) {
    const Index size = rows * vectors * columns * kLanes;
    for (Index i = 0; i < size; i += kLanes) store(data + i, zero());
  }
  FASTCIFAR_INLINE Index size() const { return rows * vectors * columns * kLanes; }
  FASTCIFAR_INLINE Index vector_step() const { return columns * kLanes; }
  // Column −left of the row, first vector.
  FASTCIFAR_INLINE float* row(Index index) const {
    return data + Index(std::uint32_t(index) % std::uint32_t(rows)) * vectors * columns * kLanes;
  }
};

// Widens rows up to and including `last` of an image [height][width][channels] into the ring, from `first` on.
template <class T>
void fill(Ring& ring, const T* image, Index width, Index channel_count, const Channels& channels, Index first,
          Index last) {
  if (ring.next < first) ring.next = first;
  for (; ring.next <= last; ++ring.next) {
    const T* source = image + ring.next * width * channel_count + channels.begin;
    float* target = ring.row(ring.next) + ring.left * kLanes;
    for (Index column = 0; column < width; ++column) {
      prefetch_pixel(source + (kRowsAhead * width + column) * channel_count, channels.vectors);
    }
    for (int v = 0; v < channels.vectors; ++v, target += ring.vector_step()) {
      if (channels.full(v)) {
        for (Index column = 0; column < width; ++column) {
          store(target + column * kLanes, load(source + column * channel_count + v * kLanes));
        }
      } else {
        for (Index column = 0; column < width; ++column) {
          store(target + column * kLanes, load_first(source + column * channel_count + v * kLanes, channels.last));
        }
      }
    }
  }
}

// Kernel rows r whose input row first + r·dilation lies in [0, height): [begin, end).
struct KernelSpan {
  Index begin, end;

  FASTCIFAR_INLINE KernelSpan(Index first, Index dilation, Index kernel, Index height)
      : begin(first < 0 ? (-first + dilation - 1) / dilation : 0),
        end(first >= height ? 0 : (height - 1 - first) / dilation + 1) {
    if (end > kernel) end = kernel;
    if (begin > end) begin = end;
  }
};

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
