#pragma once

#include <cstdint>
#include <vector>

namespace fastcifar::spectral {

// A weight as a matrix [rows, outer·inner] that lies in memory as [outer, rows, inner]. Column m in memory order is
// column (m % q)·swap + m / q of the matrix, with q = columns / swap (channels-last weights; swap = 1: the same order).
struct Matrix {
  std::int64_t rows, outer, inner, swap;
  std::int64_t weight_offset;  // into the normalised weights and the gradients
  std::int64_t vector_offset;  // into the vectors: u [rows], then v [columns] in memory order

  std::int64_t columns() const { return outer * inner; }
  std::int64_t size() const { return rows * outer * inner; }
};

// Where the values of one call lie: addresses of T, a list holding one for each matrix. `v` is read before `v_out` is
// written, so that they may be the same; with no iterations u and v are read and u_out, v_out left alone.
struct Operands {
  std::vector<std::uintptr_t> weights, u, v, u_out, v_out;
  std::uintptr_t normalised, vectors, sigmas;
};

// One batch of weights; T is float or double.
template <class T>
void normalize(const std::vector<Matrix>& matrices, const Operands& operands, int iterations, double eps, int threads);

// result = (g − ⟨g, W̄⟩·u vᵀ)/σ for every matrix whose gradient address is not 0; all in memory order.
template <class T>
void gradient(const std::vector<Matrix>& matrices, const std::vector<std::uintptr_t>& gradients, const T* normalised,
              const T* vectors, const T* sigmas, T* result, int threads);

}  // namespace fastcifar::spectral
