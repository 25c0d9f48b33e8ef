// The room on the CPU: one pass over memory forward, one backward.
//
// float32 and bfloat16, sums in float32; what else there is runs through PyTorch. `X` is the type
// of the stream and its gradient, `Y` that of the branch, of the modulated norm and of theirs.

#include "../_shared/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kBlock = 4;  // rows that are worked on side by side

struct Sizes {
  int64_t batch, tokens, width, groups;
  const int32_t* starts;  // of every group, and the end of the last; null: groups are equal
  int64_t starts_step;    // from sample to sample
  int64_t start(int64_t b, int64_t g) const {
    return starts ? starts[b * starts_step + g] : g * (tokens / groups);
  }
  int64_t group_of(int64_t b, int64_t n) const {
    if (!starts) return n / (tokens / groups);
    const int32_t* const first = starts + b * starts_step;
    return std::upper_bound(first, first + groups, n) - first - 1;
  }
  int64_t longest_group() const {
    if (!starts) return tokens / groups;
    int64_t longest = 1;
    for (int64_t b = 0; b < (starts_step ? batch : 1); ++b)
      for (int64_t g = 0; g < groups; ++g)
        longest = std::max(longest, start(b, g + 1) - start(b, g));
    return longest;
  }
  int64_t padded() const { return (width + 15) / 16 * 16; }
};

// A (B, N, D) tensor, in steps of elements. No data: there is no such argument.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch_step, row_step;
  const T* at(int64_t b, int64_t row) const { return data + b * batch_step + row * row_step; }
};

// A (B|1, D) or (B|1, groups, D) tensor of either type.
struct Modulation {
  const void* data;
  int64_t batch_step, row_step;
  bool narrow;
};

template <typename X, typename Y>
struct Forward {
  Sizes size;
  Rows<X> x;
  Rows<Y> h;
  Modulation gate, shift, scale;
  bool rms;
  float eps;
  X* total;
  Y* y;
  float *mean, *rstd;
};

template <typename X, typename Y>
struct Backward {
  Sizes size;
  Rows<X> dsum;
  Rows<Y> dy;
  Rows<X> total;
  Rows<Y> h;
  Modulation gate, scale;
  const float *mean, *rstd;
  bool rms;
  X* dx;
  Y* dh;
};

// Where the gradients of one row of shift, scale and gate are summed.
struct Sums {
  float *shift, *scale, *gate;
};

#define ARITHMETIC "../modulate/rows.h"
#include "../_shared/every_set.h"

using Maybe = std::optional<Tensor>;

template <typename T>
T* data_of(const Maybe& tensor) {
  return tensor && tensor->numel() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

template <typename T>
Rows<T> rows_of(const Maybe& tensor) {
  if (!tensor) return {};
  return {data_of<T>(tensor), tensor->stride(0), tensor->stride(1)};
}

Modulation modulation_of(const Maybe& tensor) {
  if (!tensor) return {};
  const bool grouped = tensor->dim() == 3;
  return {tensor->data_ptr(), tensor->size(0) > 1 ? tensor->stride(0) : 0,
          grouped ? tensor->stride(1) : 0, tensor->scalar_type() != ScalarType::Float};
}

Sizes sizes_of(const Tensor& x, const Tensor& modulation, const Maybe& starts) {
  const int64_t groups = modulation.dim() == 3 ? modulation.size(1) : 1;
  return {x.size(0), x.size(1), x.size(2), groups, data_of<int32_t>(starts),
          starts && starts->size(0) > 1 ? starts->stride(0) : 0};
}

// `call` with the types of two tensors.
template <typename Call>
void with_types(const Tensor& x, const Tensor& y, Call call) {
  with_type(x, [&](auto x_type) { with_type(y, [&](auto y_type) { call(x_type, y_type); }); });
}

void forward(Tensor x, Maybe h, Maybe gate, Tensor shift, Tensor scale, Maybe starts, bool rms,
             double eps, Maybe total, Tensor y, Tensor mean, Tensor rstd) {
  const Sizes size = sizes_of(x, scale, starts);
  with_types(x, y, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    const Forward<X, Y> job{size, rows_of<X>(x), rows_of<Y>(h), modulation_of(gate),
                            modulation_of(shift), modulation_of(scale), rms, float(eps),
                            data_of<X>(total), data_of<Y>(y), data_of<float>(mean),
                            data_of<float>(rstd)};
    const int64_t grain = std::max<int64_t>(1, 32768 / size.width);
    torch::stable::parallel_for(0, size.batch * size.tokens, grain,
                                [&](int64_t first, int64_t last) {
                                  FOR_THIS_CPU(forward_rows, first, last, job);
                                });
  });
}

// Tokens whose gradients of the modulation are summed in a row, before the sums are added up: the
// same whatever the number of threads, so the same bits; few, so that little is lost to rounding.
constexpr int64_t kChunk = 32;

// The gradient of a modulation: a sum over the chunks of each group, and over the samples if they
// share one. Where that is one chunk, the sum of the chunk is the result.
class Result {
 public:
  Result(const Maybe& tensor, const Sizes& size, int64_t chunks)
      : size_(size), chunks_(chunks), present_(tensor) {
    if (!tensor) return;
    data_ = tensor->data_ptr();
    narrow_ = tensor->scalar_type() != ScalarType::Float;
    sharing_ = tensor->size(0) < size.batch ? size.batch : 1;
    if (chunks * sharing_ > 1)
      parts_.reset(new float[size.batch * size.groups * chunks * size.width]);
  }

