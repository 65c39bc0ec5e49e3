#include "augment_bindings.h"

#include <stdexcept>
#include <tuple>

#include "augment.h"
#include "binding_helpers.h"

namespace nb = nanobind;
namespace augmenting = fastcifar::augment;
using namespace nb::literals;

namespace {

using fastcifar::Address, fastcifar::pointer;

using SetNumbers = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
using PositionNumbers = std::tuple<Address, Address, std::int64_t, std::int64_t, std::int64_t>;
using Triple = std::tuple<float, float, float>;
// (step, seed, crop_pad, reflect, random_flip, color_jitter, cutout, mixing, beta, scale, shift)
using OptionNumbers = std::tuple<std::uint64_t, std::uint64_t, std::int64_t, bool, bool, double, std::int64_t, int,
                                 Address, Triple, Triple>;
using ResultNumbers = std::tuple<int, Address, Address, Address>;

augmenting::Options options(const OptionNumbers& v) {
  const auto& [step, seed, crop_pad, reflect, random_flip, color_jitter, cutout, mixing, beta, scale, shift] = v;
  if (mixing < 0 || mixing >= augmenting::kMixings) throw std::invalid_argument("augment: unknown mixing code");
  const auto [a, b, c] = scale;
  const auto [d, e, f] = shift;
  return {step, seed, crop_pad, reflect, random_flip, color_jitter, cutout, augmenting::Mixing(mixing),
          pointer<double>(beta), {a, b, c}, {d, e, f}};
}

void augment(const SetNumbers& set_numbers, const PositionNumbers& position_numbers,
             const OptionNumbers& option_numbers, const ResultNumbers& result_numbers, int threads) {
  const auto [images, count, height, width] = set_numbers;
  const augmenting::Set set{pointer<std::uint8_t>(images), count, height, width};
  const auto [indices, flips, size, first, made] = position_numbers;
  const augmenting::Positions positions{pointer<std::int64_t>(indices), pointer<std::uint8_t>(flips), size, first,
                                        made};
  if (first < 0 || made < 0 || first + made > size) throw std::invalid_argument("augment: positions out of range");
  const augmenting::Options chosen = options(option_numbers);
  const auto [dtype, out, partners, weights] = result_numbers;
  const augmenting::Results results{fastcifar::dtype(dtype), pointer<void>(out), pointer<std::int64_t>(partners),
                                    pointer<float>(weights)};
  nb::gil_scoped_release release;
  augmenting::augment(set, positions, chosen, results, threads);
}

}  // namespace

void bind_augment(nb::module_& m) {
  m.def("augment", &augment, "set"_a, "positions"_a, "options"_a, "results"_a, "threads"_a);
}
