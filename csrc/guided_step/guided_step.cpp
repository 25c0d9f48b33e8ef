// guided_step on the CPU: one pass over memory, in pieces that stay in the first-level cache.
//
// Any mixture of float32 and bfloat16, computed in float32; what else there is runs through PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "../_shared/planes.h"
#include "../_shared/rows.h"
#include "step.h"

namespace {

using namespace fastvid;
using torch::stable::Tensor;

constexpr int64_t kPiece = kNoiseBlock;

// A tensor whose rows are read as float32: where they lie, or through a buffer.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : single_(x), brief_(x), is_single_(x.scalar_type() == torch::headeronly::ScalarType::Float) {}
  const float* row(Place at, int64_t from, int64_t count, float* buffer) const {
    if (is_single_) return single_.at(at) + from;
    widen_row(brief_.at(at) + from, count, buffer);
    return buffer;
  }

 private:
  Planes<const float> single_;
  Planes<const bf16> brief_;
  bool is_single_;
};

// The rows of one piece. Unused branches and noise are null; `out` may be any of the others.
struct Piece {
  const float *x, *first, *second, *third, *noise;
  float* out;
  int64_t count;
};

template <int kBranches>
FOR_EVERY_CPU void guide_row(const Piece& piece, float first_scale, float second_scale, float* guided) {
  const float *const first = piece.first, *const second = piece.second, *const third = piece.third;
#pragma omp simd
  for (int64_t i = 0; i < piece.count; ++i) {
    const float last = kBranches > 2 ? third[i] : 0;
    guided[i] = guide<kBranches>(first[i], second[i], last, first_scale, second_scale);
  }
}

template <bool kClip, bool kNoise>
FOR_EVERY_CPU void advance_row(const Piece& piece, const float* predicted, Coefficients c, float clip) {
  const float *const x = piece.x, *const noise = piece.noise;
  float* const out = piece.out;
#pragma omp simd
  for (int64_t i = 0; i < piece.count; ++i) {
    float value = advance<kClip>(x[i], predicted[i], c, clip);
    if (kNoise) value += c.of_noise * noise[i];
    out[i] = value;
  }
}

// The new state in the dtype of x, clean where known.
template <typename X>
FOR_EVERY_CPU void finish(const float* value, const X* clean, const bool* known, int64_t count, X* out) {
  if (known) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      X own;
      narrow(value[i], &own);
      out[i] = known[i] ? clean[i] : own;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) narrow(value[i], out + i);
  }
}

void guided_step(Tensor x, Tensor prediction, Tensor table, int64_t row, int64_t branches,
                 double first_scale, double second_scale, double clip, std::optional<Tensor> known,
                 std::optional<Tensor> clean, std::optional<Tensor> noise,
                 std::optional<Tensor> seeds, int64_t stream, Tensor out) {
  const Sizes size = sizes_of(x);
  const Coefficients c =
      coefficients_of(static_cast<const float*>(table.data_ptr()) + row * table.size(1));
  const Known given(known);
  const Rows old(x), model(prediction), normals(noise ? *noise : x);
  const int64_t* const seed = seeds && c.of_noise != 0
                                  ? static_cast<const int64_t*>(seeds->data_ptr()) : nullptr;
  const bool noisy = c.of_noise != 0 && (seeds || noise), clipped = clip < kUnclipped;
  with_type(x, [&](auto type) {
    using X = decltype(type);
    const Planes<const X> given_data(clean ? *clean : x);
    X* const result = static_cast<X*>(out.data_ptr());
    torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t from_plane, int64_t to_plane) {
      float buffers[5][kPiece], guided[kPiece], fresh[kPiece];
      for (int64_t plane = from_plane; plane < to_plane; ++plane) {
        const Place at = size.place(plane);
        X* const to = result + plane * size.plane;
        if (given.frame(at)) {
          if (given_data.at(at) != to) std::copy_n(given_data.at(at), size.plane, to);
          continue;
        }
        const int64_t start = (at.c * size.frames + at.t) * size.plane;  // in the sample
        // Pieces from one multiple of the block of noise to the next, so that counters are whole.
        for (int64_t from = 0; from < size.plane;) {
          const int64_t block = (start + from) / kPiece, skipped = start + from - block * kPiece;
          const int64_t count = std::min(kPiece - skipped, size.plane - from);
          const auto branch = [&](int64_t g, float* buffer) -> const float* {
            return g < branches ? model.row({at.b + g * size.batch, at.c, at.t}, from, count, buffer)
                                : nullptr;
          };
          const bool* const cells = given.cells(at);
          Piece piece{old.row(at, from, count, buffers[0]), branch(0, buffers[1]),
                      branch(1, buffers[2]), branch(2, buffers[3]), nullptr, fresh, count};
          if constexpr (std::is_same_v<X, float>) {
            if (!cells) piece.out = to + from;
          }
          if (seed) {
            draw_block(uint64_t(seed[at.b]), uint64_t(block) * (kPiece / 4), uint32_t(stream), buffers[4]);
            piece.noise = buffers[4] + skipped;
          } else if (noisy) {
            piece.noise = normals.row(at, from, count, buffers[4]);
          }
          if (branches == 2) guide_row<2>(piece, first_scale, second_scale, guided);
          if (branches == 3) guide_row<3>(piece, first_scale, second_scale, guided);
          const float* const predicted = branches == 1 ? piece.first : guided;
          if (clipped) (noisy ? advance_row<true, true> : advance_row<true, false>)(piece, predicted, c, clip);
          else (noisy ? advance_row<false, true> : advance_row<false, false>)(piece, predicted, c, clip);
          if (piece.out == fresh)
            finish(fresh, given_data.at(at) + from, cells ? cells + from : nullptr, count, to + from);
          from += count;
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "guided_step(Tensor x, Tensor prediction, Tensor table, int row, int branches,"
      " float first_scale, float second_scale, float clip, Tensor? known, Tensor? clean, Tensor? noise,"
      " Tensor? seeds, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) { m.impl("guided_step", TORCH_BOX(&guided_step)); }
