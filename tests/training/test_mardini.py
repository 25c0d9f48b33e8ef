"""MarDini in training: what each stage trains, how stages follow each other, and its samples."""

from dataclasses import replace

import pytest
import torch

from fastvid.diffusion.mardini import slow_motion
from fastvid.models.mardini import MarDini
from fastvid.training import loop, mardini
from fastvid.training.build import build_schedule
from fastvid.training.codec import PixelCodec, shrink
from fastvid.training.draws import draw, generator
from fastvid.training.evaluate import evaluate
from fastvid.training.guard import NonFiniteError
from fastvid.training.log import read_log
from fastvid.training.loop import train
from fastvid.training.runs import export, load_run
from fastvid.training.sample import laid_out, sample_task
from tests.training.mardini_stages import DIFFUSION, MODEL, tiny_stage

CODEC = PixelCodec(4)
STAGE = tiny_stage("clips", "run")


@pytest.fixture
def config(clips, tmp_path):
    """`config("both", steps=4)`: a tiny stage."""

    def make(trains="both", *, folder=tmp_path / "run", **changes):
        return tiny_stage(clips, folder, trains, **changes)

    return make


@pytest.fixture
def awake(awakened):
    return awakened(MarDini(MODEL))


@pytest.fixture
def batch(rand):
    """clean, low, draws and schedule of four clips."""
    schedule = build_schedule(DIFFUSION)
    clean = rand(4, 48, 4, 4, 4)
    draws = draw([generator(0, n) for n in range(4)], (48, 4, 4, 4), len(schedule), DIFFUSION)
    return clean, rand(4, 48, 4, 2, 2), draws, schedule


# What is drawn


def test_the_share_of_given_frames_follows_its_interval():
    wide = replace(DIFFUSION, ref_ratio=(0.06, 0.3))
    draws = draw([generator(0, n) for n in range(400)], (1, 17, 1, 1), 20, wide)
    known = draws.known.flatten(2).all(2)
    counts = known.sum(1)
    assert counts.unique().tolist() == [1, 2, 3, 4, 5]  # 0.06 x 17 = 1.02 to 0.3 x 17 = 5.1
    assert known.any(0).all()  # at any place
    inner = counts.bincount()[2:5]  # each a unit wide in n, so alike
    assert inner.min() > 0.6 * inner.max()


@pytest.mark.parametrize("ratio", [(0.0, 0.01), (0.99, 1.0), (0.0, 1.0)])
def test_one_frame_is_always_given_and_one_never(ratio):
    always = replace(DIFFUSION, ref_ratio=ratio)
    draws = draw([generator(1, n) for n in range(200)], (1, 4, 1, 1), 20, always)
    counts = draws.known.flatten(2).all(2).sum(1)
    assert counts.min() >= 1
    assert counts.max() <= 3


def test_plans_are_dropped_as_often_as_asked():
    draws = draw([generator(2, n) for n in range(2000)], (1, 4, 1, 1), 20, DIFFUSION)
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    none = replace(DIFFUSION, drop=0.0)
    assert not draw([generator(2, n) for n in range(50)], (1, 4, 1, 1), 20, none).dropped.any()


# The losses


def test_the_planner_is_judged_by_what_it_rebuilds(config, awake, batch):
    clean, low, draws, schedule = batch
    known = draws.known.flatten(2).all(2)
    found = mardini.losses(awake, clean, low, draws, schedule, config("planner"))
    rebuilt = awake.reconstruct(awake.plan(low, known))
    for i in range(4):
        wanted = (rebuilt - low)[i, :, ~known[i]].square().mean()
        assert found[i].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_generator_is_judged_by_the_velocity_of_unknown_frames(config, awake, batch):
    clean, low, draws, schedule = batch
    known = draws.known.flatten(2).all(2)
    alpha, sigma = (
        schedule.gather(name, draws.index, clean)
        for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    )
    cells = known[:, None, :, None, None]
    noisy = torch.where(cells, clean, alpha * clean + sigma * draws.noise)
    planning = awake.project(awake.plan(low, known), draws.dropped)
    velocity = awake(noisy, schedule.timesteps(draws.index), known=known, planning=planning)
    error = (velocity - alpha * draws.noise + sigma * clean).square()
    found = mardini.losses(awake, clean, low, draws, schedule, config("both"))
    for i in range(4):
        assert found[i].item() == pytest.approx(error[i, :, ~known[i]].mean().item(), rel=1e-4)


