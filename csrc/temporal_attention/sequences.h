// The arithmetic of temporal_attention on one sequence. No include guard: temporal_attention.cpp
// includes it once per instruction set, inside a namespace, with TARGET (an attribute) and
// LANE_BYTES (the width of its vectors) defined.

#define INLINE TARGET inline __attribute__((always_inline))

using Lanes = float __attribute__((vector_size(LANE_BYTES), may_alias));
using Whole = int32_t __attribute__((vector_size(LANE_BYTES), may_alias));
constexpr int kLanes = LANE_BYTES / sizeof(float);
constexpr int kTile = LANE_BYTES == 64 ? 16 : 8;  // rows of a product that the registers hold

INLINE Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }
INLINE const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

// 2^x for x <= 0, to one unit in the last place; below 2^-126 it stays there. The polynomial has the
// least relative error on [-1/2, 1/2].
INLINE Lanes exp2_of(Lanes x) {
  const Lanes magic = Lanes{} + (12582912 + 127);  // 1.5 * 2^23 rounds; 127 is the exponent of 1
  x = x < -126.0f ? Lanes{} - 126 : x;
  const Lanes shifted = x + magic, f = x - (shifted - magic);
  Lanes power = Lanes{} + 1.535335905e-4f;
  power = power * f + 1.339887502e-3f;
  power = power * f + 9.618436918e-3f;
  power = power * f + 5.550332367e-2f;
  power = power * f + 2.402264774e-1f;
  power = power * f + 6.931471825e-1f;
  power = power * f + 1;
  return power * Lanes(Whole(shifted) << 23);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), `rows` of them at once in registers. All
// steps between elements are constants, so that they cost no registers and no instructions.
template <int rows, int row_step, int depth_step, int line>
TARGET void multiply_tile(const float* a, const float* b, float* c, int64_t depth,
                          int64_t columns) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    Lanes sum[rows] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Lanes along = lanes_at(b + k * line + column);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) sum[r] += a[r * row_step + k * depth_step] * along;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) lanes_at(c + r * line + column) = sum[r];
  }
}

template <int row_step, int depth_step, int line, int... less>
INLINE void multiply(const float* a, const float* b, float* c, int64_t rows, int64_t depth,
                     int64_t columns, std::integer_sequence<int, less...>) {
  using Tile = void (*)(const float*, const float*, float*, int64_t, int64_t);
  static constexpr Tile tiles[] = {multiply_tile<less + 1, row_step, depth_step, line>...};
  for (int64_t row = 0, left = (rows + kTile - 1) / kTile; row < rows; --left) {
    const int64_t count = (rows - row + left - 1) / left;  // tiles of much the same height
    tiles[count - 1](a + row * row_step, b, c + row * line, depth, columns);
    row += count;
  }
}

constexpr std::make_integer_sequence<int, kTile> kTiles;

// c (T, T) = a b, where a is (T, E) and b is (E, T).
INLINE void scores_of(const float* a, const float* b, float* c, const Sizes& size) {
  multiply<kWide, 1, kSquare>(a, b, c, size.frames, size.width, size.frames, kTiles);
}

// c (T, E) = a b, where a is (T, T) and b is (T, E).
INLINE void sums_of(const float* a, const float* b, float* c, const Sizes& size) {
  multiply<kSquare, 1, kWide>(a, b, c, size.frames, size.frames, size.width, kTiles);
}

// c (T, E) = the transpose of a (T, T) times b (T, E).
INLINE void sums_of_transposed(const float* a, const float* b, float* c, const Sizes& size) {
  multiply<1, kSquare, kWide>(a, b, c, size.frames, size.frames, size.width, kTiles);
}

// The lanes of a, then b, in this order.
template <int... lane>
INLINE Lanes shuffle(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, Whole{lane...});
#endif
}

template <int... lane>
constexpr auto pairs_swapped(std::integer_sequence<int, lane...>) {
  return std::integer_sequence<int, (lane ^ 1)...>();
}

// a0 b0 a1 b1 ... of the lower (0) or upper (1) halves of a and b.
template <int half, int... lane>
constexpr auto interleaved(std::integer_sequence<int, lane...>) {
  return std::integer_sequence<int, (half * kLanes / 2 + lane / 2 + lane % 2 * kLanes)...>();
}

