// What one thread of the CUDA kernel of guided_step does: four numbers of one plane, as many as
// come of one counter of noise. Nothing here needs a GPU.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>

#include "../_shared/philox.h"
#include "../_shared/planes.h"
#include "step.h"

namespace fastvid {

using torch::stable::Tensor;

// What all threads know. A branch is a whole batch of predictions, `branch_step` after the last.
template <typename P>
struct Step {
  Planes<const float> x, clean, noise;
  Planes<const P> prediction;
  Known known;
  const float* table;
  const int64_t *step, *seeds;  // null seeds: noise is not drawn
  float* out;
  int64_t branch_step;
  uint32_t channels, frames, blocks, threads;  // blocks to a plane, threads to a block
  int32_t plane, rows, branches;               // numbers of a plane, rows of the table
  uint32_t stream;
  float first_scale, second_scale, clip;
  bool noisy;  // noise is given
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// The numbers p to p + 3 of a plane of `count`, 0 where there are none. `kWide`: they lie together
// on a multiple of four and are all there.
template <bool kWide, typename T>
FASTVID_INLINE Four<float> load_four(const T* plane, int32_t p, int32_t count) {
  Four<float> found;
  if constexpr (kWide) {
    const Four<T> narrow = *reinterpret_cast<const Four<T>*>(plane + p);
    for (int i = 0; i < 4; ++i) found.at[i] = float(narrow.at[i]);
  } else {
    for (int i = 0; i < 4; ++i)
      found.at[i] = p + i >= 0 && p + i < count ? float(plane[p + i]) : 0.0f;
  }
  return found;
}

template <bool kWide>
FASTVID_INLINE void store_four(const Four<float>& four, float* plane, int32_t p, int32_t count) {
  if constexpr (kWide) {
#ifdef __CUDA_ARCH__  // as an assignment this becomes four stores
    const float4 all = make_float4(four.at[0], four.at[1], four.at[2], four.at[3]);
    __stcg(reinterpret_cast<float4*>(plane + p), all);
#else
    *reinterpret_cast<Four<float>*>(plane + p) = four;
#endif
  } else {
    for (int i = 0; i < 4; ++i)
      if (p + i >= 0 && p + i < count) plane[p + i] = four.at[i];
  }
}

template <typename P, bool kWide, bool kDrawn>
FASTVID_INLINE void step_thread(const Step<P>& s, uint32_t block, uint32_t thread) {
  const uint32_t plane = block / s.blocks, piece = block - plane * s.blocks;
  const uint32_t row_of_planes = plane / s.frames, b = row_of_planes / s.channels;
  const Place at{b, row_of_planes - b * s.channels, plane - row_of_planes * s.frames};
  const int64_t start = (at.c * s.frames + at.t) * s.plane;  // of the plane in its sample
  // In the plane; below 0 where four numbers of one counter straddle two planes.
  const int32_t p = 4 * (piece * s.threads + thread) - (kWide ? 0 : start & 3);
  if (p >= s.plane) return;
  float* const out = s.out + int64_t(plane) * s.plane;
  if (s.known.frame(at)) {
    store_four<kWide>(load_four<kWide>(s.clean.at(at), p, s.plane), out, p, s.plane);
    return;
  }

  const int64_t asked = *s.step;  // what follows does not wait for it
  const P* const predictions = s.prediction.at(at);
  const Four<float> x = load_four<kWide>(s.x.at(at), p, s.plane);
  const Four<float> first = load_four<kWide>(predictions, p, s.plane);
  Four<float> second{}, third{};
  if (s.branches > 1) second = load_four<kWide>(predictions + s.branch_step, p, s.plane);
  if (s.branches > 2) third = load_four<kWide>(predictions + 2 * s.branch_step, p, s.plane);
  const int32_t row = asked < 0 ? 0 : asked < s.rows ? int32_t(asked) : s.rows - 1;
  const Coefficients c = coefficients_of(s.table + 5 * int64_t(row));
  Four<float> noise{};
  if (!kDrawn && s.noisy && c.of_noise != 0)  // NaN times 0 would be NaN
    noise = load_four<kWide>(s.noise.at(at), p, s.plane);
  if (kDrawn && c.of_noise != 0)
    normals(uint64_t(s.seeds[at.b]), uint64_t(start + p) / 4, s.stream + uint32_t(row), noise.at);

  Four<float> next;
  for (int i = 0; i < 4; ++i) {
    const float first_scale = s.first_scale, second_scale = s.second_scale;
    float m = first.at[i];
    if (s.branches == 2) m = guide<2>(m, second.at[i], 0, first_scale, second_scale);
    if (s.branches == 3) m = guide<3>(m, second.at[i], third.at[i], first_scale, second_scale);
    next.at[i] = s.clip < kUnclipped ? advance<true>(x.at[i], m, c, s.clip)
                                     : advance<false>(x.at[i], m, c, s.clip);
    next.at[i] += c.of_noise * noise.at[i];
  }
  if (const bool* const cells = s.known.cells(at)) {
    const Four<float> clean = load_four<kWide>(s.clean.at(at), p, s.plane);
    for (int i = 0; i < 4; ++i)
      if (p + i >= 0 && p + i < s.plane && cells[p + i]) next.at[i] = clean.at[i];
  }
  store_four<kWide>(next, out, p, s.plane);
}

// Whether `tensor` may be read four numbers at a time.
inline bool wide(const Tensor& tensor) {
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (4 * tensor.element_size()) == 0;
  for (int axis = 0; axis < 3; ++axis)
    fits = fits && (tensor.size(axis) == 1 || tensor.stride(axis) % 4 == 0);
  return fits && tensor.size(3) * tensor.size(4) % 4 == 0;
}

constexpr const char* kStepSchema =
    "guided_step(Tensor x, Tensor prediction, Tensor table, Tensor step, int branches,"
    " float first_scale, float second_scale, float clip, Tensor? known, Tensor? clean, Tensor? noise,"
    " Tensor? seeds, int stream, Tensor(a!) out) -> ()";

// Calls launch<P, kWide, kDrawn>(step, blocks in all), with the arguments of the op.
template <typename Launch>
void with_step(const Tensor& x, const Tensor& prediction, const Tensor& table, const Tensor& step,
               int64_t branches, double first_scale, double second_scale, double clip,
               const std::optional<Tensor>& known, const std::optional<Tensor>& clean,
               const std::optional<Tensor>& noise, const std::optional<Tensor>& seeds,
               int64_t stream, const Tensor& out, Launch launch) {
  const int32_t plane = x.size(3) * x.size(4);
  const uint32_t threads = plane > 256 ? 128 : 64;
  const uint32_t blocks = (plane + (plane % 4 ? 3 : 0) + 4 * threads - 1) / (4 * threads);
  bool four = wide(x) && wide(prediction) && wide(out);
  for (const auto* given : {&clean, &noise}) four = four && (!*given || wide(**given));
  const auto with_type = [&]<typename P>(P) {
    const Step<P> all{
        .x = Planes<const float>(x),
        .clean = Planes<const float>(clean ? *clean : x),
        .noise = Planes<const float>(noise ? *noise : x),
        .prediction = Planes<const P>(prediction),
        .known = Known(known),
        .table = static_cast<const float*>(table.data_ptr()),
        .step = static_cast<const int64_t*>(step.data_ptr()),
        .seeds = seeds ? static_cast<const int64_t*>(seeds->data_ptr()) : nullptr,
        .out = static_cast<float*>(out.data_ptr()),
        .branch_step = x.size(0) * prediction.stride(0),
        .channels = uint32_t(x.size(1)),
        .frames = uint32_t(x.size(2)),
        .blocks = blocks,
        .threads = threads,
        .plane = plane,
        .rows = int32_t(table.size(0)),
        .branches = int32_t(branches),
        .stream = uint32_t(stream),
        .first_scale = float(first_scale),
        .second_scale = float(second_scale),
        .clip = float(clip),
        .noisy = noise.has_value(),
    };
    const uint32_t grid = x.size(0) * x.size(1) * x.size(2) * blocks;
    if (four && seeds) launch.template operator()<P, true, true>(all, grid);
    else if (four) launch.template operator()<P, true, false>(all, grid);
    else if (seeds) launch.template operator()<P, false, true>(all, grid);
    else launch.template operator()<P, false, false>(all, grid);
  };
  switch (prediction.scalar_type()) {
    case torch::headeronly::ScalarType::Half: return with_type(torch::headeronly::Half());
    case torch::headeronly::ScalarType::BFloat16: return with_type(torch::headeronly::BFloat16());
    default: return with_type(float());
  }
}

}  // namespace fastvid
