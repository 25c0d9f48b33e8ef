// noising and masked_mse on the CPU: one pass over memory each, noise drawn where it is used.
//
// float32 and bfloat16, computed in float32; what else there is runs through PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "../_shared/planes.h"
#include "../_shared/rows.h"

namespace {

using namespace fastvid;
using torch::stable::Tensor;

// What a cell's level makes of its data and noise.
struct Factors {
  float noisy_x, noisy_eps, target_x, target_eps;
};

enum class Target { none, eps, v, flow };

Target target_of(const std::string& name) {
  return name == "eps" ? Target::eps : name == "v" ? Target::v : name == "flow" ? Target::flow
                                                                              : Target::none;
}

Factors factors(float alpha, float sigma, Target target) {
  switch (target) {
    case Target::v: return {alpha, sigma, -sigma, alpha};
    case Target::flow: return {alpha, sigma, -1, 1};
    default: return {alpha, sigma, 0, 1};
  }
}

// Levels (B|1, T|1), contiguous.
struct Levels {
  const float *alpha, *sigma;
  int64_t batch_step, frame_step;
  Levels(const Tensor& a, const Tensor& s)
      : alpha(static_cast<const float*>(a.data_ptr())),
        sigma(static_cast<const float*>(s.data_ptr())),
        batch_step(a.size(0) > 1 ? a.size(1) : 0),
        frame_step(a.size(1) > 1 ? 1 : 0) {}
  Factors at(int64_t b, int64_t t, Target target) const {
    const int64_t i = b * batch_step + t * frame_step;
    return factors(alpha[i], sigma[i], target);
  }
};

// A row of one frame: every number has the same level. `keep`: noisy is x, whatever eps holds.
template <typename X>
FOR_EVERY_CPU void row_of_frame(const X* x, const float* eps, int64_t count, Factors f, bool keep,
                                X* noisy, X* target) {
  if (keep) {
    std::copy_n(x, count, noisy);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      narrow(f.noisy_x * widen(x[i]) + f.noisy_eps * eps[i], noisy + i);
  }
  if (target) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      narrow(f.target_x * widen(x[i]) + f.target_eps * eps[i], target + i);
  }
}

// A row whose cells have one of two levels, f where unknown and g where known.
template <typename X>
FOR_EVERY_CPU void row_of_cells(const X* x, const float* eps, const bool* known, int64_t count,
                                Factors f, Factors g, bool keep, X* noisy, X* target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = widen(x[i]), e = eps[i];
    const float of_x = known[i] ? g.noisy_x : f.noisy_x;
    const float of_eps = known[i] ? g.noisy_eps : f.noisy_eps;
    const float mixed = of_x * value + of_eps * e;
    narrow(known[i] && keep ? value : mixed, noisy + i);
  }
  if (!target) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float of_x = known[i] ? g.target_x : f.target_x;
    const float of_eps = known[i] ? g.target_eps : f.target_eps;
    narrow(of_x * widen(x[i]) + of_eps * eps[i], target + i);
  }
}

void noising(Tensor x0, Tensor alpha, Tensor sigma, std::optional<Tensor> noise,
             std::optional<Tensor> seeds, int64_t stream, std::optional<Tensor> known,
             std::optional<Tensor> known_alpha, std::optional<Tensor> known_sigma,
             std::string target_name, Tensor noisy, Tensor target) {
  const Sizes size = sizes_of(x0);
  const Target kind = target_of(target_name);
  const Levels levels(alpha, sigma);
  const bool own = known_alpha.has_value();
  const Levels known_levels = own ? Levels(*known_alpha, *known_sigma) : levels;
  const Known given(known);
  const int64_t* const seed = seeds ? static_cast<const int64_t*>(seeds->data_ptr()) : nullptr;
  with_type(x0, [&](auto type) {
    using X = decltype(type);
    const Planes<X> x(x0), e(noise ? *noise : x0);
    X* const out = static_cast<X*>(noisy.data_ptr());
    X* const made = kind == Target::none ? nullptr : static_cast<X*>(target.data_ptr());
    torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t first, int64_t last) {
      float eps[kNoiseBlock];
      for (int64_t plane = first; plane < last; ++plane) {
        const Place at = size.place(plane);
        const Factors f = levels.at(at.b, at.t, kind);
        const Factors g = own ? known_levels.at(at.b, at.t, kind) : factors(1, 0, kind);
        const bool* const cells = given.cells(at);
        const bool whole = given.frame(at);
        const int64_t start = (at.c * size.frames + at.t) * size.plane;  // in the sample
        // Pieces of a plane from one multiple of the block to the next, so that counters are whole.
        for (int64_t from = 0; from < size.plane;) {
          const int64_t block = (start + from) / kNoiseBlock, skipped = start + from - block * kNoiseBlock;
          const int64_t count = std::min(kNoiseBlock - skipped, size.plane - from);
          const float* row = eps;
          if (seed) {
            draw_block(uint64_t(seed[at.b]), uint64_t(block) * (kNoiseBlock / 4), uint32_t(stream), eps);
            row = eps + skipped;
          } else if constexpr (std::is_same_v<X, float>) {
            row = e.at(at) + from;
          } else {
            widen_row(e.at(at) + from, count, eps);
          }
          X* const to = out + plane * size.plane + from;
          X* const made_to = made ? made + plane * size.plane + from : nullptr;
          const X* const data = x.at(at) + from;
          if (cells) row_of_cells(data, row, cells + from, count, f, g, !own, to, made_to);
          else row_of_frame(data, row, count, whole ? g : f, whole && !own, to, made_to);
          from += count;
        }
      }
    });
  });
}

