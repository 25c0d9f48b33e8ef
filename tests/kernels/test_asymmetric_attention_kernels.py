"""The Triton kernels of `asymmetric_attention`. Without a GPU they run in the interpreter."""

import functools

import pytest
import torch

from fastvid.functional import asymmetric_attention
from tests.kernels.asymmetric_attention_cases import (
    LAYOUTS,
    SCALE,
    SHARING,
    check_budget,
    draw,
    gradients,
    oracle,
    some_known,
)

OP = torch.ops.fastvid.asymmetric_attention.default
BACKWARD = torch.ops.fastvid.asymmetric_attention_backward.default


def launched(q, k, v, dout, scope="frame", known=None, scale=SCALE):
    from fastvid.kernels.asymmetric_attention.kernel import launch_backward, launch_forward

    rule = known, scale, scope == "clip"
    out, lse = launch_forward(q, k, v, *rule)
    return out, *launch_backward(dout, q, k, v, out, lse, *rule)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "sharing", "scope", "some"),
    [
        ((2, 2, 40, 37, 1, 72), "own", "frame", False),  # resident, one short tile
        ((1, 3, 33, 70, 2, 24), "own", "frame", True),  # streamed
        ((2, 3, 20, 25, 1, 16), "one sample", "clip", False),  # frames in a row
        ((2, 3, 20, 25, 1, 16), "one sample", "clip", True),
        ((2, 3, 20, 25, 1, 40), "one of both", "frame", False),
        ((2, 2, 20, 70, 1, 80), "one sample", "frame", True),
        ((1, 2, 9, 2, 1, 64), "own", "frame", True),
        ((1, 1, 17, 33, 1, 136), "own", "clip", False),
    ],
)
def test_rounds_no_worse_than_eager(
    within_budget, guard_bands, rand, device, shape, sharing, scope, some, dtype
):
    q, k, v, dout = draw(rand, *shape, sharing, dtype)
    known = some_known(*shape[:2], device) if some else None
    rule = {"scope": scope, "known": known, "scale": SCALE}
    check_budget(within_budget, launched(q, k, v, dout, **rule), q, k, v, dout, **rule)
    guard_bands()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("Nk", [20, 70])
