// Latents (B, C, T, H, W) as planes of H x W numbers that lie together; steps between planes are
// free. The twin of kernels/_shared/planes.py, for the CPU and for CUDA.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "inline.h"

namespace fastvid {

struct Place {
  int64_t b, c, t;
};

struct Sizes {
  int64_t batch, channels, frames, plane;
  int64_t planes() const { return batch * channels * frames; }
  Place place(int64_t plane) const {
    return {plane / (channels * frames), plane / frames % channels, plane % frames};
  }
};

inline Sizes sizes_of(const torch::stable::Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3) * x.size(4)};
}

template <typename T>
struct Planes {
  T* data;
  int64_t batch_step, channel_step, frame_step;
  explicit Planes(const torch::stable::Tensor& x)
      : data(static_cast<T*>(x.data_ptr())),
        batch_step(x.stride(0)),
        channel_step(x.stride(1)),
        frame_step(x.stride(2)) {}
  FASTVID_INLINE T* at(Place place) const {
    return data + place.b * batch_step + place.c * channel_step + place.t * frame_step;
  }
};

// bool (B|1, T) or (B|1, T, H, W), or nothing.
struct Known {
  const bool* data = nullptr;
  int64_t batch_step = 0, frame_step = 0;
  bool per_cell = false;
  explicit Known(const std::optional<torch::stable::Tensor>& known) {
    if (!known) return;
    data = static_cast<const bool*>(known->data_ptr());
    batch_step = known->size(0) > 1 ? known->stride(0) : 0;
    frame_step = known->stride(1);
    per_cell = known->dim() == 4;
  }
  FASTVID_INLINE const bool* at(Place place) const { return data + place.b * batch_step + place.t * frame_step; }
  // The cells of a plane where each is its own, else null.
  FASTVID_INLINE const bool* cells(Place place) const { return per_cell ? at(place) : nullptr; }
  // Whether the plane is known as a whole.
  FASTVID_INLINE bool frame(Place place) const { return data && !per_cell && *at(place); }
};

// Planes that one thread takes at a time.
inline int64_t grain(int64_t plane) { return std::max<int64_t>(1, 32768 / plane); }

}  // namespace fastvid
