#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "norm.h"

// What the bindings share. Tensors arrive as addresses (0 for none): nothing here knows torch.
namespace fastcifar {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype(int code) {
  if (code < 0 || code >= kDtypes) throw std::invalid_argument("unknown dtype code");
  return Dtype(code);
}

// (statistics, weight, bias, eps, activation, negative slope)
using NormNumbers = std::tuple<Address, Address, Address, double, int, float>;

inline Norm norm(const NormNumbers& v) {
  const auto [statistics, weight, bias, eps, activation, negative_slope] = v;
  if (activation < 0 || activation >= kActivations) throw std::invalid_argument("unknown activation code");
  return {pointer<double>(statistics), pointer<float>(weight), pointer<float>(bias), eps, Activation(activation),
          negative_slope};
}

}  // namespace fastcifar
