// temporal_attention on the CPU: one sequence of T tokens at a time, from strides to strides.
//
// A sequence and its T x T scores stay in the first-level cache, so memory is read and written
// once. The rows come into padded float32 scratch; every product is then the same small one, of
// 16 columns at a time. float32 and bfloat16; what else there is runs through PyTorch.

#include "../_shared/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kPadding = 16;  // rows and columns of the scratch are multiples of it

struct Sizes {
  int64_t batch, frames, positions, heads, width;
  int64_t rows() const { return (frames + kPadding - 1) / kPadding * kPadding; }    // T, padded
  int64_t columns() const { return (width + kPadding - 1) / kPadding * kPadding; }  // E, padded
  int64_t sequences() const { return batch * positions * heads; }
};

// A (B, T, N, heads, E) tensor, in steps of elements.
template <typename T>
struct Tokens {
  T* data;
  int64_t batch_step, frame_step, position_step, head_step;
  explicit Tokens(const Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())), batch_step(tensor.stride(0)),
        frame_step(tensor.stride(1)), position_step(tensor.stride(2)),
        head_step(tensor.stride(3)) {}
  T* at(int64_t b, int64_t n, int64_t h) const {
    return data + b * batch_step + n * position_step + h * head_step;
  }
};

// Who sees whom, and the rotary tables.
struct Rule {
  const bool* known;
  int64_t known_batch, known_frame;
  const float *cos, *sin;
  float scale;
  int64_t back, forward;

  bool identity(int64_t b, int64_t t) const {
    return known && known[b * known_batch + t * known_frame];
  }
};

Rule rule_of(const std::optional<Tensor>& known, const std::optional<Tensor>& cos,
             const std::optional<Tensor>& sin, double scale, int64_t back, int64_t forward) {
  Rule rule{nullptr, 0, 0, nullptr, nullptr, float(scale), back, forward};
  if (known) {
    rule.known = static_cast<const bool*>(known->data_ptr());
    rule.known_batch = known->size(0) > 1 ? known->stride(0) : 0;
    rule.known_frame = known->stride(1);
  }
  if (cos) rule.cos = static_cast<const float*>(cos->data_ptr());
  if (sin) rule.sin = static_cast<const float*>(sin->data_ptr());
  return rule;
}

// Zeroed once: what pads a matrix in the scratch is never written to but by zeros.
class Scratch {
 public:
  Scratch(const Sizes& size, int64_t wide, int64_t square) {
    const int64_t count =
        wide * size.rows() * size.columns() + square * size.rows() * size.rows() + kPadding;
    memory_.reset(new float[count]());
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (-address % 64) / sizeof(float);
  }
  float* take(int64_t count) { return (next_ += count) - count; }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

struct Place {
  int64_t b, n, h;
  Place(int64_t sequence, const Sizes& size)
      : b(sequence / size.heads / size.positions), n(sequence / size.heads % size.positions),
        h(sequence % size.heads) {}
};

#if HAS_X86_SETS
namespace v4 {
#define TARGET TARGET_V4
#define LANE_BYTES 64
#include "sequences.h"
}  // namespace v4
namespace v3 {
#define TARGET TARGET_V3
#define LANE_BYTES 32
#include "sequences.h"
}  // namespace v3
#endif
namespace any {
#define TARGET
#define LANE_BYTES 16
#include "sequences.h"
}  // namespace any

Sizes sizes_of(const Tensor& q) {
  return {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)};
}

int64_t grain_of(const Sizes& size) {
  return std::max<int64_t>(1, 32768 / (size.frames * size.width));
}

void forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> known, std::optional<Tensor> cos,
             std::optional<Tensor> sin, double scale, int64_t back, int64_t ahead, Tensor out) {
  const Sizes size = sizes_of(q);
  const Rule rule = rule_of(known, cos, sin, scale, back, ahead);
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const Tokens<const T> q_(q), k_(k), v_(v);
    const Tokens<T> out_(out);
    torch::stable::parallel_for(
        0, size.sequences(), grain_of(size), [&](int64_t begin, int64_t end) {
          FOR_THIS_CPU(forward_sequences<T>, begin, end, size, rule, q_, k_, v_, out_);
        });
  });
}

void backward(Tensor dout, Tensor q, Tensor k, Tensor v, std::optional<Tensor> known,
              std::optional<Tensor> cos, std::optional<Tensor> sin, double scale, int64_t back,
              int64_t ahead, Tensor dq, Tensor dk, Tensor dv) {
  const Sizes size = sizes_of(q);
  const Rule rule = rule_of(known, cos, sin, scale, back, ahead);
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const Tokens<const T> dout_(dout), q_(q), k_(k), v_(v);
    const Tokens<T> dq_(dq), dk_(dk), dv_(dv);
    torch::stable::parallel_for(
        0, size.sequences(), grain_of(size), [&](int64_t begin, int64_t end) {
          FOR_THIS_CPU(backward_sequences<T>, begin, end, size, rule, dout_, q_, k_, v_, dq_,
                       dk_, dv_);
        });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "temporal_attention(Tensor q, Tensor k, Tensor v, Tensor? known, Tensor? cos, Tensor? sin,"
      " float scale, int back, int forward, Tensor(a!) out) -> ()");
  m.def(
      "temporal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? known,"
      " Tensor? cos, Tensor? sin, float scale, int back, int forward, Tensor(a!) dq,"
      " Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("temporal_attention", TORCH_BOX(&forward));
  m.impl("temporal_attention_backward", TORCH_BOX(&backward));
}
