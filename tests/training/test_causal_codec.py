"""The codec of Pyramid Flow: statistics, windows, draws, folders, and runs on joined frames."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fastvid.data.latents import LatentDataset
from fastvid.diffusion.pyramid import SD3_SCALE
from fastvid.diffusion.schedule import squared_cosine
from fastvid.models.autoencoder import CausalVideoVAE, CausalVideoVAEConfig
from fastvid.models.vdt import VDT
from fastvid.training.batches import open_sets
from fastvid.training.codec import CausalVideoCodec, PixelCodec, build_codec
from fastvid.training.config import CodecConfig, DataConfig, TrainMarDini
from fastvid.training.draws import generator
from fastvid.training.evaluate import evaluate, to_unit
from fastvid.training.sample import sample_task
from fastvid.training.timeline import known_in_video, latent_frames, video_frames
from fastvid.training.vidim import score_vidim

TINY = CausalVideoVAEConfig(
    channels=4,
    widths=(4, 4, 8, 8),
    encoder_layers=(1, 1, 1, 1),
    decoder_layers=(1, 1, 1, 1),
    groups=4,
)
PLAIN = CodecConfig(kind="causal-video", path="-", posterior="mode", statistics="none")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalVideoVAE(TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


@pytest.fixture
def video(rand):
    return rand(2, 3, 17, 16, 24).clamp(-1, 1)


@pytest.mark.parametrize(
    ("name", "shift", "spread"), [("miniflux", -0.04, 1.8726), ("sd3", 0.149, 1.8415)]
)
def test_latents_are_normalised_as_published(vae, folder, video, name, shift, spread):
    codec = build_codec(replace(PLAIN, path=str(folder), statistics=name))
    assert (codec.channels, codec.factor, codec.time_factor) == (4, 8, 8)
    latents, mean = codec.encode(video), vae.encode(video, frames=16).mean
    assert latents.shape == (2, 4, 3, 2, 3)
    torch.testing.assert_close(latents[:, :, 0], (mean[:, :, 0] - shift) / spread)
    torch.testing.assert_close(latents[:, :, 1:], (mean[:, :, 1:] + 0.2343) / 3.0986)
    torch.testing.assert_close(
        codec.decode(latents), vae.decode(mean, frames=2), rtol=1e-5, atol=1e-5
    )


def test_an_image_is_a_clip_of_one_frame(folder, video):
    codec = CausalVideoCodec(folder, posterior="mode")
    image = codec.encode(video[:, :, :1])
    torch.testing.assert_close(image, codec.encode(video)[:, :, :1], rtol=1e-5, atol=1e-6)
    assert codec.decode(image).shape == (2, 3, 1, 16, 24)


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_chunks_reach_the_autoencoder_and_change_nothing(folder, rand, monkeypatch, call):
    codecs = [CausalVideoCodec(folder, chunk=chunk, posterior="mode") for chunk in (8, 40)]
    x = rand(1, 3, 41, 16, 16).clamp(-1, 1) if call == "encode" else rand(1, 4, 6, 2, 2)
    parts, whole = (getattr(codec, call)(x) for codec in codecs)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    seen = []
    part = codecs[0].vae.encoder if call == "encode" else codecs[0].vae.decoder
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    getattr(codecs[0], call)(x)
    assert seen == ([9, 8, 8, 8, 8] if call == "encode" else [2, 1, 1, 1, 1])


def test_memory_decides_the_chunk_where_none_is_named(folder, video, monkeypatch):
    calls = []
    monkeypatch.setattr(CausalVideoVAE, "window", lambda self, *args: calls.append(args[0]) or 1)
    codec = build_codec(replace(PLAIN, path=str(folder), chunk=0))
    latents = codec.encode(video)
    codec.decode(latents)
    assert calls == [video.shape, (2, 3, 17, 16, 24)]
    torch.testing.assert_close(latents, build_codec(replace(PLAIN, path=str(folder))).encode(video))


def test_tiles_reach_the_autoencoder(vae, folder, rand):
    video = rand(1, 3, 9, 64, 64).clamp(-1, 1)
    tiled, whole = (build_codec(replace(PLAIN, path=str(folder), tile=tile)) for tile in (32, 0))
    latents = tiled.encode(video)
    torch.testing.assert_close(latents, vae.encode(video, tile=32).mean)
    assert not torch.allclose(latents, whole.encode(video), atol=1e-3)
    torch.testing.assert_close(tiled.decode(latents), vae.decode(latents, tile=32))


def test_posterior_draws_belong_to_a_sample_not_to_its_batch_or_chunk(folder, video):
    three = torch.cat([video, video[:1]])
    together = CausalVideoCodec(folder, chunk=16).encode(
        three, generators=[generator(0, n) for n in range(3)]
    )
    alone = CausalVideoCodec(folder, chunk=8).encode(video[1:], generators=[generator(0, 1)])
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[2]).std() > 0.01  # the same clip under another number
    mode = CausalVideoCodec(folder, posterior="mode").encode(three)
    assert (together - mode).std() > 0.01
    with pytest.raises(ValueError, match="one per sample, B=2, got 1"):
        CausalVideoCodec(folder).encode(video, generators=[generator(0, 0)])


def test_identity_names_what_decides_latents_but_not_the_chunk(vae, folder, tmp_path):
    same = CausalVideoCodec(folder, chunk=8).identity
    assert same == CausalVideoCodec(folder, chunk=16).identity
    assert same != CausalVideoCodec(folder, SD3_SCALE).identity
    assert same != CausalVideoCodec(folder, tile=32).identity
    assert same != CausalVideoCodec(folder, posterior="mode").identity
    other = CausalVideoVAE(TINY)
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        other.decoder.last.bias[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert same["weights"] != CausalVideoCodec(tmp_path).identity["weights"]


def test_official_weights_are_read(tmp_path, video):
    vae = CausalVideoVAE(replace(TINY, widths=(32, 32, 32, 32), groups=32)).eval()
    save_file(vae.to_official_state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "CausalVideoVAE"}')
    codec = CausalVideoCodec(tmp_path, posterior="mode")
    again = CausalVideoCodec(tmp_path / "diffusion_pytorch_model.safetensors", posterior="mode")
    assert not any(p.requires_grad for p in codec.vae.parameters())
    assert codec.identity == again.identity
    with torch.no_grad():
        mean = vae.encode(video[:, :, :9]).mean
    torch.testing.assert_close(
        codec.encode(video[:, :, :9])[:, :, 0], (mean[:, :, 0] + 0.04) / 1.8726
    )


def test_folders_of_something_else_are_refused(folder, tmp_path, config):
    with pytest.raises(ValueError, match=r"local folder of a CausalVideoVAE: .*nowhere"):
        CausalVideoCodec(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no CausalVideoVAE: .*holds no weights"):
        CausalVideoCodec(tmp_path / "empty")
    VDT(config().model).save_pretrained(tmp_path / "vdt")
    with pytest.raises(ValueError, match=r"vdt holds no CausalVideoVAE: .*keys unknown"):
        CausalVideoCodec(tmp_path / "vdt")
    save_file({"down.weight": torch.zeros(2)}, tmp_path / "empty" / "other.safetensors")
    with pytest.raises(ValueError, match=r"not the weights of a CausalVideoVAE.*down\.weight"):
        CausalVideoCodec(tmp_path / "empty")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "vdt" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "vdt" / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        CausalVideoCodec(tmp_path / "vdt")


def test_videos_and_settings_that_do_not_fit_are_refused(folder, video):
    codec = CausalVideoCodec(folder)
    with pytest.raises(ValueError, match=r"1 \+ 8 n frames, got 16"):
        codec.encode(video[:, :, :16])
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.encode(video[..., :20])
    with pytest.raises(ValueError, match=r"must be \(B, 4, T"):
        codec.decode(torch.zeros(1, 3, 1, 2, 2))
    for values, message in (
        ({"chunk": 12}, "chunk must be a positive multiple of 8 frames, got 12"),
        ({"tile": 48}, "tile must be a multiple of 32 pixels, got 48"),
        ({"posterior": "mean"}, "posterior must be 'sample' or 'mode', got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            CausalVideoCodec(folder, **values)
    with pytest.raises(ValueError, match=r"codec\.path must name a local folder for causal-video"):
        CodecConfig(kind="causal-video")
    for name in ("chunk", "tile"):
        with pytest.raises(ValueError, match=rf"codec\.{name} must not be negative, got -32"):
            CodecConfig(**{name: -32})


def test_configs_count_latent_frames(config):
    values = config()
    with pytest.raises(ValueError, match=r"data\.frames must be 1 \+ 8 n for this codec, got 16"):
        replace(values, codec=PLAIN, data=replace(values.data, frames=16))
    long = replace(values.data, frames=41)
    with pytest.raises(ValueError, match=r"at most model\.frames = 4 latent frames, got 6"):
        replace(values, codec=PLAIN, data=long)
    replace(values, codec=PLAIN, data=replace(long, frames=25))
    with pytest.raises(ValueError, match=r"codec\.kind must be pixel or diffusers for mardini"):
        TrainMarDini(codec=PLAIN, data=DataConfig(frames=9))


def test_frames_and_latent_frames():
    assert [latent_frames(frames, 8) for frames in (1, 9, 17)] == [1, 2, 3]
    assert [video_frames(frames, 8) for frames in (0, 1, 3)] == [0, 1, 17]
    assert [latent_frames(5, 1), video_frames(5, 1)] == [5, 5]
    known = torch.tensor([[True, False, True], [False, True, False]])
    assert known_in_video(known, 2).int().tolist() == [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    cells = known[:, :, None, None].expand(-1, -1, 2, 3)
    assert known_in_video(cells, 2)[..., 1, 2].equal(known_in_video(known, 2))
    assert known_in_video(cells, 1) is cells


class Still(torch.nn.Module):
    """Every unknown latent frame is the last known one."""

    def __init__(self, frames):
        super().__init__()
        self.config = SimpleNamespace(frames=frames, height=2, width=3)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, latents, timestep, *, known):
        flat = known.flatten(2).any(2) if known.ndim > 2 else known
        return latents[:, :, int(flat[0].nonzero().max())].unsqueeze(2).expand_as(latents)


def sample(codec, video, task="predict", **options):
    options = {"seeds": [0, 1], "steps": 3, "prediction": "x0", "frames": 25} | options
    return sample_task(Still(3), codec, squared_cosine(10), video, task=task, **options)


@pytest.mark.parametrize("given", [1, 2])
def test_a_clip_goes_on_from_whole_latent_frames(folder, video, given):
    """4 latent frames by windows of 3; the given ones are what the codec makes of their frames."""
    codec = CausalVideoCodec(folder, posterior="mode")
    count = 1 + 8 * (given - 1)
    made, known = sample(codec, video[:, :, :count], given=given)
    assert made.shape == (2, 3, 25, 16, 24)
    assert known.tolist() == [[True] * count + [False] * (25 - count)] * 2
    latents = codec.encode(video[:, :, :count])
    still = torch.cat([latents, latents[:, :, -1:].expand(-1, -1, 4 - given, -1, -1)], 2)
    torch.testing.assert_close(made, codec.decode(still).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_sampling_refuses_what_joined_frames_cannot_do(folder, video):
    codec = CausalVideoCodec(folder)
    with pytest.raises(ValueError, match="first 9 frames for predict, got 8"):
        sample(codec, video[:, :, :8], given=2)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 8 n for this codec, got 24"):
        sample(codec, video, frames=24)
    with pytest.raises(ValueError, match=r"known must be \(B or 1, 4\), got \(1, 25\)"):
        sample(codec, video, known=torch.ones(1, 25, dtype=torch.bool))
    for task in ("loop", "slow-motion"):
        with pytest.raises(ValueError, match=f"{task}.*codes each frame alone"):
            sample(codec, video, task)
    with pytest.raises(ValueError, match=r"VIDIM-Bench needs a codec that codes each frame alone"):
        score_vidim(Still(2), codec, squared_cosine(10), [])


def test_scores_count_video_frames(folder, video):
    """2 of 3 latent frames are given: 9 frames shown, 8 scored, the rivals given all 9."""
    seen = {}

    def error(video, target):
        seen.setdefault("rows", []).append((video - target).abs().amax((1, 3, 4)))
        return seen["rows"][-1]

    codec = CausalVideoCodec(folder, posterior="mode")
    schedule = squared_cosine(10)
    result = evaluate(
        Still(3).eval(),
        codec,
        schedule,
        video,
        task="predict",
        given=2,
        prediction="x0",
        steps=2,
        samples=1,
        metrics={"error": error},
    )
    assert result["frames"] == 2 * 8
    last = to_unit(video)[:, :, 8:9]
    expected = (last - to_unit(video)[:, :, 9:]).abs().amax((1, 3, 4)).mean().item()
    assert result["rows"]["copy_nearest"]["error"] == pytest.approx(expected, rel=1e-5)
    assert all(not row[:, :9].any() for row in seen["rows"])  # given frames are the truth
    with pytest.raises(ValueError, match=r"frames of clips must be 1 \+ 8 n for this codec, got 8"):
        evaluate(Still(3).eval(), codec, schedule, video[:, :, :8], task="predict", prediction="x0")


class TestRuns:
    """A VDT on clips of 17 frames, 3 latent ones: encoded once, trained, validated, sampled."""

    @pytest.fixture
    def run(self, config, folder, tmp_path):
        pytest.importorskip("av")
        pytest.importorskip("tqdm")
        from fastvid.data.synthetic import make_motion_clips

        make_motion_clips(tmp_path / "long", clips=6, frames=17, size=16)
        made = config(validate_every=2, steps=2)
        return replace(
            made,
            data=replace(made.data, train=str(tmp_path / "long"), frames=17),
            codec=CodecConfig(kind="causal-video", path=str(folder), chunk=8),
            model=replace(made.model, channels=4, height=2, width=2, frames=3),
            diffusion=replace(made.diffusion, tasks={"predict": 1.0}),
        )

    def test_latents_are_encoded_once_and_trained_on(self, run, folder, tmp_path):
        from fastvid.training.encode import encode_sets
        from fastvid.training.loop import train

        done = encode_sets(run, tmp_path / "latents")
        assert {name: count for name, (count, _) in done.items()} == {"train": 4, "validation": 2}
        item = LatentDataset(tmp_path / "latents" / "train")[0]
        assert item["latents"].shape == (4, 3, 2, 2)
        names = {"train": "train", "validation": "validation"}
        data = replace(
            run.data,
            kind="latents",
            **{field: str(tmp_path / "latents" / name) for field, name in names.items()},
        )
        train(replace(run, data=data))
        with pytest.raises(ValueError, match="was encoded with codec"):
            open_sets(data, CausalVideoCodec(folder, SD3_SCALE), 0)
        with pytest.raises(ValueError, match=r"\(4, 3, 2, 2\), needs \(4, 2, 2, 2\)"):
            open_sets(replace(data, frames=9), CausalVideoCodec(folder), 0)
        with pytest.raises(ValueError, match="was encoded with codec"):
            open_sets(data, PixelCodec(8), 0)

    def test_the_verbs_take_it(self, run, tmp_path, capsys):
        from fastvid.cli import main
        from fastvid.training.log import read_log
        from fastvid.training.loop import train

        pytest.importorskip("jsonargparse")
        train(replace(run, run=replace(run.run, sample_every=2)))
        folder = run.run.folder
        assert any("psnr/predict" in line for line in read_log(tmp_path / "run"))
        assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
        clip = str(next((tmp_path / "long").glob("*.mp4")))
        words = [folder, "--task", "predict", "--given", "2", "--steps", "2"]
        assert main(["sample", *words, "--input", clip]) == 0
        assert "1 clips of 17 frames" in capsys.readouterr().out
        short = ["--input", clip, "--start", "9"]
        assert main(["sample", *words, *short]) == 1
        assert "needs 9 frames from frame 9" in capsys.readouterr().err
        assert main(["sample", *words, "--input", clip, "--frames", "16"]) == 1
        assert "--frames must be 1 + 8 n" in capsys.readouterr().err
        assert main(["evaluate", *words, "--samples", "1"]) == 0
        assert "2 clips, 16 frames scored" in capsys.readouterr().out
