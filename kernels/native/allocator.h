#pragma once

namespace fastcifar {

// Keeps freed memory in the process: large tensors come from the heap instead of fresh mappings, so that each training
// step does not fault its pages in again. Returns false where the C library has no such setting.
bool tune_allocator();

}  // namespace fastcifar
