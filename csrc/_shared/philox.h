// Philox 4x32-10 and Box-Muller for the CPU and for CUDA: the twin of kernels/_shared/philox.py.
//
// Plain integer and float32 arithmetic without calls, so that loops over it are vectorised.

#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace fastvid {

struct Words {
  uint32_t at[4];
};

// `counter` with its lowest word first; every bit of `seed` is key.
FASTVID_INLINE Words philox(Words counter, uint64_t seed) {
  uint32_t c0 = counter.at[0], c1 = counter.at[1], c2 = counter.at[2], c3 = counter.at[3];
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <typename To, typename From>
FASTVID_INLINE To same_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FASTVID_INLINE void box_muller(uint32_t first, uint32_t second, float* out) {
  constexpr int32_t kHalfRoot = 0x3F3504F3;  // the bits of sqrt(1/2)
  const int32_t bits = same_bits<int32_t>(float(first) + 1.0f) - kHalfRoot;
  const float exponent = float((bits >> 23) - 32);
  const float x = same_bits<float>((bits & 0x7FFFFF) + kHalfRoot) - 1.0f;
  // ln(1 + x) / x for 1 + x from sqrt(1/2) to sqrt(2); a fit, as are sine and cosine below.
  float log = 0.08959803f;
  log = log * x - 0.14482136f;
  log = log * x + 0.14917395f;
  log = log * x - 0.16543746f;
  log = log * x + 0.19958416f;
  log = log * x - 0.25002946f;
  log = log * x + 0.3333416f;
  log = log * x - 0.49999978f;
  log = log * x + 0.99999998f;
  const float squared = -2.0f * (exponent * 0.6931471805599453f + x * log);
  const float radius = __builtin_sqrtf(squared);

  // The nearest quarter turn, and what is left of the angle, exact in integers.
  const uint32_t quarter = (second + 0x20000000u) >> 30;
  const float turn = float(int32_t(second - (quarter << 30))) * 2.3283064365386963e-10f;  // 2^-32
  const float t = turn * turn;
  const float sine = ((-75.40224949f * t + 81.59255849f) * t - 41.34166267f) * t + 6.28318529f;
  const float cosine = ((59.22049994f * t - 85.44285537f) * t + 64.93931625f) * t - 19.73920865f;
  const float up = radius * turn * sine, right = radius * (cosine * t + 1.0f);
  const bool odd = quarter & 1;
  const float across = odd ? up : right, along = odd ? right : up;
  out[0] = (quarter + 1) & 2 ? -across : across;
  out[1] = quarter & 2 ? -along : along;
}

// The numbers 4 * index to 4 * index + 3 of the noise of a sample.
FASTVID_INLINE void normals(uint64_t seed, uint64_t index, uint32_t stream, float* out) {
  const Words words = philox({{uint32_t(index), uint32_t(index >> 32), stream, 0}}, seed);
  box_muller(words.at[0], words.at[1], out);
  box_muller(words.at[2], words.at[3], out + 2);
}

}  // namespace fastvid
