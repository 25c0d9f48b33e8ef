// The arithmetic of the room on tokens of q or k. No include guard: see _shared/cpu.h.
//
// The width of a head is a multiple of 8 numbers, so vectors of 8 leave no rest. Those of 16 are for
// heads that are multiples of 16.

#include "../_shared/lanes.h"

// Those that turn with the channels from e on; `x` is a whole head.
template <Pairs pairs>
INLINE Lanes partners(const float* x, Lanes here, const Turn& turn, int64_t e) {
  if constexpr (pairs == Pairs::neighbours) return exchanged<1>(here);
  if (turn.run[e] >= kLanes) return load_lanes(x + turn.partner[e]);
  float few[kLanes];
  for (int i = 0; i < kLanes; ++i) few[i] = x[turn.partner[e + i]];
  return load_lanes(few);
}

// A head turned: `load(e)` gives its lanes, `store(e, lanes)` takes them.
template <Pairs pairs, typename Load, typename Store>
INLINE void turn_head(const Turn& turn, const Angles& angles, int64_t E, float* scratch, Load load,
                      Store store) {
  if constexpr (pairs == Pairs::halves)
    for (int64_t e = 0; e < E; e += kLanes) store_lanes(load(e), scratch + e);
  for (int64_t e = 0; e < E; e += kLanes) {
    Lanes x = pairs == Pairs::halves ? load_lanes(scratch + e) : load(e);
    if constexpr (pairs != Pairs::none)
      x = x * load_lanes(angles.cos + e) +
          partners<pairs>(scratch, x, turn, e) * load_lanes(angles.sin + e);
    store(e, x);
  }
}

// Mean (0 for RMSNorm) and 1 / deviation of every norm of a token, one after the other: what waits
// for a sum would hold up what comes behind it.
template <typename T>
INLINE void moments_of(const T* x, int64_t step, const Job<T>& job, Moments* found) {
  const int64_t E = job.size.width, heads = job.heads_of_norm(), norms = job.size.heads / heads;
  const float share = 1 / float(heads * E), eps = job.eps;
  const bool centre = job.norm == Norm::layer;
  const auto sum_over = [&](const T* x, auto number) IN_PLACE {
    Lanes sum = {};
    for (int64_t h = 0; h < heads; ++h) {
      Lanes part = {};  // of each head by itself: a chain of sums is slow
      for (int64_t e = 0; e < E; e += kLanes) part += number(load_lanes(x + h * step + e));
      sum += part;
    }
    return sum_of(sum) * share;
  };
  for (int64_t i = 0; i < norms; ++i, x += heads * step) {
    const float mean = centre ? sum_over(x, [&](Lanes x) IN_PLACE { return x; }) : 0;
    const float variance = sum_over(x, [&](Lanes x) IN_PLACE { return (x - mean) * (x - mean); });
    found[i] = {mean, 1 / std::sqrt(variance + eps)};
  }
}

// The head that is wanted a token later: the processor follows no rows across pages.
template <typename T>
INLINE void fetch(const T* head, const Heads<T>& from, int64_t E) {
  head += from.token_step;
  for (int64_t e = 0; e < E; e += 64 / sizeof(T)) __builtin_prefetch(head + e, 0, 2);
}

// A token of q or k: y = turn(norm(x) * weight + bias).
template <Pairs pairs, typename T>
INLINE void forward_token(const Job<T>& job, const Side<T>& side, int64_t b, int64_t n,
                          const Angles& angles, float* scratch) {
  const Sizes& size = job.size;
  const int64_t E = size.width, heads = job.heads_of_norm(), step = side.x.head_step;
  const T* x = side.x.at(b, n);
  T* y = side.y + (b * size.tokens + n) * size.row();
  Moments moments[kMostHeads];
  if (job.norm == Norm::none) std::fill_n(moments, size.heads, Moments{0, 1});
  else moments_of(x, step, job, moments);
  for (int64_t i = 0; i < size.heads / heads; ++i) {
    const float mean = moments[i].mean, rstd = moments[i].rstd;
    for (int64_t h = 0; h < heads; ++h, x += step, y += E) {
      const float *const weight = side.weight + h * side.weight_step;
      const float *const bias = side.bias + h * side.bias_step;
      fetch(x, side.x, E);
      turn_head<pairs>(job.turn, angles, E, scratch,
                       [&](int64_t e) IN_PLACE {
                         return (load_lanes(x + e) - mean) * rstd * load_lanes(weight + e) +
                                load_lanes(bias + e);
                       },
                       [&](int64_t e, Lanes lanes) IN_PLACE { store_lanes(lanes, y + e); });
    }
  }
}

