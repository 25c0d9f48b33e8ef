"""The promises of `asymmetric_attention` as an op. Its Triton kernels have a file of their own."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvid.functional import asymmetric_attention
from fastvid.kernels._shared import paths
from fastvid.kernels.asymmetric_attention import cpu, op, reference
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
SCOPES = ("frame", "clip")


def ours(q, k, v, dout, **rule):
    f = functools.partial(asymmetric_attention, **rule)
    return f(q, k, v), *gradients(f, dout, q, k, v)


# ---- the reference, and what the op computes on this machine


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("scope", SCOPES)
def test_written_gradient_is_the_gradient(rand, scope, sharing):
    q, k, v, dout = draw(rand, 2, 3, 5, 4, 2, 16, sharing, torch.float64)
    rule = {"scope": scope, "known": some_known(2, 3, q.device)}
    f = functools.partial(reference.asymmetric_attention, **rule)
    written = reference.asymmetric_attention_backward(dout, q, k, v, **rule)
    torch.testing.assert_close(written, gradients(f, dout, q, k, v))


def test_reference_is_pytorchs_attention(rand):
    q, k, v, _ = draw(rand, 2, 3, 5, 4, 2, 16, dtype=torch.float64)
    heads = [x.transpose(2, 3) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads).transpose(2, 3)
    torch.testing.assert_close(reference.asymmetric_attention(q, k, v), wanted)
    heads = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(reference.asymmetric_attention(q, k, v, scope="clip"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("Nq", "Nk", "E"), [(70, 33, 72), (9, 200, 64)])
def test_rounds_no_worse_than_eager(
    within_budget, rand, device, Nq, Nk, E, scope, sharing, some, dtype
):
    q, k, v, dout = draw(rand, 2, 3, Nq, Nk, 2, E, sharing, dtype)
    rule = {"scope": scope, "scale": SCALE, "known": some_known(2, 3, device) if some else None}
    found = ours(q, k, v, dout, **rule)
    assert found[0].is_contiguous()
    check_budget(within_budget, found, q, k, v, dout, **rule)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("scope", SCOPES)
def test_gradcheck(scope, sharing, some):
    torch.manual_seed(0)
    B, T = SHARING[sharing](2, 3)
    q = torch.randn(2, 3, 4, 2, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, T, 3, 2, 16, dtype=torch.float64, requires_grad=True) for _ in "kv")
    known = some_known(2, 3) if some else None
    f = functools.partial(asymmetric_attention, scope=scope, known=known)
    assert torch.autograd.gradcheck(f, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_strides(rand, layout, scope):
    packed = draw(rand, 2, 3, 6, 5, 2, 24)
    found = ours(*(LAYOUTS[layout](x) for x in packed), scope=scope)
    for a, b in zip(found, ours(*packed, scope=scope), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sharing", ["one sample", "one frame", "one of both"])
def test_shared_keys_are_repeated_keys(rand, sharing, scope):
    q, k, v, dout = draw(rand, 2, 3, 6, 5, 2, 24, sharing)
    if sharing != "one sample" and scope == "clip":  # one frame of keys is the whole clip
        wanted = oracle(q, k, v, dout, scope="frame")
    else:
        repeat = [2 // k.shape[0], 3 // k.shape[1], 1, 1, 1]
        wanted = list(oracle(q, k.repeat(repeat), v.repeat(repeat), dout, scope=scope))
        wanted[2:] = (grad.unflatten(0, (-1, k.shape[0])).sum(0) for grad in wanted[2:])
        wanted[2:] = (grad.sum_to_size(k.shape) for grad in wanted[2:])
    expanded = [x.expand(2, x.shape[1] if scope == "clip" else 3, -1, -1, -1) for x in (k, v)]
    f = functools.partial(asymmetric_attention, scope=scope)
    torch.testing.assert_close(f(q, *expanded).double(), wanted[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours(q, k, v, dout, scope=scope), wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_known_frames_are_skipped(rand, device, scope):
    q, k, v, dout = draw(rand, 2, 4, 6, 5, 2, 24)
    known = some_known(2, 4, device)
    here = known[:, :, None, None, None]
    out, dq, *_ = ours(q, k, v, dout, scope=scope, known=known)
    assert not out[known].any()
    assert not dq[known].any()
    nan = [torch.where(here, torch.nan, x) for x in (q, dout)]
    for a, b in zip(
        ours(nan[0], k, v, nan[1], scope=scope, known=known),
        ours(q, k, v, dout, scope=scope, known=known),
        strict=True,
    ):
        assert torch.equal(a, b)
    full = asymmetric_attention(q, k, v, scope=scope)
    torch.testing.assert_close(out[~known], full[~known])
    one = asymmetric_attention(q, k, v, scope=scope, known=known[:1])
    torch.testing.assert_close(one[0], out[0])
    assert not one[1, known[0]].any()


def test_frames_do_not_see_each_other(rand):
    q, k, v, _ = draw(rand, 1, 3, 6, 5, 2, 24)
    out = asymmetric_attention(q, k, v)
    k[:, 1], v[:, 1] = 7.0, -3.0
    other = asymmetric_attention(q, k, v)
    assert torch.equal(other[:, [0, 2]], out[:, [0, 2]])
    assert not torch.equal(other[:, 1], out[:, 1])
    clip = asymmetric_attention(q, k, v, scope="clip")
    order = [2, 0, 1]
    moved = asymmetric_attention(q, k[:, order], v[:, order], scope="clip")
    torch.testing.assert_close(moved, clip)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sharing", ["own", "one of both"])
def test_one_key_gives_its_value(rand, sharing, scope):
    q, k, v, dout = draw(rand, 2, 3, 6, 1, 2, 24, sharing)
    out, dq, dk, dv = ours(q, k, v, dout, scope="frame" if sharing == "own" else scope)
    torch.testing.assert_close(out, v.expand_as(q))
    torch.testing.assert_close(dv, dout.sum(2, keepdim=True).sum_to_size(v.shape))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4  # what rounding leaves of 0


def test_many_keys(within_budget, rand):
    q, k, v, dout = draw(rand, 1, 2, 5, 4096, 1, 16)
    check_budget(within_budget, ours(q, k, v, dout), q, k, v, dout)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 2, 16), (2, 0, 4, 2, 16), (2, 3, 0, 2, 16), (2, 3, 4, 0, 16)]
)
def test_empty(shape, scope, some):
    B, T, _, heads, E = shape
    q = torch.zeros(shape, requires_grad=True)
    k = torch.zeros(1, 1, 5, heads, E, requires_grad=True)
    known = some_known(B, T) if some else None
    out = asymmetric_attention(q, k, k, scope=scope, known=known)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape
    assert k.grad.shape == k.shape
    assert not k.grad.any()


def test_extreme_scores(rand):
    q, k, v, _ = draw(rand, 1, 2, 5, 6, 1, 16)
    out = asymmetric_attention(1e4 * q, 1e4 * k, v)
    torch.testing.assert_close(out, reference.asymmetric_attention(1e4 * q, 1e4 * k, v))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scope", SCOPES)
def test_repeats_do_not_change_the_bits(rand, device, scope):
    q, k, v, dout = draw(rand, 2, 3, 40, 30, 2, 40, "one sample")
    known = some_known(2, 3, device)
    first, second = (ours(q, k, v, dout, scope=scope, known=known) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# ---- the CPU path


@pytest.mark.parametrize("scope", SCOPES)
def test_cpu_copies_nothing(monkeypatch, scope):
    def spied(*tensors, **options):
        out, lse = attend(*tensors, **options)
        moved.extend([*tensors, out])
        return out, lse

    attend, moved = cpu._attend, []
    monkeypatch.setattr(cpu, "_attend", spied)
    q = torch.randn(2, 4, 64, 3, 4, 64)[:, :, :, 0]
    k, v = torch.randn(2, 4, 32, 2, 4, 64).unbind(3)
    out = asymmetric_attention(q, k, v, scope=scope)
    wanted = [x.untyped_storage().data_ptr() for x in (q, k, v, out)]
    assert [x.untyped_storage().data_ptr() for x in moved] == wanted


@pytest.mark.parametrize("scope", SCOPES)
def test_cpu_skips_known_frames(monkeypatch, scope):
    rows = []

    def counted(q, k, v, **options):
        rows.append((q.shape[0] * q.shape[2], k.shape[2]))
        return attend(q, k, v, **options)

    attend = cpu._attend
    monkeypatch.setattr(cpu, "_attend", counted)
    q, k = torch.randn(1, 6, 8, 1, 16), torch.randn(1, 6, 3, 1, 16)
    known = torch.tensor([[False, True, False, False, True, False]])
    asymmetric_attention(q, k, k, scope=scope, known=known)
    keys = 3 if scope == "frame" else 18
    assert rows == [(8, keys), (16, keys), (8, keys)]
    rows.clear()
    asymmetric_attention(q, k, k, scope=scope, known=torch.ones_like(known))
    assert rows == []


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("scope", SCOPES)
def test_vendor_attention_is_the_same(monkeypatch, rand, scope, sharing):
    """What a GPU gives to PyTorch where that serves the call on views, computed here."""
    q, k, v, _ = draw(rand, 2, 3, 6, 5, 2, 24, sharing)
    wanted = asymmetric_attention(q, k, v, scope=scope)
    clip = scope == "clip" or k.shape[1] == 1
    if not cpu.one_call([q], k, v, clip):
        assert (sharing, scope) == ("one sample", "frame")
        return
    monkeypatch.setattr(op, "_vendor_serves", lambda *call: True)
    monkeypatch.setattr(op, "_asymmetric_attention", None)
    out = asymmetric_attention(q, k, v, scope=scope)
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted)


def test_vendor_serves_no_training_and_no_copies():
    class OnGpu(torch.Tensor):
        is_cuda = True

    q = torch.zeros(1, 2, 4, 1, 16).bfloat16().as_subclass(OnGpu)
    k = torch.zeros(1, 2, 256, 1, 16).bfloat16()
    with torch.no_grad():
        assert op._vendor_serves(q, k, k, None, False)
        assert op._vendor_serves(q, k, k, None, True)
        assert op._vendor_serves(q, k[:, :, :64], k[:, :, :64], None, True) is False  # few, copied
        assert not op._vendor_serves(q, k[:, :, :4], k[:, :, :4], None, False)
        assert not op._vendor_serves(q, k, k, torch.zeros(1, 2).bool(), False)
        assert not op._vendor_serves(q.float(), k.float(), k.float(), None, False)
        assert not op._vendor_serves(q[:0], k, k, None, False)
    assert not op._vendor_serves(q, k, k.requires_grad_(), None, False)


def test_path_is_logged_once(caplog):
    paths.announce.cache_clear()
    q = torch.ones(1, 2, 1, 1, 16)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        for _ in range(3):
            asymmetric_attention(q, q, q)
    assert [r.getMessage() for r in caplog.records] == ["asymmetric_attention: SDPA on views"]


# ---- inside PyTorch


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("sharing", ["own", "one of both"])
@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck(rand, device, scope, sharing, some):
    q, k, v, dout = draw(rand, 2, 3, 4, 5, 2, 24, sharing)
    known = some_known(2, 3, device) if some else None
    rule = known, SCALE, scope == "clip" or k.shape[1] == 1
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(OP, (*inputs, *rule))
    out, lse = OP(q, k, v, *rule)
    torch.library.opcheck(BACKWARD, (dout, q, k, v, out, lse, *rule))


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_compiles_once_for_all_sizes(device, rand, scope, some):
    torch._dynamo.reset()
    step = torch.compile(asymmetric_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T, Nq, Nk in ((2, 5, 12, 7), (3, 4, 20, 9)):
            q, k, v, dout = draw(rand, B, T, Nq, Nk, 3, 16)
            rule = {"scope": scope, "known": some_known(B, T, device) if some else None}
            found = gradients(functools.partial(step, **rule), dout, q, k, v)
            wanted = gradients(functools.partial(asymmetric_attention, **rule), dout, q, k, v)
            torch.testing.assert_close(found, wanted)


def test_exports_with_free_sizes(rand):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return asymmetric_attention(q, k, v)

    B, T = torch.export.Dim("B", min=2), torch.export.Dim("T", min=2)
    free_q = {0: B, 1: T, 2: torch.export.Dim("Nq", min=2)}
    free_k = {0: B, 1: T, 2: torch.export.Dim("Nk", min=2)}
    example = draw(rand, 2, 3, 6, 4, 2, 16)[:3]
    shapes = (free_q, free_k, free_k)
    exported = torch.export.export(Module(), example, dynamic_shapes=shapes).module()
    other = draw(rand, 3, 5, 7, 9, 2, 16)[:3]
    torch.testing.assert_close(exported(*other), asymmetric_attention(*other))


def test_meta_tensors_pass_through():
    q = torch.empty(2, 4, 3, 2, 16, device="meta", requires_grad=True)
    k = torch.empty(1, 4, 5, 2, 16, device="meta", requires_grad=True)
    out = asymmetric_attention(q, k, k)
    out.sum().backward()
    assert (out.device.type, out.shape, q.grad.shape) == ("meta", q.shape, q.shape)
    assert k.grad.shape == k.shape


def test_activation_checkpointing(rand):
    q, k, v, dout = draw(rand, 2, 3, 6, 4, 2, 16)
    kept = gradients(asymmetric_attention, dout, q, k, v)
    again = functools.partial(checkpoint, asymmetric_attention, use_reentrant=False)
    for a, b in zip(kept, gradients(again, dout, q, k, v), strict=True):
        assert torch.equal(a, b)


# ---- refusals

Q = torch.zeros(2, 4, 3, 2, 16)
M = torch.zeros(2, 4).bool()


@pytest.mark.parametrize(
    ("tensors", "options", "error", "says"),
    [
        ((Q[0], Q, Q), {}, ValueError, r"q must be \(B, T, Nq, heads, E\), got \(4, 3, 2, 16\)"),
        ((Q, None, Q), {}, TypeError, "k must be a Tensor, got NoneType"),
        ((Q, Q, None), {}, TypeError, "v must be a Tensor, got NoneType"),
        ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, r"k must be .*T=4.*got \(2, 3, 3, 2, 16\)"),
        ((Q[:1], Q, Q), {}, ValueError, r"k must be \(B\|1, .*B=1 .*got \(2, 4, 3, 2, 16\)"),
        ((Q, Q[..., :8], Q), {}, ValueError, r"k must be .*E=16.*got \(2, 4, 3, 2, 8\)"),
        ((Q, Q[:, :, :0], Q[:, :, :0]), {}, ValueError, "k must have Nk >= 1"),
        ((Q, Q, Q[:, :, :2]), {}, ValueError, r"v must have the shape of k.*\(2, 4, 2, 2, 16\)"),
        ((Q, Q.half(), Q), {}, TypeError, "k must have the dtype of q.*float16"),
        ((Q.long(), Q, Q), {}, TypeError, "q must be float32.*int64"),
        ((Q, Q, Q.to("meta")), {}, ValueError, "v must be on the device of q, cpu, got meta"),
        ((torch.zeros(1, 4, 1, 1, 8),) * 3, {}, ValueError, "multiple of 8, >= 16, got 8"),
        ((torch.zeros(1, 4, 1, 1, 20),) * 3, {}, ValueError, "multiple of 8, >= 16, got 20"),
        ((torch.zeros(1, 4, 1, 1, 264),) * 3, {}, NotImplementedError, "E <= 256, got 264"),
        ((Q, Q, Q), {"scope": "video"}, ValueError, 'scope must be "frame" or "clip", got .video'),
        ((Q, Q, Q), {"known": M.float()}, TypeError, "known must be bool.*float32"),
        ((Q, Q, Q), {"known": M[:, :3]}, ValueError, r"known must be \(B\|1, T\).*\(2, 3\)"),
        ((Q, Q, Q), {"known": M.to("meta")}, ValueError, "known must be on the device of q"),
    ],
)
def test_refuses(tensors, options, error, says):
    with pytest.raises(error, match=says):
        asymmetric_attention(*tensors, **options)


def test_gradients_of_shared_keys_are_rounded_once(rand):
    q, dout = rand(8, 2, 32, 2, 16).bfloat16(), rand(8, 2, 32, 2, 16).bfloat16()
    k, v = rand(2, 1, 2, 8, 2, 16).bfloat16()
    dv = ours(q, k, v, dout)[3].double()
    exact = ours(*(x.double() for x in (q, k, v, dout)))[3]
    rounding = (exact.bfloat16().double() - exact).square().mean().sqrt()
    assert (dv - exact).square().mean().sqrt() < 1.1 * rounding


def test_refuses_a_second_derivative():
    q = torch.randn(1, 1, 2, 1, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(asymmetric_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="asymmetric_attention has no second derivative"):
        grad.sum().backward()
