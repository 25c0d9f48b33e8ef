// The arithmetic of guided_step for one number, on the CPU and in CUDA.

#pragma once

#include "../_shared/inline.h"

namespace fastvid {

// A row of the table, and what it makes of x and prediction where nothing is clipped.
struct Coefficients {
  float x0_of_x, x0_of_prediction, of_x0, of_x, of_noise;
  FASTVID_INLINE float direct_x() const { return of_x + of_x0 * x0_of_x; }
  FASTVID_INLINE float direct_prediction() const { return of_x0 * x0_of_prediction; }
};

FASTVID_INLINE Coefficients coefficients_of(const float* row) {
  return {row[0], row[1], row[2], row[3], row[4]};
}

// One prediction of two or three; `third` counts in the latter case only.
template <int kBranches>
FASTVID_INLINE float guide(float first, float second, float third, float first_scale,
                           float second_scale) {
  const float value = first + first_scale * (second - first);
  return kBranches > 2 ? value + second_scale * (third - second) : value;
}

constexpr float kUnclipped = 1e38f;  // from here on a bound of x0 bounds nothing

// The next state but for its noise.
template <bool kClip>
FASTVID_INLINE float advance(float x, float predicted, const Coefficients& c, float clip) {
  if (!kClip) return c.direct_x() * x + c.direct_prediction() * predicted;
  float x0 = c.x0_of_x * x + c.x0_of_prediction * predicted;
  x0 = x0 > clip ? clip : x0 < -clip ? -clip : x0;  // NaN stays NaN
  return c.of_x0 * x0 + c.of_x * x;
}

}  // namespace fastvid
