#include "augment_pixels.h"

namespace fastcifar {
namespace augment {
namespace FASTCIFAR_ISA {

const Kernels& kernels() {
  static constexpr Kernels table{&pack, {&render<float>, &render<BFloat16>, &render<Float16>}};
  return table;
}

}  // namespace FASTCIFAR_ISA
}  // namespace augment
}  // namespace fastcifar
