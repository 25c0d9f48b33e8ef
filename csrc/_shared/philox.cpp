// Noise of whole samples on the CPU, and the words behind it for whoever checks them.

#include "philox.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "rows.h"

using torch::stable::Tensor;

namespace {

using namespace fastvid;

FOR_EVERY_CPU void words_of(const int64_t* counters, const int64_t* seeds, int64_t* words,
                            int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    Words counter;
    for (int k = 0; k < 4; ++k) counter.at[k] = uint32_t(counters[4 * i + k]);
    const Words found = philox(counter, uint64_t(seeds[i]));
    for (int k = 0; k < 4; ++k) words[4 * i + k] = found.at[k];
  }
}

// counters (N, 4) and seeds (N,) int64 -> words (N, 4) int64.
void philox_words(Tensor counters, Tensor seeds, Tensor words) {
  words_of(static_cast<const int64_t*>(counters.data_ptr()),
           static_cast<const int64_t*>(seeds.data_ptr()), static_cast<int64_t*>(words.data_ptr()), 0,
           seeds.size(0));
}

// seeds (B,) int64 -> out (B, N) float32, contiguous.
void normal(Tensor seeds, int64_t stream, Tensor out) {
  const int64_t N = out.size(1), blocks = (N + kNoiseBlock - 1) / kNoiseBlock;
  const int64_t* const seed = static_cast<const int64_t*>(seeds.data_ptr());
  float* const noise = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, out.size(0) * blocks, 16, [&](int64_t first, int64_t last) {
    float block[kNoiseBlock];
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / blocks, start = task % blocks * kNoiseBlock;
      draw_block(uint64_t(seed[b]), uint64_t(start) / 4, uint32_t(stream), block);
      std::copy_n(block, std::min(kNoiseBlock, N - start), noise + b * N + start);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def("philox_words(Tensor counters, Tensor seeds, Tensor(a!) words) -> ()");
  m.def("normal(Tensor seeds, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("normal", TORCH_BOX(&normal));
}
