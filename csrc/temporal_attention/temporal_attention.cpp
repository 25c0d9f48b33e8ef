// temporal_attention on the CPU: a few sequences of T tokens at a time, from strides to strides.
//
// They and their T x T scores stay in the nearest caches, so memory is read and written once. The
// rows come into padded float32 scratch; there one routine does every product, with a tile of the
// result in registers. float32 and bfloat16; what else there is runs through PyTorch.

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

constexpr int kSquare = 64;      // floats from row to row of T x T scores: the most frames
constexpr int kWide = 256 + 16;  // of T x E tokens: the widest head, off the same cache sets
constexpr int kRun = 2048;       // bytes of a frame that are read in a row, where they are
constexpr int kMostTogether = 16;

struct Sizes {
  int64_t batch, frames, positions, heads, width;
  int64_t matrix() const { return (frames + 15) / 16 * 16 * kWide; }  // whole vectors of frames
  int64_t sequences() const { return batch * positions * heads; }
  // Sequences at a time: as many as make a run in every frame.
  int64_t together(int64_t itemsize) const {
    const int64_t wanted = kRun / (width * itemsize);
    return std::clamp<int64_t>(std::min(wanted, sequences()), 1, kMostTogether);
  }
};

struct Place {
  int64_t b, n, h;
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
  int64_t at(const Place& place) const {
    return place.b * batch_step + place.n * position_step + place.h * head_step;
  }
};

// Who sees whom, and the rotary tables.
struct Rule {
  const bool* known;
  int64_t known_batch, known_frame;
  const float *cos, *sin;
  float scale;
  int64_t back, forward;

  int64_t turns_size(const Sizes& size) const { return cos ? 2 * size.matrix() : 0; }
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

// The rotary tables, a number for each of E: c c ... and -s s ... for every pair.
struct Turns {
  float *cos = nullptr, *sin = nullptr;
  Turns() = default;
  Turns(const Rule& rule, const Sizes& size, Scratch& scratch) {
    if (!rule.cos) return;
    cos = scratch.take(size.matrix());
    sin = scratch.take(size.matrix());
    for (int64_t t = 0; t < size.frames; ++t) {
      for (int64_t e = 0; e < size.width; ++e) {
        const int64_t pair = t * (size.width / 2) + e / 2;
        cos[t * kWide + e] = rule.cos[pair];
        sin[t * kWide + e] = e % 2 ? rule.sin[pair] : -rule.sin[pair];
      }
    }
  }
};

// The first and last frame that each frame of a sample sees.
struct Bounds {
  alignas(64) int32_t first[kSquare] = {}, last[kSquare] = {};
  int64_t sample = -1;
  void set(const Rule& rule, int64_t b, const Sizes& size) {
    if (b == sample) return;
    sample = b;
    for (int64_t t = 0; t < size.frames; ++t) {
      const bool alone = rule.identity(b, t);
      first[t] = alone ? t : std::max<int64_t>(0, t - rule.back);
      last[t] = alone ? t : std::min(size.frames - 1, t + rule.forward);
    }
  }
};

// A few sequences, one after the other in the order of (b, n, h).
struct Group {
  Place places[kMostTogether];
  int64_t count, begin, end, most;
  const Sizes& size;
  Group(int64_t begin, int64_t end, int64_t most, const Sizes& size)
      : count(0), begin(begin), end(end), most(most), size(size) {
    next();
  }
  void next() {
    begin += count;
    count = std::min(most, end - begin);
    for (int64_t i = 0; i < count; ++i) places[i] = place(begin + i);
  }
  Place place(int64_t sequence) const {
    const int64_t row = sequence / size.heads;
    return {row / size.positions, row % size.positions, sequence % size.heads};
  }
  // What the next group has in the place of the i-th; at the end that is itself.
  Place ahead(int64_t i) const {
    return begin + i + most < end ? place(begin + i + most) : places[i];
  }
};

#define ARITHMETIC "../temporal_attention/sequences.h"
#include "../_shared/every_set.h"

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