// Its gradients: dx, and what it adds to those of weight and bias. `g` has room for a token.
template <Pairs pairs, typename T>
INLINE void backward_token(const Job<T>& job, const Side<T>& side, int64_t b, int64_t n,
                           const Angles& angles, float* scratch, float* g) {
  const Sizes& size = job.size;
  const int64_t E = size.width, heads = job.heads_of_norm(), norms = size.heads / heads;
  const int64_t x_step = side.x.head_step, dy_step = side.dy.head_step;
  const T *const x = side.x.at(b, n), *dy = side.dy.at(b, n);
  const float count = 1 / float(heads * E);
  Moments moments[kMostHeads];
  struct {
    float share, projection;  // of g, and of g along the norm
  } means[kMostHeads];
  moments_of(x, x_step, job, moments);
  const auto normed = [&](const T* x, const Moments& of) IN_PLACE {
    return (load_lanes(x) - of.mean) * of.rstd;
  };
  for (int64_t i = 0; i < norms; ++i) {
    const Moments of = moments[i];
    Lanes shares = {}, projections = {};
    for (int64_t h = 0; h < heads; ++h, dy += dy_step) {
      const T* const row = x + (i * heads + h) * x_step;
      const float* const weight = side.weight + h * side.weight_step;
      float* const dweight = side.dweight ? side.dweight + h * side.weight_step : nullptr;
      float* const dbias = side.dbias ? side.dbias + h * side.bias_step : nullptr;
      float* const to = g + (i * heads + h) * E;
      Lanes share = {}, projection = {};
      fetch(row, side.x, E);
      fetch(dy, side.dy, E);
      turn_head<pairs>(job.turn, angles, E, scratch,
                       [&](int64_t e) IN_PLACE { return load_lanes(dy + e); },
                       [&](int64_t e, Lanes grad) IN_PLACE {
                         const Lanes along = normed(row + e, of);
                         if (dweight)
                           store_lanes(load_lanes(dweight + e) + grad * along, dweight + e);
                         if (dbias) store_lanes(load_lanes(dbias + e) + grad, dbias + e);
                         grad *= load_lanes(weight + e);
                         store_lanes(grad, to + e);
                         share += grad;
                         projection += grad * along;
                       });
      shares += share;
      projections += projection;
    }
    means[i] = {job.norm == Norm::layer ? sum_of(shares) * count : 0, sum_of(projections) * count};
  }
  T* dx = side.y + (b * size.tokens + n) * size.row();
  for (int64_t i = 0; i < norms; ++i) {
    const Moments of = moments[i];
    const auto mean = means[i];
    for (int64_t h = i * heads; h < (i + 1) * heads; ++h, dx += E)
      for (int64_t e = 0; e < E; e += kLanes) {
        const Lanes along = normed(x + h * x_step + e, of);
        store_lanes((load_lanes(g + h * E + e) - mean.share - along * mean.projection) * of.rstd,
                    dx + e);
      }
  }
}

// `call(b, n, angles, scratch)` for tokens `first` to `last` of all samples.
template <typename T, typename Call>
INLINE void each_token(const Job<T>& job, int64_t first, int64_t last, float* scratch, Call call) {
  float *const cos = scratch, *const sin = cos + kWidest, *const head = sin + kWidest;
  for (int64_t at = first; at < last; ++at) {
    const int64_t b = at / job.size.tokens, n = at % job.size.tokens;
    if (job.turn.cos) job.turn.angles_of(b, n, job.size.width, cos, sin);
    call(b, n, Angles{cos, sin}, head);
  }
}

template <Pairs pairs, typename T>
TARGET void forward_tokens(int64_t first, int64_t last, const Job<T>& job, float* scratch) {
#if LANE_BYTES == 64
  if (job.size.width % kLanes) return v3::forward_tokens<pairs>(first, last, job, scratch);
#endif
  each_token(job, first, last, scratch,
             [&](int64_t b, int64_t n, const Angles& angles, float* head) IN_PLACE {
               for (const Side<T>& side : job.sides)
                 forward_token<pairs>(job, side, b, n, angles, head);
             });
}

template <Pairs pairs, typename T>
TARGET void backward_tokens(int64_t first, int64_t last, const Job<T>& job, float* scratch) {
#if LANE_BYTES == 64
  if (job.size.width % kLanes) return v3::backward_tokens<pairs>(first, last, job, scratch);
#endif
  each_token(job, first, last, scratch,
             [&](int64_t b, int64_t n, const Angles& angles, float* head) IN_PLACE {
               for (const Side<T>& side : job.sides)
                 backward_token<pairs>(job, side, b, n, angles, head, head + kWidest);
             });
}

#undef INLINE
#undef IN_PLACE
#undef TARGET
#undef LANE_BYTES
