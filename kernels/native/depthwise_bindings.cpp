#include "depthwise_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "depthwise.h"

namespace nb = nanobind;
namespace dw = fastcifar::depthwise;
using namespace nb::literals;

namespace {

// Tensors arrive as addresses (0 for none): nothing here knows torch.
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (N, H, W, C, Ho, Wo, KH, KW, stride, padding and dilation as height and width)
dw::Shape shape(const std::vector<std::int64_t>& v) {
  if (v.size() != 14) throw std::invalid_argument("depthwise: a shape has 14 numbers, got " + std::to_string(v.size()));
  const dw::Shape s{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13]};
  const auto fits = [](std::int64_t size, std::int64_t out, std::int64_t kernel, std::int64_t stride,
                       std::int64_t padding, std::int64_t dilation) {
    return size > 0 && out > 0 && kernel > 0 && stride > 0 && padding >= 0 && dilation > 0 &&
           (out - 1) * stride + dilation * (kernel - 1) + 1 <= size + 2 * padding;
  };
  if (s.images < 0 || s.channels < 0 ||
      !fits(s.height, s.out_height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height) ||
      !fits(s.width, s.out_width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width)) {
    throw std::invalid_argument("depthwise: the shape is none of a convolution");
  }
  return s;
}

fastcifar::Dtype dtype(int code) {
  if (code < 0 || code >= fastcifar::kDtypes) throw std::invalid_argument("depthwise: unknown dtype code");
  return fastcifar::Dtype(code);
}

// (statistics, weight, bias, eps, activation, negative slope)
using NormNumbers = std::tuple<Address, Address, Address, double, int, float>;

dw::Norm norm(const NormNumbers& v) {
  const auto [statistics, weight, bias, eps, activation, negative_slope] = v;
  if (activation < 0 || activation >= fastcifar::kActivations) {
    throw std::invalid_argument("depthwise: unknown activation code");
  }
  return {pointer<double>(statistics),           pointer<float>(weight), pointer<float>(bias), eps,
          fastcifar::Activation(activation), negative_slope};
}

using Numbers = std::vector<std::int64_t>;

void statistics(const Numbers& sizes, int code, Address x, Address weight, Address y, Address statistics,
                int threads) {
  const dw::Shape s = shape(sizes);
  const fastcifar::Dtype type = dtype(code);
  nb::gil_scoped_release release;
  dw::statistics(s, type, pointer<void>(x), pointer<float>(weight), pointer<void>(y), pointer<double>(statistics),
                 threads);
}

void inference(const Numbers& sizes, int code, Address x, Address weight, const NormNumbers& numbers, Address z,
               int threads) {
  const dw::Shape s = shape(sizes);
  const fastcifar::Dtype type = dtype(code);
  const dw::Norm n = norm(numbers);
  nb::gil_scoped_release release;
  dw::inference(s, type, pointer<void>(x), pointer<float>(weight), n, pointer<void>(z), threads);
}

void normalise(std::int64_t pixels, std::int64_t channels, int code, Address y, const NormNumbers& numbers, Address z,
               int threads) {
  const fastcifar::Dtype type = dtype(code);
  const dw::Norm n = norm(numbers);
  nb::gil_scoped_release release;
  dw::normalise(pixels, channels, type, pointer<void>(y), n, pointer<void>(z), threads);
}

void reduce(std::int64_t pixels, std::int64_t channels, int code, Address y, Address dz, const NormNumbers& numbers,
            Address sums, int threads) {
  const fastcifar::Dtype type = dtype(code);
  const dw::Norm n = norm(numbers);
  nb::gil_scoped_release release;
  dw::reduce(pixels, channels, type, pointer<void>(y), pointer<void>(dz), n, pointer<double>(sums), threads);
}

void gradients(const Numbers& sizes, int code, Address x, Address weight, Address y, Address dz,
               const NormNumbers& numbers, Address terms, Address dx, Address dweight, int threads) {
  const dw::Shape s = shape(sizes);
  const fastcifar::Dtype type = dtype(code);
  const dw::Norm n = norm(numbers);
  nb::gil_scoped_release release;
  dw::gradients(s, type, pointer<void>(x), pointer<float>(weight), pointer<void>(y), pointer<void>(dz), n,
                pointer<double>(terms), pointer<void>(dx), pointer<float>(dweight), threads);
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const fastcifar::Isa level : fastcifar::isa_levels()) names.emplace_back(fastcifar::isa_name(level));
  return names;
}

}  // namespace

void bind_depthwise(nb::module_& m) {
  m.def("isa_levels", &isa_levels, "Instruction sets that the vector code can use here, best last.");
  m.def("isa", [] { return std::string(fastcifar::isa_name(fastcifar::isa())); });
  m.def("set_isa", &fastcifar::set_isa, "name"_a);
  m.def("depthwise_statistics", &statistics, "shape"_a, "dtype"_a, "x"_a, "weight"_a, "y"_a, "statistics"_a,
        "threads"_a);
  m.def("depthwise_inference", &inference, "shape"_a, "dtype"_a, "x"_a, "weight"_a, "norm"_a, "z"_a, "threads"_a);
  m.def("depthwise_normalise", &normalise, "pixels"_a, "channels"_a, "dtype"_a, "y"_a, "norm"_a, "z"_a, "threads"_a);
  m.def("depthwise_reduce", &reduce, "pixels"_a, "channels"_a, "dtype"_a, "y"_a, "dz"_a, "norm"_a, "sums"_a,
        "threads"_a);
  m.def("depthwise_gradients", &gradients, "shape"_a, "dtype"_a, "x"_a, "weight"_a, "y"_a, "dz"_a, "norm"_a,
        "terms"_a, "dx"_a, "dweight"_a, "threads"_a);
}
