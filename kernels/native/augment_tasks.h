#pragma once

#include "augment.h"

// What augment.cpp, which draws and gathers, and the vector code (augment_simd.cpp, one copy an instruction set) say to
// each other. A pixel is a word: red, green and blue in its lower bytes, flags in the highest.
namespace fastcifar::augment {

constexpr std::uint32_t kCut = 1u << 24, kPasted = 1u << 25;
constexpr std::int64_t kPixelAlign = 16;  // zeros follow the pixels up to a multiple of this

// Neighbouring columns of the image that stay neighbours, in this order or the reverse.
struct Run {
  std::int64_t from, to, length;  // the lowest column of the image, that of the output
  bool reversed;
};

struct Crop {
  const std::uint8_t* image;  // [height, width, 3]
  std::int64_t height, width;
  const std::int64_t* rows;  // [height], the row of the image that each one shows; −1: black
  const Run* runs;
  std::int64_t run_count;
  bool border;  // some columns are in no run: black
  std::uint32_t* pixels;
};

struct Picture {
  const std::uint32_t* pixels;
  float brightness, contrast, saturation;
};

struct Task {
  std::int64_t pixels;
  Picture own, partner;
  bool jitter, cutout;
  Mixing mixing;
  float share;  // the partner's, for mixup
  const float* scale;
  const float* shift;
  void* out;  // [pixels, 3]
};

struct Kernels {
  void (*pack)(const Crop&);
  void (*render[kDtypes])(const Task&);
};

namespace baseline { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }

}  // namespace fastcifar::augment
