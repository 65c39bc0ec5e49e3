#include "aw_hinge.h"

#include <algorithm>
#include <vector>

#include "aw_hinge_scalars.h"

// The clones differ in vector width only; the loader picks one when the module is imported.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTCIFAR_NO_CLONES)
#define FASTCIFAR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTCIFAR_CLONES
#endif

#if defined(__GNUC__)
#define FASTCIFAR_INLINE inline __attribute__((always_inline))
#else
#define FASTCIFAR_INLINE inline
#endif

namespace fastcifar::aw_hinge {
namespace {

// Below this many values a second thread costs more than it saves.
constexpr std::int64_t kParallelSize = 1 << 16;

alignas(64) const double kZeros[kChunk] = {};

struct Chunk {
  std::int32_t gradient;
  std::int32_t size;
  std::int64_t offset;
};

std::vector<Chunk> split(const Gradient* gradients, std::int64_t count) {
  std::vector<Chunk> chunks;
  for (std::int64_t g = 0; g < count; ++g)
    for (std::int64_t offset = 0; offset < gradients[g].size; offset += kChunk)
      chunks.push_back({std::int32_t(g), std::int32_t(std::min(kChunk, gradients[g].size - offset)), offset});
  return chunks;
}

template <class T>
FASTCIFAR_INLINE void dot_chunk(const T* r, const T* f, std::int64_t size, double* sums) {
  double rr = 0.0, ff = 0.0, rf = 0.0;
#pragma omp simd reduction(+ : rr, ff, rf)
  for (std::int64_t i = 0; i < size; ++i) {
    const double a = load(r[i]), b = load(f[i]);
    rr += a * a;
    ff += b * b;
    rf += a * b;
  }
  sums[0] = rr;
  sums[1] = ff;
  sums[2] = rf;
}

FASTCIFAR_CLONES void dot(const float* r, const float* f, std::int64_t n, double* sums) { dot_chunk(r, f, n, sums); }
FASTCIFAR_CLONES void dot(const double* r, const double* f, std::int64_t n, double* sums) { dot_chunk(r, f, n, sums); }
FASTCIFAR_CLONES void dot(const BFloat16* r, const BFloat16* f, std::int64_t n, double* sums) {
  dot_chunk(r, f, n, sums);
}
FASTCIFAR_CLONES void dot(const Float16* r, const Float16* f, std::int64_t n, double* sums) {
  dot_chunk(r, f, n, sums);
}

template <class From, class To>
FASTCIFAR_INLINE void combine_chunk(const From* r, const From* f, To* target, std::int64_t size, double weight_real,
                                    double weight_fake, bool accumulate) {
  if (accumulate)
    for (std::int64_t i = 0; i < size; ++i)
      store(target[i], load(target[i]) + (weight_real * load(r[i]) + weight_fake * load(f[i])));
  else
    for (std::int64_t i = 0; i < size; ++i) store(target[i], weight_real * load(r[i]) + weight_fake * load(f[i]));
}

#define FASTCIFAR_COMBINE(From, To)                                                                             \
  FASTCIFAR_CLONES void combine(const From* r, const From* f, To* target, std::int64_t n, double wr, double wf, \
                                bool accumulate) {                                                              \
    combine_chunk(r, f, target, n, wr, wf, accumulate);                                                         \
  }
FASTCIFAR_COMBINE(float, float)
FASTCIFAR_COMBINE(double, double)
FASTCIFAR_COMBINE(BFloat16, BFloat16)
FASTCIFAR_COMBINE(Float16, Float16)
FASTCIFAR_COMBINE(float, BFloat16)
FASTCIFAR_COMBINE(float, Float16)
#undef FASTCIFAR_COMBINE

template <class T>
const T* at(const void* pointer, std::int64_t offset) {
  return pointer ? static_cast<const T*>(pointer) + offset : reinterpret_cast<const T*>(kZeros);
}

template <class From, class To>
void combine_at(const Gradient& g, const Chunk& chunk, const double* weights) {
  combine(at<From>(g.real, chunk.offset), at<From>(g.fake, chunk.offset), static_cast<To*>(g.target) + chunk.offset,
          chunk.size, weights[0], weights[1], g.accumulate);
}

template <class T>
void hinge_side(const T* logits, T* gradients, std::int64_t count, double sign, double total, double scale,
                double* loss, double* score) {
  // relu as torch has it: NaN stays NaN, and its derivative at NaN is 1.
  for (std::int64_t i = 0; i < count; ++i) {
    const double x = load(logits[i]);
    const double margin = 1.0 + sign * x;
    const bool outside = margin <= 0.0;
    *loss += outside ? 0.0 : margin;
    *score += 1.0 / (1.0 + std::exp(-x));
    store(gradients[i], outside ? 0.0 : sign * scale / total);
  }
  *loss /= total;
  *score /= total;
}

int thread_count(const std::vector<Chunk>& chunks, int threads) {
  return std::int64_t(chunks.size()) * kChunk < kParallelSize ? 1 : threads;
}

}  // namespace

void hinge_terms_cpu(const Logits& logits) {
  const double scale = logits.scale * (logits.device_scale ? double(*logits.device_scale) : 1.0);
  const double n_real = logits.counts ? logits.counts[0] : double(logits.n_real);
  const double n_fake = logits.counts ? logits.counts[1] : double(logits.n_fake);
  double* terms = logits.terms;
  std::fill_n(terms, 4, 0.0);
  with_scalar(logits.scalar, [&](auto tag) {
    using T = decltype(tag);
    hinge_side(static_cast<const T*>(logits.real), static_cast<T*>(logits.d_real), logits.n_real, -1.0, n_real, scale,
               terms, terms + 2);
    hinge_side(static_cast<const T*>(logits.fake), static_cast<T*>(logits.d_fake), logits.n_fake, 1.0, n_fake, scale,
               terms + 1, terms + 3);
  });
}

void gradient_weights_cpu(const Gradient* gradients, std::int64_t count, const Decision& decision,
                          [[maybe_unused]] int threads) {
  const std::vector<Chunk> chunks = split(gradients, count);
  const std::int64_t total = std::int64_t(chunks.size());
#pragma omp parallel for schedule(static) num_threads(thread_count(chunks, threads))
  for (std::int64_t c = 0; c < total; ++c) {
    const Gradient& g = gradients[chunks[c].gradient];
    with_scalar(g.source_scalar, [&](auto tag) {
      using T = decltype(tag);
      dot(at<T>(g.real, chunks[c].offset), at<T>(g.fake, chunks[c].offset), chunks[c].size,
          decision.workspace + 3 * c);
    });
  }
  double sums[3] = {};
  for (std::int64_t c = 0; c < total; ++c)
    for (int i = 0; i < 3; ++i) sums[i] += decision.workspace[3 * c + i];
  decide(decision, sums);
}

void combine_cpu(const Gradient* gradients, std::int64_t count, const double* weights, [[maybe_unused]] int threads) {
  const std::vector<Chunk> chunks = split(gradients, count);
  const std::int64_t total = std::int64_t(chunks.size());
#pragma omp parallel for schedule(static) num_threads(thread_count(chunks, threads))
  for (std::int64_t c = 0; c < total; ++c) {
    const Gradient& g = gradients[chunks[c].gradient];
    if (g.target_scalar == g.source_scalar)
      with_scalar(g.source_scalar, [&](auto tag) { combine_at<decltype(tag), decltype(tag)>(g, chunks[c], weights); });
    else if (g.target_scalar == Scalar::bfloat16)
      combine_at<float, BFloat16>(g, chunks[c], weights);
    else
      combine_at<float, Float16>(g, chunks[c], weights);
  }
}

}  // namespace fastcifar::aw_hinge
