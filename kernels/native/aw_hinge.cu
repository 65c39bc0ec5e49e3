#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "aw_hinge.h"
#include "aw_hinge_scalars.h"

namespace fastcifar::aw_hinge {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPack = 4;
constexpr int kSteps = int(kChunk) / (kThreads * kPack);
// A launch takes the table by value: no copy to the device, and a captured graph holds its own.
constexpr int kTableSize = 96;

struct Table {
  const void* real[kTableSize];
  const void* fake[kTableSize];
  void* target[kTableSize];
  long long size[kTableSize];
  int first_chunk[kTableSize + 1];
  Scalar source_scalar[kTableSize];
  Scalar target_scalar[kTableSize];
  bool accumulate[kTableSize];
  int count;
};
static_assert(sizeof(Table) <= 4000, "kernel parameters are limited to 4 KiB");

template <class T>
struct alignas(kPack * sizeof(T) < 16 ? kPack * sizeof(T) : 16) Pack {
  T values[kPack];
};

struct Chunk {
  int gradient;
  long long offset;
  int size;
};

__device__ Chunk chunk_of(const Table& table, int block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_chunk[middle] <= block ? low : high) = middle;
  }
  const long long offset = (long long)(block - table.first_chunk[low]) * kChunk;
  const long long rest = table.size[low] - offset;
  return {low, offset, int(rest < kChunk ? rest : kChunk)};
}

template <class T>
__device__ const T* at(const void* pointer, long long offset) {
  return pointer ? static_cast<const T*>(pointer) + offset : nullptr;
}

__device__ bool aligned(const void* pointer) { return reinterpret_cast<unsigned long long>(pointer) % 16 == 0; }

template <class T>
__device__ Pack<T> load_pack(const T* pointer, int index) {
  return pointer ? reinterpret_cast<const Pack<T>*>(pointer)[index] : Pack<T>{};
}

template <class T>
__device__ double load_at(const T* pointer, int index) {
  return pointer ? load(pointer[index]) : 0.0;
}

// Sums over the block, in a fixed order; valid in thread 0.
template <int Count>
__device__ void reduce_block(double (&sums)[Count]) {
  __shared__ double shared[Count][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) sums[i] += __shfl_down_sync(0xffffffffu, sums[i], width);
    if (lane == 0) shared[i][warp] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      sums[i] = shared[i][0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sums[i] += shared[i][w];
    }
  }
}

template <class T>
__device__ void hinge_side(const void* logits, void* gradients, long long count, double sign, double derivative,
                           double& loss, double& score) {
  for (long long i = threadIdx.x; i < count; i += kThreads) {
    const double x = load(static_cast<const T*>(logits)[i]);
    const double margin = 1.0 + sign * x;
    const bool outside = margin <= 0.0;
    loss += outside ? 0.0 : margin;
    score += 1.0 / (1.0 + exp(-x));
    store(static_cast<T*>(gradients)[i], outside ? 0.0 : derivative);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) hinge_terms_kernel(Logits logits) {
  const double scale = logits.scale * (logits.device_scale ? double(*logits.device_scale) : 1.0);
  const double n_real = logits.counts ? logits.counts[0] : double(logits.n_real);
  const double n_fake = logits.counts ? logits.counts[1] : double(logits.n_fake);
  double sums[4] = {};
  hinge_side<T>(logits.real, logits.d_real, logits.n_real, -1.0, -scale / n_real, sums[0], sums[2]);
  hinge_side<T>(logits.fake, logits.d_fake, logits.n_fake, 1.0, scale / n_fake, sums[1], sums[3]);
  reduce_block(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 4; ++i) logits.terms[i] = sums[i] / (i % 2 ? n_fake : n_real);
}

__device__ void add_products(double a, double b, double (&sums)[3]) {
  sums[0] += a * a;
  sums[1] += b * b;
  sums[2] += a * b;
}

template <class T>
__device__ void dot_chunk(const Table& table, const Chunk& chunk, double (&sums)[3]) {
  const T* real = at<T>(table.real[chunk.gradient], chunk.offset);
  const T* fake = at<T>(table.fake[chunk.gradient], chunk.offset);
  if (chunk.size == kChunk && aligned(real) && aligned(fake)) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Pack<T> a = load_pack(real, step * kThreads + threadIdx.x);
      const Pack<T> b = load_pack(fake, step * kThreads + threadIdx.x);
#pragma unroll
      for (int i = 0; i < kPack; ++i) add_products(load(a.values[i]), load(b.values[i]), sums);
    }
  } else {
    for (int i = threadIdx.x; i < chunk.size; i += kThreads) add_products(load_at(real, i), load_at(fake, i), sums);
  }
}

// One block a chunk: partials[3 · block] are its three sums.
__global__ void __launch_bounds__(kThreads) gradient_products_kernel(const __grid_constant__ Table table,
                                                                     double* partials) {
  const Chunk chunk = chunk_of(table, blockIdx.x);
  double sums[3] = {};
  switch (table.source_scalar[chunk.gradient]) {
    case Scalar::float32: dot_chunk<float>(table, chunk, sums); break;
    case Scalar::float64: dot_chunk<double>(table, chunk, sums); break;
    case Scalar::bfloat16: dot_chunk<BFloat16>(table, chunk, sums); break;
    case Scalar::float16: dot_chunk<Float16>(table, chunk, sums); break;
  }
  reduce_block(sums);
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) partials[3ll * blockIdx.x + i] = sums[i];
}