@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_strides(rand, layout, scope, Nk):
    packed = draw(rand, 1, 2, 6, Nk, 2, 24)
    found = launched(*(LAYOUTS[layout](x) for x in packed), scope=scope)
    for a, b in zip(found, oracle(*packed, scope=scope, scale=SCALE), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_keys_of_stride_0_are_repeated_keys(rand, scope):
    q, k, v, dout = draw(rand, 2, 3, 6, 5, 1, 16, "one of both")
    expanded = [x.expand(2, 3, -1, -1, -1) for x in (k, v)]
    found = launched(q, *expanded, dout, scope)
    wanted = launched(q, *(x.contiguous() for x in expanded), dout, scope)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.parametrize(("sharing", "Nk"), [("one of both", 40), ("one sample", 70)])
def test_parts_of_the_queries_add_up_and_repeat_their_bits(
    monkeypatch, rand, device, sharing, Nk, guard_bands
):
    from fastvid.kernels.asymmetric_attention import kernel

    q, k, v, dout = draw(rand, 2, 2, 90, Nk, 1, 16, sharing)
    rule = {"scope": "clip", "known": some_known(2, 2, device)}
    wanted = oracle(q, k, v, dout, scale=SCALE, **rule)
    for busy in (1, 4, 512):
        monkeypatch.setattr(kernel, "BUSY", busy)
        first, second = (launched(q, k, v, dout, **rule) for _ in range(2))
        for a, b, exact in zip(first, second, wanted, strict=True):
            assert torch.equal(a, b)
            assert (a.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    guard_bands()
    assert kernel._parts(16, 800) == 32  # one GPU's worth of programs
    assert kernel._parts(16, 5) == 5
    assert kernel._parts(3328, 64) == 1


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("tiles", [1, 2, 8])
@pytest.mark.parametrize("some", [False, True])
def test_resident_keys_serve_any_number_of_tiles(monkeypatch, rand, device, tiles, some):
    from fastvid.kernels.asymmetric_attention import kernel

    monkeypatch.setattr(kernel, "_tiles_each", lambda frames, tiles_: tiles)
    q, k, v, _ = draw(rand, 1, 2, 100, 7, 1, 16)
    known = some_known(1, 2, device) if some else None
    wanted, *_ = oracle(q, k, v, q, known=known, scale=SCALE)
    out, lse = kernel.launch_forward(q, k, v, known, SCALE, False)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(kernel, "RESIDENT", 0)
    streamed = kernel.launch_forward(q, k, v, known, SCALE, False)
    torch.testing.assert_close((out, lse), streamed)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("Nk", [5, 70])
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_known_frames_read_nothing(rand, device, scope, Nk):
    q, k, v, dout = draw(rand, 2, 3, 6, Nk, 1, 16)
    known = some_known(2, 3, device)
    here = known[:, :, None, None, None]
    nan = [torch.where(here, torch.nan, x) for x in (q, dout)]
    found = launched(nan[0], k, v, nan[1], scope, known)
    for a, b in zip(found, launched(q, k, v, dout, scope, known), strict=True):
        assert torch.equal(a, b)
    assert not found[0][known].any()
    assert not found[1][known].any()
    if scope == "frame":  # and nobody else saw the keys of that frame
        k[known], v[known] = torch.nan, torch.nan
        for a, b in zip(launched(q, k, v, dout, scope, known), found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("interpreter")
def test_one_key_gives_its_value(rand):
    q, k, v, dout = draw(rand, 1, 2, 6, 1, 2, 24)
    out, dq, dk, dv = launched(q, k, v, dout)
    torch.testing.assert_close(out, v.expand_as(q))
    torch.testing.assert_close(dv, dout.sum(2, keepdim=True))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4  # what rounding leaves of 0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_on_nothing(rand, shape):
    q, k = rand(*shape, 2, 16), rand(1, 1, 5, 2, 16)
    out, dq, dk, dv = launched(q, k, k, q)
    assert out.shape == dq.shape == q.shape
    assert not dk.any()
    assert not dv.any()


def test_one_compilation_serves_every_size_and_stride(compilations):
    printed = compilations("""
from fastvid.kernels.asymmetric_attention import kernel
sizes = (1, 13, 64, 70, 16), (2, 3, 99, 300, 8), (3, 1, 7, 65, 1), (1, 2, 1, 66, 3)
for B, T, N, M, heads in sizes:
    for clip in (False, True):
        q = torch.zeros(B, T, N, heads, 72)
        k, v = torch.zeros(B, T, M, 2, heads, 72).unbind(3)
        for k, v in ((k, v), (k[:1], v[:1]), (k[:, :1, :20], v[:, :1, :20])):
            out, lse = kernel.launch_forward(q, k, v, None, 0.1, clip)
            kernel.launch_backward(q, q, k, v, out, lse, None, 0.1, clip)
names = "_forward", "_forward_resident", "_backward_q", "_backward_kv"
print(*(count(getattr(kernel, name)) for name in names))
""")
    assert printed.split() == ["1"] * 4


@pytest.mark.usefixtures("interpreter")
def test_offsets_past_2_to_the_31(child, tmp_path):
    """A sparse file stands in for a large tensor; an int32 offset would leave it and crash."""
    child(f"""
import torch
from fastvid.kernels.asymmetric_attention.kernel import launch_backward, launch_forward
step, E = 2**30 + 16, 16
file = torch.from_file({str(tmp_path / "sparse")!r}, True, 2 * step + E, dtype=torch.float16)
for axis in range(4):
    shape = [3 if i == axis else 1 for i in range(4)] + [E]
    x = file.as_strided(shape, [step if i == axis else 0 for i in range(4)] + [1])
    x.copy_(torch.randn(shape))
    near = x.contiguous()
    for clip in (False, True):
        rule = None, 0.1, clip
        (out, lse), (wanted, _) = (launch_forward(y, y, y, *rule) for y in (x, near))
        assert torch.equal(out, wanted)
        far, wanted = (launch_backward(y, y, y, y, out, lse, *rule) for y in (x, near))
        assert all(torch.equal(a, b) for a, b in zip(far, wanted))
""")


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize(
    "shape", [(2, 4, 1024, 256, 4, 64), (2, 3, 1000, 50, 4, 72), (2, 3, 500, 130, 2, 128)]
)
def test_gpu_bf16_at_real_sizes(within_budget, rand, device, shape, sharing, scope, some):
    q, k, v, dout = draw(rand, *shape, sharing, torch.bfloat16)
    known = some_known(*shape[:2], device) if some else None
    rule = {"scope": scope, "known": known, "scale": shape[-1] ** -0.5}
    check_budget(within_budget, launched(q, k, v, dout, **rule), q, k, v, dout, **rule)
    with torch.no_grad():  # what the public function chooses
        out = asymmetric_attention(q, k, v, **rule)
    found = (out, *gradients(functools.partial(asymmetric_attention, **rule), dout, q, k, v))
    check_budget(within_budget, found, q, k, v, dout, **rule)


@pytest.mark.gpu
@pytest.mark.parametrize("Nk", [40, 300])
def test_gpu_float32_to_1e_5(rand, Nk):
    q, k, v, dout = draw(rand, 1, 3, 500, Nk, 4, 64)
    found = launched(q, k, v, dout, scale=0.125)
    for a, b in zip(found, oracle(q, k, v, dout, scale=0.125), strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("Nk", [64, 1024])
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_gpu_graph_capture(rand, scope, Nk):
    q, k, v, _ = draw(rand, 1, 4, 1024, Nk, 4, 64, dtype=torch.bfloat16)
    rule = None, 0.125, scope == "clip"
    OP(q, k, v, *rule)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = OP(q, k, v, *rule)
    q.copy_(rand(*q.shape))
    graph.replay()
    assert torch.equal(out, OP(q, k, v, *rule)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_gpu_backward_repeats_its_bits(rand, scope):
    q, k, v, dout = draw(rand, 2, 4, 2048, 64, 4, 64, "one sample", torch.bfloat16)
    f = functools.partial(asymmetric_attention, scope=scope)
    runs = [gradients(f, dout, q, k, v) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