def test_a_dropped_plan_is_the_loss_of_the_generator_alone(config, awake, batch):
    clean, low, draws, schedule = batch
    dropped = replace(draws, dropped=torch.tensor([True, True, False, False]))
    alone = mardini.losses(awake, clean, low, draws, schedule, config("generator"))
    both = mardini.losses(awake, clean, low, dropped, schedule, config("both"))
    torch.testing.assert_close(both[:2], alone[:2], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(both[2:], alone[2:], rtol=1e-4).any()


# The stages


def changed(one, other):
    """Names of the weights that differ."""
    return {name for name in one if not torch.equal(one[name], other[name])}


def weights(folder):
    return load_run(folder / "model" / "last")[0].state_dict()


def test_each_stage_trains_its_part_from_the_weights_of_the_one_before(config, tmp_path):
    planner = train(config("planner", folder=str(tmp_path / "a"), ref_ratio=(0.65, 1.0)))
    generator_ = train(config("generator", folder=str(tmp_path / "b"), init=str(planner)))
    both = train(config(folder=str(tmp_path / "c"), init=str(generator_)))
    one, two, three = (weights(folder) for folder in (planner, generator_, both))
    moved = changed(one, two)
    assert moved
    assert all(name.startswith("generator.") for name in moved)
    assert "generator.unconditional" in moved
    moved = changed(two, three)
    assert {name.split(".")[0] for name in moved} == {"planner", "generator"}
    assert not any("head" in name for name in moved)

    torch.manual_seed(config().run.seed)  # what the first stage began with
    moved = changed(MarDini(MODEL).state_dict(), one)
    assert moved
    assert all(name.startswith("planner.") for name in moved)
    assert any("head" in name for name in moved)


def test_weights_fit_other_lengths_and_attention_over_time(config, awake, tmp_path):
    export(tmp_path / "st" / "model" / "last", config(), awake.state_dict())
    longer = replace(MODEL, frames=9, generator=replace(MODEL.generator, attention="time"))
    made = mardini.build_model(config(init=str(tmp_path / "st"), model=longer))
    assert made.config == longer
    assert not changed(awake.state_dict(), made.state_dict())


def test_the_planner_may_come_from_a_run_of_its_own(config, awake, tmp_path):
    torch.manual_seed(5)
    other = MarDini(MODEL)
    for name, model in (("one", awake), ("two", other)):
        export(tmp_path / name / "model" / "last", config(), model.state_dict())
    made = mardini.build_model(config(planner=str(tmp_path / "two"), init=str(tmp_path / "one")))
    for name, value in made.state_dict().items():
        source = other if name.startswith("planner.") else awake
        assert torch.equal(value, source.state_dict()[name])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("planner", {"heads": 1}, "planner.heads 2, the run wants 1"),
        ("generator", {"ref_t": "zero"}, "generator.ref_t 'shared', the run wants 'zero'"),
        ("generator", {"depth": 3}, "generator.depth 2, the run wants 3"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    config, awake, tmp_path, part, change, message
):
    export(tmp_path / "run" / "model" / "last", config(), awake.state_dict())
    wanted = replace(MODEL, **{part: replace(getattr(MODEL, part), **change)})
    with pytest.raises(ValueError, match=message):
        mardini.build_model(config(init=str(tmp_path / "run"), model=wanted))


def test_a_run_leaves_validation_sheets_and_a_model(config):
    made = config(steps=4, validate_every=2, sample_every=4, lr=3e-3)
    folder = train(made)
    lines = [line for line in read_log(folder) if line["kind"] == "validation"]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("psnr/arbitrary-interpolation" in line for line in lines)
    assert (folder / "samples" / "step-00000004.png").stat().st_size > 1000
    model, loaded, _ = load_run(folder)
    assert isinstance(model, MarDini)
    assert loaded == made


def test_a_resumed_run_equals_an_uncut_one(config, tmp_path):
    straight = config(folder=str(tmp_path / "straight"), steps=5)
    train(straight)
    cut = replace(straight, run=replace(straight.run, folder=str(tmp_path / "cut")))
    with pytest.raises(loop.Interrupted):
        train(cut, stop_at=2)
    train(cut, resume=True)
    assert not changed(weights(tmp_path / "straight"), weights(tmp_path / "cut"))


def test_a_stage_does_not_change_on_a_resume(config):
    with pytest.raises(loop.Interrupted):
        train(config(), stop_at=1)
    with pytest.raises(ValueError, match=r"stage\.trains was 'both'"):
        train(config("generator"), resume=True)


def test_nan_is_left_out_counted_and_then_ends_the_run(config, monkeypatch, tmp_path):
    original = mardini.losses

    def spoiled(*arguments):
        loss = original(*arguments)
        spoiled.step += 1
        return loss * float("nan") if spoiled.step >= 2 else loss

    spoiled.step = 0
    monkeypatch.setattr(mardini, "losses", spoiled)
    skipping = config(steps=9, on_nonfinite="skip", skip_limit=2, save_every=1)
    with pytest.raises(NonFiniteError, match="giving up"):
        train(skipping)
    lines = [line for line in read_log(tmp_path / "run") if line["kind"] == "nonfinite"]
    assert [line["left_out"] for line in lines] == [1, 2, 3]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "latents"}, "data.kind must be clips or frames for mardini"),
        ({"prediction": "x0"}, "diffusion.prediction must be 'v' for mardini"),
        ({"tasks": {"complete": 1.0}}, r"must give whole frames.*complete"),
        ({"tasks": {"unconditional": 1.0}}, r"must give whole frames.*unconditional"),
        ({"ref_ratio": (0.0, 0.0)}, "ref_ratio must be given for mardini"),
        ({"ref_ratio": (0.5, 0.2)}, "ref_ratio must rise"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\)"),
        ({"frames": 1}, "data.frames must be at"),
        ({"model": replace(MODEL, channels=16)}, r"model\.channels must be the codec's 48, got 16"),
        ({"size": (4, 4)}, "planner.side must be at most the 1 cells"),
    ],
)
def test_nonsense_is_refused_by_name(config, changes, message):
    if "frames" in changes:  # of the data, which is not the first part that has frames
        values = config()
        with pytest.raises(ValueError, match=message):
            replace(values, data=replace(values.data, **changes))
    else:
        with pytest.raises(ValueError, match=message):
            config(**changes)


