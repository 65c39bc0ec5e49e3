#include "depthwise.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "depthwise_tasks.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastcifar::depthwise {
namespace {

using Index = std::int64_t;

constexpr Index kTiles = 64;                 // enough for even work, few enough for cheap partial sums
constexpr Index kRowsPerTile = 8;            // at least, as each tile reads the rows beside it again
constexpr Index kRingBytes = 32 * 1024;      // what a task keeps in the L1 cache
constexpr Index kLineBytes = 64;
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
Index floor_divide(Index a, Index b) { return a >= 0 ? a / b : -divide_up(-a, b); }
Index padded(Index channels) { return divide_up(channels, kChannelAlign) * kChannelAlign; }
Index bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// f(task, thread) for every task; which thread runs a task changes nothing in its result.
template <class F>
void parallel(Index tasks, int threads, F&& f) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index task = 0; task < tasks; ++task) f(task, thread_number());
    return;
  }
#endif
  for (Index task = 0; task < tasks; ++task) f(task, 0);
}

int useful_threads(int threads, Index values) {
  return int(std::max<Index>(1, std::min<Index>(threads, values / kValuesPerThread)));
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

// [C, taps] → [taps, padded C].
std::vector<float> pack_weight(const Shape& shape, const float* weight) {
  const Index taps = shape.taps(), width = padded(shape.channels);
  std::vector<float> packed(taps * width, 0.0f);
  for (Index c = 0; c < shape.channels; ++c) {
    for (Index t = 0; t < taps; ++t) packed[t * width + c] = weight[c * taps + t];
  }
  return packed;
}

// Vectors [C] as the vector code wants them, with zeros up to the padded size.
class Vectors {
 public:
  Vectors(const Norm& norm, Index channels) : norm_(norm), channels_(channels), width_(padded(channels)) {
    data_.resize(5 * width_, 0.0f);
    for (Index c = 0; c < channels; ++c) {
      data_[c] = float(norm.statistics[c]);
      data_[width_ + c] = float(weight(c) * rstd(c));
      data_[2 * width_ + c] = norm.bias == nullptr ? 0.0f : norm.bias[c];
    }
  }
  double rstd(Index c) const { return 1.0 / std::sqrt(norm_.statistics[channels_ + c] + norm_.eps); }
  Normaliser normaliser() const {
    return {data_.data(), data_.data() + width_, data_.data() + 2 * width_, norm_.activation, norm_.negative_slope};
  }
  void set_terms(const double* terms) {
    for (Index c = 0; c < channels_; ++c) {
      data_[3 * width_ + c] = float(weight(c) * rstd(c) * terms[c]);
      data_[4 * width_ + c] = float(weight(c) * rstd(c) * rstd(c) * terms[channels_ + c]);
    }
  }
  const float* offset() const { return data_.data() + 3 * width_; }
  const float* slope() const { return data_.data() + 4 * width_; }

 private:
  double weight(Index c) const { return norm_.weight == nullptr ? 1.0 : double(norm_.weight[c]); }
  const Norm& norm_;
  Index channels_, width_;
  std::vector<float> data_;
};

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
    const Index wanted = divide_up(shape.channels, std::max(line, fitting));
    block_ = divide_up(divide_up(shape.channels, wanted), line) * line;
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

// Pixels in equal parts for the passes without a convolution.
struct PixelTiles {
  Index pixels, count;
  explicit PixelTiles(Index all) : pixels(all), count(std::min<Index>(kTiles, divide_up(all, 64))) {}
  Index begin(Index tile) const { return tile * pixels / count; }
};

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
  for (Index c = 0; c < shape.channels && seen > 0.0; ++c) variance[c] = std::max(0.0, variance[c] / seen);
}

void inference(const Shape& shape, Dtype dtype, const void* x, const float* weight, const Norm& norm, void* z,
               int threads) {
  const Rings rings = forward_rings(shape);
  const Division division(shape, dtype, forward_footprint(shape, rings));
  const Vectors vectors(norm, shape.channels);
  const Normaliser normaliser = vectors.normaliser();
  convolve(shape, dtype, x, weight, z, &normaliser, division, rings, nullptr, threads);
}

void normalise(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const Norm& norm, void* z,
               int threads) {
  const Vectors vectors(norm, channels);
  const PixelTiles tiles(pixels);
  const Kernels& table = kernels();
  parallel(tiles.count, useful_threads(threads, pixels * channels), [&](Index tile, int) {
    table.normalise[int(dtype)]({tiles.begin(tile), tiles.begin(tile + 1), channels, y, nullptr, vectors.normaliser(),
                                 z, nullptr, nullptr});
  });
}

void reduce(std::int64_t pixels, std::int64_t channels, Dtype dtype, const void* y, const void* dz, const Norm& norm,
            double* sums, int threads) {
  const Vectors vectors(norm, channels);
  const PixelTiles tiles(pixels);
  const Index width = padded(channels);
  threads = useful_threads(threads, pixels * channels);
  const Scratch scratch(2 * width, threads);
  std::vector<double> partials(tiles.count * 2 * width, 0.0);
  const Kernels& table = kernels();
  parallel(tiles.count, threads, [&](Index tile, int thread) {
    table.reduce[int(dtype)]({tiles.begin(tile), tiles.begin(tile + 1), channels, y, dz, vectors.normaliser(), nullptr,
                              partials.data() + tile * 2 * width, scratch.of(thread)});
  });
  std::fill_n(sums, 2 * channels, 0.0);
  for (Index tile = 0; tile < tiles.count; ++tile) {
    for (Index row = 0; row < 2; ++row) {
      const double* part = partials.data() + (tile * 2 + row) * width;
      for (Index c = 0; c < channels; ++c) sums[row * channels + c] += part[c];
    }
  }
  for (Index c = 0; c < channels; ++c) sums[channels + c] *= vectors.rstd(c);
}

void gradients(const Shape& shape, Dtype dtype, const void* x, const float* weight, const void* y, const void* dz,
               const Norm& norm, const double* terms, void* dx, float* dweight, int threads) {
  const Rings rings = gradient_rings(shape);
  const Index footprint = rings.x_rows * rings.x_columns + rings.dy_rows * rings.dy_columns + shape.width;
  const Division division(shape, dtype, footprint);
  const std::vector<float> packed = pack_weight(shape, weight);
  Vectors vectors(norm, shape.channels);
  if (terms != nullptr) vectors.set_terms(terms);
  const Index taps = shape.taps(), width = padded(shape.channels);
  threads = useful_threads(threads, shape.pixels() * shape.channels);
  const Scratch scratch(gradient_scratch(shape, rings, division.block()), threads);
  std::vector<double> partials(dweight == nullptr ? 0 : division.tiles() * taps * width, 0.0);
  const Kernels& table = kernels();
  parallel(division.tasks(), threads, [&](Index task, int thread) {
    double* part = dweight == nullptr ? nullptr : partials.data() + division.tile(task) * taps * width;
    table.gradients[int(dtype)]({shape, rings, division.range(task), x, packed.data(), y, dz,
                                 vectors.normaliser(), vectors.offset(), vectors.slope(), dx, part,
                                 scratch.of(thread)});
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
