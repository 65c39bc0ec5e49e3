#pragma once

#include <cstdint>

#include "storage.h"

// Batch normalisation, addition of a residual and activation on the CPU: z = act(weight·ŷ + bias + residual) with
// ŷ = (x − mean)/√(variance + eps). Tensors are [pixels, C] in memory (channels-last), of one dtype; vectors [C] are
// float32, statistics and sums float64. Every result is the same for any number of threads.
namespace fastcifar::batch_norm {

struct Norm {
  const double* statistics;  // [2, C]: mean and biased variance
  const float* weight;       // null for ones
  const float* bias;         // null for zeros
  double eps;
  Activation activation;
  float negative_slope;
};

struct Tensors {
  std::int64_t pixels, channels;
  Dtype dtype;
  const void* x;
  const void* residual;  // null: none
};

// statistics [2, C] of x.
void statistics(const Tensors& tensors, double* statistics, int threads);

void normalise(const Tensors& tensors, const Norm& norm, void* z, int threads);

// With dA = dz·act′: sums [2, C] = Σ dA and Σ dA·ŷ; dA itself, rounded to the dtype, where da is not null.
void reduce(const Tensors& tensors, const void* dz, const Norm& norm, void* da, double* sums, int threads);

// dx = weight/√(variance + eps)·(dA − terms[0] − ŷ·terms[1]) from dz; the residual is not looked at, so with one dz
// must be dA and the activation none. terms [2, C]; null for zeros.
void gradient(const Tensors& tensors, const void* dz, const Norm& norm, const double* terms, void* dx, int threads);

}  // namespace fastcifar::batch_norm
