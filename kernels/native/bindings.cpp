#include <nanobind/nanobind.h>

#include "allocator.h"
#include "augment_bindings.h"
#include "batch_norm_bindings.h"
#include "depthwise_bindings.h"
#include "aw_hinge_bindings.h"
#include "spectral_bindings.h"

namespace nb = nanobind;

namespace {

nb::dict build_info() {
  nb::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cuda"] = FASTCIFAR_CUDA != 0;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled part of fastcifar.";
  m.def("tune_allocator", &fastcifar::tune_allocator);
  m.def("build_info", &build_info);
  bind_depthwise(m);
  bind_batch_norm(m);
  bind_aw_hinge(m);
  bind_spectral(m);
  bind_augment(m);
}
