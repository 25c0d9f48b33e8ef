"""Blocks of text and video tokens: packed columns are what they are alone."""

import pytest
import torch
import torch.nn.functional as F

from fastvid.functional import FrameLayout, Rotary, Visibility, rotary_table
from fastvid.modules.joint import JointBlock, Scene, SingleBlock, joined, modulated, separated

D, HEADS, EPS = 32, 2, 1e-6
SIZES = [(2, 3, (4, 4)), (1, 5, (2, 2, 8))]  # batch, text, frames of each column


def scene(B, text, frames, last=False):
    """All tokens ask, or those of the last frame."""
    layout = FrameLayout([text, *frames])
    N = text + sum(frames)
    rows = torch.arange(N, dtype=torch.int32)[None, :, None].contiguous()
    sight = Visibility.text_and_frames(layout, torch.full((B,), text))
    if last:
        ask = FrameLayout(frames[-1:])
        sight = Visibility(sight.table[:, -1:], ask, layout, key_lengths=sight.key_lengths)
    rotary = Rotary.of([rotary_table(N, D // HEADS)], rows)
    return Scene(sight, rotary, frames[-1] if last else N)


@pytest.fixture
def pack(rand):
    text = [rand(B, L, D) for B, L, _ in SIZES]
    video = [rand(B, sum(frames), D) for B, _, frames in SIZES]
    return text, video, rand(3, D), [scene(*size) for size in SIZES]


def redraw(block):
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return block


def test_joined_and_separated_are_inverse(rand):
    columns = [rand(2, 3, D), rand(1, 7, D), rand(3, 1, D)]
    packed = joined(columns)
    assert packed.shape == (6 + 7 + 3, D)
    assert all(map(torch.equal, separated(packed, columns), columns))
    assert joined(columns[:1]).data_ptr() == columns[0].data_ptr()  # one column is not copied


def test_modulation_is_of_the_samples(rand):
    columns = [rand(2, 3, D), rand(1, 7, D)]
    rows = [(rand(len(c), D), rand(len(c), D)) for c in columns]
    parts = separated(modulated(columns, rows).make(*modulated(columns, rows).inputs), columns)
    for part, column, (shift, scale) in zip(parts, columns, rows, strict=True):
        exact = F.layer_norm(column, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(part, exact)


@pytest.mark.parametrize("last", [False, True])
def test_joint_columns_are_what_they_are_alone(pack, last):
    text, video, condition, scenes = pack
    block = redraw(JointBlock(D, HEADS, EPS, last=last))
    if last:
        assert not hasattr(block.text, "mlp")
        scenes = [scene(*size, last=True) for size in SIZES]
    texts, videos, kept = block(text, video, condition, scenes)
    assert kept == [None, None]
    assert len(texts) == (0 if last else 2)
    for i, rows in enumerate(condition.split([2, 1])):
        alone_text, (alone,), _ = block(text[i : i + 1], video[i : i + 1], rows, scenes[i : i + 1])
        torch.testing.assert_close(videos[i], alone)
        assert alone.shape[1] == (SIZES[i][2][-1] if last else sum(SIZES[i][2]))
        if not last:
            torch.testing.assert_close(texts[i], alone_text[0])


def test_single_columns_are_what_they_are_alone(pack):
    text, video, condition, scenes = pack
    columns = [torch.cat(pair, 1) for pair in zip(text, video, strict=True)]
    block = redraw(SingleBlock(D, HEADS, EPS))
    outputs, _ = block(columns, condition, scenes)
    for i, rows in enumerate(condition.split([2, 1])):
        (alone,), _ = block(columns[i : i + 1], rows, scenes[i : i + 1])
        torch.testing.assert_close(outputs[i], alone)


@pytest.mark.parametrize("grad", [True, False])
def test_both_paths_of_a_single_block_are_one(pack, grad):
    text, video, condition, scenes = pack
    columns = [torch.cat(pair, 1) for pair in zip(text, video, strict=True)]
    block = redraw(SingleBlock(D, HEADS, EPS)).double()
    wide = [column.double() for column in columns]
    exact, _ = block(wide, condition.double(), scenes)
    with torch.set_grad_enabled(grad):
        outputs, _ = block.float()(columns, condition, scenes)
    for out, reference in zip(outputs, exact, strict=True):
        torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)
