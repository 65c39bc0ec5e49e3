#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_norm_tasks.h"
#include "isa.h"

namespace fastcifar::batch_norm {
namespace {

using Index = std::int64_t;

constexpr Index kTiles = 64;                 // enough for even work, few enough for cheap partial sums
constexpr Index kPixelsPerTile = 64;         // at least
constexpr Index kValuesPerThread = 1 << 14;  // below that a thread costs more than it brings

const Kernels& kernels() {
  switch (isa()) {
#if FASTCIFAR_X86
    case Isa::avx2: return avx2::kernels();
    case Isa::avx512: return avx512::kernels();
    case Isa::avx512_bf16: return avx512_bf16::kernels();
#endif
    default: return baseline::kernels();
  }
}

Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

float widen(Dtype dtype, const void* values, Index index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(values)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(values)[index];
  if (dtype == Dtype::bfloat16) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(float(fraction), -24)
                                        : std::ldexp(float(fraction + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The passes of one call: pixels in equal parts that follow from the shape alone, each with its own sums.
class Passes {
 public:
  Passes(const Tensors& tensors, int threads)
      : tensors_(tensors),
        width_(divide_up(tensors.channels, kChannelAlign) * kChannelAlign),
        tiles_(std::min<Index>(kTiles, divide_up(tensors.pixels, kPixelsPerTile))),
        threads_(int(std::max<Index>(
            1, std::min<Index>(threads, tensors.pixels * tensors.channels / kValuesPerThread)))),
        vectors_(5 * width_, 0.0f) {}

  float* vector(int index) { return vectors_.data() + index * width_; }
  Index width() const { return width_; }
  Index tiles() const { return tiles_; }
  Index begin(Index tile) const { return tile * tensors_.pixels / tiles_; }

  void set_norm(const Norm& norm) {
    for (Index c = 0; c < tensors_.channels; ++c) {
      vector(0)[c] = float(norm.statistics[c]);
      vector(1)[c] = float(factor(norm, c));
      vector(2)[c] = norm.bias == nullptr ? 0.0f : norm.bias[c];
    }
  }

  void set_terms(const Norm& norm, const double* terms) {
    for (Index c = 0; c < tensors_.channels && terms != nullptr; ++c) {
      vector(3)[c] = float(factor(norm, c) * terms[c]);
      vector(4)[c] = float(factor(norm, c) * rstd(norm, c) * terms[tensors_.channels + c]);
    }
  }

  double rstd(const Norm& norm, Index c) const {
    return 1.0 / std::sqrt(norm.statistics[tensors_.channels + c] + norm.eps);
  }

  // sums, where wanted, holds [tiles, 2, width].
  void run(void (*const kernel[kDtypes])(const Task&), Activation activation, float negative_slope, const void* dz,
           void* out, std::vector<double>* sums) {
    std::vector<float> scratch(sums == nullptr ? 0 : tiles_ * 2 * width_);
    if (sums != nullptr) sums->assign(tiles_ * 2 * width_, 0.0);
    const auto work = kernel[int(tensors_.dtype)];
    const auto one = [&](Index tile) {
      const Index place = tile * 2 * width_;
      work({begin(tile), begin(tile + 1), tensors_.channels, tensors_.x, tensors_.residual, dz, out, vector(0),
            vector(1), vector(2), vector(3), vector(4), activation, negative_slope,
            sums == nullptr ? nullptr : sums->data() + place, scratch.empty() ? nullptr : scratch.data() + place});
    };
#ifdef _OPENMP
    if (threads_ > 1 && tiles_ > 1) {
#pragma omp parallel for num_threads(threads_) schedule(static)
      for (Index tile = 0; tile < tiles_; ++tile) one(tile);
      return;
    }
#endif
    for (Index tile = 0; tile < tiles_; ++tile) one(tile);
  }

 private:
  double factor(const Norm& norm, Index c) const {
    return (norm.weight == nullptr ? 1.0 : double(norm.weight[c])) * rstd(norm, c);
  }

  const Tensors& tensors_;
  Index width_, tiles_;
  int threads_;
  std::vector<float> vectors_;
};

}  // namespace

void statistics(const Tensors& tensors, double* statistics, int threads) {
  Passes passes(tensors, threads);
  const Index channels = tensors.channels;
  std::fill_n(statistics, 2 * channels, 0.0);
  if (tensors.pixels == 0) return;
  // Sums about the first pixel's values, which lie within the spread of the others: nothing large cancels.
  for (Index c = 0; c < channels; ++c) passes.vector(0)[c] = widen(tensors.dtype, tensors.x, c);
  std::vector<double> sums;
  passes.run(kernels().statistics, Activation::none, 0.0f, nullptr, nullptr, &sums);
  const double count = double(tensors.pixels);
  for (Index c = 0; c < channels; ++c) {
    double first = 0.0, second = 0.0;
    for (Index tile = 0; tile < passes.tiles(); ++tile) {
      first += sums[tile * 2 * passes.width() + c];
      second += sums[(tile * 2 + 1) * passes.width() + c];
    }
    const double shift = first / count;
    statistics[c] = double(passes.vector(0)[c]) + shift;
    statistics[channels + c] = std::max(0.0, second / count - shift * shift);
  }
}

void normalise(const Tensors& tensors, const Norm& norm, void* z, int threads) {
  Passes passes(tensors, threads);
  passes.set_norm(norm);
  passes.run(kernels().normalise, norm.activation, norm.negative_slope, nullptr, z, nullptr);
}

void reduce(const Tensors& tensors, const void* dz, const Norm& norm, void* da, double* sums, int threads) {
  Passes passes(tensors, threads);
  passes.set_norm(norm);
  std::vector<double> partials;
  passes.run(kernels().reduce, norm.activation, norm.negative_slope, dz, da, &partials);
  for (Index c = 0; c < tensors.channels; ++c) {
    double first = 0.0, second = 0.0;
    for (Index tile = 0; tile < passes.tiles(); ++tile) {
      first += partials[tile * 2 * passes.width() + c];
      second += partials[(tile * 2 + 1) * passes.width() + c];
    }
    sums[c] = first;
    sums[tensors.channels + c] = second * passes.rstd(norm, c);
  }
}

void gradient(const Tensors& tensors, const void* dz, const Norm& norm, const double* terms, void* dx, int threads) {
  Passes passes(tensors, threads);
  passes.set_norm(norm);
  passes.set_terms(norm, terms);
  passes.run(kernels().gradient, norm.activation, norm.negative_slope, dz, dx, nullptr);
}

}  // namespace fastcifar::batch_norm
