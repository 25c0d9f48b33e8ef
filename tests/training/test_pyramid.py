"""Pyramid Flow in training: which clip trains what, its loss, its runs and its samples."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvid.models.pyramid_flow import PyramidFlux
from fastvid.training import loop, pyramid
from fastvid.training.build import build_schedule
from fastvid.training.codec import PixelCodec
from fastvid.training.draws import draw, draw_validation, generator
from fastvid.training.evaluate import evaluate
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.pyramid import lesson, stages_of
from fastvid.training.runs import export, load_run
from fastvid.training.sample import sample_task
from tests.training.pyramid_run import MODEL, tiny_pyramid

CODEC = PixelCodec(2)
CONFIG = tiny_pyramid("clips", "run")
CHAIN = build_schedule(CONFIG.diffusion)
SHAPE = (12, 4, 8, 8)


@pytest.fixture
def config(clips, tmp_path):
    """`config(steps=4)`: a tiny run."""

    def make(*, folder=tmp_path / "run", **changes):
        return tiny_pyramid(clips, folder, **changes)

    return make


@pytest.fixture
def awake(awakened):
    return awakened(PyramidFlux(MODEL))


def draws_of(numbers, batch):
    drawn = [generator(0, "train", n) for n in numbers]
    return draw(drawn, SHAPE, len(CHAIN), CONFIG.diffusion, numbers=numbers, batch=batch)


# Which clip trains what


@pytest.mark.parametrize("ratios", [(1, 2, 1), (2, 1), (1,)])
def test_every_step_has_the_shares_of_its_stages(ratios):
    diffusion, columns = replace(CONFIG.diffusion, sample_ratios=ratios), sum(ratios)
    for step in range(3):
        numbers = range(step * 3 * columns, (step + 1) * 3 * columns)
        found = Counter(lesson(n, 3 * columns, 5, diffusion)[0] for n in numbers)
        assert found == {stage: 3 * share for stage, share in enumerate(ratios)}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_as_much_of_every_stage(world):
    for rank in range(world):
        mine = range(rank, 16, world)
        found = Counter(lesson(n, 16, 4, CONFIG.diffusion)[0] for n in mine)
        assert found == {0: 4 / world, 1: 8 / world, 2: 4 / world}


@pytest.mark.parametrize("group", [1, 2, 4])
def test_steps_go_through_all_frames_and_pair_long_with_short(group):
    """As the published unit counts do, at every size of the group."""
    diffusion = replace(CONFIG.diffusion, sync_group=group)
    trained = {0: Counter(), 1: Counter(), 2: Counter()}
    for step in range(4 // group):
        counts = {0: set(), 1: set(), 2: set()}
        for n in range(16 * step, 16 * step + 16):
            stage, units = lesson(n, 16, 4, diffusion)
            trained[stage][units] += 1
            counts[stage].add(units)
        highest = set(range(1 + step * group, 1 + (step + 1) * group))
        assert counts[2] == highest
        assert counts[0] == counts[1] == {5 - units for units in highest}
    for counts in trained.values():
        assert set(counts) == {1, 2, 3, 4}
        assert len(set(counts.values())) == 1


def test_validation_has_all_stages_and_frames():
    found = {lesson(n, 0, 4, CONFIG.diffusion) for n in range(16)}
    assert found == {(stage, units) for stage in range(3) for units in (1, 2, 3, 4)}


# The loss


def by_hand(model, clean, draws, i, stage, units):
    """The loss of one clip, from the formulae, on its own."""
    level = stages_of(CONFIG.diffusion).stages[stage]
    c = CONFIG.diffusion.corrupt * torch.rand(
        (), generator=generator(CONFIG.run.seed, "corruption", draws.numbers[i])
    )

    def down(x, times):
        for _ in range(times):
            x = F.avg_pool3d(x, (1, 2, 2))
        return x

    x1, eps, t = clean[i : i + 1], draws.noise[i : i + 1], units - 1
    frame, n = down(x1[:, :, t : t + 1], 2 - stage), eps[:, :, t : t + 1]
    n = down(n, 2 - stage) * 2 ** (2 - stage)
    start = n
    if stage:
        coarse = F.interpolate(down(frame, 1), scale_factor=(1, 2, 2))
        start = level.start_sigma * n + (1 - level.start_sigma) * coarse
    end = level.end_sigma * n + (1 - level.end_sigma) * frame
    r = 1 - draws.index[i] / 20
    span = level.last_timestep - level.first_timestep
    timestep = level.first_timestep + span * draws.index[i : i + 1] / 20
    history, at = [], stage
    for before in range(t - 1, -1, -1):  # one clip per frame: the model sees no difference
        clip, noise = x1[:, :, before : before + 1], eps[:, :, before : before + 1]
        noise = down(noise, 2 - at) * 2 ** (2 - at)
        history.insert(0, c * noise + (1 - c) * down(clip, 2 - at))
        at = max(at - 1, 0)
    velocity = model(
        r * start + (1 - r) * end,
        timestep.float(),
        history=history,
        text=torch.zeros(1, 1, 8),
        text_lengths=torch.ones(1, dtype=torch.int64),
        pooled=torch.zeros(1, 8),
    )
    return (velocity - (start - end)).square().mean().item()


def test_the_loss_is_that_of_the_formulae_clip_by_clip(awake, rand):
    """All stages and all lengths of history; packed, in any order."""
    numbers = [n for n in range(64) if n % 16 in (1, 6, 8, 15)]
    clean, draws = rand(len(numbers), *SHAPE), draws_of(numbers, 16)
    found = pyramid.losses(awake, clean, None, draws, CHAIN, CONFIG)
    lessons = [lesson(n, 16, 4, CONFIG.diffusion) for n in numbers]
    assert {stage for stage, _ in lessons} == {0, 1, 2}
    assert {units for _, units in lessons} == {1, 2, 3, 4}
    for i, (stage, units) in enumerate(lessons):
        wanted = by_hand(awake, clean, draws, i, stage, units)
        assert found[i].item() == pytest.approx(wanted, rel=1e-4), (stage, units)


def test_the_loss_of_a_clip_depends_on_its_number_alone(awake, rand):
    clean, numbers = rand(8, *SHAPE), list(range(8))
    together = pyramid.losses(awake, clean, None, draws_of(numbers, 8), CHAIN, CONFIG)
    for part in ([5], [7, 2]):
        alone = pyramid.losses(awake, clean[part], None, draws_of(part, 8), CHAIN, CONFIG)
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-5)


# Runs


def weights(folder):
    return load_run(folder / "model" / "last")[0].state_dict()


def test_a_run_learns_and_leaves_validation_sheets_and_a_model(config):
    made = config(steps=24, log_every=6, validate_every=24, sample_every=24, ema=0.5)
    folder = train(made)
    lines = read_log(folder)
    found = [line["loss"] for line in lines if line["kind"] == "train"]
    assert found[-1] < 0.8 * found[0]
    assert any("psnr/predict" in line for line in lines)
    assert (folder / "samples" / "step-00000024.png").stat().st_size > 1000
    model, loaded, _ = load_run(folder)
    assert isinstance(model, PyramidFlux)
    assert loaded == made


def test_a_resumed_run_equals_an_uncut_one(config, tmp_path):
    straight = config(folder=tmp_path / "straight")
    train(straight)
    cut = config(folder=tmp_path / "cut")
    with pytest.raises(loop.Interrupted):
        train(cut, stop_at=2)
    train(cut, resume=True)
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_parts_of_a_batch_train_like_the_whole(config, tmp_path):
    found = []
    for parts in (1, 2):
        folder = train(config(folder=tmp_path / str(parts), batch=8, accumulate=parts, steps=2))
        found.append([line["loss"] for line in read_log(folder) if line["kind"] == "train"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_high_loss_updates_nothing(config):
    folder = train(config(skip_loss=1e-6))
    lines = read_log(folder)
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [1, 2, 3]
    assert all(line["loss"] >= 1e-6 for line in skipped)
    torch.manual_seed(config().run.seed)
    first = PyramidFlux(MODEL).state_dict()
    assert all(torch.equal(first[name], value) for name, value in weights(folder).items())


def test_weights_come_from_a_run_or_official_ones(config, awake, tmp_path):
    from safetensors.torch import save_file

    export(tmp_path / "a" / "model" / "last", config(), awake.state_dict())
    official = tmp_path / "official"
    official.mkdir()
    state = awake.to_official_state_dict()
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, official / "diffusion_pytorch_model.safetensors")
    for source in (tmp_path / "a", official / "diffusion_pytorch_model.safetensors"):
        made = pyramid.build_model(config(init=str(source))).state_dict()
        assert all(torch.equal(made[n], value) for n, value in awake.state_dict().items())
    wider = replace(MODEL, single_blocks=2)
    with pytest.raises(ValueError, match="the run wants"):
        pyramid.build_model(config(init=str(tmp_path / "a"), model=wider))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 6}, r"optim\.batch must be a multiple of the 4 columns"),
        ({"sync_group": 2}, r"optim\.batch must be a multiple of .* sync_group = 2"),
        ({"sync_group": 0}, r"diffusion\.sync_group must be positive"),
        ({"sample_ratios": (1, 0, 1)}, r"diffusion\.sample_ratios must give each stage"),
        ({"sample_ratios": ()}, r"diffusion\.sample_ratios must give each stage"),
        ({"sample_ratios": (1, "x")}, r"diffusion\.sample_ratios must be int"),
        ({"gamma": 0.5}, r"diffusion\.gamma must be in \(0, 1/3\]"),
        ({"corrupt": 1.5}, r"diffusion\.corrupt must be in \[0, 1\]"),
        ({"context": -1}, r"diffusion\.context must not be negative"),
        ({"context": 4}, r"diffusion\.context must leave one of 4 latent frames"),
        ({"size": (16, 24)}, r"data\.size must be multiples of 16 pixels"),
        ({"model": replace(MODEL, channels=3)}, r"model\.channels must be the codec's 12, got 3"),
        ({"skip_loss": -1.0}, r"optim\.skip_loss must not be negative"),
        ({"eps": 0.0}, r"optim\.eps must be positive"),
    ],
)
def test_nonsense_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_pyramid("clips", "run", **changes)


# Samples


@pytest.fixture
def video(rand):
    return rand(2, 3, 8, 16, 16).clamp(-2, 2) / 2


def made_by(model, video, task, **options):
    sampler_of, spacing = pyramid.sampler_of(model, CODEC, CONFIG)
    settings = {"steps": 2, "spacing": spacing, "sampler_of": sampler_of, "seeds": [3, 4]}
    settings |= {"task": task, "size": (8, 8)}
    return sample_task(model, CODEC, CHAIN, video, **(settings | options))


@pytest.mark.parametrize(
    ("task", "given", "frames"),
    [("predict", 1, 3), ("predict", 3, 7), ("expand", 2, 4), ("unconditional", None, 3)],
)
def test_clips_of_any_length_go_on_from_what_is_given(awake, video, task, given, frames):
    source = None if given is None else video[:, :, :frames]
    made, known = made_by(awake, source, task, given=given, frames=frames)
    assert made.shape == (2, 3, frames, 16, 16)
    given = given or 0
    assert torch.equal(known[0], torch.arange(frames) < given)
    assert torch.equal(made[:, :, :given], video[:, :, :given])
    assert made.isfinite().all()
    assert not torch.allclose(made[0, :, given:], made[1, :, given:], atol=1e-2)


def test_a_frame_depends_on_those_before_it(awake, video):
    other = video.clone()
    other[:, :, 0] = -other[:, :, 0]
    one, two = (made_by(awake, v, "predict", given=2, frames=3).video for v in (video, other))
    assert not torch.allclose(one[:, :, 2], two[:, :, 2], atol=1e-4)


def test_a_clip_depends_on_its_seed_alone(awake, video):
    together = made_by(awake, video, "predict", given=2, frames=4).video
    alone = made_by(awake, video[1:], "predict", given=2, frames=4, seeds=[4]).video
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


def test_progress_counts_the_steps_of_the_chain(awake, video):
    seen = []
    tell = lambda done, total: seen.append((done, total))  # noqa: E731
    made_by(awake, video, "predict", given=1, frames=4, steps=5, progress=tell)
    assert seen == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize("task", ["interpolate", "backward", "complete", "loop", "slow-motion"])
def test_tasks_that_do_not_start_from_the_first_frames_are_refused(awake, task):
    with pytest.raises(ValueError, match=f"task must be one of predict.*{task}"):
        pyramid.sampling(awake, task, 4, one_pass=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": torch.tensor([[True, False, True, False]])}, "known must be the first frames"),
        ({"given": 1, "eta": 1.0}, "eta must be 0 for pyramid"),
    ],
)
def test_what_it_cannot_do_is_refused(awake, video, options, message):
    with pytest.raises(ValueError, match=message):
        made_by(awake, video, "predict", frames=4, **options)


def test_there_is_no_guidance(awake):
    with pytest.raises(ValueError, match="guidance must be left out for pyramid"):
        pyramid.sampler_of(awake, CODEC, CONFIG, guidance=2.0)


def test_a_validation_is_the_same_every_time(awake, rand):
    clean = rand(3, *SHAPE)
    draws = draw_validation([0, 1, 2], 3, SHAPE, len(CHAIN), CONFIG.diffusion, seed=0)
    given = (awake, clean, None, draws, CHAIN, CONFIG)
    assert torch.equal(pyramid.losses(*given), pyramid.losses(*given))
    one, two = pyramid.posterior_mean(*given), pyramid.posterior_mean(*given)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[0][:, :, :1], clean[:, :, :1])


def test_scores_stand_beside_the_rivals(awake, video):
    sampler_of, spacing = pyramid.sampler_of(awake, CODEC, CONFIG)
    result = evaluate(
        awake,
        CODEC,
        CHAIN,
        video[:, :, :4],
        task="predict",
        given=2,
        prediction="v",
        steps=2,
        samples=2,
        sampler_of=sampler_of,
        spacing=spacing,
    )
    rows = {"sample", "one_step_mean", "sample_mean", "copy_nearest", "linear_blend"}
    assert set(result["rows"]) == rows
    assert result["frames"] == 4
