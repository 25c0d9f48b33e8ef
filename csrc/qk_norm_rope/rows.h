// The arithmetic of the room on tokens of q or k. No include guard: see _shared/cpu.h.
//
// The width of a head is a multiple of 8 numbers, so vectors are of 8 at most and there is no rest.

#if LANE_BYTES > 32
#undef LANE_BYTES
#define LANE_BYTES 32
#endif
#include "../_shared/lanes.h"

using Places = int32_t __attribute__((vector_size(LANE_BYTES)));

// The lanes, neighbours exchanged.
INLINE Lanes neighbours(Lanes x) {
#ifdef __clang__
  if constexpr (kLanes == 8) return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  else return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#else
  Places swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = i ^ 1;
  return __builtin_shuffle(x, swapped);
#endif
}

// Those that turn with the channels from e on; `x` is a whole head.
template <Pairs pairs>
INLINE Lanes partners(const float* x, Lanes here, const Turn& turn, int64_t e) {
  if constexpr (pairs == Pairs::neighbours) return neighbours(here);
  if (turn.together[e / 8]) return load_lanes(x + turn.partner[e]);
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

// Mean (0 for RMSNorm) and 1 / deviation of `heads` heads.
template <typename T>
INLINE Moments moments_of(const T* x, int64_t step, int64_t heads, const Job<T>& job) {
  const int64_t E = job.size.width;
  const float count = float(heads * E);
  Moments found{0, 1};
  if (job.norm == Norm::layer) {
    Lanes sum = {};
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t e = 0; e < E; e += kLanes) sum += load_lanes(x + h * step + e);
    found.mean = sum_of(sum) / count;
  }
  Lanes squares = {};
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t e = 0; e < E; e += kLanes) {
      const Lanes centred = load_lanes(x + h * step + e) - found.mean;
      squares += centred * centred;
    }
  }
  found.rstd = 1 / std::sqrt(sum_of(squares) / count + job.eps);
  return found;
}

// A token of q or k: y = turn(norm(x) * weight + bias).
template <Pairs pairs, typename T>
INLINE void forward_token(const Job<T>& job, const Side<T>& side, int64_t b, int64_t n,
                          const Angles& angles, float* scratch) {
  const Sizes& size = job.size;
  const int64_t E = size.width, heads = job.heads_of_norm(), step = side.x.head_step;
  T* y = side.y + (b * size.tokens + n) * size.heads * E;
  for (int64_t first = 0; first < size.heads; first += heads) {
    const T* const x = side.x.at(b, n) + first * step;
    const Moments of = job.norm == Norm::none ? Moments{0, 1} : moments_of(x, step, heads, job);
    for (int64_t h = 0; h < heads; ++h, y += E) {
      const float *const weight = side.weight + h * side.weight_step;
      const float *const bias = side.bias + h * side.bias_step;
      turn_head<pairs>(job.turn, angles, E, scratch,
                       [&](int64_t e) IN_PLACE {
                         return (load_lanes(x + h * step + e) - of.mean) * of.rstd *
                                    load_lanes(weight + e) + load_lanes(bias + e);
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
  const int64_t E = size.width, heads = job.heads_of_norm();
  const int64_t x_step = side.x.head_step, dy_step = side.dy.head_step;
  T* dx = side.y + (b * size.tokens + n) * size.heads * E;
  for (int64_t first = 0; first < size.heads; first += heads) {
    const T* const x = side.x.at(b, n) + first * x_step;
    const T* const dy = side.dy.at(b, n) + first * dy_step;
    const Moments of = moments_of(x, x_step, heads, job);
    const auto normed = [&](int64_t h, int64_t e) IN_PLACE {
      return (load_lanes(x + h * x_step + e) - of.mean) * of.rstd;
    };
    Lanes shares = {}, projections = {};
    for (int64_t h = 0; h < heads; ++h) {
      const float* const weight = side.weight + h * side.weight_step;
      float* const dweight = side.dweight + h * side.weight_step;
      float* const dbias = side.dbias + h * side.bias_step;
      turn_head<pairs>(job.turn, angles, E, scratch,
                       [&](int64_t e) IN_PLACE { return load_lanes(dy + h * dy_step + e); },
                       [&](int64_t e, Lanes grad) IN_PLACE {
                         const Lanes along = normed(h, e);
                         store_lanes(load_lanes(dweight + e) + grad * along, dweight + e);
                         store_lanes(load_lanes(dbias + e) + grad, dbias + e);
                         grad *= load_lanes(weight + e);
                         store_lanes(grad, g + h * E + e);
                         shares += grad;
                         projections += grad * along;
                       });
    }
    const float count = float(heads * E);
    const float share = job.norm == Norm::layer ? sum_of(shares) / count : 0;
    const float projection = sum_of(projections) / count;
    for (int64_t h = 0; h < heads; ++h, dx += E)
      for (int64_t e = 0; e < E; e += kLanes)
        store_lanes((load_lanes(g + h * E + e) - share - normed(h, e) * projection) * of.rstd,
                    dx + e);
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
  each_token(job, first, last, scratch,
             [&](int64_t b, int64_t n, const Angles& angles, float* head) IN_PLACE {
               for (const Side<T>& side : job.sides)
                 forward_token<pairs>(job, side, b, n, angles, head);
             });
}

template <Pairs pairs, typename T>
TARGET void backward_tokens(int64_t first, int64_t last, const Job<T>& job, float* scratch) {
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
