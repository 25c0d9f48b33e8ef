// norm_modulate on the CPU: one pass over x forward, one over x and dy backward.
//
// A row stays in the first-level cache between its sums and its result, so memory is read once.
// float32 and bfloat16, sums in float32; what else there is runs through PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace {

using bf16 = uint16_t;

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = bf16(value != value ? 0x7fc0 : rounded);
}

// The loops over one row of D numbers. Plain enough that the compiler vectorises them.

template <typename T>
inline void load_row(const T* in, float* row, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) row[d] = widen(in[d]);
}

template <typename F, typename T>
inline void store_row(const F* row, T* out, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) narrow(float(row[d]), out + d);
}

template <typename T>
inline float load_and_sum(const T* in, float* row, int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) {
    const float value = widen(in[d]);
    row[d] = value;
    sum += value;
  }
  return sum;
}

inline float centre_and_square(float* row, float mean, int64_t D) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < D; ++d) {
    const float value = row[d] - mean;
    row[d] = value;
    squares += value * value;
  }
  return squares;
}

struct Sizes {
  int64_t batch, tokens, width, groups;
};

// A (B, N, D) tensor or a (B|1, groups, D) modulation, in steps of elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_step, row_step;
  T* at(int64_t b, int64_t row) const { return data + b * batch_step + row * row_step; }
};

template <typename T>
Rows<T> rows_of(const Tensor& tensor) {
  const bool three = tensor.dim() == 3;
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0) > 1 ? tensor.stride(0) : 0,
          three && tensor.size(1) > 1 ? tensor.stride(1) : 0};
}

Sizes sizes_of(const Tensor& x, const Tensor& modulation) {
  return {x.size(0), x.size(1), x.size(2), modulation.dim() == 3 ? modulation.size(1) : 1};
}

template <typename X, typename M, typename Y>
FOR_EVERY_CPU void forward_rows(int64_t first, int64_t last, Sizes size, Rows<X> x, Rows<M> shift,
                                Rows<M> scale, bool rms, float eps, Y* y, float* mean,
                                float* rstd) {
  const int64_t D = size.width, per_group = size.tokens / size.groups;
  std::vector<float> scratch(3 * D);
  float *row = scratch.data(), *gain = row + D, *offset = gain + D;
  int64_t at_hand = -1;  // the group whose modulation is in gain and offset
  for (int64_t at = first; at < last; ++at) {
    const int64_t b = at / size.tokens, n = at % size.tokens, g = n / per_group;
    if (b * size.groups + g != at_hand) {
      at_hand = b * size.groups + g;
      load_row(scale.at(b, g), gain, D);
      load_row(shift.at(b, g), offset, D);
    }
    float m = load_and_sum(x.at(b, n), row, D) / D;
    if (rms) m = 0;
    else mean[at] = m;
    const float r = rstd[at] = 1 / std::sqrt(centre_and_square(row, m, D) / D + eps);
    Y* out = y + at * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) narrow(row[d] * r * (1 + gain[d]) + offset[d], out + d);
  }
}

// The rows of one chunk of group g: dx, and the sums of the chunk in dshift and dscale.
template <typename X, typename M, typename Y>
FOR_EVERY_CPU void backward_rows(int64_t b, int64_t g, int64_t first, int64_t last, Sizes size,
                                 Rows<Y> dy, Rows<X> x, Rows<M> scale, const float* mean,
                                 const float* rstd, bool rms, X* dx, float* dshift,
                                 float* dscale, float* scratch) {
  const int64_t D = size.width;
  float *gain = scratch, *grad = gain + D, *normed = grad + D;
  load_row(scale.at(b, g), gain, D);
  std::fill_n(dshift, D, 0.0f);
  std::fill_n(dscale, D, 0.0f);
  for (int64_t n = first; n < last; ++n) {
    const int64_t at = b * size.tokens + n;
    const float r = rstd[at], m = rms ? 0.0f : mean[at];
    const Y* dy_row = dy.at(b, n);
    const X* x_row = x.at(b, n);
    float sum = 0, projection = 0;
#pragma omp simd reduction(+ : sum, projection)
    for (int64_t d = 0; d < D; ++d) {
      const float dy_d = widen(dy_row[d]), normed_d = (widen(x_row[d]) - m) * r;
      const float grad_d = dy_d * (1 + gain[d]);
      dshift[d] += dy_d;
      dscale[d] += dy_d * normed_d;
      sum += grad_d;
      projection += grad_d * normed_d;
      grad[d] = grad_d;
      normed[d] = normed_d;
    }
    sum = rms ? 0.0f : sum / D;
    projection /= D;
    X* out = dx + at * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) narrow((grad[d] - sum - normed[d] * projection) * r, out + d);
  }
}

template <typename Call>
void with_type(const Tensor& tensor, Call call) {
  if (tensor.scalar_type() == ScalarType::Float) call(float{});
  else call(bf16{});
}

