#pragma once

// The adaptive-weighted hinge loss of a discriminator: what the CPU and the CUDA code share.
// Zadorozhnyy, Cheng, Ye, "Adaptive Weighted Discriminator for Training GANs", CVPR 2021, in the form of its code.

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTCIFAR_HD __host__ __device__
#else
#define FASTCIFAR_HD
#endif

namespace fastcifar::aw_hinge {

enum class Scalar : std::uint8_t { float32, float64, bfloat16, float16 };

// One partial sum each; it fixes the order of the additions, hence the bits of the result.
constexpr std::int64_t kChunk = 4096;
constexpr double kSquaredNormFloor = 1e-4;

// d_real and d_fake take scale · ∂L/∂logit. counts: the global [n_real, n_fake], or null for the local ones.
// device_scale: one float32, or null; it multiplies scale. terms: L_real, L_fake, s_real, s_fake.
struct Logits {
  const void* real;
  const void* fake;
  void* d_real;
  void* d_fake;
  std::int64_t n_real;
  std::int64_t n_fake;
  Scalar scalar;
  const double* counts;
  const float* device_scale;
  double scale;
  double* terms;
};

struct Options {
  double alpha1;
  double alpha2;
  double delta;
  double epsilon;
  bool normalized;
};

// One parameter: its two gradients (null where there is none, never both) and its .grad, all of one memory layout.
struct Gradient {
  const void* real;
  const void* fake;
  void* target;
  std::int64_t size;
  Scalar source_scalar;
  Scalar target_scalar;
  bool accumulate;
};

// weights: w_real, w_fake, |r|, |f|, cosine. finite: whether every term and every gradient is.
// workspace: three sums for each chunk of each gradient.
struct Decision {
  const double* terms;
  const float* device_scale;
  double scale;
  Options options;
  double* workspace;
  double* weights;
  bool* finite;
};

inline std::int64_t chunks_of(std::int64_t size) { return (size + kChunk - 1) / kChunk; }

// sums: ⟨r,r⟩, ⟨f,f⟩, ⟨r,f⟩ of the scaled gradients.
FASTCIFAR_HD inline void decide(const Decision& decision, const double (&sums)[3]) {
  const double scale = decision.scale * (decision.device_scale ? double(*decision.device_scale) : 1.0);
  const double* terms = decision.terms;
  const Options& options = decision.options;
  const double rr = sums[0] / (scale * scale) + kSquaredNormFloor;
  const double ff = sums[1] / (scale * scale) + kSquaredNormFloor;
  const double rf = sums[2] / (scale * scale);
  const double norm_real = std::sqrt(rr);
  const double norm_fake = std::sqrt(ff);
  const double unit_real = options.normalized ? 1.0 / norm_real : 1.0;
  const double unit_fake = options.normalized ? 1.0 / norm_fake : 1.0;
  const double score_real = terms[2];
  const double score_fake = terms[3];

  double weight_real = unit_real;
  double weight_fake = unit_fake;
  if (score_real < options.alpha1 || score_real < score_fake - options.delta) {
    weight_fake = rf <= 0.0 ? -rf / ff * unit_real : 0.0;
  } else if (score_real > options.alpha2 && score_real > score_fake - options.delta) {
    weight_real = rf <= 0.0 ? -rf / rr * unit_fake : 0.0;
  }
  const bool finite = std::isfinite(rr) && std::isfinite(ff) && std::isfinite(rf) && std::isfinite(terms[0]) &&
                      std::isfinite(terms[1]) && std::isfinite(score_real) && std::isfinite(score_fake);
  decision.weights[0] = finite ? weight_real + options.epsilon : NAN;
  decision.weights[1] = finite ? weight_fake + options.epsilon : NAN;
  decision.weights[2] = norm_real;
  decision.weights[3] = norm_fake;
  decision.weights[4] = rf / (norm_real * norm_fake);
  *decision.finite = finite;
}

void hinge_terms_cpu(const Logits& logits);
void gradient_weights_cpu(const Gradient* gradients, std::int64_t count, const Decision& decision, int threads);
void combine_cpu(const Gradient* gradients, std::int64_t count, const double* weights, int threads);

#if FASTCIFAR_CUDA
// Null, or why the CUDA runtime in this module finds no device (a driver that is missing or too old, say).
const char* cuda_obstacle();
// Asynchronous on the stream; they throw std::runtime_error when a launch is refused.
void hinge_terms_cuda(const Logits& logits, int device, void* stream);
void gradient_weights_cuda(const Gradient* gradients, std::int64_t count, const Decision& decision, int device,
                           void* stream);
void combine_cuda(const Gradient* gradients, std::int64_t count, const double* weights, int device, void* stream);
#endif

}  // namespace fastcifar::aw_hinge
