#include "depthwise_gradients.h"
#include "depthwise_tasks.h"

namespace fastcifar {
namespace depthwise {
namespace FASTCIFAR_ISA {

const Kernels& kernels() {
  static constexpr Kernels table{
      kLanes,
      {&forward<float>, &forward<BFloat16>, &forward<Float16>},
      {&normalise<float>, &normalise<BFloat16>, &normalise<Float16>},
      {&reduce<float>, &reduce<BFloat16>, &reduce<Float16>},
      {&gradients<float>, &gradients<BFloat16>, &gradients<Float16>},
  };
  return table;
}

}  // namespace FASTCIFAR_ISA
}  // namespace depthwise
}  // namespace fastcifar