__global__ void __launch_bounds__(kThreads) decide_kernel(Decision decision, long long chunks) {
  double sums[3] = {};
  for (long long c = threadIdx.x; c < chunks; c += kThreads)
    for (int i = 0; i < 3; ++i) sums[i] += decision.workspace[3 * c + i];
  reduce_block(sums);
  if (threadIdx.x == 0) decide(decision, sums);
}

template <class From, class To>
__device__ void combine_chunk(const Table& table, const Chunk& chunk, double weight_real, double weight_fake) {
  const From* real = at<From>(table.real[chunk.gradient], chunk.offset);
  const From* fake = at<From>(table.fake[chunk.gradient], chunk.offset);
  To* target = static_cast<To*>(table.target[chunk.gradient]) + chunk.offset;
  const bool accumulate = table.accumulate[chunk.gradient];
  if (chunk.size == kChunk && aligned(real) && aligned(fake) && aligned(target)) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int index = step * kThreads + threadIdx.x;
      const Pack<From> a = load_pack(real, index);
      const Pack<From> b = load_pack(fake, index);
      Pack<To> out = load_pack(accumulate ? target : nullptr, index);
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        store(out.values[i],
              load(out.values[i]) + (weight_real * load(a.values[i]) + weight_fake * load(b.values[i])));
      reinterpret_cast<Pack<To>*>(target)[index] = out;
    }
  } else {
    for (int i = threadIdx.x; i < chunk.size; i += kThreads)
      store(target[i], load_at<To>(accumulate ? target : nullptr, i) +
                           (weight_real * load_at(real, i) + weight_fake * load_at(fake, i)));
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Table table,
                                                           const double* weights) {
  const Chunk chunk = chunk_of(table, blockIdx.x);
  const double wr = weights[0], wf = weights[1];
  const Scalar from = table.source_scalar[chunk.gradient], to = table.target_scalar[chunk.gradient];
  if (from == to) {
    switch (from) {
      case Scalar::float32: combine_chunk<float, float>(table, chunk, wr, wf); break;
      case Scalar::float64: combine_chunk<double, double>(table, chunk, wr, wf); break;
      case Scalar::bfloat16: combine_chunk<BFloat16, BFloat16>(table, chunk, wr, wf); break;
      case Scalar::float16: combine_chunk<Float16, Float16>(table, chunk, wr, wf); break;
    }
  } else if (to == Scalar::bfloat16) {
    combine_chunk<float, BFloat16>(table, chunk, wr, wf);
  } else {
    combine_chunk<float, Float16>(table, chunk, wr, wf);
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("aw_hinge: ") + what + " failed: " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ")");
}

// A stream belongs to a device; launches need that device to be the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

// Calls launch(table, blocks, chunks before this table) for every kTableSize gradients; returns the number of chunks.
template <class Launch>
long long for_tables(const Gradient* gradients, std::int64_t count, Launch launch) {
  long long before = 0;
  for (std::int64_t first = 0; first < count; first += kTableSize) {
    Table table{};
    table.count = int(std::min<std::int64_t>(kTableSize, count - first));
    for (int i = 0; i < table.count; ++i) {
      const Gradient& g = gradients[first + i];
      table.real[i] = g.real;
      table.fake[i] = g.fake;
      table.target[i] = g.target;
      table.size[i] = g.size;
      table.source_scalar[i] = g.source_scalar;
      table.target_scalar[i] = g.target_scalar;
      table.accumulate[i] = g.accumulate;
      table.first_chunk[i + 1] = table.first_chunk[i] + int(chunks_of(g.size));
    }
    const int blocks = table.first_chunk[table.count];
    if (blocks > 0) launch(table, blocks, before);
    before += blocks;
  }
  return before;
}

}  // namespace

const char* cuda_obstacle() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

void hinge_terms_cuda(const Logits& logits, int device, void* stream) {
  const DeviceGuard guard(device);
  with_scalar(logits.scalar, [&](auto tag) {
    hinge_terms_kernel<decltype(tag)><<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(logits);
  });
  check(cudaGetLastError(), "hinge_terms_kernel");
}

void gradient_weights_cuda(const Gradient* gradients, std::int64_t count, const Decision& decision, int device,
                           void* stream) {
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const long long chunks = for_tables(gradients, count, [&](const Table& table, int blocks, long long before) {
    gradient_products_kernel<<<blocks, kThreads, 0, cuda_stream>>>(table, decision.workspace + 3 * before);
    check(cudaGetLastError(), "gradient_products_kernel");
  });
  decide_kernel<<<1, kThreads, 0, cuda_stream>>>(decision, chunks);
  check(cudaGetLastError(), "decide_kernel");
}

void combine_cuda(const Gradient* gradients, std::int64_t count, const double* weights, int device, void* stream) {
  const DeviceGuard guard(device);
  for_tables(gradients, count, [&](const Table& table, int blocks, long long) {
    combine_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, weights);
    check(cudaGetLastError(), "combine_kernel");
  });
}

}  // namespace fastcifar::aw_hinge