# Samples


def made_by(model, video, task, **options):
    sampler_of, spacing = mardini.sampler_of(model, CODEC, STAGE)
    settings = {"steps": 3, "spacing": spacing, "sampler_of": sampler_of, "seeds": [3, 4]}
    settings |= {"task": task}
    return sample_task(model, CODEC, build_schedule(DIFFUSION), video, **(settings | options))


@pytest.fixture
def video(rand):
    return rand(2, 3, 12, 16, 24).clamp(-2, 2) / 2


@pytest.fixture
def plans(awake, monkeypatch):
    """What the planner read, call by call."""
    calls, plain = [], awake.plan

    def plan(low, known):
        calls.append((low, known.clone()))  # a view of what the sampler goes on writing
        return plain(low, known)

    monkeypatch.setattr(awake, "plan", plan)
    return calls


@pytest.mark.parametrize(
    ("task", "options", "windows"),
    [
        ("predict", {"given": 1}, 1),
        ("interpolate", {"given": 2}, 1),
        ("middle-frame", {}, 1),
        ("loop", {}, 1),
        ("expand", {"given": 2, "frames": 10}, 4),
        ("slow-motion", {"given": 2, "frames": 4}, 1),
        ("slow-motion", {"given": 2, "frames": 8}, 1 + 2),
        ("backward", {"given": 1, "frames": 7}, 2),
    ],
)
def test_one_plan_per_window_and_given_frames_exact(awake, video, plans, task, options, windows):
    made, known = made_by(awake, video, task, **options)
    assert len(plans) == windows
    frames = options.get("frames", 4)
    assert made.shape == (2, 3, frames, 16, 24)
    if task in ("slow-motion", "loop"):
        video = laid_out("loop" if task == "loop" else "", video[:, :, : known[0].sum()], known)
    cells = known[:, None, :, None, None].expand_as(made)
    assert torch.equal(made[cells], video[:, :, :frames][cells])
    assert not torch.isclose(made[~cells], video[:, :, :frames][~cells]).all()


