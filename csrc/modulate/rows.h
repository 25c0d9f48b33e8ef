// The arithmetic of the room on a few rows of D numbers. No include guard: see _shared/cpu.h.
//
// A block of rows of one group shares the rows of modulation, and its sums run side by side. A row
// stays in the nearest caches between the passes over it.

#include "../_shared/lanes.h"

// `body(d, left)` for every block of lanes of a row. The last may have fewer numbers, `left`; what
// is loaded past them is 0.
template <typename Body>
INLINE void each_block(int64_t D, Body body) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) body(d, kLanes);
  if (d < D) body(d, D - d);
}

template <typename T>
INLINE Lanes load(const T* in, int64_t left) {
  if (left == kLanes) return load_lanes(in);
  float few[kLanes] = {};
  for (int64_t i = 0; i < left && i < kLanes; ++i) few[i] = widen(in[i]);
  return load_lanes(few);
}

template <typename T>
INLINE void store(Lanes value, T* out, int64_t left) {
  if (left == kLanes) return store_lanes(value, out);
  float few[kLanes];
  store_lanes(value, few);
  for (int64_t i = 0; i < left && i < kLanes; ++i) narrow(few[i], out + i);
}

INLINE Lanes zero_past(Lanes value, int64_t left) {
  if (left == kLanes) return value;
  float few[kLanes];
  store_lanes(value, few);
  return load(few, left);
}

template <typename T>
INLINE void widen_row(const T* in, float plus, float* out, int64_t D) {
  each_block(D, [&](int64_t d, int64_t left)
                    IN_PLACE { store(load(in + d, left) + plus, out + d, left); });
}

// Row g of sample b of a modulation, plus `plus`, wide.
INLINE void take(const Modulation& from, int64_t b, int64_t g, float plus, float* out, int64_t D) {
  const int64_t at = b * from.batch_step + g * from.row_step;
  if (from.narrow) widen_row(static_cast<const bf16*>(from.data) + at, plus, out, D);
  else widen_row(static_cast<const float*>(from.data) + at, plus, out, D);
}

template <int R, typename X, typename Y>
INLINE void forward_block(int64_t b, int64_t n, const Forward<X, Y>& job, const float* gain,
                          const float* offset, const float* gate, float* rows) {
  const int64_t D = job.size.width, at = b * job.size.tokens + n;
  const int64_t x_step = job.x.row_step, h_step = job.h.row_step, step = job.size.padded();
  const X* const x = job.x.at(b, n);
  Lanes sum[R] = {}, squares[R] = {};
  if (gate) {
    const Y* const h = job.h.at(b, n);
    X* const total = job.total + at * D;
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
      const Lanes gate_d = load(gate + d, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Lanes exact = load(x + r * x_step + d, left) + gate_d * load(h + r * h_step + d, left);
        const Lanes value = rounded_as(exact, total);
        store(value, total + r * D + d, left);
        store_lanes(value, rows + r * step + d);
        sum[r] += value;
      }
    });
  } else {
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Lanes value = load(x + r * x_step + d, left);
        store_lanes(value, rows + r * step + d);
        sum[r] += value;
      }
    });
  }
  float mean[R], rstd[R];
  for (int r = 0; r < R; ++r) mean[r] = job.rms ? 0 : sum_of(sum[r]) / D;
  each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes centred = zero_past(load_lanes(rows + r * step + d) - mean[r], left);
      squares[r] += centred * centred;
    }
  });
  for (int r = 0; r < R; ++r) {
    rstd[r] = job.rstd[at + r] = 1 / std::sqrt(sum_of(squares[r]) / D + job.eps);
    if (!job.rms) job.mean[at + r] = mean[r];
  }
  Y* const y = job.y + at * D;
  each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
    const Lanes gain_d = load(gain + d, left), offset_d = load(offset + d, left);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes normed = (load_lanes(rows + r * step + d) - mean[r]) * rstd[r];
      store(normed * gain_d + offset_d, y + r * D + d, left);
    }
  });
}

// Rows `first` to `last` of all samples.
template <typename X, typename Y>
TARGET void forward_rows(int64_t first, int64_t last, const Forward<X, Y>& job) {
  const Sizes& size = job.size;
  const int64_t D = size.width, step = size.padded();
  Scratch scratch((3 + kBlock) * step);
  float *const gain = scratch.take(step), *const offset = scratch.take(step);
  float *const gate = scratch.take(step), *const rows = scratch.take(kBlock * step);
  const bool residual = job.h.data != nullptr;
  if (residual) std::fill_n(gate, D, 1.0f);
  for (int64_t at = first, next; at < last; at = next) {
    const int64_t b = at / size.tokens, n = at % size.tokens, g = size.group_of(b, n);
    next = std::min(last, at - n + size.start(b, g + 1));  // the end of the group
    take(job.scale, b, g, 1, gain, D);
    take(job.shift, b, g, 0, offset, D);
    if (job.gate.data) take(job.gate, b, g, 0, gate, D);
    const float* const through = residual ? gate : nullptr;
    int64_t row = n;
    const int64_t end = n + next - at;
    for (; row + kBlock <= end; row += kBlock)
      forward_block<kBlock>(b, row, job, gain, offset, through, rows);
    for (; row < end; ++row) forward_block<1>(b, row, job, gain, offset, through, rows);
  }
}

