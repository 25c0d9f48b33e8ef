"""Training. Everything is built and checked first (`setup.py`), then there is one loop."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastvid.training.batches import Batch, batches
from fastvid.training.checkpoint import prune
from fastvid.training.config import TrainConfig
from fastvid.training.distributed import join, on_first
from fastvid.training.draws import draw, generator
from fastvid.training.guard import judge, leave_out
from fastvid.training.interrupt import Interrupted, StopRequest, stop_on_signal
from fastvid.training.preview import save_preview
from fastvid.training.runs import export
from fastvid.training.setup import Run, prepared
from fastvid.training.state import TrainState, averaged, full_weights, learning_rate, save, update
from fastvid.training.validate import validate


def train(config: TrainConfig, *, resume: bool = False, stop_at: int = 0) -> Path:
    """Train as `config` says and return the run's folder.

    Under torchrun every process calls this with the same arguments; FSDP2 splits the model.

    Args:
        resume: continue from the newest sound checkpoint in `run.folder`. With none there the run
            starts at its beginning. On the CPU a resumed run equals an uncut one bit for bit.
        stop_at: end after this step as a signal would; the learning rate still follows run.steps.
    Raises:
        ValueError: the config does not fit the data, the codec, the processes or, on a resume, the
            run; or the folder holds a run and `resume` is False. Nothing was computed.
        Interrupted: a signal came, or step `stop_at`; the state was saved first.
        NonFiniteError: NaN or infinity, see `run.on_nonfinite`.
        CheckpointError: the state could not be saved, or no checkpoint is sound.
        LogError: the log, TensorBoard's file or a contact sheet could not be written.
        RunBusyError: another process trains in this folder.
    """
    with (
        join(config.run.device) as world,
        prepared(config, world, resume) as (run, state),
        stop_on_signal() as stop,
    ):
        _loop(run, state, stop, stop_at)
    return run.folder


def _loop(run: Run, state: TrainState, stop: StopRequest, stop_at: int) -> None:
    optim, settings = run.config.optim, run.config.run
    low_size = run.family.low_size(state.model, run.config.data.size, run.codec.factor)
    feed = batches(run.train, run.config, run.codec, state.world, state.sampler, low_size)
    while state.step < settings.steps:
        batch = next(feed)
        loss = _backward(run, state, batch)
        verdict = judge(state, loss, clip=optim.clip, stop=bool(stop) or state.step + 1 == stop_at)
        lr = learning_rate(state.step, settings.steps, optim)
        if verdict.finite and optim.skip_loss and verdict.loss >= optim.skip_loss:
            run.log.line("skipped", state.step + 1, loss=verdict.loss)
        elif verdict.finite:
            update(state, lr, optim.ema)
            state.note(loss=verdict.loss, norm=verdict.norm)
        else:
            leave_out(state, verdict, loss, batch.paths, settings, run.log)
        state.optimizer.zero_grad()
        state.step, state.sampler = state.step + 1, batch.sampler
        run.log.advance()

        last = state.step == settings.steps
        best = False
        if last or _due(state.step, settings.log_every):
            run.log.steps(state.step, **state.means(), lr=lr)
        # A stop does not leave it out: a resumed run starts at the next step.
        if run.held_out is not None and (last or _due(state.step, settings.validate_every)):
            best = _validate(run, state)
        if last or best or verdict.stop or _due(state.step, settings.save_every):
            _keep(run, state, best=best)
        if run.held_out is not None and (last or _due(state.step, settings.sample_every)):
            _preview(run, state)
        if verdict.stop and not last:
            raise Interrupted(f"stopped at step {state.step}, after saving it")


def _backward(run: Run, state: TrainState, batch: Batch) -> Tensor:
    """Gradients of this rank's share of a batch, part by part; returns its mean loss."""
    world = state.world
    count = run.config.optim.accumulate
    parts = batch.latents.chunk(count)
    lows = [None] * len(parts) if batch.low is None else batch.low.chunk(count)
    numbers = list(batch.numbers)
    mean = torch.zeros((), device=world.device)
    for part, (clean, low) in enumerate(zip(parts, lows, strict=True), start=1):
        own, numbers = numbers[: len(clean)], numbers[len(clean) :]
        draws = draw(
            [generator(run.config.run.seed, "train", number) for number in own],
            tuple(clean.shape[1:]),  # type: ignore[arg-type]
            len(run.schedule),
            run.config.diffusion,
            numbers=own,
            batch=run.config.optim.batch,
        ).to(world.device)
        if world.mesh is not None:  # ranks exchange gradients once a step
            state.model.set_requires_gradient_sync(part == len(parts))  # type: ignore[operator]
        with world.autocast(run.config.run.precision):
            losses = run.family.losses(state.model, clean, low, draws, run.schedule, run.config)
        loss = losses.mean() / len(parts)
        loss.backward()
        mean += loss.detach()
    return mean


def _validate(run: Run, state: TrainState) -> bool:
    """Validate the averaged weights; whether none before were better."""
    assert run.held_out is not None
    with averaged(state) as model:
        numbers = validate(model, run.held_out, run.codec, run.schedule, run.config, state.world)
    best = numbers["loss"] < state.best.get("loss", float("inf"))
    if best:
        state.best = {"step": state.step, "loss": numbers["loss"]}
    run.log.numbers("validation", state.step, **numbers)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    run.log.say(f"step {state.step}: validation {shown}{' (best)' if best else ''}")
    return best


def _preview(run: Run, state: TrainState) -> None:
    assert run.held_out is not None
    path = run.folder / "samples" / f"step-{state.step:08d}.png"
    with averaged(state) as model:
        save_preview(path, model, run.held_out, run.codec, run.schedule, run.config, state.world)
    run.log.image("samples", state.step, path)


def _keep(run: Run, state: TrainState, *, best: bool) -> None:
    """Checkpoint, weights to share, and room for the next ones."""
    save(state, run.folder / "checkpoints", run.config)
    weights = full_weights(state)

    def write() -> None:
        for name in ("last", "best") if best else ("last",):
            export(run.folder / "model" / name, run.config, weights)
        best_step = state.best.get("step")
        prune(run.folder / "checkpoints", state.step, run.config.run.keep, best_step)

    on_first(state.world, write)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
