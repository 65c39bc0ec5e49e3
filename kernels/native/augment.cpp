#include "augment.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "augment_tasks.h"
#include "isa.h"
#include "work.h"

// Draws must have the reference's bits: this file is compiled without contraction of a·b + c.
namespace fastcifar::augment {
namespace {

using Words = std::array<std::uint32_t, 4>;

// The purposes that a position's words serve, one block of four words each.
enum Purpose : std::uint32_t { kGeometry, kColour, kCutout, kMix, kBox };

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

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
Words philox(Index counter, Purpose purpose, const Options& options) {
  Words c{std::uint32_t(counter), std::uint32_t(options.step), std::uint32_t(options.step >> 32), purpose};
  std::uint32_t k0 = std::uint32_t(options.seed), k1 = std::uint32_t(options.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53} * c[0], second = std::uint64_t{0xCD9E8D57} * c[2];
    c = {std::uint32_t(second >> 32) ^ c[1] ^ k0, std::uint32_t(second), std::uint32_t(first >> 32) ^ c[3] ^ k1,
         std::uint32_t(first)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

Index below(std::uint32_t word, Index bound) { return Index(std::uint64_t(word) * std::uint64_t(bound) >> 32); }

double uniform(std::uint32_t word) { return (double(word) + 0.5) * 0x1p-32; }

// Beta(α, α): the quantile on the lower half, and which half.
double beta(const double* table, std::uint32_t word, std::uint32_t side) {
  const double place = uniform(word) * double(kBetaPoints - 1);
  const Index index = Index(place);
  const double value = table[index] + (place - double(index)) * (table[index + 1] - table[index]);
  return side >> 31 == 1 ? 1.0 - value : value;
}

struct Box {
  Index top, bottom, left, right;
  Index area() const { return std::max<Index>(0, bottom - top) * std::max<Index>(0, right - left); }
};

// A box about a random centre, clipped at the border.
Box box(std::uint32_t y, std::uint32_t x, Index box_height, Index box_width, const Set& set) {
  const Index top = below(y, set.height) - box_height / 2, left = below(x, set.width) - box_width / 2;
  return {std::max<Index>(0, top), std::min(set.height, top + box_height), std::max<Index>(0, left),
          std::min(set.width, left + box_width)};
}

// One thread's memory.
struct Workspace {
  std::vector<std::uint32_t> own, partner;
  std::vector<Index> rows;
  std::vector<Run> runs;
};

class Batch {
 public:
  Batch(const Set& set, const Positions& positions, const Options& options, const Results& results)
      : set_(set), positions_(positions), options_(options), results_(results) {
    if (options.mixing != Mixing::none && positions.size > 1) {
      shift_ = 1 + below(philox(0, kMix, options)[0], positions.size - 1);
    }
  }

  Workspace workspace() const {
    const std::size_t pixels = divide_up(set_.height * set_.width, kPixelAlign) * kPixelAlign;
    const std::size_t partners = options_.mixing == Mixing::none ? 0 : pixels;
    return {std::vector<std::uint32_t>(pixels, 0), std::vector<std::uint32_t>(partners, 0),
            std::vector<Index>(set_.height), {}};
  }

  void render(Index number, Workspace& work) const {
    const Index position = positions_.first + number, pixels = set_.height * set_.width;
    Task task{pixels, gather(position, work.own, work), {}, options_.color_jitter != 0.0,
              options_.cutout > 0, options_.mixing, 0.0f, options_.scale, options_.shift, nullptr};
    if (options_.mixing != Mixing::none) {
      const Index other = (position + shift_) % positions_.size;
      task.partner = gather(other, work.partner, work);
      results_.partners[number] = positions_.indices[other];
      results_.weights[number] = task.share = mix(position, work.own);
    }
    const Index bytes = results_.dtype == Dtype::float32 ? 4 : 2;
    task.out = static_cast<std::uint8_t*>(results_.images) + number * pixels * 3 * bytes;
    kernels_.render[int(results_.dtype)](task);
  }

 private:
  // The source of row or column i of the output; −1 outside of the image.
  Index source(Index i, Index shift, Index size) const {
    Index at = i + shift - options_.crop_pad;
    if (options_.reflect) {
      at = std::abs(at);
      return at >= size ? 2 * (size - 1) - at : at;
    }
    return at >= size ? -1 : std::max<Index>(at, -1);
  }

  // The cropped and mirrored image as packed pixels, and its colours.
  Picture gather(Index position, std::vector<std::uint32_t>& packed, Workspace& work) const {
    const Index height = set_.height, width = set_.width, span = 2 * options_.crop_pad + 1;
    const Words words = philox(position, kGeometry, options_);
    const Index down = below(words[0], span), right = below(words[1], span);
    const bool mirrored = positions_.flips != nullptr ? positions_.flips[position] != 0
                                                      : options_.random_flip && words[2] >> 31 == 1;
    for (Index y = 0; y < height; ++y) work.rows[y] = source(y, down, height);
    const bool border = find_runs(right, mirrored, work.runs);
    const std::uint8_t* image = set_.images + positions_.indices[position] * height * width * 3;
    kernels_.pack({image, height, width, work.rows.data(), work.runs.data(), Index(work.runs.size()), border,
                   packed.data()});
    if (options_.cutout > 0) {
      const Words cut = philox(position, kCutout, options_);
      flag(box(cut[0], cut[1], options_.cutout, options_.cutout, set_), kCut, packed);
    }
    return coloured(position, packed.data());
  }

  // The runs of a row; whether some columns are black.
  bool find_runs(Index shift, bool mirrored, std::vector<Run>& runs) const {
    runs.clear();
    bool border = false;
    Index last = -1;
    for (Index x = 0; x < set_.width; ++x) {
      const Index column = source(mirrored ? set_.width - 1 - x : x, shift, set_.width);
      Run* run = runs.empty() || last < 0 ? nullptr : &runs.back();
      if (column < 0) {
        border = true;
      } else if (run != nullptr && column == last + 1 && !(run->length > 1 && run->reversed)) {
        ++run->length;
      } else if (run != nullptr && column == last - 1 && (run->length == 1 || run->reversed)) {
        *run = {column, run->to, run->length + 1, true};
      } else {
        runs.push_back({column, x, 1, false});
      }
      last = column;
    }
    return border;
  }

  Picture coloured(Index position, const std::uint32_t* pixels) const {
    if (options_.color_jitter == 0.0) return {pixels, 1.0f, 1.0f, 1.0f};
    const Words words = philox(position, kColour, options_);
    const auto factor = [&](int i) { return float(1.0 + options_.color_jitter * (2.0 * uniform(words[i]) - 1.0)); };
    return {pixels, factor(0), factor(1), factor(2)};
  }

  void flag(const Box& box, std::uint32_t bit, std::vector<std::uint32_t>& packed) const {
    for (Index y = box.top; y < box.bottom; ++y) {
      for (Index x = box.left; x < box.right; ++x) packed[y * set_.width + x] |= bit;
    }
  }

  // The partner's share; for cutmix the box is marked.
  float mix(Index position, std::vector<std::uint32_t>& own) const {
    const Words words = philox(position, kBox, options_);
    const double share = beta(options_.beta, words[0], words[1]);
    if (options_.mixing == Mixing::mixup) return float(share);
    const double side = std::sqrt(share);
    const Box pasted = box(words[2], words[3], Index(side * double(set_.height)), Index(side * double(set_.width)), set_);
    flag(pasted, kPasted, own);
    return float(pasted.area()) / float(set_.height * set_.width);
  }

  const Set& set_;
  const Positions& positions_;
  const Options& options_;
  const Results& results_;
  const Kernels& kernels_ = kernels();
  Index shift_ = 0;
};

}  // namespace

void augment(const Set& set, const Positions& positions, const Options& options, const Results& results, int threads) {
  for (Index i = 0; i < positions.size; ++i) {
    if (positions.indices[i] < 0 || positions.indices[i] >= set.count) {
      throw std::out_of_range("augment: index " + std::to_string(positions.indices[i]) + " at position " +
                              std::to_string(i) + " is not within the " + std::to_string(set.count) + " images");
    }
  }
  const Batch batch(set, positions, options, results);
  threads = useful_threads(threads, positions.made * set.height * set.width * 3);
  std::vector<Workspace> work(threads, batch.workspace());
  parallel(positions.made, threads, [&](Index number, int thread) { batch.render(number, work[thread]); });
}

}  // namespace fastcifar::augment