constexpr int64_t kPiece = 64;  // numbers summed in float32 before the sum goes on in float64

// Sum of squared differences where unknown.
template <typename P, typename Q>
FOR_EVERY_CPU double square_sum(const P* pred, const Q* target, const bool* known, int64_t count) {
  double total = 0;
  for (int64_t from = 0; from < count; from += kPiece) {
    const int64_t to = std::min(from + kPiece, count);
    float sum = 0;
    if (known) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = from; i < to; ++i) {
        const float difference = known[i] ? 0.0f : widen(pred[i]) - widen(target[i]);
        sum += difference * difference;
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = from; i < to; ++i) {
        const float difference = widen(pred[i]) - widen(target[i]);
        sum += difference * difference;
      }
    }
    total += sum;
  }
  return total;
}

template <typename P, typename Q>
FOR_EVERY_CPU void slope_row(const P* pred, const Q* target, const bool* known, int64_t count,
                             float slope, P* out) {
  if (known) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      narrow(known[i] ? 0.0f : slope * (widen(pred[i]) - widen(target[i])), out + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      narrow(slope * (widen(pred[i]) - widen(target[i])), out + i);
  }
}

// The share of a sample that is unknown, times its numbers.
int64_t unknown_count(const Known& given, const Sizes& size, int64_t b) {
  int64_t count = 0;
  for (int64_t t = 0; t < size.frames; ++t) {
    const Place at{b, 0, t};
    if (const bool* const cells = given.cells(at))
      count += std::count(cells, cells + size.plane, false);
    else if (!given.frame(at))
      count += size.plane;
  }
  return count * size.channels;
}

void masked_mse(Tensor pred, Tensor target, std::optional<Tensor> known, bool all, Tensor loss,
                Tensor weight) {
  const Sizes size = sizes_of(pred);
  const Known given(known);
  const std::unique_ptr<double[]> sums(new double[size.planes()]);
  with_type(pred, [&](auto pred_type) {
    with_type(target, [&](auto target_type) {
      const Planes<decltype(pred_type)> p(pred);
      const Planes<decltype(target_type)> q(target);
      torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t first, int64_t last) {
        for (int64_t plane = first; plane < last; ++plane) {
          const Place at = size.place(plane);
          sums[plane] = given.frame(at) ? 0
                                        : square_sum(p.at(at), q.at(at), given.cells(at), size.plane);
        }
      });
    });
  });
  float* const losses = static_cast<float*>(loss.data_ptr());
  float* const weights = static_cast<float*>(weight.data_ptr());
  const int64_t per_sample = size.channels * size.frames;
  for (int64_t b = 0; b < size.batch; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < per_sample; ++i) sum += sums[b * per_sample + i];
    const int64_t count = unknown_count(given, size, b);
    const double divisor = all && count ? per_sample * size.plane : count;
    losses[b] = float(sum / divisor);  // 0 / 0: NaN where nothing is unknown
    weights[b] = float(1 / divisor);
  }
}

void masked_mse_backward(Tensor dloss, Tensor pred, Tensor target, std::optional<Tensor> known,
                         Tensor weight, Tensor dpred) {
  const Sizes size = sizes_of(pred);
  const Known given(known);
  const float* const upstream = static_cast<const float*>(dloss.data_ptr());
  const float* const weights = static_cast<const float*>(weight.data_ptr());
  with_type(pred, [&](auto pred_type) {
    with_type(target, [&](auto target_type) {
      using P = decltype(pred_type);
      const Planes<P> p(pred);
      const Planes<decltype(target_type)> q(target);
      P* const out = static_cast<P*>(dpred.data_ptr());
      torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t first, int64_t last) {
        for (int64_t plane = first; plane < last; ++plane) {
          const Place at = size.place(plane);
          P* const row = out + plane * size.plane;
          if (given.frame(at)) std::fill_n(row, size.plane, P(0));
          else slope_row(p.at(at), q.at(at), given.cells(at), size.plane,
                         2 * upstream[at.b] * weights[at.b], row);
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "noising(Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? seeds, int stream,"
      " Tensor? known, Tensor? known_alpha, Tensor? known_sigma, str target,"
      " Tensor(a!) noisy, Tensor(b!) target_out) -> ()");
  m.def(
      "masked_mse(Tensor pred, Tensor target, Tensor? known, bool all, Tensor(a!) loss,"
      " Tensor(b!) weight) -> ()");
  m.def(
      "masked_mse_backward(Tensor dloss, Tensor pred, Tensor target, Tensor? known, Tensor weight,"
      " Tensor(a!) dpred) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("noising", TORCH_BOX(&noising));
  m.impl("masked_mse", TORCH_BOX(&masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&masked_mse_backward));
}
