// Includes ARITHMETIC, a path from this folder, once per instruction set, the narrowest first: see
// cpu.h. No include guard.

namespace any {
#define TARGET
#define LANE_BYTES 16
#include ARITHMETIC
}  // namespace any
#if HAS_X86_SETS
namespace v3 {
#define TARGET TARGET_V3
#define LANE_BYTES 32
#include ARITHMETIC
}  // namespace v3
namespace v4 {
#define TARGET TARGET_V4
#define LANE_BYTES 64
#include ARITHMETIC
}  // namespace v4
#endif
#undef ARITHMETIC
