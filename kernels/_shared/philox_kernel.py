"""The Triton twin of `philox.py`."""

import triton
import triton.language as tl

_HALF_ROOT: tl.constexpr = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)


@triton.jit
def box_muller(first, second):
    """Two normals from two uint32 words, in float32 without a special function but the root."""
    bits = (first.to(tl.float32) + 1.0).to(tl.int32, bitcast=True) - _HALF_ROOT
    exponent = (bits >> 23) - 32
    x = ((bits & 0x7FFFFF) + _HALF_ROOT).to(tl.float32, bitcast=True) - 1.0
    # ln(1 + x) / x for 1 + x from sqrt(1/2) to sqrt(2); a fit, as are sine and cosine below.
    log = 0.08959803
    log = log * x - 0.14482136
    log = log * x + 0.14917395
    log = log * x - 0.16543746
    log = log * x + 0.19958416
    log = log * x - 0.25002946
    log = log * x + 0.3333416
    log = log * x - 0.49999978
    log = log * x + 0.99999998
    log = exponent.to(tl.float32) * 0.6931471805599453 + x * log
    radius = tl.sqrt(-2.0 * log)
    # The nearest quarter turn, and what is left of the angle, exact in integers.
    quarter = (second + 0x20000000) >> 30
    rest = (second - (quarter << 30)).to(tl.int32, bitcast=True)
    turn = rest.to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    t = turn * turn
    sine = ((-75.40224949 * t + 81.59255849) * t - 41.34166267) * t + 6.28318529
    cosine = ((59.22049994 * t - 85.44285537) * t + 64.93931625) * t - 19.73920865
    sine, cosine = radius * turn * sine, radius * (cosine * t + 1.0)
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -x, x), tl.where((quarter & 2) == 2, -y, y)


@triton.jit
def normals(seed, index, stream):
    """Four blocks of normals: the numbers 4 * index to 4 * index + 3 of a sample.

    `seed` int64 and `stream` scalars, `index` an int64 block of counters.
    """
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    third = low * 0 + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, low * 0)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3
