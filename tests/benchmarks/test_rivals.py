"""Other people's kernels behind stand-ins that have their signatures and plain PyTorch inside."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels import bench_masked_attention as masked
from benchmarks.kernels import bench_modulate, bench_temporal_attention
from benchmarks.rivals import packages

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
    return attend(q, k, v)


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
        "liger_kernel.transformers.functional": (liger_layer_norm,),
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


@pytest.mark.parametrize("name", ["flash-attn", "xformers", "natten"])
def test_temporal_attention(installed, rand, name):
    q, k, v = (rand(2, 5, 7, 3, 8) for _ in range(3))
    found = bench_temporal_attention.PACKAGES[name]()(q, k, v)
    torch.testing.assert_close(found, bench_temporal_attention.eager(q, k, v))


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
