// Noise of whole samples on a GPU, and the words behind it: the ops of philox.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"
#include "philox.h"

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

namespace {

using namespace fastvid;

constexpr uint32_t kThreads = 128;

uint32_t blocks_for(int64_t threads) { return uint32_t((threads + kThreads - 1) / kThreads); }

__global__ void words_kernel(const int64_t* counters, const int64_t* seeds, int64_t* words, int64_t N) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= N) return;
  Words counter;
  for (int k = 0; k < 4; ++k) counter.at[k] = uint32_t(counters[4 * i + k]);
  const Words found = philox(counter, uint64_t(seeds[i]));
  for (int k = 0; k < 4; ++k) words[4 * i + k] = found.at[k];
}

// A thread draws the four numbers of a counter.
__global__ void normal_kernel(const int64_t* seeds, uint32_t stream, float* out, int64_t N, uint32_t blocks) {
  const uint32_t b = blockIdx.x / blocks;
  const int64_t index = int64_t(blockIdx.x - b * blocks) * kThreads + threadIdx.x;
  float noise[4];
  normals(uint64_t(seeds[b]), uint64_t(index), stream, noise);
  for (int k = 0; k < 4; ++k)
    if (4 * index + k < N) out[b * N + 4 * index + k] = noise[k];
}

// counters (N, 4) and seeds (N,) int64 -> words (N, 4) int64.
void philox_words(Tensor counters, Tensor seeds, Tensor words) {
  const DeviceGuard guard(seeds.get_device_index());
  const int64_t N = seeds.size(0);
  if (N == 0) return;
  words_kernel<<<blocks_for(N), kThreads, 0, current_stream(seeds)>>>(
      static_cast<const int64_t*>(counters.data_ptr()),
      static_cast<const int64_t*>(seeds.data_ptr()), static_cast<int64_t*>(words.data_ptr()), N);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// seeds (B,) int64 -> out (B, N) float32, contiguous.
void normal(Tensor seeds, int64_t stream, Tensor out) {
  const DeviceGuard guard(seeds.get_device_index());
  const int64_t N = out.size(1);
  if (out.numel() == 0) return;
  const uint32_t blocks = blocks_for((N + 3) / 4);
  normal_kernel<<<uint32_t(out.size(0)) * blocks, kThreads, 0, current_stream(seeds)>>>(
      static_cast<const int64_t*>(seeds.data_ptr()), uint32_t(stream),
      static_cast<float*>(out.data_ptr()), N, blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cuda, m) {
  m.def("philox_words(Tensor counters, Tensor seeds, Tensor(a!) words) -> ()");
  m.def("normal(Tensor seeds, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cuda, CUDA, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("normal", TORCH_BOX(&normal));
}
