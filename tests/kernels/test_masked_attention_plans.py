"""How `masked_attention` divides a call into calls of PyTorch's attention, on any device."""

import copy
import logging
import pickle

import pytest
import torch

from fastvid.functional import FrameLayout, Visibility, masked_attention
from fastvid.kernels._shared import paths
from fastvid.kernels.masked_attention import grouped, plan, vendor
from tests.kernels.masked_attention_cases import (
    MASKS,
    check_budget,
    oracle,
    ours,
    visibility_of,
)  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    """A list that grows by one for every sample that is planned."""
    plan._plans.cache_clear()
    seen, made = [], plan._plan
    monkeypatch.setattr(plan, "_plan", lambda *tables: seen.append(1) or made(*tables))
    yield seen
    plan._plans.cache_clear()


def test_a_visibility_is_planned_once(planned):
    """Forward and backward, in every layer and step, copied, sent elsewhere, or compiled."""
    q, k, v, dout = torch.randn(4, 2, 16, 1, 16)
    visibility = visibility_of("causal")
    compiled = torch.compile(masked_attention, fullgraph=True, backend="aot_eager")
    for again in (
        visibility,
        visibility,
        visibility_of("causal"),  # a model builds it anew in every step
        copy.deepcopy(visibility),
        pickle.loads(pickle.dumps(visibility)),
    ):
        ours(q, k, v, again, dout)
    q.requires_grad_()
    torch.autograd.grad(compiled(q, k, v, visibility), q, dout)
    assert len(planned) == 1


def test_what_differs_is_planned_anew(planned):
    q, k, v = torch.randn(3, 2, 16, 1, 16)
    layouts = FrameLayout([4] * 4), FrameLayout([5, 3, 4, 4])
    masks = Visibility.causal, lambda layout: Visibility.window(layout, 1, 1)
    for number, (layout, mask) in enumerate(
        ((layout, mask) for layout in layouts for mask in masks), start=1
    ):
        visibility = mask(layout)
        wanted = oracle(q, k, v, visibility, q, 0.25)[0]
        out = masked_attention(q, k, v, visibility)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        assert len(planned) == number
    assert plan._plans.cache_info().currsize <= plan._plans.cache_info().maxsize


def test_samples_that_see_the_same_share_their_calls(monkeypatch):
    """Told by their own tables, or by layouts whose frames differ where nothing is hidden."""
    calls, flash = [], grouped._flash
    monkeypatch.setattr(grouped, "_flash", lambda *given: calls.append(1) or flash(*given))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 16, 1, 16)
    known = [[True, False, True, False]] * 3
    for visibility in (
        Visibility.identity(FrameLayout([4] * 4), known),
        Visibility.full(FrameLayout([[4, 12], [8, 8], [16, 0]])),
    ):
        calls.clear()
        out = masked_attention(q, k, v, visibility)
        wanted = oracle(q, k, v, visibility, q, 0.25)[0]
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        assert len(calls) == 1


# ---- PyTorch's attention on a GPU, by group


def by_group(q, k, v, plans, dout, scale):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = vendor.attend(*leaves, plans, scale)
    if not out.requires_grad:  # nobody sees anything
        return out, *(torch.zeros_like(leaf) for leaf in leaves)
    given = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
    return out, *given


