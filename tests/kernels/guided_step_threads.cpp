// The threads of the CUDA kernel of guided_step, one after the other on a CPU.

#include <torch/csrc/stable/library.h>

#include "../../csrc/guided_step/thread.h"

namespace {

using namespace fastvid;

void guided_step(Tensor x, Tensor prediction, Tensor table, Tensor step, int64_t branches,
                 double first_scale, double second_scale, double clip, std::optional<Tensor> known,
                 std::optional<Tensor> clean, std::optional<Tensor> noise,
                 std::optional<Tensor> seeds, int64_t stream, Tensor out) {
  with_step(x, prediction, table, step, branches, first_scale, second_scale, clip, known, clean,
            noise, seeds, stream, out,
            []<typename P, bool kWide, bool kDrawn>(const Step<P>& all, uint32_t grid) {
              for (uint32_t block = 0; block < grid; ++block)
                for (uint32_t thread = 0; thread < all.threads; ++thread)
                  step_thread<P, kWide, kDrawn>(all, block, thread);
            });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_threads, m) { m.def(kStepSchema); }

STABLE_TORCH_LIBRARY_IMPL(fastvid_threads, CPU, m) { m.impl("guided_step", TORCH_BOX(&guided_step)); }
