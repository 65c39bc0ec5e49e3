#pragma once

#include <cstdint>

#include "storage.h"

// Augmented, normalised images on the CPU: crop, flip, colour jitter, normalisation, cutout, then mixup or cutmix.
// Every draw is a pure function of (seed, step, position in the batch), by Philox4x32-10, so that every result is the
// same for any number of threads and any division of the batch.
namespace fastcifar::augment {

enum class Mixing : int { none, mixup, cutmix };

constexpr int kMixings = 3;

struct Set {
  const std::uint8_t* images;  // [count, height, width, 3]
  std::int64_t count, height, width;
};

// The positions [first, first + made) of a batch of `size`.
struct Positions {
  const std::int64_t* indices;  // [size], in [0, count)
  const std::uint8_t* flips;    // [size], which images are mirrored; null: none are given
  std::int64_t size, first, made;
};

struct Options {
  std::uint64_t step, seed;
  std::int64_t crop_pad;
  bool reflect, random_flip;
  double color_jitter;  // 0: none
  std::int64_t cutout;
  Mixing mixing;
  const double* beta;  // [kBetaPoints], quantiles of the lower half of the partner's share; null without mixing
  float scale[3], shift[3];
};

constexpr std::int64_t kBetaPoints = 4097;

struct Results {
  Dtype dtype;
  void* images;            // [made, height, width, 3]
  std::int64_t* partners;  // [made]; the same and
  float* weights;          // [made] only with mixing
};

// Throws std::out_of_range where an index is not that of an image.
void augment(const Set& set, const Positions& positions, const Options& options, const Results& results, int threads);

}  // namespace fastcifar::augment
