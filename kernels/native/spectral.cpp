#include "spectral.h"

#include <algorithm>
#include <cmath>

// The clones differ in vector width only; the loader picks one when the module is imported.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTCIFAR_NO_CLONES)
#define FASTCIFAR_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define FASTCIFAR_CLONES
#endif

#if defined(__GNUC__)
#define FASTCIFAR_INLINE inline __attribute__((always_inline))
#else
#define FASTCIFAR_INLINE inline
#endif

namespace fastcifar::spectral {
namespace {

// Below this many values in all, a second thread costs more than it saves.
constexpr std::int64_t kParallelSize = 1 << 16;

// Long sums are sums of short ones: rounding errors grow with the length of each.
constexpr std::int64_t kBlock = 2048;
constexpr std::int64_t kBlockRows = 64;

template <class T>
FASTCIFAR_INLINE T dot_of(const T* a, const T* b, std::int64_t size) {
  double total = 0;
  for (std::int64_t start = 0; start < size; start += kBlock) {
    const std::int64_t end = std::min(start + kBlock, size);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = start; i < end; ++i) sum += a[i] * b[i];
    total += sum;
  }
  return T(total);
}

// product[r] = Σ_c matrix[r, c]·vector[c], row-major, four rows at a time.
template <class T>
FASTCIFAR_INLINE void multiply_rows(const T* matrix, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                                    const T* vector, T* product, bool accumulate) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T *m0 = matrix + r * stride, *m1 = m0 + stride, *m2 = m1 + stride, *m3 = m2 + stride;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (std::int64_t c = 0; c < columns; ++c) {
      const T x = vector[c];
      s0 += m0[c] * x;
      s1 += m1[c] * x;
      s2 += m2[c] * x;
      s3 += m3[c] * x;
    }
    product[r] = (accumulate ? product[r] : T(0)) + s0;
    product[r + 1] = (accumulate ? product[r + 1] : T(0)) + s1;
    product[r + 2] = (accumulate ? product[r + 2] : T(0)) + s2;
    product[r + 3] = (accumulate ? product[r + 3] : T(0)) + s3;
  }
  for (; r < rows; ++r)
    product[r] = (accumulate ? product[r] : T(0)) + dot_of(matrix + r * stride, vector, columns);
}

// product[c] = Σ_r matrix[r, c]·vector[r], row-major, four rows at a time; `part` [columns] holds a block's sum.
template <class T>
FASTCIFAR_INLINE void multiply_columns(const T* matrix, std::int64_t rows, std::int64_t columns, const T* vector,
                                       T* product, T* part) {
  for (std::int64_t first = 0; first < rows; first += kBlockRows) {
    const std::int64_t end = std::min(first + kBlockRows, rows);
    T* sum = first == 0 ? product : part;
    std::fill_n(sum, columns, T(0));
    std::int64_t r = first;
    for (; r + 4 <= end; r += 4) {
      const T *m0 = matrix + r * columns, *m1 = m0 + columns, *m2 = m1 + columns, *m3 = m2 + columns;
      const T x0 = vector[r], x1 = vector[r + 1], x2 = vector[r + 2], x3 = vector[r + 3];
#pragma omp simd
      for (std::int64_t c = 0; c < columns; ++c) sum[c] += (m0[c] * x0 + m1[c] * x1) + (m2[c] * x2 + m3[c] * x3);
    }
    for (; r < end; ++r) {
      const T* m = matrix + r * columns;
      const T x = vector[r];
#pragma omp simd
      for (std::int64_t c = 0; c < columns; ++c) sum[c] += m[c] * x;
    }
    if (first > 0)
#pragma omp simd
      for (std::int64_t c = 0; c < columns; ++c) product[c] += part[c];
  }
}

// t = W v
template <class T>
FASTCIFAR_INLINE void forward_product(const Matrix& m, const T* weight, const T* v, T* t, T* part) {
  // [outer, rows] when inner is 1: the transpose lies row-major.
  if (m.inner == 1) return multiply_columns(weight, m.outer, m.rows, v, t, part);
  for (std::int64_t a = 0; a < m.outer; ++a)
    for (std::int64_t c = 0; c < m.inner; c += kBlock)
      multiply_rows(weight + a * m.rows * m.inner + c, m.rows, std::min(kBlock, m.inner - c), m.inner,
                    v + a * m.inner + c, t, a > 0 || c > 0);
}

