// What loops over rows of numbers share on the CPU: dtypes, vector widths, blocks of noise.

#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

// Compiled for wider vectors too; the widest that the machine has is chosen when the library loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace fastvid {

using bf16 = uint16_t;

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return same_bits<float>(uint32_t(value) << 16); }

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = same_bits<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = bf16(value != value ? 0x7fc0 : rounded);
}

constexpr int64_t kNoiseBlock = 512;  // normals that are drawn together, a multiple of 4

// kNoiseBlock normals from counter `index` on.
FOR_EVERY_CPU static void draw_block(uint64_t seed, uint64_t index, uint32_t stream, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < kNoiseBlock / 4; ++i) normals(seed, index + i, stream, out + 4 * i);
}

}  // namespace fastvid