void forward(Tensor x, Tensor shift, Tensor scale, bool rms, double eps, Tensor y, Tensor mean,
             Tensor rstd) {
  const Sizes size = sizes_of(x, scale);
  const int64_t grain = std::max<int64_t>(1, 32768 / size.width);
  with_type(x, [&](auto x_type) {
    with_type(scale, [&](auto m_type) {
      with_type(y, [&](auto y_type) {
        using X = decltype(x_type);
        using M = decltype(m_type);
        using Y = decltype(y_type);
        torch::stable::parallel_for(
            0, size.batch * size.tokens, grain, [&](int64_t first, int64_t last) {
              forward_rows<X, M, Y>(first, last, size, rows_of<X>(x), rows_of<M>(shift),
                                    rows_of<M>(scale), rms, float(eps),
                                    static_cast<Y*>(y.data_ptr()),
                                    static_cast<float*>(mean.data_ptr()),
                                    static_cast<float*>(rstd.data_ptr()));
            });
      });
    });
  });
}

// Tokens whose gradients of shift and scale are summed in a row, before the sums are added up: the
// same whatever the number of threads, so the same bits; few, so that little is lost to rounding.
constexpr int64_t kChunk = 32;

void backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, bool rms, Tensor dx,
              Tensor dshift, Tensor dscale) {
  const Sizes size = sizes_of(x, scale);
  const int64_t D = size.width, per_group = size.tokens / size.groups;
  const int64_t all_groups = size.batch * size.groups;
  const int64_t chunks = (per_group + kChunk - 1) / kChunk, tasks = all_groups * chunks;
  const int64_t sharing = scale.size(0) < size.batch ? size.batch : 1;
  const bool direct = chunks == 1 && sharing == 1;  // a chunk is all that its row is summed over
  const std::unique_ptr<float[]> partials(direct ? nullptr : new float[2 * tasks * D]);
  float *shift_parts = partials.get(), *scale_parts = shift_parts + tasks * D;
  const int64_t grain = std::max<int64_t>(1, 32768 / (D * std::min(kChunk, per_group)));

  with_type(x, [&](auto x_type) {
    with_type(scale, [&](auto m_type) {
      with_type(dy, [&](auto y_type) {
        using X = decltype(x_type);
        using M = decltype(m_type);
        using Y = decltype(y_type);
        M* const results[] = {static_cast<M*>(dshift.data_ptr()),
                              static_cast<M*>(dscale.data_ptr())};
        torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
          std::vector<float> scratch(5 * D);
          float* const own = scratch.data() + 3 * D;
          for (int64_t task = begin; task < end; ++task) {
            float* const shift_sum = direct ? own : shift_parts + task * D;
            float* const scale_sum = direct ? own + D : scale_parts + task * D;
            const int64_t b = task / chunks / size.groups, g = task / chunks % size.groups;
            const int64_t from = task % chunks * kChunk;
            const int64_t to = std::min(from + kChunk, per_group);
            backward_rows<X, M, Y>(b, g, g * per_group + from, g * per_group + to, size,
                                   rows_of<Y>(dy), rows_of<X>(x), rows_of<M>(scale),
                                   static_cast<const float*>(mean.data_ptr()),
                                   static_cast<const float*>(rstd.data_ptr()), rms,
                                   static_cast<X*>(dx.data_ptr()), shift_sum, scale_sum,
                                   scratch.data());
            if (direct) {
              store_row(shift_sum, results[0] + task * D, D);
              store_row(scale_sum, results[1] + task * D, D);
            }
          }
        });
        if (direct) return;

        // Chunks of a group, and samples that share one modulation, are added in order.
        const float* const parts[] = {shift_parts, scale_parts};
        const int64_t outputs = all_groups / sharing;
        torch::stable::parallel_for(0, 2 * outputs, 8, [&](int64_t begin, int64_t end) {
          std::vector<double> sum(D);  // few numbers, so precision is free
          for (int64_t at = begin; at < end; ++at) {
            const int64_t group = at % outputs;
            std::fill(sum.begin(), sum.end(), 0.0);
            for (int64_t b = 0; b < sharing; ++b) {
              const float* part = parts[at / outputs] + (b * size.groups + group) * chunks * D;
              for (int64_t c = 0; c < chunks; ++c, part += D)
                for (int64_t d = 0; d < D; ++d) sum[d] += part[d];
            }
            M* out = results[at / outputs] + group * D;
            store_row(sum.data(), out, D);
          }
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "norm_modulate(Tensor x, Tensor shift, Tensor scale, bool rms, float eps,"
      " Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "norm_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd,"
      " bool rms, Tensor(a!) dx, Tensor(b!) dshift, Tensor(c!) dscale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&forward));
  m.impl("norm_modulate_backward", TORCH_BOX(&backward));
}
