// The stages of Pyramid Flow on the CPU: one pass over memory each, noise drawn where it is used.
//
// float32 and bfloat16, computed in float32; what else there is runs through PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../_shared/planes.h"
#include "../_shared/rows.h"

namespace {

using namespace fastvid;
using torch::stable::Tensor;

constexpr int64_t kPiece = kNoiseBlock / 4;  // blocks of 2 x 2 whose noise is drawn together

// alpha; beta times the root of a block's covariance, its diagonal and the numbers below it; beta.
struct Factors {
  float alpha, diagonal[4], below[3], beta;
};

// A run of blocks in one row: four normals each, to two rows of the result.
template <typename X, typename Z>
FOR_EVERY_CPU void from_normals(const X* x, const Z* normals, int64_t count, Factors f, X* top,
                                X* bottom) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float z0 = widen(normals[4 * i]), z1 = widen(normals[4 * i + 1]);
    const float z2 = widen(normals[4 * i + 2]), z3 = widen(normals[4 * i + 3]);
    float mean = f.alpha * widen(x[i]);  // of the number to come, given those before it
    narrow(mean + f.diagonal[0] * z0, top + 2 * i);
    mean += f.below[0] * z0;
    narrow(mean + f.diagonal[1] * z1, top + 2 * i + 1);
    mean += f.below[1] * z1;
    narrow(mean + f.diagonal[2] * z2, bottom + 2 * i);
    mean += f.below[2] * z2;
    narrow(mean + f.diagonal[3] * z3, bottom + 2 * i + 1);
  }
}

// One row of the result from its block noise.
template <typename X, typename Z>
FOR_EVERY_CPU void from_noise(const X* x, const Z* noise, int64_t count, Factors f, X* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float mean = f.alpha * widen(x[i]);
    narrow(mean + f.beta * widen(noise[2 * i]), out + 2 * i);
    narrow(mean + f.beta * widen(noise[2 * i + 1]), out + 2 * i + 1);
  }
}

// x (B, C, T, H, W); noise (B, C, T, H, W, 4) or (B, C, T, 2 H, 2 W), contiguous, or seeds (B,).
void pyramid_renoise(Tensor x, Tensor factors, std::optional<Tensor> noise,
                     std::optional<Tensor> seeds, int64_t stream, Tensor out) {
  const Sizes size = sizes_of(x);
  const int64_t W = x.size(4);
  Factors f;
  std::copy_n(static_cast<const float*>(factors.data_ptr()), sizeof f / sizeof(float), &f.alpha);
  const bool normals = noise && noise->dim() == 6;
  const int64_t* const seed = seeds ? static_cast<const int64_t*>(seeds->data_ptr()) : nullptr;
  with_type(x, [&](auto x_type) {
    with_type(noise ? *noise : x, [&](auto noise_type) {
      using X = decltype(x_type);
      using Z = decltype(noise_type);
      const Planes<const X> data(x);
      const Z* const given = noise ? static_cast<const Z*>(noise->data_ptr()) : nullptr;
      X* const result = static_cast<X*>(out.data_ptr());
      torch::stable::parallel_for(0, size.planes(), grain(4 * size.plane), [&](int64_t first, int64_t last) {
        float drawn[kNoiseBlock];
        for (int64_t plane = first; plane < last; ++plane) {
          const Place at = size.place(plane);
          const X* const from = data.at(at);
          X* const to = result + plane * 4 * size.plane;
          const Z* const own = given + (given ? plane * 4 * size.plane : 0);
          const int64_t counter = (at.c * size.frames + at.t) * size.plane;  // in the sample
          int64_t row = 0, column = 0;
          for (int64_t p = 0; p < size.plane;) {
            // To the end of the row, and of what is drawn.
            const int64_t count = seed ? std::min(W - column, kPiece - p % kPiece) : W;
            X* const top = to + 4 * row * W + 2 * column;
            X* const bottom = top + 2 * W;
            if (seed) {
              if (p % kPiece == 0)
                draw_block(uint64_t(seed[at.b]), uint64_t(counter + p), uint32_t(stream), drawn);
              from_normals(from + p, drawn + 4 * (p % kPiece), count, f, top, bottom);
            } else if (normals) {
              from_normals(from + p, own + 4 * p, count, f, top, bottom);
            } else {
              from_noise(from + p, own + 4 * p, count, f, top);
              from_noise(from + p, own + 4 * p + 2 * W, count, f, bottom);
            }
            p += count;
            column += count;
            if (column == W) column = 0, ++row;
          }
        }
      });
    });
  });
}

