// qk_norm_rope on the CPU: a token of q and k at a time, from the strides of the packed projection.
//
// Its angles are gathered once and serve all heads of both. float32 and bfloat16, sums in float32;
// what else there is runs through PyTorch.

#include "../_shared/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

constexpr int64_t kWidest = 256;      // numbers of a head
constexpr int64_t kMostHeads = 512;  // of a token: 8192 numbers, 16 each

enum class Norm { none, rms, layer };
enum class Pairs { none, neighbours, halves };

struct Sizes {
  int64_t batch, tokens, heads, width;
  int64_t all() const { return batch * tokens; }
  int64_t row() const { return heads * width; }
};

// A (B, N, heads, E) tensor, in steps of elements.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch_step, token_step, head_step;
  const T* at(int64_t b, int64_t n) const { return data + b * batch_step + n * token_step; }
};

// Of one token, a number for each of E channels: c c ... and -s s ... for every pair.
struct Angles {
  const float *cos, *sin;
};

// Where tokens stand, and which channels turn together.
struct Turn {
  const float *cos = nullptr, *sin = nullptr;
  const int32_t* index = nullptr;
  int64_t index_step = 0, pairs = 0;
  std::vector<int64_t> dims;
  float sign = 1;  // -1 turns back
  int32_t partner[kWidest];
  int32_t run[kWidest];  // channels from here on whose partners are neighbours too

  Turn(const Sizes& size, const Maybe& cos_table, const Maybe& sin_table, const Maybe& rows,
       std::vector<int64_t> axes, bool interleaved, bool back)
      : dims(std::move(axes)), sign(back ? -1 : 1), step_(interleaved ? 2 : 1) {
    if (!cos_table) return;
    cos = static_cast<const float*>(cos_table->data_ptr());
    sin = static_cast<const float*>(sin_table->data_ptr());
    index = static_cast<const int32_t*>(rows->data_ptr());
    index_step = rows->size(0) > 1 ? rows->stride(0) : 0;
    pairs = cos_table->size(1);
    for (int32_t e = 0; e < size.width; ++e) partner[e] = e;
    each_pair([&](int64_t, int64_t, int64_t first, int64_t second) {
      partner[first] = int32_t(second);
      partner[second] = int32_t(first);
    });
    for (int64_t e = size.width; e-- > 0;)
      run[e] = e + 1 < size.width && partner[e + 1] == partner[e] + 1 ? run[e + 1] + 1 : 1;
  }

  Pairs kind() const { return !cos ? Pairs::none : step_ == 2 ? Pairs::neighbours : Pairs::halves; }

  // The angles of a token; channels behind the last axis stay.
  void angles_of(int64_t b, int64_t n, int64_t width, float* c, float* s) const {
    const int64_t axes = int64_t(dims.size());
    const int32_t* const rows = index + b * index_step + n * axes;
    each_pair([&](int64_t axis, int64_t pair, int64_t first, int64_t second) {
      const int64_t at = rows[axis] * pairs + pair;
      c[first] = c[second] = cos[at];
      s[second] = sign * sin[at];
      s[first] = -s[second];
    });
    std::fill(c + 2 * pairs, c + width, 1.0f);
    std::fill(s + 2 * pairs, s + width, 0.0f);
  }

 private:
  // `call(axis, pair, first channel, second)`.
  template <typename Call>
  void each_pair(Call call) const {
    int64_t channel = 0;
    for (int64_t axis = 0; axis < int64_t(dims.size()); channel += dims[axis++])
      for (int64_t j = 0; j < dims[axis] / 2; ++j) {
        const int64_t first = channel + j * step_;
        call(axis, channel / 2 + j, first, first + (step_ == 2 ? 1 : dims[axis] / 2));
      }
  }

  int64_t step_;
};

struct Moments {
  float mean, rstd;
};

// q or k: what is read and written, its weight and bias, and where their gradients are summed.
template <typename T>
struct Side {
  Heads<T> x, dy;
  T* y;  // or dx
  const float *weight, *bias;
  int64_t weight_step, bias_step;  // from head to head: 0 where heads share
  float *dweight, *dbias;
};

template <typename T>
struct Job {
  Sizes size;
  const Turn& turn;
  Norm norm;
  bool across;
  float eps;
  Side<T> sides[2];
  int64_t heads_of_norm() const { return across ? size.heads : 1; }
};

#define ARITHMETIC "../qk_norm_rope/rows.h"
#include "../_shared/every_set.h"

// A row of numbers that stands in for a weight or bias that is not there.
struct Row {
  float numbers[kWidest];
  explicit Row(float number) { std::fill_n(numbers, kWidest, number); }
};
const Row kOnes(1), kZeros(0);

Sizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