@pytest.mark.parametrize("mask", MASKS)
def test_groups_compute_the_same(mask):
    """Forward and backward, in float64; on the CPU, since nothing here knows the device."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 16, 2, 16, dtype=torch.float64)
    visibility = visibility_of(mask)
    exact, _, *exact_grads = oracle(q, k, v, visibility, dout, 0.3)
    out, *grads = by_group(q, k, v, vendor.grouped(visibility, 16, 16), dout, 0.3)
    assert out.is_contiguous()
    torch.testing.assert_close((out, *grads), (exact, *exact_grads))


def test_a_group_is_one_call(monkeypatch):
    """Known frames none, the others one; a causal rule has a group a frame."""
    calls, attend = [], vendor._sdpa
    monkeypatch.setattr(vendor, "_sdpa", lambda *given: calls.append(1) or attend(*given))
    q, k, v = torch.randn(3, 1, 16, 1, 16)
    layout = FrameLayout([4] * 4)
    for visibility, wanted in (
        (Visibility.identity(layout, [True, False, True, False]), 1),
        (Visibility.causal(layout), 4),
        (Visibility.full(layout), 1),
    ):
        calls.clear()
        vendor.attend(q, k, v, vendor.grouped(visibility, 16, 16), 0.25)
        assert len(calls) == wanted


@pytest.fixture
def hopper(monkeypatch):
    """The rule of a GPU, on tensors of the CPU; `hopper(rule)` is what was measured there."""
    monkeypatch.setattr(vendor, "_capability", lambda q: (9, 0))
    return lambda rule: monkeypatch.setattr(vendor, "FASTER_ON", {(9, 0): rule} if rule else {})


def test_few_and_huge_groups_go_to_pytorch(hopper):
    q = torch.zeros(2, 16, 1, 16, dtype=torch.bfloat16)

    def taken(rule, visibility, q=q, wants_gradient=False):
        hopper(rule)
        return vendor.plans_for(q, q, visibility, wants_gradient) is not None

    identity, causal = visibility_of("identity"), visibility_of("causal")  # groups of 8 and 16; 4
    assert taken(vendor.Rule(8, 2), identity)
    assert not taken(vendor.Rule(9, 2), identity), "one group is too small"
    assert not taken(vendor.Rule(8, 1), identity), "two samples with a group each"
    assert taken(vendor.Rule(4, 4), causal)
    assert not taken(vendor.Rule(4, 3), causal)
    assert not taken(None, identity), "nothing was measured"
    assert not taken(vendor.Rule(8, 2), identity, q.float())
    assert not taken(vendor.Rule(8, 2), identity, wants_gradient=True)
    assert not taken(vendor.Rule(0, 9), identity, q[:, :0])
    assert taken(None, visibility_of("full"), q.float()), "nothing is hidden"
    assert not vendor.FASTER_ON, "no GPU was measured"


def test_no_group_is_made_on_a_cpu_or_of_what_only_the_device_knows(hopper, monkeypatch):
    hopper(vendor.Rule(0, 99))
    q = torch.zeros(2, 16, 1, 16, dtype=torch.bfloat16)
    layout = FrameLayout(torch.tensor([4] * 4, device="meta"))
    assert vendor.plans_for(q, q, Visibility.causal(layout), False) is None
    told = Visibility.causal(FrameLayout([4] * 4, device="meta"))
    assert vendor.plans_for(q, q, told, False) is not None
    monkeypatch.undo()
    assert vendor.plans_for(q, q, visibility_of("full"), False) is None


@pytest.mark.parametrize("mask", ["full", "identity"])
def test_the_public_call_follows_the_rule(hopper, caplog, mask):
    """Who wants the lse or a gradient gets the room's own path."""
    paths.announce.cache_clear()
    hopper(vendor.Rule(8, 2))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 16, 2, 16).bfloat16()
    visibility = visibility_of(mask)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        out = masked_attention(q, k, v, visibility)
        assert caplog.messages == ["masked_attention: SDPA, one call per group of frames"]
        caplog.clear()
        wanted, _ = masked_attention(q, k, v, visibility, return_lse=True)
        trained = masked_attention(q, k.clone().requires_grad_(), v, visibility)
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)
    assert out.is_contiguous()
    assert caplog.messages == ["masked_attention: SDPA per group of frames"]
    assert "masked_attention" in type(trained.grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
def test_gpu_groups_compute_the_same(monkeypatch, within_budget, rand, mask):
    rule = {torch.cuda.get_device_capability(): vendor.Rule(0, 99)}
    monkeypatch.setattr(vendor, "FASTER_ON", rule)
    visibility = visibility_of(mask, 1000, "cuda")
    q, k, v = rand(2, 4000, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    dout = rand(2, 4000, 2, 64, dtype=torch.bfloat16)
    plans = vendor.plans_for(q, k, visibility, False)
    assert plans is not None
    out, *grads = by_group(q, k, v, plans, dout, 0.125)
    _, lse = masked_attention(q, k, v, visibility, return_lse=True)
    check_budget(within_budget, (out, lse, *grads), q, k, v, visibility, dout, 0.125)
    assert torch.equal(masked_attention(q, k, v, visibility), out)
