"""Identity attention: known frames see themselves, the others see all."""

import pytest
import torch

from fastvid.functional import Rotary, rotary_table
from fastvid.modules.frame_attention import FrameAttention, Stream, clip_visibility
from fastvid.modules.frames import places, take
from fastvid.modules.tokens import drop_ends, embed, end_rows, to_latents

D, HEADS, N = 32, 2, 5


def stream(known, over, identity="self_token", alone=False, chosen=None):
    """All frames, or those chosen; without `known`, none of them is."""
    known = torch.tensor(known, dtype=torch.bool)
    T = known.shape[1]
    grid = torch.stack(torch.meshgrid(torch.arange(T), torch.arange(N), indexing="ij"), -1)
    rows = grid[None].int()
    visibility = None
    if chosen is not None:
        rows = take(rows, chosen)
        if over == "clip":
            visibility = clip_visibility(rows.shape[1], T, N, rows.device)
        known = None
    elif over == "clip":
        visibility = clip_visibility(T, T, N, rows.device, known, identity)
    rotary = Rotary.of([rotary_table(T, 8), rotary_table(N, 8)], rows.flatten(1, 2))
    return Stream(rows.shape[1], rotary, known, visibility, alone)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("over", ["time", "clip"])
def test_with_nothing_known_it_is_full_attention(rand, over, frames):
    module = FrameAttention(D, HEADS, over)
    full = FrameAttention(D, HEADS, over, identity="none")
    full.load_state_dict(module.state_dict())
    x, known = rand(1, frames * N, D), [[0] * frames]
    found, _ = module(x, stream(known, over))
    wanted, _ = full(x, stream([[1] + [0] * (frames - 1)], over, "none"))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("over", ["time", "clip"])
def test_a_known_frame_alone_is_its_own_value(rand, over):
    module = FrameAttention(D, HEADS, over)
    x = rand(2, N, D)
    found, _ = module(x, stream([[1], [1]], over))
    wanted = module.proj(module.kv(x)[..., D:])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("identity", ["self_token", "self_frame", "bypass"])
@pytest.mark.parametrize("over", ["time", "clip"])
def test_known_frames_are_the_same_bits_whatever_the_others_are(rand, over, identity):
    module = FrameAttention(D, HEADS, over, identity=identity)
    known = [[0, 1, 0, 1], [1, 0, 0, 0]]
    x, given = rand(2, 4, N, D), torch.tensor(known, dtype=torch.bool)
    other = x.where(given[:, :, None, None], rand(2, 4, N, D))
    here = stream(known, over, identity)
    with torch.no_grad():
        before, after = (
            module(value.flatten(1, 2), here)[0].unflatten(1, (4, N)) for value in (x, other)
        )
    assert torch.equal(before[given], after[given])
    assert not torch.isclose(before[~given], after[~given]).all(-1).any()
    assert (identity == "bypass") is not before[given].any().item()


@pytest.mark.parametrize("identity", ["self_token", "self_frame", "bypass"])
@pytest.mark.parametrize("over", ["time", "clip"])
def test_frames_alone_then_the_others_are_all_together(rand, over, identity):
    module = FrameAttention(D, HEADS, over, identity=identity)
    known = [[0, 1, 0, 1], [1, 0, 1, 0]]
    flags = torch.tensor(known, dtype=torch.bool)
    x = rand(2, 4, N, D)
    both, own = module(x.flatten(1, 2), stream(known, over, identity))
    assert own is None
    both = both.unflatten(1, (4, N))
    mine, others = places(flags), places(~flags)
    first, given = module(
        take(x, mine).flatten(1, 2), stream(known, over, identity, alone=True, chosen=mine)
    )
    here = stream(known, over, identity, chosen=others)
    rest, _ = module(take(x, others).flatten(1, 2), here, given)
    torch.testing.assert_close(first.unflatten(1, (2, N)), take(both, mine), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rest.unflatten(1, (2, N)), take(both, others), atol=1e-6, rtol=1e-5)


def test_only_wanted_frames_come_back(rand):
    module = FrameAttention(D, HEADS, "time")
    known = [[0, 1, 1, 0]]
    x, here = rand(1, 4 * N, D), stream(known, "time")
    every = module(x, here)[0].unflatten(1, (4, N))
    found, _ = module(x, here, wanted=torch.tensor([[0, 3]]))
    torch.testing.assert_close(found.unflatten(1, (2, N)), every[:, [0, 3]])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="dim must be a multiple of heads = 3"):
        FrameAttention(D, 3, "time")


def test_tokens_become_latents_again_and_rows_get_their_ends(rand):
    latents, layer = rand(2, 4, 3, 6, 8), torch.nn.Linear(16, 16)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    x = embed(layer, latents, 2)
    assert x.shape == (2, 3, 12, 16)
    x = x.unflatten(-1, (4, 2, 2)).movedim(-3, -1).flatten(-3)  # c p q to p q c
    torch.testing.assert_close(to_latents(x, 3, 2), latents)
    token = rand(16)
    ended = end_rows(x, token, 3)
    assert ended.shape == (2, 3, 15, 16)
    assert torch.equal(ended[:, :, 4::5], token.expand(2, 3, 3, 16))
    assert torch.equal(drop_ends(ended, 3), x)
    assert end_rows(x, None, 3) is x