// out (E, T) = the transpose of in (T, E): log2(lanes) rounds in which every row meets the one half
// a block away.
INLINE void transpose(const float* in, float* out, const Sizes& size) {
  constexpr std::make_integer_sequence<int, kLanes> all;
  for (int64_t row = 0; row < size.frames; row += kLanes) {
    for (int64_t column = 0; column < size.width; column += kLanes) {
      Lanes block[kLanes], shuffled[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = lanes_at(in + (row + i) * kWide + column);
#pragma GCC unroll 4
      for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i) {
          shuffled[2 * i] = shuffle(block[i], block[i + kLanes / 2], interleaved<0>(all));
          shuffled[2 * i + 1] = shuffle(block[i], block[i + kLanes / 2], interleaved<1>(all));
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = shuffled[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) lanes_at(out + (column + i) * kSquare + row) = block[i];
    }
  }
}

// Turn the pairs of one row; `direction` -1 turns them back.
INLINE void rotate(float* row, const Turns& turns, int64_t t, int64_t width, float direction) {
  constexpr std::make_integer_sequence<int, kLanes> all;
  for (int64_t e = 0; e < width; e += kLanes) {
    const Lanes x = lanes_at(row + e), other = shuffle(x, x, pairs_swapped(all));
    const Lanes cos = lanes_at(turns.cos + t * kWide + e);
    const Lanes sin = lanes_at(turns.sin + t * kWide + e) * direction;
    lanes_at(row + e) = x * cos + other * sin;
  }
}

// Frame after frame of all sequences of a group: neighbours in memory are read as neighbours, and
// no line is met twice, though the rows of a sequence often share one cache set.
template <typename T>
INLINE void load(const Tokens<const T>& from, const Group& group, float* matrices,
                 const Sizes& size, const Turns& turns) {
  int64_t first[kMostTogether];
  for (int64_t i = 0; i < group.count; ++i) first[i] = from.at(group.places[i]);
  for (int64_t t = 0; t < size.frames; ++t) {
    for (int64_t i = 0; i < group.count; ++i) {
      const T* in = from.data + first[i] + t * from.frame_step;
      float* row = matrices + i * size.matrix() + t * kWide;
      for (int64_t e = 0; e < size.width; e += 8)
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) row[e + i] = widen(in[e + i]);
      if (turns.cos) rotate(row, turns, t, size.width, 1);
    }
  }
}

template <typename T>
INLINE void store(float* matrices, const Tokens<T>& to, const Group& group, const Sizes& size,
                  const Turns& turns) {
  int64_t first[kMostTogether];
  for (int64_t i = 0; i < group.count; ++i) first[i] = to.at(group.places[i]);
  for (int64_t t = 0; t < size.frames; ++t) {
    for (int64_t i = 0; i < group.count; ++i) {
      T* out = to.data + first[i] + t * to.frame_step;
      float* row = matrices + i * size.matrix() + t * kWide;
      if (turns.cos) rotate(row, turns, t, size.width, -1);
      for (int64_t e = 0; e < size.width; e += 8)
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) narrow(row[e + i], out + e + i);
    }
  }
}

// Fetch a sequence while another is computed: more rows than the CPU follows by itself.
template <typename T, int write = 0>
INLINE void fetch(const Tokens<T>& from, const Place& place, const Sizes& size) {
  const T* in = from.data + from.at(place);
  for (int64_t t = 0; t < size.frames; ++t, in += from.frame_step)
    for (int64_t e = 0; e < size.width; e += 64 / sizeof(T)) __builtin_prefetch(in + e, write, 2);
}

// Scores (keys, queries) to probabilities, in place: queries lie side by side in the lanes, so that
// nothing is ever summed across them. What a query does not see gets 0.
INLINE void softmax(float* scores, const Bounds& bounds, const Sizes& size, float scale) {
  const float factor = scale * 1.44269504f;
  for (int64_t query = 0; query < size.frames; query += kLanes) {
    float* column = scores + query;
    const Whole& first = reinterpret_cast<const Whole&>(bounds.first[query]);
    const Whole& last = reinterpret_cast<const Whole&>(bounds.last[query]);
    Lanes most = Lanes{} - std::numeric_limits<float>::infinity(), sum = {};
    for (int32_t key = 0; key < size.frames; ++key) {
      const Lanes score = lanes_at(column + key * kSquare) * factor;
      most = (score > most) & (first <= key) & (last >= key) ? score : most;
    }
    for (int32_t key = 0; key < size.frames; ++key) {
      Lanes& p = lanes_at(column + key * kSquare);
      p = (first <= key) & (last >= key) ? exp2_of(p * factor - most) : Lanes{};
      sum += p;
    }
    const Lanes inverse = 1 / sum;
    for (int64_t key = 0; key < size.frames; ++key) lanes_at(column + key * kSquare) *= inverse;
  }
}

