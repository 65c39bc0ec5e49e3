#include "batch_norm_bindings.h"

#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <tuple>

#include "batch_norm.h"

namespace nb = nanobind;
namespace bn = fastcifar::batch_norm;
using namespace nb::literals;

namespace {

// Tensors arrive as addresses (0 for none): nothing here knows torch.
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (pixels, channels, dtype, x, residual)
using TensorNumbers = std::tuple<std::int64_t, std::int64_t, int, Address, Address>;

bn::Tensors tensors(const TensorNumbers& v) {
  const auto [pixels, channels, dtype, x, residual] = v;
  if (pixels < 0 || channels < 0) throw std::invalid_argument("batch_norm: a negative size");
  if (dtype < 0 || dtype >= fastcifar::kDtypes) throw std::invalid_argument("batch_norm: unknown dtype code");
  return {pixels, channels, fastcifar::Dtype(dtype), pointer<void>(x), pointer<void>(residual)};
}

// (statistics, weight, bias, eps, activation, negative slope)
using NormNumbers = std::tuple<Address, Address, Address, double, int, float>;

bn::Norm norm(const NormNumbers& v) {
  const auto [statistics, weight, bias, eps, activation, negative_slope] = v;
  if (activation < 0 || activation >= fastcifar::kActivations) {
    throw std::invalid_argument("batch_norm: unknown activation code");
  }
  return {pointer<double>(statistics),           pointer<float>(weight), pointer<float>(bias), eps,
          fastcifar::Activation(activation), negative_slope};
}

void statistics(const TensorNumbers& numbers, Address out, int threads) {
  const bn::Tensors t = tensors(numbers);
  nb::gil_scoped_release release;
  bn::statistics(t, pointer<double>(out), threads);
}

void normalise(const TensorNumbers& numbers, const NormNumbers& norm_numbers, Address z, int threads) {
  const bn::Tensors t = tensors(numbers);
  const bn::Norm n = norm(norm_numbers);
  nb::gil_scoped_release release;
  bn::normalise(t, n, pointer<void>(z), threads);
}

void reduce(const TensorNumbers& numbers, Address dz, const NormNumbers& norm_numbers, Address da, Address sums,
            int threads) {
  const bn::Tensors t = tensors(numbers);
  const bn::Norm n = norm(norm_numbers);
  if (t.residual != nullptr && da == 0) throw std::invalid_argument("batch_norm: a residual needs da");
  nb::gil_scoped_release release;
  bn::reduce(t, pointer<void>(dz), n, pointer<void>(da), pointer<double>(sums), threads);
}

void gradient(const TensorNumbers& numbers, Address dz, const NormNumbers& norm_numbers, Address terms, Address dx,
              int threads) {
  const bn::Tensors t = tensors(numbers);
  const bn::Norm n = norm(norm_numbers);
  nb::gil_scoped_release release;
  bn::gradient(t, pointer<void>(dz), n, pointer<double>(terms), pointer<void>(dx), threads);
}

}  // namespace

void bind_batch_norm(nb::module_& m) {
  m.def("batch_norm_statistics", &statistics, "tensors"_a, "statistics"_a, "threads"_a);
  m.def("batch_norm_normalise", &normalise, "tensors"_a, "norm"_a, "z"_a, "threads"_a);
  m.def("batch_norm_reduce", &reduce, "tensors"_a, "dz"_a, "norm"_a, "da"_a, "sums"_a, "threads"_a);
  m.def("batch_norm_gradient", &gradient, "tensors"_a, "dz"_a, "norm"_a, "terms"_a, "dx"_a, "threads"_a);
}
