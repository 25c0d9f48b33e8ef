"""Other people's kernels behind stand-ins that have their signatures and plain PyTorch inside."""

import contextlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import run
from benchmarks.kernels import bench_asymmetric_attention as asymmetric
from benchmarks.kernels import bench_masked_attention as masked
from benchmarks.kernels import bench_modulate, bench_qk_norm_rope
from benchmarks.kernels import bench_temporal_attention as temporal
from benchmarks.rivals import packages, sdpa
from fastvid.functional import asymmetric_attention, temporal_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def attend(q, k, v):
    """(B, N, heads, E), as all of these packages have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def by_segment(q, k, v, ends):
    """(tokens, heads, E) in segments."""
    lengths = ends.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x[None] for x in part))[0] for part in parts])


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert not causal
    assert deterministic
    if window_size == (-1, -1):
        return attend(q, k, v)
    at = torch.arange(q.shape[1])
    ahead = at - at[:, None]
    seen = (-window_size[0] <= ahead) & (ahead <= window_size[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert not causal
    assert deterministic
    return by_segment(q, k, v, cu_seqlens_q)


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        bias = cls()
        bias.ends = torch.tensor([0, *q_seqlen], device=device).cumsum(0)
        return bias


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    if attn_bias is None:
        return attend(query, key, value)
    assert query.shape[0] == 1  # xformers wants the segments behind each other
    return by_segment(query[0], key[0], value[0], attn_bias.ends)[None]


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return F.rms_norm(X, W.shape, W, eps)


def na1d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
    assert kernel_size == query.shape[1]
    return attend(query, key, value)


@pytest.fixture
def installed(monkeypatch):
    """All four packages."""
    contents = {
        "flash_attn": (flash_attn_func, flash_attn_varlen_func),
        "xformers": (),
        "xformers.ops": (memory_efficient_attention,),
        "xformers.ops.fmha": (),
        "xformers.ops.fmha.attn_bias": (BlockDiagonalMask,),
        "liger_kernel": (),
        "liger_kernel.transformers": (),
        "liger_kernel.transformers.functional": (liger_layer_norm, liger_rms_norm),
        "natten": (na1d,),
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("make", [masked.own_frame, masked.causal])
@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_masked_attention(installed, rand, name, make):
    q, k, v = (rand(2, 17, 3, 8) for _ in range(3))
    visibility = make([5, 3, 7, 2], q.device)
    found = masked.from_packages(visibility)[name]()(q, k, v)
    torch.testing.assert_close(found, masked.with_dense_mask(visibility, 17)(q, k, v))


def test_frames_that_see_themselves_alone_are_one_call(installed, rand, monkeypatch):
    calls = []
    monkeypatch.setattr(
        sys.modules["flash_attn"],
        "flash_attn_varlen_func",
        lambda *args, **kwargs: calls.append(1) or flash_attn_varlen_func(*args, **kwargs),
    )
    q, k, v = (rand(2, 8, 3, 8) for _ in range(3))
    masked.from_packages(masked.own_frame([4, 4], q.device))["flash-attn"]()(q, k, v)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("", {"flash-attn", "xformers", "natten"}),
        ("rotary", {"flash-attn", "xformers", "natten"}),
        ("window", {"flash-attn"}),
        ("known", set()),
    ],
)
def test_temporal_attention(installed, rand, rule, names):
    q, k, v = (rand(2, 5, 7, 3, 8) for _ in range(3))
    rule = temporal.RULES[rule](5, 8, CPU) if rule else {}
    makers = temporal.from_packages(rule)
    assert makers.keys() == names
    for make in makers.values():
        torch.testing.assert_close(make()(q, k, v), temporal_attention(q, k, v, **rule))


@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize("name", asymmetric.PACKAGES)
def test_asymmetric_attention(installed, rand, scope, name):
    q, (k, v) = rand(2, 3, 7, 2, 16), (rand(1, 3, 4, 2, 16) for _ in range(2))
    attend = asymmetric.batched(scope, asymmetric.PACKAGES[name]())
    torch.testing.assert_close(attend(q, k, v), asymmetric_attention(q, k, v, scope=scope))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(installed, rand, kind):
    x, weight = rand(2, 7, 16), rand(16)
    found = packages.liger_norm()(kind, x, weight)
    torch.testing.assert_close(found, bench_qk_norm_rope.plain_norm(kind, x, weight))


@pytest.mark.parametrize("room", run.rooms())
def test_what_a_room_may_be_compared_with_has_a_row_here_too(room):
    """On a machine without a GPU all of them are missing."""
    wanted = {
        "asymmetric_attention": {"flash-attn", "xformers"},
        "masked_attention": {"flash-attn", "xformers"},
        "temporal_attention": {"flash-attn", "xformers", "natten"},
        "modulate": {"liger"},
        "qk_norm_rope": {"liger"},
    }
    missing = {name for case in run.cases(room, CPU, True) for name in case.missing}
    assert missing == wanted.get(room, set())
    for case in run.cases(room, CPU, True):
        assert all(how.startswith("needs a GPU, and pip install") for how in case.missing.values())


def test_every_backend_is_asked_for_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sdpa, "sdpa_kernel", lambda backend: asked.append(backend) or contextlib.nullcontext()
    )
    rivals = sdpa.by_backend("dense", lambda x, by: x * by)
    assert [attend(3, by=2) for attend in rivals.values()] == [6] * 3
    assert list(rivals) == ["dense flash", "dense cudnn", "dense effic."]
    assert asked == list(sdpa.BACKENDS.values())


def test_norm_modulate(installed, rand):
    x, shift, scale = rand(2, 7, 16), rand(2, 16), rand(2, 16)
    found = packages.liger_norm_modulate()(x, shift, scale)
    torch.testing.assert_close(found, bench_modulate.eager_norm(x, shift, scale))


def test_what_is_missing_says_how_to_install_it(monkeypatch):
    makers = dict.fromkeys(packages.PACKAGES, lambda: pytest.fail("made without its package"))
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    here, missing = packages.split_by_presence(CUDA, makers)
    assert here == {}
    assert missing["liger"] == "pip install liger-kernel"
    assert missing.keys() == packages.PACKAGES.keys()
    _, missing = packages.split_by_presence(CPU, makers)
    assert missing["liger"] == "needs a GPU, and pip install liger-kernel"


def test_what_is_installed_is_a_rival_on_a_gpu(installed):
    makers = {"liger": packages.liger_norm_modulate, "natten": packages.natten_over_all}
    here, missing = packages.split_by_presence(CUDA, makers)
    assert here.keys() == {"liger", "natten"}
    assert missing == {}