// s = Wᵀ u
template <class T>
FASTCIFAR_INLINE void backward_product(const Matrix& m, const T* weight, const T* u, T* s, T* part) {
  if (m.inner == 1) {
    for (std::int64_t r = 0; r < m.rows; r += kBlock)
      multiply_rows(weight + r, m.outer, std::min(kBlock, m.rows - r), m.rows, u + r, s, r > 0);
    return;
  }
  for (std::int64_t a = 0; a < m.outer; ++a)
    multiply_columns(weight + a * m.rows * m.inner, m.rows, m.inner, u, s + a * m.inner, part);
}

// x / max(|x|, eps), as torch.nn.functional.normalize; returns |x|.
template <class T>
FASTCIFAR_INLINE T normalize_vector(T* x, std::int64_t size, T eps) {
  const T norm = std::sqrt(dot_of(x, x, size));
  // A NaN norm must stay one.
  const T divisor = norm < eps ? eps : norm;
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) x[i] /= divisor;
  return norm;
}

template <class T>
FASTCIFAR_INLINE void normalize_matrix(const Matrix& m, const T* weight, T* u, T* v, int iterations, T eps,
                                       T* normalised, T* scratch, T* sigma) {
  T value = 0;
  T *t = scratch, *part = scratch + m.rows;
  if (iterations == 0) {
    forward_product(m, weight, v, t, part);
    value = dot_of(u, t, m.rows);
  }
  for (int i = 0; i < iterations; ++i) {
    forward_product(m, weight, v, u, part);
    normalize_vector(u, m.rows, eps);
    backward_product(m, weight, u, v, part);
    // σ = uᵀ W v = ⟨s, v⟩ for s = Wᵀ u and v = s/max(|s|, eps): no third product.
    const T norm = normalize_vector(v, m.columns(), eps);
    value = norm < eps ? norm * (norm / eps) : norm;
  }
  *sigma = value;
  const T inverse = T(1) / value;
  const std::int64_t size = m.size();
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) normalised[i] = weight[i] * inverse;
}

template <class T>
FASTCIFAR_INLINE void gradient_of(const Matrix& m, const T* gradient, const T* normalised, const T* u, const T* v,
                                  T sigma, T* result) {
  const T inverse = T(1) / sigma;
  const T scale = dot_of(gradient, normalised, m.size()) * inverse;
  const bool transposed = m.inner == 1;
  const std::int64_t rows = transposed ? m.outer : m.rows, outer = transposed ? 1 : m.outer;
  const std::int64_t inner = transposed ? m.rows : m.inner;
  for (std::int64_t a = 0; a < outer; ++a)
    for (std::int64_t r = 0; r < rows; ++r) {
      const T k = scale * (transposed ? v[r] : u[r]);
      const T* along = transposed ? u : v + a * inner;
      const std::int64_t start = (a * rows + r) * inner;
#pragma omp simd
      for (std::int64_t i = 0; i < inner; ++i) result[start + i] = gradient[start + i] * inverse - k * along[i];
    }
}

#define FASTCIFAR_SPECTRAL(T)                                                                                        \
  FASTCIFAR_CLONES void normalize_one(const Matrix& m, const T* weight, T* u, T* v, int iterations, T eps,           \
                                      T* normalised, T* scratch, T* sigma) {                                         \
    normalize_matrix(m, weight, u, v, iterations, eps, normalised, scratch, sigma);                                  \
  }                                                                                                                  \
  FASTCIFAR_CLONES void gradient_one(const Matrix& m, const T* gradient, const T* normalised, const T* u,            \
                                     const T* v, T sigma, T* result) {                                               \
    gradient_of(m, gradient, normalised, u, v, sigma, result);                                                       \
  }
