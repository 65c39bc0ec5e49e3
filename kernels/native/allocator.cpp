#include "allocator.h"

#if defined(__GLIBC__) || __has_include(<features.h>)
#include <features.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace fastcifar {

bool tune_allocator() {
#ifdef __GLIBC__
  constexpr int mmap_threshold = 1 << 30;
  constexpr int trim_threshold = 2147483647;
  return mallopt(M_MMAP_THRESHOLD, mmap_threshold) == 1 && mallopt(M_TRIM_THRESHOLD, trim_threshold) == 1;
#else
  return false;
#endif
}

}  // namespace fastcifar
