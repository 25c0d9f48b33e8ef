"""CausalVideoVAE: sizes, windows, tiles, memory, weights in files, bad input."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from fastvid.models.autoencoder import CausalConv3d, CausalVideoVAE, CausalVideoVAEConfig

TINY = CausalVideoVAEConfig(
    channels=4,
    widths=(8, 8, 16, 16),
    encoder_layers=(1, 2, 1, 1),
    decoder_layers=(2, 1, 1, 1),
    groups=4,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalVideoVAE(TINY).eval()


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def close(actual, expected, allowed=2e-6):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed)


def test_the_published_size():
    with torch.device("meta"):
        model = CausalVideoVAE()
    parts = (model, model.encoder, model.decoder)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert [round(count / 1e6, 1) for count in counts] == [335.4, 109.6, 225.8]


@pytest.mark.parametrize(("frames", "sides"), [(1, (8, 8)), (9, (40, 16)), (25, (16, 24))])
def test_sizes(model, rand, frames, sides):
    video = rand(2, 3, frames, *sides)
    mean, log_variance = model.encode(video)
    expected = (2, 4, 1 + frames // 8, sides[0] // 8, sides[1] // 8)
    assert mean.shape == log_variance.shape == expected
    assert model.decode(mean).shape == video.shape


def test_no_frame_sees_a_later_one(model, rand):
    video = rand(1, 3, 17, 16, 16)
    other = video.clone()
    other[:, :, 9:] = 0
    mean, changed = model.encode(video).mean, model.encode(other).mean
    assert mean[:, :, :2].equal(changed[:, :, :2])
    assert not mean[:, :, 2].equal(changed[:, :, 2])
    out = model.decode(mean), model.decode(changed)
    assert out[0][:, :, :9].equal(out[1][:, :, :9])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_windows_change_nothing(model, rand, frames):
    video = rand(1, 3, 41, 16, 16)
    whole = model.encode(video, frames=41)
    windows = model.encode(video, frames=8 * frames)
    close(windows.mean, whole.mean)
    close(windows.log_variance, whole.log_variance)
    peak = (out := model.decode(whole.mean, frames=6)).abs().max()
    close(model.decode(whole.mean, frames=frames), out, 2e-6 * max(1, float(peak)))


def test_a_tile_as_large_as_the_frame_changes_nothing(model, rand):
    video = rand(1, 3, 9, 32, 24)
    assert model.encode(video, tile=32).mean.equal(model.encode(video).mean)


def test_tiles_agree_with_the_frame_where_nothing_is_normed(rand):
    """Without norms a tile's middle is the frame's, and two equal tiles blend into themselves."""
    latents = rand(1, 4, 1, 4, 4).repeat(1, 1, 1, 3, 3)
    torch.manual_seed(0)
    model = CausalVideoVAE(TINY).eval()
    tiles = model.decode(latents, tile=32)
    assert tiles.shape == (1, 3, 1, 96, 96)
    # The first tile's own part is what the tile alone gives.
    alone = model.decode(latents[..., :4, :4])
    assert tiles[..., :24, :24].equal(alone[..., :24, :24])
    # Over the overlap it fades out: at its first line it is whole, at its last all but gone.
    close(tiles[..., 24, :24], alone[..., 24, :24])
    assert not torch.allclose(tiles[..., 31, :24], alone[..., 31, :24])


def test_tiled_encoding_covers_the_frame(model, rand):
    video = rand(1, 3, 9, 72, 104)
    tiled, whole = model.encode(video, tile=32), model.encode(video)
    assert tiled.mean.shape == whole.mean.shape
    assert tiled.mean.isfinite().all()
    assert tiled.mean[..., :3, :3].equal(model.encode(video[..., :32, :32]).mean[..., :3, :3])


def test_gradients_reach_every_weight_and_pass_gradcheck(rand):
    model = CausalVideoVAE(replace(TINY, widths=(4, 4, 4, 4))).double()
    video = rand(1, 3, 9, 8, 8, dtype=torch.float64).requires_grad_()
    model(video, generator=torch.Generator().manual_seed(0)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    layer = CausalConv3d(2, 3).double()
    x = rand(1, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(layer, (x,))


def test_a_draw_follows_the_posterior(model, rand):
    posterior = model.encode(rand(1, 3, 9, 16, 16))
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([posterior.sample(generator) for _ in range(2000)])
    deviation = (0.5 * posterior.log_variance).exp()
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * deviation / 2000**0.5).all()
    assert ((draws.std(0) / deviation - 1).abs() < 5 / (2 * 2000) ** 0.5).all()
    again = posterior.sample(torch.Generator().manual_seed(3))
    assert again.equal(draws[0])


def test_half_precision_is_that_of_the_weights(rand):
    torch.manual_seed(0)
    model = CausalVideoVAE(TINY).eval()
    video = rand(1, 3, 9, 16, 16)
    expected = model.decode(model.encode(video).mean)
    model = model.bfloat16()
    mean = model.encode(video).mean
    out = model.decode(mean)
    assert mean.dtype == out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_one_graph(model, rand):
    latents = rand(1, 4, 2, 2, 2)
    decode = torch.compile(model.decoder, fullgraph=True, backend="eager")
    close(decode(latents), model.decoder(latents))


class TestMemory:
    # Of two clips: for a single small one PyTorch unfolds the input of a convolution on the CPU.
    SHAPE = (2, 3, 41, 32, 48)

    @pytest.fixture
    def model(self):
        return CausalVideoVAE(replace(TINY, widths=(16, 32, 32, 32))).eval()

    @staticmethod
    def peak(call):
        """Bytes handed out at the peak of a call, beyond what was there."""
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        now = peak = 0
        events = (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    @pytest.mark.parametrize("window", [1, 2, 4])
    def test_the_window_fits_in_what_is_free(self, model, window):
        video = torch.zeros(self.SHAPE)
        latents = model.encode(video, frames=8).mean
        sizes = [model.window(self.SHAPE, free=free) for free in range(0, 10**9, 10**5)]
        # The least room that earns the next window earns this one with a frame to spare.
        free = sizes.index(window + 1) * 10**5 * (window + 1) // (window + 2)
        # The result itself is the caller's.
        decoded = self.peak(lambda: model.decode(latents, frames=window)) - video.nbytes
        encoded = self.peak(lambda: model.encode(video, frames=8 * window))
        assert decoded < free
        assert encoded < free
        assert decoded > free / 4  # or it would be a bound that wastes most of a device

    def test_windows_need_no_more_for_a_longer_clip(self, model, rand):
        short, long = rand(2, 4, 4, 4, 4), rand(2, 4, 12, 4, 4)
        results = [model.decode(latents).nbytes for latents in (short, long)]
        peaks = [self.peak(lambda x=x: model.decode(x, frames=1)) for x in (short, long)]
        assert peaks[1] - peaks[0] < 2.5 * (results[1] - results[0])
        whole = self.peak(lambda: model.decode(long, frames=12))
        assert whole > 3 * peaks[1]

    def test_more_room_never_means_a_smaller_window(self, model):
        found = [model.window(self.SHAPE, free=free) for free in range(0, 10**9, 10**6)]
        assert found == sorted(found)
        assert (found[0], found[-1]) == (1, 6)  # at least one, at most the clip

    def test_tiles_and_small_batches_leave_room(self, model):
        free = 30_000_000
        assert model.window((1, 3, 81, 96, 96), 32, free) > model.window(
            (1, 3, 81, 96, 96), None, free
        )
        assert model.window((1, 3, 81, 32, 32), None, free) > model.window(
            (4, 3, 81, 32, 32), None, free
        )

    def test_a_window_is_found_when_none_is_named(self, model, rand, monkeypatch):
        calls = []
        monkeypatch.setattr(CausalVideoVAE, "window", lambda self, *args: calls.append(args) or 1)
        video = rand(1, 3, 17, 16, 16)
        expected = model.encode(video, frames=8).mean
        assert not calls
        assert model.encode(video).mean.equal(expected)
        model.decode(expected)
        assert calls == [(video.shape, None), ((1, 3, 17, 16, 16), None)]


class TestFiles:
    @pytest.mark.parametrize("kind", ["pt", "safetensors"])
    def test_official_names(self, model, rand, tmp_path, kind):
        state = model.to_official_state_dict()
        assert "encoder.down_blocks.0.temporal_downsamplers.0.conv.conv.weight" in state
        assert "decoder.mid_block.attentions.0.to_out.0.bias" in state
        path = tmp_path / f"weights.{kind}"
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
        found = CausalVideoVAE.from_official(path, config=TINY).eval()
        video = rand(1, 3, 9, 16, 16)
        assert found.encode(video).mean.equal(model.encode(video).mean)

    def test_the_config_is_read_off_the_shapes(self):
        config = replace(TINY, widths=(32, 32, 64, 64), groups=32)
        state = CausalVideoVAE(config).to_official_state_dict()
        assert CausalVideoVAE.from_official(state).config == config

    def test_our_own_folder(self, model, rand, tmp_path):
        model.save_pretrained(tmp_path)
        found = CausalVideoVAE.from_pretrained(tmp_path)
        assert found.config == TINY
        latents = rand(1, 4, 2, 2, 2)
        assert found.decode(latents).equal(model.decode(latents))

    def test_what_does_not_fit_is_named(self, model):
        state = model.to_official_state_dict()
        state["loss.discriminator.weight"] = torch.zeros(1)
        bias = state.pop("decoder.conv_in.conv.bias")
        with pytest.raises(ValueError, match=r"missing decoder\.first\.bias.*left over loss.discr"):
            CausalVideoVAE.from_official(state, config=TINY)
        del state["loss.discriminator.weight"]
        state["decoder.conv_in.conv.bias"] = bias * torch.nan
        with pytest.raises(ValueError, match=r"decoder.first.bias has NaN"):
            CausalVideoVAE.from_official(state, config=TINY)
        with pytest.raises(ValueError, match="not the weights of a CausalVideoVAE"):
            CausalVideoVAE.from_official({"x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 9, 16, 16), {}, r"video must be \(B, 3, T, H, W\), got \(1, 4, 9"),
        ((3, 9, 16, 16), {}, r"video must be \(B, 3, T, H, W\)"),
        ((1, 3, 8, 16, 16), {}, "video must have 1 \\+ 8 n frames, got 8"),
        ((1, 3, 9, 20, 16), {}, r"H and W of video must be multiples of 8, got \(20, 16\)"),
        ((1, 3, 9, 16, 16), {"frames": 4}, "frames must be a positive multiple of 8, got 4"),
        ((1, 3, 9, 16, 16), {"tile": 16}, "tile must be a multiple of 32 pixels, got 16"),
        ((1, 3, 9, 16, 16), {"tile": 0}, "tile must be a multiple of 32 pixels, got 0"),
    ],
)
def test_bad_video(model, shape, options, message):
    with pytest.raises(ValueError, match=message):
        model.encode(torch.zeros(shape), **options)


def test_bad_latents(model):
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, T, H, W\), got \(1, 3,"):
        model.decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="latents must not be empty"):
        model.decode(torch.zeros(1, 4, 0, 2, 2))
    with pytest.raises(ValueError, match="frames must be positive, got 0"):
        model.decode(torch.zeros(1, 4, 1, 2, 2), frames=0)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        model.decode(torch.zeros(1, 4, 1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8, 8, 16)}, "widths must be 4 positive integers"),
        ({"groups": 3}, "widths must be multiples of groups=3"),
        ({"channels": 0}, "channels must be an integer from 1"),
        ({"decoder_layers": (1, 1, 0, 1)}, "decoder_layers must be 4 positive integers"),
        ({"encoder_layers": (1, 1, 5000, 1)}, "no autoencoder is that large"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