template <typename T>
Heads<T> heads_of(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
Side<T> side_of(const Tensor& x, const Tensor& dy, const Tensor& y, const Maybe& weight,
                const Maybe& bias, const Sizes& size, bool across) {
  Side<T> side{heads_of<T>(x), heads_of<T>(dy), static_cast<T*>(y.data_ptr())};
  side.weight = weight ? static_cast<const float*>(weight->data_ptr()) : kOnes.numbers;
  side.bias = bias ? static_cast<const float*>(bias->data_ptr()) : kZeros.numbers;
  side.weight_step = weight && across ? size.width : 0;
  side.bias_step = bias && across ? size.width : 0;
  return side;
}

// `call` with the way that channels pair.
template <typename Call>
void with_pairs(Pairs pairs, Call call) {
  if (pairs == Pairs::none) call(std::integral_constant<Pairs, Pairs::none>{});
  else if (pairs == Pairs::neighbours) call(std::integral_constant<Pairs, Pairs::neighbours>{});
  else call(std::integral_constant<Pairs, Pairs::halves>{});
}

void forward(Tensor q, Tensor k, Maybe q_weight, Maybe k_weight, Maybe q_bias, Maybe k_bias,
             Maybe cos, Maybe sin, Maybe index, std::vector<int64_t> dims, bool interleaved,
             int64_t norm, bool across, double eps, bool back, Tensor q_out, Tensor k_out) {
  const Sizes size = sizes_of(q);
  const Turn turn(size, cos, sin, index, std::move(dims), interleaved, back);
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const Job<T> job{size, turn, Norm(norm), across, float(eps),
                     {side_of<T>(q, q, q_out, q_weight, q_bias, size, across),
                      side_of<T>(k, k, k_out, k_weight, k_bias, size, across)}};
    with_pairs(turn.kind(), [&](auto pairs) {
      const int64_t grain = std::max<int64_t>(1, 16384 / size.row());
      torch::stable::parallel_for(0, size.all(), grain, [&](int64_t first, int64_t last) {
        Scratch memory(3 * kWidest);
        float* const scratch = memory.take(0);
        FOR_THIS_CPU(forward_tokens<decltype(pairs)::value>, first, last, job, scratch);
      });
    });
  });
}

// The rows of a norm whose gradients of the weights are summed in a row, before the sums are added
// up: the same whatever the number of threads, so the same bits; few, so that little is lost.
constexpr int64_t kChunk = 32;

// The gradient of a weight or bias, a sum over chunks of tokens.
class Result {
 public:
  Result(const Maybe& tensor, int64_t chunks) : chunks_(chunks) {
    if (!tensor) return;
    data_ = static_cast<float*>(tensor->data_ptr());
    width_ = tensor->size(0);
    parts_.reset(new float[chunks * width_]());
  }
  // Where the sums of a chunk go, if somebody asked for them.
  float* part(int64_t chunk) const { return data_ ? parts_.get() + chunk * width_ : nullptr; }
  void add() const {
    std::vector<double> sum(width_);  // few numbers, so precision is free
    for (int64_t at = 0; at < chunks_ * width_; ++at) sum[at % width_] += parts_[at];
    std::copy(sum.begin(), sum.end(), data_);
  }

 private:
  int64_t chunks_, width_ = 0;
  float* data_ = nullptr;
  std::unique_ptr<float[]> parts_;
};

void backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Maybe q_weight, Maybe k_weight,
              Maybe cos, Maybe sin, Maybe index, std::vector<int64_t> dims, bool interleaved,
              int64_t norm, bool across, double eps, Tensor dq, Tensor dk, Maybe dq_weight,
              Maybe dk_weight, Maybe dq_bias, Maybe dk_bias) {
  const Sizes size = sizes_of(q);
  const Turn turn(size, cos, sin, index, std::move(dims), interleaved, true);
  const int64_t tokens = std::max<int64_t>(1, across ? kChunk : kChunk / size.heads);
  const int64_t chunks = (size.all() + tokens - 1) / tokens;
  const Result results[] = {
      {dq_weight, chunks}, {dk_weight, chunks}, {dq_bias, chunks}, {dk_bias, chunks}};
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const Job<T> common{size, turn, Norm(norm), across, float(eps),
                        {side_of<T>(q, dq_out, dq, q_weight, dq_bias, size, across),
                         side_of<T>(k, dk_out, dk, k_weight, dk_bias, size, across)}};
    with_pairs(turn.kind(), [&](auto pairs) {
      const int64_t grain = std::max<int64_t>(1, 16384 / (tokens * size.row()));
      torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
        Scratch memory(3 * kWidest + size.row());
        float* const scratch = memory.take(0);
        Job<T> job = common;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          for (int i = 0; i < 2; ++i) {
            job.sides[i].dweight = results[i].part(chunk);
            job.sides[i].dbias = results[2 + i].part(chunk);
          }
          const int64_t first = chunk * tokens, last = std::min(first + tokens, size.all());
          FOR_THIS_CPU(backward_tokens<decltype(pairs)::value>, first, last, job, scratch);
        }
      });
    });
  });
  for (const Result& result : results) result.add();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) {
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias,"
      " Tensor? k_bias, Tensor? cos, Tensor? sin, Tensor? index, int[] dims, bool interleaved,"
      " int norm, bool across_heads, float eps, bool back, Tensor(a!) q_out, Tensor(b!) k_out)"
      " -> ()");
  m.def(
      "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight,"
      " Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? index, int[] dims, bool interleaved,"
      " int norm, bool across_heads, float eps, Tensor(a!) dq, Tensor(b!) dk,"
      " Tensor(c!)? dq_weight, Tensor(d!)? dk_weight, Tensor(e!)? dq_bias, Tensor(f!)? dk_bias)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&backward));
}
