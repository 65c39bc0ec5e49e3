#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastcifar {
namespace {

constexpr const char* kNames[kIsas] = {"baseline", "avx2", "avx512", "avx512_bf16"};

std::atomic<int> chosen{-1};

bool runs(Isa isa) {
  if (isa == Isa::baseline) return true;
#if FASTCIFAR_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa named(const std::string& name) {
  std::string levels;
  for (const Isa level : isa_levels()) {
    if (name == isa_name(level)) return level;
    levels += std::string(levels.empty() ? "" : ", ") + isa_name(level);
  }
  throw std::invalid_argument("fastcifar: instruction set '" + name + "' cannot run here (there are: " + levels + ")");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

std::vector<Isa> isa_levels() {
  std::vector<Isa> levels;
  for (int i = 0; i < kIsas; ++i) {
    if (runs(Isa(i))) levels.push_back(Isa(i));
  }
  return levels;
}

Isa isa() {
  if (chosen < 0) {
    const char* name = std::getenv("FASTCIFAR_ISA");
    chosen = int(name != nullptr && *name != '\0' ? named(name) : isa_levels().back());
  }
  return Isa(int(chosen));
}

void set_isa(const std::string& name) { chosen = int(named(name)); }

}  // namespace fastcifar
