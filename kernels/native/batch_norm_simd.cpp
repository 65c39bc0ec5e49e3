#include "batch_norm_elements.h"

namespace fastcifar {
namespace batch_norm {
namespace FASTCIFAR_ISA {

const Kernels& kernels() {
  static constexpr Kernels table{
      {&statistics<float>, &statistics<BFloat16>, &statistics<Float16>},
      {&normalise<float>, &normalise<BFloat16>, &normalise<Float16>},
      {&reduce<float>, &reduce<BFloat16>, &reduce<Float16>},
      {&gradient<float>, &gradient<BFloat16>, &gradient<Float16>},
  };
  return table;
}

}  // namespace FASTCIFAR_ISA
}  // namespace batch_norm
}  // namespace fastcifar
