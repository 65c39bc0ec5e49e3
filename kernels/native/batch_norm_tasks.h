#pragma once

#include "batch_norm.h"

// What batch_norm.cpp, which divides the work, and the vector code (batch_norm_simd.cpp, one copy an instruction set)
// say to each other. Vectors [C] are padded to a multiple of kChannelAlign here.
namespace fastcifar::batch_norm {

constexpr std::int64_t kChannelAlign = 16;

struct Task {
  std::int64_t pixel_begin, pixel_end, channels;
  const void* x;
  const void* residual;
  const void* dz;
  void* out;           // z, dA or dx; null: none
  const float* mean;   // z = act(scale·(x − mean) + shift + residual); for the statistics a pivot
  const float* scale;
  const float* shift;
  const float* offset;  // dx = scale·dA − offset − slope·(x − mean)
  const float* slope;
  Activation activation;
  float negative_slope;
  double* sums;        // [2, padded C], added to
  float* scratch;      // [2, padded C]
};

struct Kernels {
  void (*statistics[kDtypes])(const Task&);  // sums of (x − mean) and of its square
  void (*normalise[kDtypes])(const Task&);
  void (*reduce[kDtypes])(const Task&);
  void (*gradient[kDtypes])(const Task&);
};

namespace baseline { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }

}  // namespace fastcifar::batch_norm
