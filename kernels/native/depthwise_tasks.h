#pragma once

#include "depthwise.h"

// What depthwise.cpp, which divides the work, and the vector code (depthwise_simd.cpp, one copy an instruction set)
// say to each other. Vectors [C] are padded to a multiple of kChannelAlign here.
namespace fastcifar::depthwise {

constexpr std::int64_t kChannelAlign = 16;

// What turns y into z = act(scale·(y − mean) + shift).
struct Normaliser {
  const float* mean;
  const float* scale;
  const float* shift;
  Activation activation;
  float negative_slope;
};

// A range of images or of one image's rows, and a range of channels starting at a multiple of kChannelAlign.
struct Range {
  std::int64_t image_begin, image_end;
  std::int64_t row_begin, row_end;          // of y
  std::int64_t dx_row_begin, dx_row_end;    // of dx, backward only
  std::int64_t channel_begin, channel_end;
};

// Columns of zeros that the rings hold beside a row, and the rows they hold.
struct Rings {
  std::int64_t x_left, x_columns, x_rows;
  std::int64_t dy_left, dy_columns, dy_rows;
};

struct ForwardTask {
  Shape shape;
  Rings rings;
  Range range;
  const void* x;
  const float* weight;             // [KH·KW, padded C]
  void* out;                       // y, or z with a normaliser
  const Normaliser* normaliser;    // null: take statistics
  double* mean;                    // [padded C], written in the channel range
  double* m2;
  float* scratch;
};

struct ElementTask {
  std::int64_t pixel_begin, pixel_end, channels;
  const void* y;
  const void* dz;       // reduce only
  Normaliser normaliser;
  void* z;              // normalise only
  double* sums;         // [2, padded C], added to
  float* scratch;       // [2, padded C]
};

struct GradientTask {
  Shape shape;
  Rings rings;
  Range range;
  const void* x;
  const float* weight;
  const void* y;
  const void* dz;
  Normaliser normaliser;
  const float* offset;  // dy = scale·dA − offset − slope·(y − mean)
  const float* slope;
  void* dx;             // null: not wanted
  double* dweight;      // [KH·KW, padded C], added to; null: not wanted
  float* scratch;
};

struct Kernels {
  int lanes;
  void (*forward[kDtypes])(const ForwardTask&);
  void (*normalise[kDtypes])(const ElementTask&);
  void (*reduce[kDtypes])(const ElementTask&);
  void (*gradients[kDtypes])(const GradientTask&);
};

// Floats that two pointers a tap take, so that what follows stays aligned to cache lines.
FASTCIFAR_INLINE std::int64_t pointer_scratch(const Shape& shape) { return (4 * shape.taps() + 15) / 16 * 16; }

// Floats of scratch memory, 64-byte aligned, for a task on a block of so many channels.
FASTCIFAR_INLINE std::int64_t forward_scratch(const Shape& shape, const Rings& rings, std::int64_t block) {
  return block * (rings.x_rows * rings.x_columns + shape.out_width + 4) + pointer_scratch(shape);
}

FASTCIFAR_INLINE std::int64_t gradient_scratch(const Shape& shape, const Rings& rings, std::int64_t block) {
  return block * (rings.x_rows * rings.x_columns + rings.dy_rows * rings.dy_columns + shape.taps()) +
         pointer_scratch(shape);
}

namespace baseline { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }

}  // namespace fastcifar::depthwise
