// The arithmetic of temporal_attention on one sequence. No include guard: temporal_attention.cpp
// includes it once per instruction set, inside a namespace, with TARGET (an attribute) and
// LANE_BYTES (the width of its vectors) defined.

#define INLINE TARGET inline __attribute__((always_inline))

// 2^x for x <= 0, to one or two units in the last place; below 2^-126 it stays there.
INLINE float exp2_of(float x) {
  const float magic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -126 ? -126 : x;
  const float shifted = x + magic, f = x - (shifted - magic);
  float power = 1.5403530e-4f;
  power = power * f + 1.3333558e-3f;
  power = power * f + 9.6181291e-3f;
  power = power * f + 5.5504109e-2f;
  power = power * f + 2.4022651e-1f;
  power = power * f + 6.9314718e-1f;
  power = power * f + 1;
  uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &power, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

using Lanes = float __attribute__((vector_size(LANE_BYTES), may_alias));
constexpr int kLanes = LANE_BYTES / sizeof(float), kTile = 8;

INLINE Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }
INLINE const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

// c (rows, columns) = a (rows, depth) b (depth, columns). Rows and columns are padded; an element
// of `a` lies at a[row * a_row + k * a_depth], so that `a` may be a transpose.
INLINE void multiply(const float* a, int64_t a_row, int64_t a_depth, const float* b, float* c,
                     int64_t rows, int64_t depth, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kTile) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const float* factors = a + row * a_row;
      Lanes sum[kTile] = {};  // in registers
      for (int64_t k = 0; k < depth; ++k) {
        const Lanes line = lanes_at(b + k * columns + column);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kTile; ++r) sum[r] += factors[r * a_row + k * a_depth] * line;
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < kTile; ++r) lanes_at(c + (row + r) * columns + column) = sum[r];
    }
  }
}

// a0 b0 a1 b1 ... of the lower (0) or upper (1) halves of a and b.
template <int half, int... lane>
INLINE Lanes interleave(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (half * kLanes / 2 + lane / 2 + lane % 2 * kLanes)...);
#else
  using Order = int32_t __attribute__((vector_size(LANE_BYTES)));
  return __builtin_shuffle(a, b, Order{(half * kLanes / 2 + lane / 2 + lane % 2 * kLanes)...});
#endif
}

// out (columns, rows) = the transpose of in (rows, columns), both padded: log2(lanes) rounds in
// which every row meets the one half a block away.
INLINE void transpose(const float* in, float* out, int64_t rows, int64_t columns) {
  constexpr std::make_integer_sequence<int, kLanes> all;
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Lanes block[kLanes], shuffled[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = lanes_at(in + (row + i) * columns + column);
#pragma GCC unroll 4
      for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i) {
          shuffled[2 * i] = interleave<0>(block[i], block[i + kLanes / 2], all);
          shuffled[2 * i + 1] = interleave<1>(block[i], block[i + kLanes / 2], all);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = shuffled[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) lanes_at(out + (column + i) * rows + row) = block[i];
    }
  }
}

// Turn the pairs of one row; `direction` -1 turns them back.
INLINE void rotate(float* row, const Rule& rule, int64_t t, int64_t width, float direction) {
  const float* cos = rule.cos + t * (width / 2);
  const float* sin = rule.sin + t * (width / 2);
#pragma omp simd
  for (int64_t pair = 0; pair < width / 2; ++pair) {
    const float a = row[2 * pair], b = row[2 * pair + 1];
    const float c = cos[pair], s = sin[pair] * direction;
    row[2 * pair] = a * c - b * s;
    row[2 * pair + 1] = a * s + b * c;
  }
}

template <typename T>
INLINE void load(const T* in, int64_t step, int64_t next, float* rows, const Sizes& size,
                 const Rule* rotary) {
  for (int64_t t = 0; t < size.frames; ++t) {
    float* row = rows + t * size.columns();
    for (int64_t e = 0; e < size.width; e += 64 / sizeof(T))  // more rows than the CPU can follow
      __builtin_prefetch(in + t * step + next + e);
#pragma omp simd
    for (int64_t e = 0; e < size.width; ++e) row[e] = widen(in[t * step + e]);
    if (rotary && rotary->cos) rotate(row, *rotary, t, size.width, 1);
  }
}

template <typename T>
INLINE void store(float* rows, T* out, int64_t step, const Sizes& size, const Rule* rotary) {
  for (int64_t t = 0; t < size.frames; ++t) {
    float* row = rows + t * size.columns();
    if (rotary && rotary->cos) rotate(row, *rotary, t, size.width, -1);
#pragma omp simd
    for (int64_t e = 0; e < size.width; ++e) narrow(row[e], out + t * step + e);
  }
}

