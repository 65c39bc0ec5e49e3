#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

// Depthwise convolution + batch normalisation + activation on the CPU. Tensors are channels-last in memory:
// x [N, H, W, C], y, z and dz [N, Ho, Wo, C], of one dtype. Weights [C, KH, KW] and vectors [C] are float32, sums
// float64. Every result is the same for any number of threads.
namespace fastcifar::depthwise {

struct Shape {
  std::int64_t images, height, width, channels, out_height, out_width;
  std::int64_t kernel_height, kernel_width, stride_height, stride_width;
  std::int64_t padding_height, padding_width, dilation_height, dilation_width;

  FASTCIFAR_INLINE std::int64_t taps() const { return kernel_height * kernel_width; }
  FASTCIFAR_INLINE std::int64_t pixels() const { return images * out_height * out_width; }
};

// What turns y into z = act(scale·(y − mean) + shift).
struct Normaliser {
  const float* mean;
  const float* scale;
  const float* shift;
  Activation activation;
  float negative_slope;
};

// y = conv(x); mean [C] and m2 [C], the sum of squares about it, from the values before they are rounded to y's dtype.
void statistics(const Shape& shape, Dtype dtype, const void* x, const float* weight, void* y, double* mean, double* m2,
                int threads);

// z = act(scale·(conv(x) − mean) + shift).
void inference(const Shape& shape, Dtype dtype, const void* x, const float* weight, const Normaliser& normaliser,
               void* z, int threads);

// z from y, both [pixels, channels].
void normalise(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const Normaliser& normaliser,
               void* z, int threads);

// With dA = dz·act′: sums [2, C] = Σ dA and Σ dA·(y − mean).
void reduce(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const void* dz,
            const Normaliser& normaliser, double* sums, int threads);

// dy = scale·dA − offset − slope·(y − mean), its transposed convolution dx (x's dtype) and its correlation with x,
// dweight [C, KH, KW] float32. dx or dweight may be null; x may be null with dweight.
void gradients(const Shape& shape, Dtype dtype, const void* x, const float* weight, const void* y, const void* dz,
               const Normaliser& normaliser, const float* offset, const float* slope, void* dx, float* dweight,
               int threads);

}  // namespace fastcifar::depthwise
