"""Frames of a clip are found, taken out and put back."""

import pytest
import torch

from fastvid.modules.frames import places, put, take

CHOSEN = {
    "a run": [[0, 1, 1, 0]],
    "in a run of all samples": [[1, 1, 0, 0], [1, 1, 0, 0]],
    "apart": [[1, 0, 0, 1], [1, 0, 0, 1]],
    "elsewhere in each sample": [[1, 0, 1, 0], [0, 1, 1, 0]],
    "none": [[0, 0, 0, 0]],
}


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=list(CHOSEN))
@pytest.mark.parametrize("dim", [1, 2])
def test_taken_frames_come_back_to_their_places(rand, chosen, dim):
    chosen = torch.tensor(chosen, dtype=torch.bool)
    x = rand(len(chosen), 4, 3, 5).movedim(1, dim)
    found = take(x, places(chosen), dim=dim)
    wanted = torch.stack(
        [sample[flags] for sample, flags in zip(x.movedim(dim, 1), chosen, strict=True)]
    )
    assert torch.equal(found.movedim(dim, 1), wanted)
    back = put(found, places(chosen), 4, dim=dim).movedim(dim, 1)
    assert torch.equal(back, x.movedim(dim, 1) * chosen[:, :, None, None])


def test_gradients_go_to_the_frames_that_were_taken(rand):
    chosen = torch.tensor(CHOSEN["elsewhere in each sample"], dtype=torch.bool)
    x = rand(2, 4, 3).requires_grad_()
    put(take(x, places(chosen)), places(chosen), 4).sum().backward()
    assert torch.equal(x.grad, chosen[:, :, None].expand(2, 4, 3).float())


def test_a_run_is_a_view_and_what_all_frames_share_is_left_alone(rand):
    x, shared = rand(1, 4, 3), rand(2, 1, 3)
    chosen = places(torch.tensor([[0, 1, 1, 0]], dtype=torch.bool))
    assert take(x, chosen).data_ptr() == x[:, 1:].data_ptr()
    assert take(shared, chosen) is shared


def test_one_sample_of_values_serves_places_of_several(rand):
    chosen = torch.tensor(CHOSEN["elsewhere in each sample"], dtype=torch.bool)
    x = rand(1, 4, 3)
    assert torch.equal(take(x, places(chosen))[1], x[0, 1:3])


def test_no_places_where_samples_differ_in_number_or_a_device_would_be_asked():
    ragged = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    assert places(ragged) is None
    assert places(ragged.to("meta")) is None
    assert places(ragged[:0]) is None
