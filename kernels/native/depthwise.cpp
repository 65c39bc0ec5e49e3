#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "depthwise_tasks.h"
#include "isa.h"
#include "work.h"

namespace fastcifar::depthwise {
namespace {

constexpr Index kRowsPerTile = 8;         // at least, as each tile reads the rows beside it again
constexpr Index kRingBytes = 32 * 1024;   // what a task keeps in the L1 cache
constexpr Index kLineBytes = 64;

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

Index floor_divide(Index a, Index b) { return a >= 0 ? a / b : -divide_up(-a, b); }
Index bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// [C, taps] → [taps, padded C].
std::vector<float> pack_weight(const Shape& shape, const float* weight) {
  const Index taps = shape.taps(), width = padded(shape.channels);
  std::vector<float> packed(taps * width, 0.0f);
  for (Index c = 0; c < shape.channels; ++c) {
    for (Index t = 0; t < taps; ++t) packed[t * width + c] = weight[c * taps + t];
  }
  return packed;
}

Rings forward_rings(const Shape& s) {
  const Index used = (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1;
  const Index rows = std::min(s.height, (s.kernel_height - 1) * s.dilation_height + 1);
  return {s.padding_width, std::max(s.padding_width + s.width, used), rows, 0, 0, 0};
}

// Column j of dx takes column (j + padding − s·dilation) / stride of dy for each tap s that divides.
Rings gradient_rings(const Shape& s) {
  Rings rings = forward_rings(s);
  const Index lowest = floor_divide(s.padding_width - (s.kernel_width - 1) * s.dilation_width, s.stride_width);
  const Index highest = (s.width - 1 + s.padding_width) / s.stride_width;
  rings.dy_left = std::max<Index>(0, -lowest);
  rings.dy_columns = rings.dy_left + std::max(s.out_width, highest + 1);
  rings.dy_rows = std::min(s.out_height, (s.kernel_height - 1) * s.dilation_height / s.stride_height + 1);
  return rings;
}

// How a convolution is cut: groups of images, rows of an image where there are few images, blocks of channels. The
// cuts follow from the shape alone, so that partial sums do not depend on the number of threads.
class Division {
 public:
  Division(const Shape& shape, Dtype dtype, Index floats_per_channel) : shape_(shape) {
    const Index line = std::max(kChannelAlign, kLineBytes / bytes_of(dtype));
    const Index fitting = kRingBytes / Index(sizeof(float)) / floats_per_channel / line * line;
    const Index wanted = std::max<Index>(1, divide_up(shape.channels, std::max(line, fitting)));
    block_ = std::max<Index>(1, divide_up(divide_up(shape.channels, wanted), line)) * line;
    blocks_ = divide_up(shape.channels, block_);
    images_ = std::max<Index>(1, divide_up(shape.images, kTiles));
    groups_ = divide_up(shape.images, images_);
    const Index few = divide_up(kTiles, std::max<Index>(1, groups_ * blocks_));
    splits_ = std::max<Index>(1, std::min(few, shape.out_height / kRowsPerTile));
  }

  Index tiles() const { return groups_ * splits_; }
  Index tasks() const { return tiles() * blocks_; }
  Index tile(Index task) const { return task / blocks_; }
  Index block() const { return std::min(block_, padded(shape_.channels)); }

  Range range(Index task) const {
    const Index block = task % blocks_, split = task / blocks_ % splits_, group = task / blocks_ / splits_;
    Range range{};
    range.image_begin = group * images_;
    range.image_end = std::min(shape_.images, range.image_begin + images_);
    range.row_begin = split * shape_.out_height / splits_;
    range.row_end = (split + 1) * shape_.out_height / splits_;
    range.dx_row_begin = split * shape_.height / splits_;
    range.dx_row_end = (split + 1) * shape_.height / splits_;
    range.channel_begin = block * block_;
    range.channel_end = std::min(shape_.channels, range.channel_begin + block_);
    return range;
  }

  // Values of y a channel in a tile.
  Index values(Index tile) const {
    const Range r = range(tile * blocks_);
    return (r.image_end - r.image_begin) * (r.row_end - r.row_begin) * shape_.out_width;
  }

 private:
  const Shape& shape_;
  Index block_, blocks_, images_, groups_, splits_;
};

// The rings and rows of a forward pass, in floats a channel.
Index forward_footprint(const Shape& shape, const Rings& rings) {
  return rings.x_rows * rings.x_columns + shape.out_width;
}

void convolve(const Shape& shape, Dtype dtype, const void* x, const float* weight, void* out,
              const Normaliser* normaliser, const Division& division, const Rings& rings, double* partials,
              int threads) {
  const Kernels& table = kernels();
  const std::vector<float> packed = pack_weight(shape, weight);
  const Index width = padded(shape.channels);
  threads = useful_threads(threads, shape.pixels() * shape.channels);
  const Scratch scratch(forward_scratch(shape, rings, division.block()), threads);
  parallel(division.tasks(), threads, [&](Index task, int thread) {
    double* part = partials == nullptr ? nullptr : partials + division.tile(task) * 2 * width;
    table.forward[int(dtype)]({shape, rings, division.range(task), x, packed.data(), out, normaliser, part,
                               part == nullptr ? nullptr : part + width, scratch.of(thread)});
  });
}

}  // namespace

void statistics(const Shape& shape, Dtype dtype, const void* x, const float* weight, void* y, double* statistics,
                int threads) {
  const Rings rings = forward_rings(shape);
  const Division division(shape, dtype, forward_footprint(shape, rings));
  const Index width = padded(shape.channels);
  std::vector<double> partials(division.tiles() * 2 * width);
  convolve(shape, dtype, x, weight, y, nullptr, division, rings, partials.data(), threads);
  double* mean = statistics;
  double* variance = statistics + shape.channels;
  std::fill_n(statistics, 2 * shape.channels, 0.0);
  double seen = 0.0;
  for (Index tile = 0; tile < division.tiles(); ++tile) {
    const double count = double(division.values(tile));
    if (count == 0.0) continue;
    const double share = count / (seen + count);
    const double* part = partials.data() + tile * 2 * width;
    for (Index c = 0; c < shape.channels; ++c) {
      const double difference = part[c] - mean[c];
      mean[c] += difference * share;
      variance[c] += part[width + c] + difference * difference * seen * share;
    }
    seen += count;
  }
  for (Index c = 0; c < shape.channels && seen > 0.0; ++c) {
    variance[c] = variance[c] < 0.0 ? 0.0 : variance[c] / seen;  // NaN stays
  }
}

void inference(const Shape& shape, Dtype dtype, const void* x, const float* weight, const Norm& norm, void* z,
               int threads) {
  const Rings rings = forward_rings(shape);
  const Division division(shape, dtype, forward_footprint(shape, rings));
  const NormVectors vectors(norm, shape.channels);
  const Normaliser normaliser = vectors.normaliser();
  convolve(shape, dtype, x, weight, z, &normaliser, division, rings, nullptr, threads);
}

void gradients(const Shape& shape, Dtype dtype, const void* x, const float* weight, const void* y, const void* dz,
               const Norm& norm, const double* terms, void* dx, float* dweight, int threads) {
  const Rings rings = gradient_rings(shape);
  const Index footprint = rings.x_rows * rings.x_columns + rings.dy_rows * rings.dy_columns + shape.width;
  const Division division(shape, dtype, footprint);
  const std::vector<float> packed = pack_weight(shape, weight);
  const NormVectors vectors(norm, shape.channels, terms);
  const Index taps = shape.taps(), width = padded(shape.channels);
  threads = useful_threads(threads, shape.pixels() * shape.channels);
  const Scratch scratch(gradient_scratch(shape, rings, division.block()), threads);
  std::vector<double> partials(dweight == nullptr ? 0 : division.tiles() * taps * width, 0.0);
  const Kernels& table = kernels();
  parallel(division.tasks(), threads, [&](Index task, int thread) {
    double* part = dweight == nullptr ? nullptr : partials.data() + division.tile(task) * taps * width;
    table.gradients[int(dtype)]({shape, rings, division.range(task), x, packed.data(), y, dz,
                                 vectors.normaliser(), dx, part, scratch.of(thread)});
  });
  if (dweight == nullptr) return;
  parallel(taps, threads, [&](Index tap, int) {
    for (Index c = 0; c < shape.channels; ++c) {
      double sum = 0.0;
      for (Index tile = 0; tile < division.tiles(); ++tile) sum += partials[(tile * taps + tap) * width + c];
      dweight[c * taps + tap] = float(sum);
    }
  });
}

}  // namespace fastcifar::depthwise
