// guided_step in CUDA, for states so small that a launch costs more than the work: float32 states,
// predictions in float32, float16 or bfloat16. The threads are those of thread.h.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../_shared/launch.h"
#include "thread.h"

namespace {

using namespace fastvid;

// The second bound, of blocks at once, is what registers suffice for without spilling.
template <typename P, bool kWide, bool kDrawn>
__global__ void __launch_bounds__(128, kWide ? 12 : 10)
    step_kernel(const __grid_constant__ Step<P> step) {
  step_thread<P, kWide, kDrawn>(step, blockIdx.x, threadIdx.x);
}

void guided_step(Tensor x, Tensor prediction, Tensor table, Tensor step, int64_t branches,
                 double first_scale, double second_scale, double clip, std::optional<Tensor> known,
                 std::optional<Tensor> clean, std::optional<Tensor> noise,
                 std::optional<Tensor> seeds, int64_t stream, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t queue = current_stream(x);
  with_step(x, prediction, table, step, branches, first_scale, second_scale, clip, known, clean,
            noise, seeds, stream, out,
            [&]<typename P, bool kWide, bool kDrawn>(const Step<P>& all, uint32_t grid) {
              step_kernel<P, kWide, kDrawn><<<grid, all.threads, 0, queue>>>(all);
            });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cuda, m) { m.def(kStepSchema); }

STABLE_TORCH_LIBRARY_IMPL(fastvid_cuda, CUDA, m) { m.impl("guided_step", TORCH_BOX(&guided_step)); }
