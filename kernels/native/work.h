#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "norm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// How the CPU core divides its work. Cuts follow from the sizes alone and each part has its own sums, so that no result
// depends on the number of threads.
namespace fastcifar {

using Index = std::int64_t;

constexpr Index kTiles = 64;                 // enough for even work, few enough for cheap partial sums
constexpr Index kPixelsPerTile = 64;         // at least
constexpr Index kValuesPerThread = 1 << 14;  // below that a thread costs more than it brings

inline Index divide_up(Index a, Index b) { return (a + b - 1) / b; }
inline Index padded(Index channels) { return divide_up(channels, kChannelAlign) * kChannelAlign; }

inline int useful_threads(int threads, Index values) {
  return int(std::max<Index>(1, std::min<Index>(threads, values / kValuesPerThread)));
}

// f(task, thread) for every task.
template <class F>
void parallel(Index tasks, int threads, F&& f) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index task = 0; task < tasks; ++task) f(task, omp_get_thread_num());
    return;
  }
#endif
  for (Index task = 0; task < tasks; ++task) f(task, 0);
}

// Uninitialised memory, a part of it for each thread, aligned to cache lines.
class Scratch {
 public:
  Scratch(Index floats, int threads)
      : step_(divide_up(floats, 16) * 16),
        memory_(static_cast<float*>(::operator new(std::size_t(step_ * threads) * sizeof(float), kAlign))) {}
  float* of(int thread) const { return memory_.get() + thread * step_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  Index step_;
  std::unique_ptr<float, Free> memory_;
};

// Pixels in equal parts.
struct PixelTiles {
  Index pixels, count;
  explicit PixelTiles(Index all) : pixels(all), count(std::min(kTiles, divide_up(all, kPixelsPerTile))) {}
  Index begin(Index tile) const { return tile * pixels / count; }
};

// Vectors [C] of a batch norm as the vector code wants them, with zeros up to the padded size.
class NormVectors {
 public:
  // terms [2, C] of the gradient; null for zeros.
  NormVectors(const Norm& norm, Index channels, const double* terms = nullptr)
      : norm_(norm), channels_(channels), width_(padded(channels)), data_(5 * width_, 0.0f) {
    for (Index c = 0; c < channels; ++c) {
      const double scale = (norm.weight == nullptr ? 1.0 : double(norm.weight[c])) * rstd(c);
      data_[c] = float(norm.statistics[c]);
      data_[width_ + c] = float(scale);
      data_[2 * width_ + c] = norm.bias == nullptr ? 0.0f : norm.bias[c];
      if (terms == nullptr) continue;
      data_[3 * width_ + c] = float(-scale * terms[c]);
      data_[4 * width_ + c] = float(-scale * rstd(c) * terms[channels + c]);
    }
  }
  double rstd(Index c) const { return 1.0 / std::sqrt(norm_.statistics[channels_ + c] + norm_.eps); }
  Normaliser normaliser() const {
    return {row(0), row(1), row(2), row(3), row(4), norm_.activation, norm_.negative_slope};
  }

 private:
  const float* row(Index index) const { return data_.data() + index * width_; }
  const Norm& norm_;
  Index channels_, width_;
  std::vector<float> data_;
};

}  // namespace fastcifar
