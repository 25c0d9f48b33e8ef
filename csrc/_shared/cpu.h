// What the CPU kernels share: bfloat16, dtypes, and one binary for every instruction set.
//
// The arithmetic of a kernel stands in a header of its own without an include guard, which its
// .cpp includes once per instruction set through every_set.h, each time inside a namespace (v4, v3,
// any) with TARGET, an attribute for every function, and LANE_BYTES, the width of the vectors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_SETS 1
#define TARGET_V4 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define TARGET_V3 __attribute__((target("avx2,fma")))
// `function` of the namespace that suits this machine.
#define FOR_THIS_CPU(function, ...)                              \
  if (vector_bytes() == 64) v4::function(__VA_ARGS__);           \
  else if (vector_bytes() == 32) v3::function(__VA_ARGS__);      \
  else any::function(__VA_ARGS__)
#else
#define HAS_X86_SETS 0
#define FOR_THIS_CPU(function, ...) any::function(__VA_ARGS__)
#endif

// At most so wide; tests lower it, to run on one machine what others would.
inline std::atomic<int64_t> most_vector_bytes{64};

// How wide the vectors of FOR_THIS_CPU are here: 64, 32 or 16.
inline int64_t vector_bytes() {
#if HAS_X86_SETS
  static const int64_t here =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
          ? 64
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32
                                                                        : 16;
  return std::min(here, most_vector_bytes.load(std::memory_order_relaxed));
#else
  return 16;
#endif
}

using bf16 = uint16_t;

inline __attribute__((always_inline)) float widen(float value) { return value; }
inline __attribute__((always_inline)) float widen(bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline __attribute__((always_inline)) void narrow(float value, float* out) { *out = value; }
inline __attribute__((always_inline)) void narrow(float value, bf16* out) {
  uint32_t bits;  // to nearest, ties to even; NaN stays NaN
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = bf16(value != value ? 0x7fc0 : rounded);
}

// Floats on a cache line, zeroed once, so that what pads them is finite.
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new float[count + 16]()) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + (-address % 64) / sizeof(float);
  }
  float* take(int64_t count) { return (next_ += count) - count; }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

// `call` with a value of the type of the tensor's elements: float or bf16.
template <typename Call>
void with_type(const torch::stable::Tensor& tensor, Call call) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Float) call(float{});
  else call(bf16{});
}
