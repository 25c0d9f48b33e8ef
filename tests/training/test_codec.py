"""Codecs: exact inverse, scale, chunks, draws that belong to a sample, local folders only."""

import pytest
import torch

from fastvid.training.codec import DiffusersCodec, PixelCodec, build_codec
from fastvid.training.config import CodecConfig
from fastvid.training.draws import generator


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_codec_is_its_own_exact_inverse(rand, factor):
    codec = PixelCodec(factor)
    video = rand(2, 3, 3, 8, 12)
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, 3, 8 // factor, 12 // factor)
    assert torch.equal(codec.decode(latents), video)
    patch = video[1, :, 2, :factor, factor : 2 * factor] if factor < 8 else None
    assert torch.equal(latents[1, :, 2, 0, 1], patch.flatten())


def test_codecs_refuse_what_they_cannot_cut(rand):
    codec = PixelCodec(4)
    with pytest.raises(ValueError, match="multiples of 4"):
        codec.encode(rand(1, 3, 2, 8, 10))
    with pytest.raises(ValueError, match=r"must be \(B, 48"):
        codec.decode(rand(1, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="factor"):
        PixelCodec(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small autoencoder with random weights, saved as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


def test_diffusers_codec_is_the_autoencoder_frame_by_frame(rand, folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder)
    codec = build_codec(
        CodecConfig(kind="diffusers", path=str(folder), scale=0.5, shift=0.25, posterior="mode")
    )
    assert (codec.channels, codec.factor) == (4, 2)
    video = rand(2, 3, 3, 8, 12).clamp(-1, 1)
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 3, 4, 6)
    with torch.no_grad():
        expected = (vae.encode(video[1, :, 2][None]).latent_dist.mean - 0.25) * 0.5
        back = vae.decode(latents[1, :, 2][None] / 0.5 + 0.25).sample
    torch.testing.assert_close(latents[1, :, 2], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents)[1, :, 2], back[0], rtol=1e-5, atol=1e-5)


def test_posterior_draws_belong_to_a_sample_not_to_its_batch_or_chunk(rand, folder):
    video = rand(3, 3, 4, 8, 8).clamp(-1, 1)
    whole = DiffusersCodec(folder, chunk=64)
    cut = DiffusersCodec(folder, chunk=5)
    together = whole.encode(video, generators=[generator(0, n) for n in range(3)])
    alone = cut.encode(video[2:], generators=[generator(0, 2)])
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-5)
    mode = DiffusersCodec(folder, posterior="mode").encode(video)
    assert (together - mode).std() > 0.01
    with pytest.raises(ValueError, match="one per sample, B=3, got 1"):
        whole.encode(video, generators=[generator(0, 0)])


def test_identity_names_weights_and_scale_but_not_the_chunk(folder, tmp_path):
    same = DiffusersCodec(folder, chunk=1).identity
    assert same == DiffusersCodec(folder, chunk=9).identity
    assert same != DiffusersCodec(folder, scale=1.0).identity
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-3
    vae.save_pretrained(tmp_path)
    assert same["weights"] != DiffusersCodec(tmp_path).identity["weights"]


def test_folders_that_hold_no_whole_autoencoder_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"local AutoencoderKL folder"):
        DiffusersCodec(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no safetensors weights"):
        DiffusersCodec(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias"):
        DiffusersCodec(tmp_path)
