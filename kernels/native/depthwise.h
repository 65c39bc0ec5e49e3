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

// Batch normalisation and activation: z = act(weight·ŷ + bias), ŷ = (y − mean)/√(variance + eps).
struct Norm {
  const double* statistics;  // [2, C]: mean and biased variance
  const float* weight;       // null for ones
  const float* bias;         // null for zeros
  double eps;
  Activation activation;
  float negative_slope;
};

// y = conv(x); statistics [2, C], mean and biased variance of the values before they are rounded to y's dtype.
void statistics(const Shape& shape, Dtype dtype, const void* x, const float* weight, void* y, double* statistics,
                int threads);

// z from x in one pass.
void inference(const Shape& shape, Dtype dtype, const void* x, const float* weight, const Norm& norm, void* z,
               int threads);

// z from y, both [pixels, channels].
void normalise(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const Norm& norm, void* z,
               int threads);

// With dA = dz·act′: sums [2, C] = Σ dA and Σ dA·ŷ.
void reduce(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const void* dz, const Norm& norm,
            double* sums, int threads);

// dy = weight/√(variance + eps)·(dA − terms[0] − ŷ·terms[1]), its transposed convolution dx (x's dtype) and its
// correlation with x, dweight [C, KH, KW] float32. terms [2, C]; null for zeros. dx or dweight may be null.
void gradients(const Shape& shape, Dtype dtype, const void* x, const float* weight, const void* y, const void* dz,
               const Norm& norm, const double* terms, void* dx, float* dweight, int threads);

}  // namespace fastcifar::depthwise
