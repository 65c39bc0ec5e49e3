#pragma once

#include <cstdint>

#include "storage.h"

namespace fastcifar {

// Batch normalisation and activation: z = act(weight·ŷ + bias), ŷ = (y − mean)/√(variance + eps).
struct Norm {
  const double* statistics;  // [2, C]: mean and biased variance
  const float* weight;       // null for ones
  const float* bias;         // null for zeros
  double eps;
  Activation activation;
  float negative_slope;
};

// Vectors [C] that the vector code reads are padded to a multiple of this.
constexpr std::int64_t kChannelAlign = 16;

// The same for the vector code: z = act(scale·(y − mean) + shift), dy = scale·dA + offset + slope·(y − mean).
struct Normaliser {
  const float* mean;
  const float* scale;
  const float* shift;
  const float* offset;
  const float* slope;
  Activation activation;
  float negative_slope;
};

}  // namespace fastcifar