// Scores to probabilities, in place. What a row does not see gets 0.
INLINE void softmax(float* scores, int64_t b, const Sizes& size, const Rule& rule) {
  const float factor = rule.scale * 1.44269504f;
  for (int64_t t = 0; t < size.frames; ++t) {
    float* row = scores + t * size.rows();
    const bool alone = rule.identity(b, t);
    const int32_t first = alone ? t : std::max<int64_t>(0, t - rule.back);
    const int32_t last = alone ? t : std::min(size.frames - 1, t + rule.forward);
    const int32_t columns = size.rows();
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
    for (int32_t s = 0; s < columns; ++s) {
      row[s] = s >= first && s <= last ? row[s] * factor : -std::numeric_limits<float>::infinity();
      most = row[s] > most ? row[s] : most;
    }
#pragma omp simd reduction(+ : sum)
    for (int32_t s = 0; s < columns; ++s) {
      row[s] = s >= first && s <= last ? exp2_of(row[s] - most) : 0;
      sum += row[s];
    }
    const float inverse = 1 / sum;
#pragma omp simd
    for (int32_t s = 0; s < columns; ++s) row[s] *= inverse;
  }
}

// dscores = p * (dp - sum of p * dp over the row) * scale, in the place of dp.
INLINE void softmax_backward(const float* p, float* dp, const Sizes& size, const Rule& rule) {
  const int64_t columns = size.rows();
  for (int64_t t = 0; t < size.frames; ++t, p += columns, dp += columns) {
    float delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t s = 0; s < columns; ++s) delta += p[s] * dp[s];
#pragma omp simd
    for (int64_t s = 0; s < columns; ++s) dp[s] = p[s] * (dp[s] - delta) * rule.scale;
  }
}

template <typename T>
TARGET void forward_sequences(int64_t begin, int64_t end, Sizes size, Rule rule,
                                     Tokens<const T> q, Tokens<const T> k, Tokens<const T> v,
                                     Tokens<T> out) {
  const int64_t rows = size.rows(), columns = size.columns();
  Scratch scratch(size, 5, 1);
  float *q_rows = scratch.take(rows * columns), *k_rows = scratch.take(rows * columns);
  float *v_rows = scratch.take(rows * columns), *keys = scratch.take(rows * columns);
  float *out_rows = scratch.take(rows * columns), *p = scratch.take(rows * rows);
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const auto [b, n, h] = Place(sequence, size);
    load(q.at(b, n, h), q.frame_step, q.head_step, q_rows, size, &rule);
    load(k.at(b, n, h), k.frame_step, k.head_step, k_rows, size, &rule);
    load(v.at(b, n, h), v.frame_step, v.head_step, v_rows, size, nullptr);
    transpose(k_rows, keys, rows, columns);
    multiply(q_rows, columns, 1, keys, p, rows, size.width, rows);
    softmax(p, b, size, rule);
    multiply(p, rows, 1, v_rows, out_rows, rows, size.frames, columns);
    for (int64_t t = 0; t < size.frames; ++t)  // the very bits of v, whatever the others hold
      if (rule.identity(b, t))
        std::copy_n(v_rows + t * columns, columns, out_rows + t * columns);
    store(out_rows, out.at(b, n, h), out.frame_step, size, nullptr);
  }
}

template <typename T>
TARGET void backward_sequences(int64_t begin, int64_t end, Sizes size, Rule rule,
                                      Tokens<const T> dout, Tokens<const T> q, Tokens<const T> k,
                                      Tokens<const T> v, Tokens<T> dq, Tokens<T> dk,
                                      Tokens<T> dv) {
  const int64_t rows = size.rows(), columns = size.columns(), frames = size.frames;
  Scratch scratch(size, 6, 2);
  float *q_rows = scratch.take(rows * columns), *k_rows = scratch.take(rows * columns);
  float *v_rows = scratch.take(rows * columns), *dout_rows = scratch.take(rows * columns);
  float *turned = scratch.take(rows * columns), *result = scratch.take(rows * columns);
  float *p = scratch.take(rows * rows), *ds = scratch.take(rows * rows);
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    const auto [b, n, h] = Place(sequence, size);
    load(q.at(b, n, h), q.frame_step, q.head_step, q_rows, size, &rule);
    load(k.at(b, n, h), k.frame_step, k.head_step, k_rows, size, &rule);
    load(v.at(b, n, h), v.frame_step, v.head_step, v_rows, size, nullptr);
    load(dout.at(b, n, h), dout.frame_step, dout.head_step, dout_rows, size, nullptr);
    transpose(k_rows, turned, rows, columns);
    multiply(q_rows, columns, 1, turned, p, rows, size.width, rows);
    softmax(p, b, size, rule);
    multiply(p, 1, rows, dout_rows, result, rows, frames, columns);
    store(result, dv.at(b, n, h), dv.frame_step, size, nullptr);
    transpose(v_rows, turned, rows, columns);
    multiply(dout_rows, columns, 1, turned, ds, rows, size.width, rows);
    softmax_backward(p, ds, size, rule);
    multiply(ds, rows, 1, k_rows, result, rows, frames, columns);
    store(result, dq.at(b, n, h), dq.frame_step, size, &rule);
    multiply(ds, 1, rows, q_rows, result, rows, frames, columns);
    store(result, dk.at(b, n, h), dk.frame_step, size, &rule);
  }
}

#undef INLINE
#undef TARGET
#undef LANE_BYTES
