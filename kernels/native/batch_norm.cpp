#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_norm_tasks.h"
#include "isa.h"
#include "work.h"

namespace fastcifar::batch_norm {
namespace {

constexpr Index kPivotPixels = 32;

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

// One pass over the pixels.
void run(void (*const kernel[kDtypes])(const Task&), const Tensors& tensors, const Normaliser& normaliser,
         const void* dz, void* out, int threads) {
  const PixelTiles tiles(tensors.pixels);
  parallel(tiles.count, useful_threads(threads, tensors.pixels * tensors.channels), [&](Index tile, int) {
    kernel[int(tensors.dtype)]({tiles.begin(tile), tiles.begin(tile + 1), tensors.channels, tensors.x,
                                tensors.residual, dz, out, normaliser, nullptr, nullptr});
  });
}

// The same with two sums a channel: [2, C].
void run_with_sums(void (*const kernel[kDtypes])(const Task&), const Tensors& tensors, const Normaliser& normaliser,
                   const void* dz, void* out, double* sums, int threads) {
  const PixelTiles tiles(tensors.pixels);
  const Index width = padded(tensors.channels);
  threads = useful_threads(threads, tensors.pixels * tensors.channels);
  const Scratch scratch(2 * width, threads);
  std::vector<double> partials(tiles.count * 2 * width, 0.0);
  parallel(tiles.count, threads, [&](Index tile, int thread) {
    kernel[int(tensors.dtype)]({tiles.begin(tile), tiles.begin(tile + 1), tensors.channels, tensors.x,
                                tensors.residual, dz, out, normaliser, partials.data() + tile * 2 * width,
                                scratch.of(thread)});
  });
  std::fill_n(sums, 2 * tensors.channels, 0.0);
  for (Index row = 0; row < 2 * tiles.count; ++row) {
    const double* part = partials.data() + row * width;
    double* sum = sums + row % 2 * tensors.channels;
    for (Index c = 0; c < tensors.channels; ++c) sum[c] += part[c];
  }
}

}  // namespace

void statistics(const Tensors& tensors, double* statistics, int threads) {
  const Index channels = tensors.channels;
  std::fill_n(statistics, 2 * channels, 0.0);
  if (tensors.pixels == 0) return;
  // Sums about the mean of a few pixels, far nearer to the mean of all than their spread: next to nothing cancels.
  std::vector<float> pivot(padded(channels), 0.0f);
  const Index pivots = std::min(kPivotPixels, tensors.pixels);
  for (Index c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (Index i = 0; i < pivots; ++i) {
      sum += widen(tensors.dtype, tensors.x, i * tensors.pixels / pivots * channels + c);
    }
    pivot[c] = float(sum / double(pivots));
  }
  Normaliser normaliser{};
  normaliser.mean = pivot.data();
  run_with_sums(kernels().statistics, tensors, normaliser, nullptr, nullptr, statistics, threads);
  const double count = double(tensors.pixels);
  for (Index c = 0; c < channels; ++c) {
    const double shift = statistics[c] / count;
    statistics[c] = double(pivot[c]) + shift;
    const double variance = statistics[channels + c] / count - shift * shift;
    statistics[channels + c] = variance < 0.0 ? 0.0 : variance;  // NaN stays
  }
}

void normalise(const Tensors& tensors, const Norm& norm, void* z, int threads) {
  const NormVectors vectors(norm, tensors.channels);
  run(kernels().normalise, tensors, vectors.normaliser(), nullptr, z, threads);
}

void reduce(const Tensors& tensors, const void* dz, const Norm& norm, void* da, double* sums, int threads) {
  const NormVectors vectors(norm, tensors.channels);
  run_with_sums(kernels().reduce, tensors, vectors.normaliser(), dz, da, sums, threads);
  for (Index c = 0; c < tensors.channels; ++c) sums[tensors.channels + c] *= vectors.rstd(c);
}

void gradient(const Tensors& tensors, const void* dz, const Norm& norm, const double* terms, void* dx, int threads) {
  const NormVectors vectors(norm, tensors.channels, terms);
  run(kernels().gradient, tensors, vectors.normaliser(), dz, dx, threads);
}

}  // namespace fastcifar::batch_norm
