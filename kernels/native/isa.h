#pragma once

#include <string>
#include <vector>

namespace fastcifar {

// Instruction sets that the vector code is compiled for, from the one every processor has upwards.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };

constexpr int kIsas = 4;

const char* isa_name(Isa isa);

// Those compiled into this module that this processor and its operating system can run, best last.
std::vector<Isa> isa_levels();

// The one in use: the best, or what the environment variable FASTCIFAR_ISA or set_isa names.
// Throws std::invalid_argument for a name that is unknown or that cannot run here.
Isa isa();
void set_isa(const std::string& name);

}  // namespace fastcifar
