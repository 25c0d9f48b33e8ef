// What loops over rows of numbers share on the CPU: vector widths, blocks of noise.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "philox.h"

// Compiled for wider vectors too; the widest that the machine has is chosen when the library loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace fastvid {

template <typename X>
FOR_EVERY_CPU void widen_row(const X* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

constexpr int64_t kNoiseBlock = 512;  // normals that are drawn together, a multiple of 4

// kNoiseBlock normals from counter `index` on.
FOR_EVERY_CPU static void draw_block(uint64_t seed, uint64_t index, uint32_t stream, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < kNoiseBlock / 4; ++i) normals(seed, index + i, stream, out + 4 * i);
}

}  // namespace fastvid