  float* sum_of(int64_t task, float* scratch) const {
    if (!present_) return nullptr;
    return parts_ ? parts_.get() + task * size_.width : scratch;
  }

  void finish(int64_t task, const float* sum) const {
    if (present_ && !parts_) write(sum, task);
  }

  int64_t rows_to_add() const { return parts_ ? size_.batch * size_.groups / sharing_ : 0; }

  void add(int64_t row, double* sum) const {
    const int64_t D = size_.width;
    std::fill_n(sum, D, 0.0);
    for (int64_t b = 0; b < sharing_; ++b) {
      const float* part = parts_.get() + (b * size_.groups + row) * chunks_ * D;
      for (int64_t c = 0; c < chunks_; ++c, part += D)
        for (int64_t d = 0; d < D; ++d) sum[d] += part[d];
    }
    write(sum, row);
  }

 private:
  template <typename F>
  void write(const F* sum, int64_t row) const {
    const int64_t D = size_.width, at = row * D;
    if (narrow_)
      for (int64_t d = 0; d < D; ++d) narrow(float(sum[d]), static_cast<bf16*>(data_) + at + d);
    else
      for (int64_t d = 0; d < D; ++d) static_cast<float*>(data_)[at + d] = float(sum[d]);
  }

  Sizes size_;
  int64_t chunks_, sharing_ = 1;
  bool present_, narrow_ = false;
  void* data_ = nullptr;
  std::unique_ptr<float[]> parts_;
};

template <typename X, typename Y>
void backward_job(const Backward<X, Y>& job, const Maybe& dgate, const Maybe& dshift,
                  const Maybe& dscale) {
  const Sizes& size = job.size;
  const int64_t longest = size.longest_group(), chunks = (longest + kChunk - 1) / kChunk;
  const Result results[] = {{dshift, size, chunks}, {dscale, size, chunks}, {dgate, size, chunks}};
  const int64_t tasks = size.batch * size.groups * chunks;
  const int64_t grain = std::max<int64_t>(1, 32768 / (size.width * std::min(kChunk, longest)));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch memory(5 * size.padded());
    float* const scratch = memory.take(0);
    for (int64_t task = begin; task < end; ++task) {
      float* sums[3];
      for (int i = 0; i < 3; ++i)
        sums[i] = results[i].sum_of(task, scratch + (2 + i) * size.padded());
      const int64_t b = task / chunks / size.groups, g = task / chunks % size.groups;
      const int64_t first = size.start(b, g) + task % chunks * kChunk;
      const int64_t last = std::min(first + kChunk, size.start(b, g + 1));
      FOR_THIS_CPU(backward_chunk, b, g, first, last, job, Sums{sums[0], sums[1], sums[2]},
                   scratch);
      for (int i = 0; i < 3; ++i) results[i].finish(task, sums[i]);
    }
  });
  for (const Result& result : results) {
    const int64_t grain_of_adding = 4;
    torch::stable::parallel_for(0, result.rows_to_add(), grain_of_adding,
                                [&](int64_t begin, int64_t end) {
                                  std::vector<double> sum(size.width);  // few, so precision is free
                                  for (int64_t row = begin; row < end; ++row)
                                    result.add(row, sum.data());
                                });
  }
}

void backward(Maybe dsum, Tensor dy, Tensor total, Maybe h, Maybe gate, Tensor scale, Maybe starts,
              Tensor mean, Tensor rstd, bool rms, Tensor dx, Maybe dh, Maybe dgate, Tensor dshift,
              Tensor dscale) {
  const Sizes size = sizes_of(total, scale, starts);
  with_types(total, dy, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    backward_job(Backward<X, Y>{size, rows_of<X>(dsum), rows_of<Y>(dy), rows_of<X>(total),
                                rows_of<Y>(h), modulation_of(gate), modulation_of(scale),
                                data_of<float>(mean), data_of<float>(rstd), rms, data_of<X>(dx),
                                data_of<Y>(dh)},
                 dgate, dshift, dscale);
  });
}

void residual_backward(Tensor dsum, Tensor h, Tensor gate, Maybe starts, Tensor dh, Tensor dgate) {
  const Sizes size = sizes_of(h, gate, starts);
  with_types(dsum, h, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    Backward<X, Y> job{};
    job.size = size;
    job.dsum = rows_of<X>(dsum);
    job.h = rows_of<Y>(h);
    job.gate = modulation_of(gate);
    job.dh = data_of<Y>(dh);
    backward_job(job, dgate, std::nullopt, std::nullopt);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "gated_residual_backward(Tensor dsum, Tensor h, Tensor gate, Tensor? starts, Tensor(a!) dh,"
      " Tensor(b!) dgate) -> ()");
  m.def(
      "norm_modulate(Tensor x, Tensor? h, Tensor? gate, Tensor shift, Tensor scale,"
      " Tensor? starts, bool rms, float eps, Tensor(a!)? total, Tensor(b!) y, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def(
      "norm_modulate_backward(Tensor? dsum, Tensor dy, Tensor total, Tensor? h, Tensor? gate,"
      " Tensor scale, Tensor? starts, Tensor mean, Tensor rstd, bool rms, Tensor(a!) dx,"
      " Tensor(b!)? dh, Tensor(c!)? dgate, Tensor(d!) dshift, Tensor(e!) dscale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("gated_residual_backward", TORCH_BOX(&residual_backward));
  m.impl("norm_modulate", TORCH_BOX(&forward));
  m.impl("norm_modulate_backward", TORCH_BOX(&backward));
}
