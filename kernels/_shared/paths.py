"""Which path an op took, said once at DEBUG."""

import functools
import logging


@functools.cache
def announce(op: str, path: str) -> None:
    """Log the first use of `path` by `op` to the logger `fastvid.kernels`."""
    logging.getLogger("fastvid.kernels").debug("%s: %s", op, path)
