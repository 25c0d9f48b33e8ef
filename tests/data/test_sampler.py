from itertools import islice

import pytest
from torch.utils.data import DataLoader

from fastvid.data.sampler import ResumableSampler


def take(sampler, count):
    return list(islice(iter(sampler), count))


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    drawn = take(ResumableSampler(50), 150)
    epochs = [[i for e, i in drawn if e == epoch] for epoch in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1]
    assert take(ResumableSampler(50), 150) == drawn
    assert take(ResumableSampler(50, seed=1), 150) != drawn


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_order_does_not_depend_on_the_world_size(world):
    alone = take(ResumableSampler(10), 60)
    ranks = [take(ResumableSampler(10, rank=r, world=world), 60 // world) for r in range(world)]
    assert [ranks[k % world][k // world] for k in range(60)] == alone


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("batches", [0, 1, 3, 9])
def test_a_resumed_order_goes_on_where_it_was(before, after, batches):
    """Global batches of 4, whatever the number of processes before and after."""
    straight = take(ResumableSampler(10, seed=5), 60)
    sampler = ResumableSampler(10, seed=5, rank=0, world=before)
    for _ in range(batches):
        sampler.advance(4)
    state = sampler.state_dict()
    assert set(state) == {"size", "seed", "epoch", "seen"}
    ranks = []
    for r in range(after):
        resumed = ResumableSampler(10, rank=r, world=after)
        resumed.load_state_dict(state)
        ranks.append(take(resumed, 12 // after))
    drawn = [ranks[k % after][k // after] for k in range(12)]
    assert drawn == straight[4 * batches : 4 * batches + 12]


def test_what_a_loader_fetches_ahead_is_not_counted():
    sampler = ResumableSampler(12, with_epoch=False)
    order = take(sampler, 24)
    batches = iter(DataLoader(range(12), batch_size=2, sampler=sampler, num_workers=1))
    for _ in range(3):
        next(batches)
        sampler.advance(2)
    assert sampler.state_dict() == {"size": 12, "seed": 0, "epoch": 0, "seen": 6}
    assert take(sampler, 6) == order[6:12]


def test_a_finite_sampler_ends_with_its_epoch_on_all_ranks():
    ranks = [ResumableSampler(10, rank=r, world=3, infinite=False) for r in range(3)]
    drawn = [list(s) for s in ranks]
    assert [len(d) for d in drawn] == [len(s) for s in ranks] == [3, 3, 3]
    assert len({i for d in drawn for _, i in d}) == 9
    for s in ranks:
        s.advance(9)
    assert {s.epoch for s in ranks} == {1}
    assert [len(list(s)) for s in ranks] == [3, 3, 3]


def test_without_shuffling_the_order_is_plain():
    sampler = ResumableSampler(5, shuffle=False, with_epoch=False, infinite=False)
    assert list(sampler) == [0, 1, 2, 3, 4]


def test_wrong_places_are_refused():
    with pytest.raises(ValueError, match="size must be"):
        ResumableSampler(0)
    with pytest.raises(ValueError, match="rank=2"):
        ResumableSampler(4, rank=2, world=2)
    sampler = ResumableSampler(4)
    with pytest.raises(ValueError, match="does not fit an epoch of 4"):
        sampler.load_state_dict({"size": 4, "seed": 0, "epoch": 0, "seen": 4})
    with pytest.raises(ValueError, match="must hold size, seed, epoch and seen"):
        sampler.load_state_dict({"seed": 0})
    with pytest.raises(ValueError, match="set of 5 samples, this one has 4"):
        sampler.load_state_dict(ResumableSampler(5).state_dict())
    with pytest.raises(ValueError, match="samples must be"):
        sampler.advance(-1)