template <typename X>
FOR_EVERY_CPU void halve_row(const X* top, const X* bottom, int64_t count, float factor, X* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    narrow(factor * ((widen(top[2 * i]) + widen(bottom[2 * i])) +
                     (widen(top[2 * i + 1]) + widen(bottom[2 * i + 1]))), out + i);
}

// x (B, C, T, 2 H, 2 W) -> out (B, C, T, H, W): `factor` times the sum of every block.
void pyramid_halve(Tensor x, double factor, Tensor out) {
  const Sizes size = sizes_of(x);
  const int64_t H = out.size(3), W = out.size(4);
  with_type(x, [&](auto type) {
    using X = decltype(type);
    const Planes<const X> data(x);
    X* const result = static_cast<X*>(out.data_ptr());
    torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane) {
        const X* const from = data.at(size.place(plane));
        for (int64_t h = 0; h < H; ++h)
          halve_row(from + 4 * h * W, from + (4 * h + 2) * W, W, float(factor), result + (plane * H + h) * W);
      }
    });
  });
}

struct Ends {
  float start_sigma, end_sigma, ratio;
};

template <typename X>
FOR_EVERY_CPU void upsample_row(const X* lower, int64_t count, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[2 * i] = out[2 * i + 1] = factor * widen(lower[i]);
}

// `raised`: what the stage below adds to start.
template <typename X>
FOR_EVERY_CPU void endpoints_row(const X* x, const X* noise, const float* raised, int64_t count,
                                 Ends ends, X* sample, X* target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float eps = widen(noise[i]);
    const float end = ends.end_sigma * eps + (1 - ends.end_sigma) * widen(x[i]);
    const float velocity = ends.start_sigma * eps + raised[i] - end;
    narrow(end + ends.ratio * velocity, sample + i);
    narrow(velocity, target + i);
  }
}

template <typename X>
FOR_EVERY_CPU void ends_row(const X* x, const X* noise, const float* raised, int64_t count,
                            Ends ends, X* start, X* end) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float eps = widen(noise[i]);
    narrow(ends.start_sigma * eps + raised[i], start + i);
    narrow(ends.end_sigma * eps + (1 - ends.end_sigma) * widen(x[i]), end + i);
  }
}

void stage_endpoints(Tensor latents, std::optional<Tensor> lower, Tensor noise, double start_sigma,
                     double end_sigma, Tensor ratio, bool endpoints, Tensor start, Tensor end,
                     Tensor sample, Tensor target) {
  const Sizes size = sizes_of(latents);
  const int64_t W = latents.size(4);
  const float* const ratios = static_cast<const float*>(ratio.data_ptr());
  with_type(latents, [&](auto type) {
    using X = decltype(type);
    const Planes<const X> x(latents), eps(noise), low(lower ? *lower : latents);
    const auto data = [](const Tensor& tensor) { return static_cast<X*>(tensor.data_ptr()); };
    X *const starts = data(start), *const finals = data(end);
    X *const samples = data(sample), *const targets = data(target);
    torch::stable::parallel_for(0, size.planes(), grain(size.plane), [&](int64_t first, int64_t last) {
      float raised[kNoiseBlock] = {};
      for (int64_t plane = first; plane < last; ++plane) {
        const Place at = size.place(plane);
        const Ends ends{float(start_sigma), float(end_sigma), ratios[at.b]};
        for (int64_t from = 0; from < size.plane;) {
          // To the end of the row, or of the buffer, which holds whole blocks.
          const int64_t row = from / W, column = from % W;
          const int64_t count = std::min(W - column, kNoiseBlock);
          if (lower)
            upsample_row(low.at(at) + row / 2 * (W / 2) + column / 2, count / 2,
                         float(1 - start_sigma), raised);
          const X *const clean = x.at(at) + from, *const own = eps.at(at) + from;
          const int64_t to = plane * size.plane + from;
          endpoints_row(clean, own, raised, count, ends, samples + to, targets + to);
          if (endpoints) ends_row(clean, own, raised, count, ends, starts + to, finals + to);
          from += count;
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "pyramid_renoise(Tensor x, Tensor factors, Tensor? noise, Tensor? seeds, int stream,"
      " Tensor(a!) out) -> ()");
  m.def("pyramid_halve(Tensor x, float factor, Tensor(a!) out) -> ()");
  m.def(
      "stage_endpoints(Tensor latents, Tensor? lower, Tensor noise, float start_sigma,"
      " float end_sigma, Tensor ratio, bool endpoints, Tensor(a!) start, Tensor(b!) end,"
      " Tensor(c!) sample, Tensor(d!) target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("pyramid_renoise", TORCH_BOX(&pyramid_renoise));
  m.impl("pyramid_halve", TORCH_BOX(&pyramid_halve));
  m.impl("stage_endpoints", TORCH_BOX(&stage_endpoints));
}