FASTCIFAR_SPECTRAL(float)
FASTCIFAR_SPECTRAL(double)
#undef FASTCIFAR_SPECTRAL

// Matrix order ↔ memory order of the columns.
template <class T>
void to_memory(const Matrix& m, const T* logical, T* memory) {
  const std::int64_t columns = m.columns(), q = columns / m.swap;
  for (std::int64_t p = 0; p < m.swap; ++p)
    for (std::int64_t i = 0; i < q; ++i) memory[p * q + i] = logical[i * m.swap + p];
}

template <class T>
void from_memory(const Matrix& m, const T* memory, T* logical) {
  const std::int64_t columns = m.columns(), q = columns / m.swap;
  for (std::int64_t p = 0; p < m.swap; ++p)
    for (std::int64_t i = 0; i < q; ++i) logical[i * m.swap + p] = memory[p * q + i];
}

// Indices of the matrices, the largest first: threads that take the next one when free end at about the same time.
std::vector<std::int64_t> by_size(const std::vector<Matrix>& matrices, std::int64_t* total) {
  std::vector<std::int64_t> order(matrices.size());
  *total = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = std::int64_t(i);
    *total += matrices[i].size();
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return matrices[a].size() > matrices[b].size(); });
  return order;
}

// Results start at multiples of 16 elements; nothing between them is left undefined.
template <class T>
void fill_gap(T* start, std::int64_t size) {
  std::fill(start + size, start + (size + 15) / 16 * 16, T(0));
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

template <class T>
void normalize(const std::vector<Matrix>& matrices, const Operands& operands, int iterations, double eps,
               [[maybe_unused]] int threads) {
  std::int64_t total = 0;
  const std::vector<std::int64_t> order = by_size(matrices, &total);
  const std::int64_t count = std::int64_t(order.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && total >= kParallelSize)
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int64_t i = order[n];
    const Matrix& m = matrices[i];
    T* u = at<T>(operands.vectors) + m.vector_offset;
    T* v = u + m.rows;
    to_memory(m, at<const T>(operands.v[i]), v);
    std::vector<T> scratch(m.rows + std::max(m.rows, m.inner));
    if (iterations == 0) std::copy_n(at<const T>(operands.u[i]), m.rows, u);
    normalize_one(m, at<const T>(operands.weights[i]), u, v, iterations, T(eps),
                  at<T>(operands.normalised) + m.weight_offset, scratch.data(), at<T>(operands.sigmas) + i);
    fill_gap(u, m.rows + m.columns());
    fill_gap(at<T>(operands.normalised) + m.weight_offset, m.size());
    if (iterations > 0) {
      std::copy_n(u, m.rows, at<T>(operands.u_out[i]));
      from_memory(m, v, at<T>(operands.v_out[i]));
    }
  }
}

template <class T>
void gradient(const std::vector<Matrix>& matrices, const std::vector<std::uintptr_t>& gradients, const T* normalised,
              const T* vectors, const T* sigmas, T* result, [[maybe_unused]] int threads) {
  std::int64_t total = 0;
  const std::vector<std::int64_t> order = by_size(matrices, &total);
  const std::int64_t count = std::int64_t(order.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && total >= kParallelSize)
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int64_t i = order[n];
    const Matrix& m = matrices[i];
    if (gradients[i] == 0) continue;
    const T* u = vectors + m.vector_offset;
    gradient_one(m, at<const T>(gradients[i]), normalised + m.weight_offset, u, u + m.rows, sigmas[i],
                 result + m.weight_offset);
    fill_gap(result + m.weight_offset, m.size());
  }
}

#define FASTCIFAR_INSTANTIATE(T)                                                                                    \
  template void normalize<T>(const std::vector<Matrix>&, const Operands&, int, double, int);                        \
  template void gradient<T>(const std::vector<Matrix>&, const std::vector<std::uintptr_t>&, const T*, const T*,     \
                            const T*, T*, int);
FASTCIFAR_INSTANTIATE(float)
FASTCIFAR_INSTANTIATE(double)
#undef FASTCIFAR_INSTANTIATE

}  // namespace fastcifar::spectral