def test_slow_motion_takes_the_windows_that_it_plans(awake, video, plans):
    made_by(awake, video, "slow-motion", given=2, frames=16)
    levels, count, windows = slow_motion(2, 16, 4), 2, 0
    for level in levels:
        windows += count // level.given
        count = count // level.given * level.frames
    assert len(plans) == windows > 2


def test_the_planner_reads_the_video_and_then_what_was_made(awake, video, plans):
    made, _ = made_by(awake, video, "expand", given=2, frames=6)
    (first, known), (second, done) = plans
    assert torch.equal(known, torch.tensor([[True, True, False, False]]).expand(2, -1))
    assert torch.equal(done, known)
    size = awake.planning_size(4, 6)
    assert first.shape == (2, 48, 4, *size)
    real = CODEC.encode(shrink(video[:, :, :2], (4 * size[0], 4 * size[1])))
    own = CODEC.encode(shrink(made[:, :, 2:4], (4 * size[0], 4 * size[1])))
    torch.testing.assert_close(first[:, :, :2], real)
    torch.testing.assert_close(second[:, :, :2], own, rtol=1e-4, atol=1e-5)


def test_any_frames_may_be_given(awake, video):
    known = torch.tensor([[False, True, True, False]])
    made, _ = made_by(awake, video[:, :, :2], "interpolate", known=known)
    assert torch.equal(made[:, :, 1:3], video[:, :, :2])


def test_guidance_is_the_papers_from_one_frame_and_none_between_frames(awake, video):
    for given, scale in ((1, 2.5), (2, 1.0)):
        made = {}
        for guidance in (None, scale, 4.0):
            sampler_of, _ = mardini.sampler_of(awake, CODEC, STAGE, guidance=guidance)
            made[guidance] = made_by(
                awake, video, "predict", given=given, sampler_of=sampler_of
            ).video
        assert torch.equal(made[None], made[scale])
        assert not torch.allclose(made[None], made[4.0], atol=1e-3)


def test_a_single_step_is_the_mean_and_not_guided(awake, video):
    """The row of scores that stands for the posterior mean."""
    made = [
        made_by(
            awake,
            video,
            "predict",
            given=1,
            steps=1,
            sampler_of=mardini.sampler_of(awake, CODEC, STAGE, guidance=guidance)[0],
        ).video
        for guidance in (None, 1.0)
    ]
    assert torch.equal(*made)


def test_known_frames_computed_once_change_nothing(awake, video, monkeypatch):
    zero = MarDini(replace(MODEL, generator=replace(MODEL.generator, ref_t="zero"))).eval()
    zero.load_state_dict(awake.state_dict())
    cached = made_by(zero, video, "interpolate", given=2).video
    plain = mardini.mardini.sample
    monkeypatch.setattr(
        mardini.mardini, "sample", lambda *a, **k: plain(*a, **(k | {"references": False}))
    )
    torch.testing.assert_close(
        cached, made_by(zero, video, "interpolate", given=2).video, rtol=1e-4, atol=1e-4
    )


def test_a_clip_depends_on_its_seed_alone(awake, video):
    together = made_by(awake, video, "expand", given=2, frames=6).video
    alone = made_by(awake, video[1:], "expand", given=2, frames=6, seeds=[4]).video
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["complete", "unconditional"])
def test_tasks_without_whole_frames_are_refused(awake, task):
    with pytest.raises(ValueError, match=f"must give whole frames.*{task}"):
        mardini.sampling(awake, task, 4, one_pass=False)


def test_a_stage_samples_what_it_trained(awake, video, plans):
    alone = tiny_stage("clips", "run", "generator")
    sampler_of, _ = mardini.sampler_of(awake, CODEC, alone)
    made_by(awake, video, "predict", given=1, sampler_of=sampler_of)
    assert not plans
    with pytest.raises(ValueError, match="makes no samples"):
        mardini.sampler_of(awake, CODEC, tiny_stage("clips", "run", "planner"))


def test_longer_clips_in_one_pass(awake, video, plans):
    model = mardini.sampling(awake, "predict", 8, one_pass=True)
    assert made_by(model, video, "predict", given=1, frames=8).video.shape[2] == 8
    assert len(plans) == 1


def test_scores_stand_beside_the_rivals(awake, video):
    sampler_of, spacing = mardini.sampler_of(awake, CODEC, STAGE)
    result = evaluate(
        awake,
        CODEC,
        build_schedule(DIFFUSION),
        video[:, :, :4],
        task="interpolate",
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