// dscores = p * (dp - sum of p * dp over the keys) * scale, in the place of dp.
INLINE void softmax_backward(const float* p, float* dp, const Sizes& size, float scale) {
  for (int64_t query = 0; query < size.frames; query += kLanes) {
    Lanes delta = {};
    for (int64_t at = query; at < size.frames * kSquare; at += kSquare)
      delta += lanes_at(p + at) * lanes_at(dp + at);
    for (int64_t at = query; at < size.frames * kSquare; at += kSquare)
      lanes_at(dp + at) = lanes_at(p + at) * (lanes_at(dp + at) - delta) * scale;
  }
}

template <typename T>
TARGET void forward_sequences(int64_t begin, int64_t end, Sizes size, Rule rule,
                              Tokens<const T> q, Tokens<const T> k, Tokens<const T> v,
                              Tokens<T> out) {
  const int64_t together = size.together(sizeof(T)), matrix = size.matrix();
  Scratch scratch(3 * together * matrix + rule.turns_size(size) + kSquare * (kWide + kSquare));
  float *q_rows = scratch.take(together * matrix), *k_rows = scratch.take(together * matrix);
  float *v_rows = scratch.take(together * matrix), *queries = scratch.take(kWide * kSquare);
  float* p = scratch.take(kSquare * kSquare);
  const Turns turns(rule, size, scratch), still;
  Bounds bounds;
  for (Group group(begin, end, together, size); group.count; group.next()) {
    load(q, group, q_rows, size, turns);
    load(k, group, k_rows, size, turns);
    load(v, group, v_rows, size, still);
    for (int64_t i = 0; i < group.count; ++i) {
      const Place place = group.places[i], ahead = group.ahead(i);
      bounds.set(rule, place.b, size);
      float *result = q_rows + i * matrix, *values = v_rows + i * matrix;
      fetch(q, ahead, size);
      transpose(q_rows + i * matrix, queries, size);
      fetch(k, ahead, size);
      scores_of(k_rows + i * matrix, queries, p, size);
      fetch(v, ahead, size);
      softmax(p, bounds, size, rule.scale);
      fetch<T, 1>(out, place, size);
      sums_of_transposed(p, values, result, size);
      for (int64_t t = 0; t < size.frames; ++t)  // the very bits of v, whatever the others hold
        if (rule.identity(place.b, t))
          std::copy_n(values + t * kWide, size.width, result + t * kWide);
    }
    store(q_rows, out, group, size, still);
  }
}

template <typename T>
TARGET void backward_sequences(int64_t begin, int64_t end, Sizes size, Rule rule,
                               Tokens<const T> dout, Tokens<const T> q, Tokens<const T> k,
                               Tokens<const T> v, Tokens<T> dq, Tokens<T> dk, Tokens<T> dv) {
  const int64_t together = size.together(sizeof(T)), matrix = size.matrix();
  Scratch scratch(4 * together * matrix + rule.turns_size(size) + kSquare * (kWide + 2 * kSquare));
  float *q_rows = scratch.take(together * matrix), *k_rows = scratch.take(together * matrix);
  float *v_rows = scratch.take(together * matrix), *dout_rows = scratch.take(together * matrix);
  float *turned = scratch.take(kWide * kSquare), *p = scratch.take(kSquare * kSquare);
  float* ds = scratch.take(kSquare * kSquare);
  const Turns turns(rule, size, scratch), still;
  Bounds bounds;
  for (Group group(begin, end, together, size); group.count; group.next()) {
    load(q, group, q_rows, size, turns);
    load(k, group, k_rows, size, turns);
    load(v, group, v_rows, size, still);
    load(dout, group, dout_rows, size, still);
    for (int64_t i = 0; i < group.count; ++i) {
      const Place place = group.places[i], ahead = group.ahead(i);
      bounds.set(rule, place.b, size);
      float *queries = q_rows + i * matrix, *keys = k_rows + i * matrix;
      float *values = v_rows + i * matrix, *douts = dout_rows + i * matrix;
      fetch(q, ahead, size);
      transpose(queries, turned, size);
      scores_of(keys, turned, p, size);
      fetch(k, ahead, size);
      softmax(p, bounds, size, rule.scale);
      transpose(douts, turned, size);
      fetch(v, ahead, size);
      scores_of(values, turned, ds, size);
      fetch(dout, ahead, size);
      softmax_backward(p, ds, size, rule.scale);
      fetch<T, 1>(dv, place, size);
      sums_of(p, douts, values, size);            // dv, in the place of v
      fetch<T, 1>(dq, place, size);
      sums_of_transposed(ds, keys, douts, size);  // dq, in the place of dout
      fetch<T, 1>(dk, place, size);
      sums_of(ds, queries, keys, size);           // dk, in the place of k
    }
    store(dout_rows, dq, group, size, turns);
    store(k_rows, dk, group, size, turns);
    store(v_rows, dv, group, size, still);
  }
}

#undef INLINE
#undef TARGET
#undef LANE_BYTES
