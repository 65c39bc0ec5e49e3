#include "spectral_bindings.h"

#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "spectral.h"

namespace nb = nanobind;
namespace spectral = fastcifar::spectral;
using namespace nb::literals;

namespace {

// Tensors arrive as addresses: nothing here knows torch.
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

// The matrices of a batch, kept between calls.
class Batch {
 public:
  explicit Batch(const std::vector<std::int64_t>& table) {
    constexpr std::size_t fields = 6;
    if (table.size() % fields) throw std::invalid_argument("SpectralBatch: the table must hold 6 numbers a matrix");
    for (std::size_t i = 0; i < table.size(); i += fields) {
      const std::int64_t* row = table.data() + i;
      for (std::size_t f = 0; f < 4; ++f)
        if (row[f] < 1) throw std::invalid_argument("SpectralBatch: sizes must be positive");
      matrices_.push_back({row[0], row[1], row[2], row[3], row[4], row[5]});
    }
  }

  void normalize(Addresses weights, Addresses u, Addresses v, Addresses u_out, Addresses v_out, Address normalised,
                 Address vectors, Address sigmas, int element_size, int iterations, double eps, int threads) const {
    for (const Addresses* list : {&weights, &u, &v, &u_out, &v_out}) check(*list);
    const spectral::Operands operands{std::move(weights), std::move(u), std::move(v), std::move(u_out),
                                      std::move(v_out),   normalised,   vectors,      sigmas};
    nb::gil_scoped_release release;
    if (element_size == 4)
      spectral::normalize<float>(matrices_, operands, iterations, eps, threads);
    else
      spectral::normalize<double>(matrices_, operands, iterations, eps, threads);
  }

  void gradient(const Addresses& gradients, Address normalised, Address vectors, Address sigmas, Address result,
                int element_size, int threads) const {
    check(gradients);
    nb::gil_scoped_release release;
    if (element_size == 4)
      run_gradient<float>(gradients, normalised, vectors, sigmas, result, threads);
    else
      run_gradient<double>(gradients, normalised, vectors, sigmas, result, threads);
  }

 private:
  void check(const Addresses& list) const {
    if (list.size() != matrices_.size())
      throw std::invalid_argument("SpectralBatch: every list needs one address a matrix");
  }

  template <class T>
  void run_gradient(const Addresses& gradients, Address normalised, Address vectors, Address sigmas, Address result,
                    int threads) const {
    spectral::gradient(matrices_, gradients, reinterpret_cast<const T*>(normalised),
                       reinterpret_cast<const T*>(vectors), reinterpret_cast<const T*>(sigmas),
                       reinterpret_cast<T*>(result), threads);
  }

  std::vector<spectral::Matrix> matrices_;
};

}  // namespace

void bind_spectral(nb::module_& m) {
  nb::class_<Batch>(m, "SpectralBatch")
      .def(nb::init<const std::vector<std::int64_t>&>(), "table"_a)
      .def("normalize", &Batch::normalize, "weights"_a, "u"_a, "v"_a, "u_out"_a, "v_out"_a, "normalised"_a,
           "vectors"_a, "sigmas"_a, "element_size"_a, "iterations"_a, "eps"_a, "threads"_a)
      .def("gradient", &Batch::gradient, "gradients"_a, "normalised"_a, "vectors"_a, "sigmas"_a, "result"_a,
           "element_size"_a, "threads"_a);
}
