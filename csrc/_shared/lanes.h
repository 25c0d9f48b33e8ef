// Vectors of floats of LANE_BYTES, and what the arithmetic of several rooms does with them. No include
// guard: see cpu.h. INLINE is for functions, IN_PLACE for lambdas; whoever includes this undefines
// both at its end.

#define INLINE TARGET inline __attribute__((always_inline))
#define IN_PLACE TARGET __attribute__((always_inline))  // of a lambda: it inherits nothing

using Lanes = float __attribute__((vector_size(LANE_BYTES), aligned(4), may_alias));
using Bits = uint32_t __attribute__((vector_size(LANE_BYTES), may_alias));
using Halves = uint16_t __attribute__((vector_size(LANE_BYTES / 2), aligned(2), may_alias));
constexpr int64_t kLanes = LANE_BYTES / sizeof(float);

INLINE Lanes load_lanes(const float* in) { return *reinterpret_cast<const Lanes*>(in); }
INLINE Lanes load_lanes(const bf16* in) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(in), Bits) << 16);
}

INLINE Halves narrowed(Lanes value) {  // as `narrow`
  const Bits bits = (Bits)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? Bits{} + 0x7fc0 : rounded, Halves);
}

INLINE void store_lanes(Lanes value, float* out) { *reinterpret_cast<Lanes*>(out) = value; }
INLINE void store_lanes(Lanes value, bf16* out) {
  *reinterpret_cast<Halves*>(out) = narrowed(value);
}

// As it would be read again after it was stored.
INLINE Lanes rounded_as(Lanes value, const float*) { return value; }
INLINE Lanes rounded_as(Lanes value, const bf16*) {
  return (Lanes)(__builtin_convertvector(narrowed(value), Bits) << 16);
}

template <int step, int... lane>
INLINE Lanes exchanged(Lanes x, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, (lane ^ step)...);
#else
  return __builtin_shuffle(x, Bits{(lane ^ step)...});
#endif
}

// Each lane's partner `step` lanes away, a power of two.
template <int step>
INLINE Lanes exchanged(Lanes x) {
  return exchanged<step>(x, std::make_integer_sequence<int, kLanes>{});
}

INLINE float sum_of(Lanes lanes) {
  if constexpr (kLanes > 8) lanes += exchanged<8>(lanes);
  if constexpr (kLanes > 4) lanes += exchanged<4>(lanes);
  lanes += exchanged<2>(lanes);
  lanes += exchanged<1>(lanes);
  return lanes[0];
}
