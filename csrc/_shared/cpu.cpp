// Which instruction set runs: what a machine without AVX-512 would compute can be seen on one with.

#include "cpu.h"

#include <torch/csrc/stable/library.h>

namespace {

// Vectors have at most `most` bytes from now on; returns how many they have.
int64_t limit_vectors(int64_t most) {
  most_vector_bytes = most >= 64 ? 64 : most >= 32 ? 32 : 16;
  return vector_bytes();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastvid_cpp, m) { m.def("limit_vectors(int most) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastvid_cpp, CompositeExplicitAutograd, m) {
  m.impl("limit_vectors", TORCH_BOX(&limit_vectors));
}
