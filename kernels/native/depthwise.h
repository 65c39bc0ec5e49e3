#pragma once

#include <cstdint>

#include "norm.h"

// Depthwise convolution + batch normalisation + activation on the CPU. Tensors are channels-last in memory:
// x [N, H, W, C], y, z and dz [N, Ho, Wo, C], of one dtype. Weights [C, KH, KW] and vectors [C] are float32, sums
// float64. The passes without a convolution are batch_norm.h's. Every result is the same for any number of threads.
namespace fastcifar::depthwise {

struct Shape {
  std::int64_t images, height, width, channels, out_height, out_width;
  std::int64_t kernel_height, kernel_width, stride_height, stride_width;
  std::int64_t padding_height, padding_width, dilation_height, dilation_width;

  FASTCIFAR_INLINE std::int64_t taps() const { return kernel_height * kernel_width; }
  FASTCIFAR_INLINE std::int64_t pixels() const { return images * out_height * out_width; }
};

// y = conv(x); statistics [2, C], mean and biased variance of the values before they are rounded to y's dtype.
void statistics(const Shape& shape, Dtype dtype, const void* x, const float* weight, void* y, double* statistics,
                int threads);

// z from x in one pass.
void inference(const Shape& shape, Dtype dtype, const void* x, const float* weight, const Norm& norm, void* z,
               int threads);

// dy = weight/√(variance + eps)·(dA − terms[0] − ŷ·terms[1]), its transposed convolution dx (x's dtype) and its
// correlation with x, dweight [C, KH, KW] float32. terms [2, C]; null for zeros. dx or dweight may be null.
void gradients(const Shape& shape, Dtype dtype, const void* x, const float* weight, const void* y, const void* dz,
               const Norm& norm, const double* terms, void* dx, float* dweight, int threads);

}  // namespace fastcifar::depthwise
