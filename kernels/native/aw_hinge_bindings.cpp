#include "aw_hinge_bindings.h"

#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "aw_hinge.h"

namespace nb = nanobind;
namespace hinge = fastcifar::aw_hinge;
using namespace nb::literals;

namespace {

// Tensors arrive as addresses (0 for none) and the device as its CUDA index, -1 for the CPU: nothing here knows torch.
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Integers = std::vector<std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

hinge::Scalar scalar(std::int64_t code) {
  if (code < 0 || code > 3) throw std::invalid_argument("aw_hinge: unknown scalar code " + std::to_string(code));
  return static_cast<hinge::Scalar>(code);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("aw_hinge: ") + message);
}

[[maybe_unused, noreturn]] void without_cuda() {
  throw std::runtime_error("aw_hinge: this module was compiled without CUDA");
}

void terms(Address real, Address fake, Address d_real, Address d_fake, std::int64_t n_real, std::int64_t n_fake,
           std::int64_t code, Address counts, Address device_scale, double scale, Address terms, int device,
           Address stream) {
  const hinge::Logits logits{pointer<void>(real),   pointer<void>(fake),         pointer<void>(d_real),
                             pointer<void>(d_fake), n_real,                      n_fake,
                             scalar(code),          pointer<double>(counts),     pointer<float>(device_scale),
                             scale,                 pointer<double>(terms)};
  if (device < 0) return hinge::hinge_terms_cpu(logits);
#if FASTCIFAR_CUDA
  hinge::hinge_terms_cuda(logits, device, pointer<void>(stream));
#else
  without_cuda();
#endif
}

void weights(const Addresses& real, const Addresses& fake, const Integers& sizes, const Integers& codes,
             Address terms, Address device_scale, double scale, double alpha1, double alpha2, double delta,
             double epsilon, bool normalized, Address workspace, std::int64_t workspace_size, Address weights,
             Address finite, int device, Address stream, int threads) {
  const std::size_t count = sizes.size();
  require(real.size() == count && fake.size() == count && codes.size() == count, "the lists differ in length");
  std::vector<hinge::Gradient> gradients(count);
  std::int64_t chunks = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const hinge::Scalar source = scalar(codes[i]);
    gradients[i] = {pointer<void>(real[i]), pointer<void>(fake[i]), nullptr, sizes[i], source, source, false};
    chunks += hinge::chunks_of(sizes[i]);
  }
  require(workspace_size >= 3 * chunks, "the workspace is too small");
  const hinge::Decision decision{pointer<double>(terms),
                                 pointer<float>(device_scale),
                                 scale,
                                 {alpha1, alpha2, delta, epsilon, normalized},
                                 pointer<double>(workspace),
                                 pointer<double>(weights),
                                 pointer<bool>(finite)};
  if (device < 0) return hinge::gradient_weights_cpu(gradients.data(), std::int64_t(count), decision, threads);
#if FASTCIFAR_CUDA
  hinge::gradient_weights_cuda(gradients.data(), std::int64_t(count), decision, device, pointer<void>(stream));
#else
  without_cuda();
#endif
}

void combine(const Addresses& real, const Addresses& fake, const Addresses& targets, const Integers& sizes,
             const Integers& source_codes, const Integers& target_codes, const std::vector<bool>& accumulate,
             Address weights, int device, Address stream, int threads) {
  const std::size_t count = sizes.size();
  require(real.size() == count && fake.size() == count && targets.size() == count && source_codes.size() == count &&
              target_codes.size() == count && accumulate.size() == count,
          "the lists differ in length");
  std::vector<hinge::Gradient> gradients(count);
  for (std::size_t i = 0; i < count; ++i) {
    const hinge::Scalar source = scalar(source_codes[i]), target = scalar(target_codes[i]);
    require(source == target || (source == hinge::Scalar::float32 && target != hinge::Scalar::float64),
            "a gradient must have the dtype of its target, or float32 for a 16-bit one");
    gradients[i] = {pointer<void>(real[i]), pointer<void>(fake[i]), pointer<void>(targets[i]), sizes[i],
                    source,                 target,                 accumulate[i]};
  }
  const auto* values = pointer<double>(weights);
  if (device < 0) return hinge::combine_cpu(gradients.data(), std::int64_t(count), values, threads);
#if FASTCIFAR_CUDA
  hinge::combine_cuda(gradients.data(), std::int64_t(count), values, device, pointer<void>(stream));
#else
  without_cuda();
#endif
}

// None, or why CUDA code of this module cannot run on this machine.
const char* cuda_obstacle() {
#if FASTCIFAR_CUDA
  return hinge::cuda_obstacle();
#else
  return "built without CUDA";
#endif
}

}  // namespace

void bind_aw_hinge(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.attr("aw_hinge_chunk") = hinge::kChunk;
  m.def("cuda_obstacle", &cuda_obstacle);
  m.def("aw_hinge_terms", &terms, "real"_a, "fake"_a, "d_real"_a, "d_fake"_a, "n_real"_a, "n_fake"_a, "scalar"_a,
        "counts"_a, "device_scale"_a, "scale"_a, "terms"_a, "device"_a, "stream"_a, Release());
  m.def("aw_hinge_weights", &weights, "real"_a, "fake"_a, "sizes"_a, "scalars"_a, "terms"_a, "device_scale"_a,
        "scale"_a, "alpha1"_a, "alpha2"_a, "delta"_a, "epsilon"_a, "normalized"_a, "workspace"_a, "workspace_size"_a,
        "weights"_a, "finite"_a, "device"_a, "stream"_a, "threads"_a, Release());
  m.def("aw_hinge_combine", &combine, "real"_a, "fake"_a, "targets"_a, "sizes"_a, "source_scalars"_a,
        "target_scalars"_a, "accumulate"_a, "weights"_a, "device"_a, "stream"_a, "threads"_a, Release());
}
