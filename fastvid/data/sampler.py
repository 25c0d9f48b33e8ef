"""A shuffled order that can be taken up anywhere, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class ResumableSampler(torch.utils.data.Sampler):
    """Give `(epoch, index)` in an order fixed by the seed, from a place that the trainer counts.

    The order is one global sequence, cut into epochs. Of `world` processes, `rank` takes every
    `world`-th sample of it, so a global batch holds the same samples whatever the world size, as
    long as batch times world stays the same.

    A loader fetches ahead of the training, so the sampler does not count what it gives. The trainer
    calls `advance` when a batch has been trained on, and a new iteration starts there:

        loader = DataLoader(dataset, batch_size=8, sampler=sampler)
        for batch in loader:
            ...
            sampler.advance(8 * world)

    Args:
        size: samples in an epoch.
        seed: of the order.
        rank, world: this process and their number.
        shuffle: False gives 0, 1, 2, ... in every epoch.
        infinite: go on through the epochs; otherwise an iteration ends with its epoch, and leaves
            out what does not divide by `world`, so that all processes take as many steps.
        with_epoch: False gives bare indices, for a dataset that knows no epochs.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        infinite: bool = True,
        with_epoch: bool = True,
    ):
        if size < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(
                "size must be >= 1, seed >= 0, rank in [0, world), "
                f"got size={size}, seed={seed}, rank={rank}, world={world}"
            )
        self.size, self.seed, self.rank, self.world = size, seed, rank, world
        self.shuffle, self.infinite, self.with_epoch = shuffle, infinite, with_epoch
        self.epoch = 0
        self.seen = 0  # samples of this epoch trained on, by all processes

    def __len__(self) -> int:
        """Samples that an iteration gives this process up to the end of the epoch."""
        return (self.size - self.seen) // self.world

    def __iter__(self) -> Iterator[Any]:
        epoch, position = self.epoch, self.seen + self.rank
        stop = self.seen + len(self) * self.world
        order = self._order(epoch)
        while self.infinite or position < stop:
            while position >= self.size:
                epoch, position = epoch + 1, position - self.size
                order = self._order(epoch)
            index = int(order[position])
            yield (epoch, index) if self.with_epoch else index
            position += self.world

    def advance(self, samples: int) -> None:
        """Count samples as trained on: the global batch, of all processes together."""
        if samples < 0:
            raise ValueError(f"samples must be >= 0, got {samples}")
        epochs, self.seen = divmod(self.seen + samples, self.size)
        self.epoch += epochs
        if not self.infinite and self.size - self.seen < self.world:
            self.epoch, self.seen = self.epoch + 1, 0  # the rest does not reach every process

    def state_dict(self) -> dict[str, int]:
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a place.

        Raises:
            ValueError: the state is not one, or is of a set of another size, in which the same
                place means other samples.
        """
        if set(state) != {"size", "seed", "epoch", "seen"}:
            raise ValueError(f"state must hold size, seed, epoch and seen, got {sorted(state)}")
        if state["size"] != self.size:
            raise ValueError(
                f"state is of a set of {state['size']} samples, this one has {self.size}: "
                "go on with the set it began with"
            )
        if min(state.values()) < 0 or state["seen"] >= self.size:
            raise ValueError(f"state {state} does not fit an epoch of {self.size} samples")
        self.seed, self.epoch, self.seen = state["seed"], state["epoch"], state["seen"]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)