// With a gain the gradient comes through the norm, with `dsum` past it, and with a gate it goes on
// into the branch.
template <int R, typename X, typename Y>
INLINE void backward_block(int64_t b, int64_t n, const Backward<X, Y>& job, const float* gain,
                           const float* gate, const Sums& sums) {
  const int64_t D = job.size.width, at = b * job.size.tokens + n;
  const int64_t dy_step = job.dy.row_step, total_step = job.total.row_step;
  const int64_t dsum_step = job.dsum.row_step, h_step = job.h.row_step;
  const Y *const dy = job.dy.at(b, n), *const h = job.h.at(b, n);
  const X *const total = job.total.at(b, n), *const dsum = job.dsum.data ? job.dsum.at(b, n) : nullptr;
  X* const dx = job.dx + at * D;
  Y* const dh = job.dh + at * D;
  float mean[R] = {}, rstd[R] = {}, share[R] = {}, projection[R] = {};
  if (gain) {
    Lanes share_sum[R] = {}, projection_sum[R] = {};
    for (int r = 0; r < R; ++r) {
      rstd[r] = job.rstd[at + r];
      mean[r] = job.rms ? 0 : job.mean[at + r];
    }
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
      const Lanes gain_d = load(gain + d, left);
      Lanes dshift = load(sums.shift + d, left), dscale = load(sums.scale + d, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Lanes dy_d = load(dy + r * dy_step + d, left), grad = dy_d * gain_d;  // 0 past D
        const Lanes normed = (load(total + r * total_step + d, left) - mean[r]) * rstd[r];
        dshift += dy_d;
        dscale += dy_d * normed;
        share_sum[r] += grad;
        projection_sum[r] += grad * normed;
      }
      store(dshift, sums.shift + d, left);
      store(dscale, sums.scale + d, left);
    });
    for (int r = 0; r < R; ++r) {
      share[r] = job.rms ? 0 : sum_of(share_sum[r]) / D;
      projection[r] = sum_of(projection_sum[r]) / D;
    }
  }
  const auto through_norm = [&](int64_t d, int64_t left, int r, Lanes gain_d) IN_PLACE {
    const Lanes normed = (load(total + r * total_step + d, left) - mean[r]) * rstd[r];
    const Lanes grad = load(dy + r * dy_step + d, left) * gain_d;
    return (grad - share[r] - normed * projection[r]) * rstd[r];
  };
  const auto past_norm = [&](int64_t d, int64_t left, int r) IN_PLACE {
    return load(dsum + r * dsum_step + d, left);
  };
  const auto into_branch = [&](int64_t d, int64_t left, int r, Lanes found, Lanes gate_d,
                               Lanes& dgate) IN_PLACE {
    dgate += found * load(h + r * h_step + d, left);
    store(found * gate_d, dh + r * D + d, left);
  };
  if (!gain) {
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
      const Lanes gate_d = load(gate + d, left);
      Lanes dgate = load(sums.gate + d, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        into_branch(d, left, r, past_norm(d, left, r), gate_d, dgate);
      store(dgate, sums.gate + d, left);
    });
  } else if (!dsum) {
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
      const Lanes gain_d = load(gain + d, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        store(through_norm(d, left, r, gain_d), dx + r * D + d, left);
    });
  } else {
    each_block(D, [&](int64_t d, int64_t left) IN_PLACE {
      const Lanes gain_d = load(gain + d, left);
      const Lanes gate_d = gate ? load(gate + d, left) : Lanes{};
      Lanes dgate = gate ? load(sums.gate + d, left) : Lanes{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Lanes found = through_norm(d, left, r, gain_d) + past_norm(d, left, r);
        store(found, dx + r * D + d, left);
        if (gate) into_branch(d, left, r, found, gate_d, dgate);
      }
      if (gate) store(dgate, sums.gate + d, left);
    });
  }
}

// Tokens `first` to `last` of group g of sample b, and their sums.
template <typename X, typename Y>
TARGET void backward_chunk(int64_t b, int64_t g, int64_t first, int64_t last,
                           const Backward<X, Y>& job, const Sums& sums, float* scratch) {
  const int64_t D = job.size.width;
  float* const gain = job.scale.data ? scratch : nullptr;
  float* const gate = job.gate.data ? scratch + job.size.padded() : nullptr;
  for (float* sum : {sums.shift, sums.scale, sums.gate})
    if (sum) std::fill_n(sum, D, 0.0f);
  if (gain) take(job.scale, b, g, 1, gain, D);
  if (gate) take(job.gate, b, g, 0, gate, D);
  int64_t n = first;
  for (; n + kBlock <= last; n += kBlock) backward_block<kBlock>(b, n, job, gain, gate, sums);
  for (; n < last; ++n) backward_block<1>(b, n, job, gain, gate, sums);
}

#undef INLINE
#undef IN_PLACE
#undef TARGET
#undef LANE_BYTES
