"""One compilation of a Triton kernel, written down so that it can be made without a GPU."""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """What `python -m benchmarks compile` compiles, and under which name it keeps the budget."""

    name: str
    kernel: Any  # the @triton.jit function
    types: dict[str, str]  # by argument; "*bf16:16", "i32:16" where Triton sees a multiple of 16
    constants: dict[str, Any]  # the constexpr arguments
    num_warps: int
    num_stages: int = 3
    architectures: tuple[str, ...] | None = None  # all of them unless named
