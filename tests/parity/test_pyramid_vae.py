"""CausalVideoVAE against tensors made with the official code.

Every `pyramid_case*.safetensors` of `--parity-dir` whose weights have an encoder and a decoder is
read, and a handler runs on the files that hold its keys, whatever their config.
"""

import re
from functools import cache

import pytest
import torch

from fastvid.models.autoencoder import CausalVideoVAE, CausalVideoVAEConfig
from tests.parity.reference import cases, load, under

ENCODER, DECODER = 1e-5, 5e-5  # absolute, of the page that describes the files


def pytest_generate_tests(metafunc):
    files = cases(metafunc.config, "pyramid_case*.safetensors")
    files = [file for file in files if "state.decoder.conv_in.conv.weight" in load(file)[1]]
    none = pytest.param(None, marks=pytest.mark.skip(reason="give --parity-dir"), id="none")
    metafunc.parametrize("path", [pytest.param(file, id=file.stem) for file in files] or [none])


@cache
def autoencoder(path):
    official, tensors = load(path)
    config = CausalVideoVAEConfig(
        channels=official["decoder_in_channels"],
        widths=official["encoder_block_out_channels"],
        encoder_layers=official["encoder_layers_per_block"],
        decoder_layers=official["decoder_layers_per_block"],
        groups=official["encoder_norm_num_groups"],
    )
    return CausalVideoVAE.from_official(under(tensors, "state."), config=config).eval()


def close(actual, reference, allowed):
    assert actual.shape == reference.shape
    error = (actual - reference).abs().max().item()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.0e}"


@torch.no_grad()
def test_whole_clip(path):
    model, tensors = autoencoder(path), load(path)[1]
    video, latents = tensors["in.video"], tensors["out.latent_mode"]
    found = model.encode(video, frames=video.shape[2])
    close(torch.cat(found, 1), tensors["out.moments"], ENCODER)
    close(found.mean, latents, ENCODER)
    close(model.decode(latents, frames=latents.shape[2]), tensors["out.recon"], DECODER)


@torch.no_grad()
def test_an_image(path):
    model, tensors = autoencoder(path), load(path)[1]
    found = model.encode(tensors["in.video"][:, :, :1]).mean
    close(found, tensors["out.image_latent_mode"], ENCODER)
    close(model.decode(tensors["out.image_latent_mode"]), tensors["out.image_recon"], DECODER)


@torch.no_grad()
def test_windows_and_tiles(path):
    model, tensors = autoencoder(path), load(path)[1]
    seen = set()
    for name, reference in tensors.items():
        if match := re.fullmatch(r"out\.moments_chunk(\d+)", name):
            found = model.encode(tensors["in.video"], frames=int(match[1]))
            close(torch.cat(found, 1), reference, ENCODER)
            seen.add("encoded")
        if match := re.fullmatch(r"out\.recon_chunk(\d+)", name):
            found = model.decode(tensors["out.latent_mode"], frames=int(match[1]))
            close(found, reference, DECODER)
            seen.add("decoded")
        if match := re.fullmatch(r"out\.recon_tiled(\d+)_chunk(\d+)", name):
            tile, frames = int(match[1]), int(match[2])
            found = model.decode(tensors["in.latent_for_tiling"], frames=frames, tile=tile)
            close(found, reference, DECODER)
            seen.add("tiled")
    if not seen:
        pytest.skip("the file has neither windows nor tiles")


def test_names_and_values_go_both_ways(path):
    state = under(load(path)[1], "state.")
    found = autoencoder(path).to_official_state_dict()
    assert found.keys() == state.keys()
    assert all(found[name].equal(value) for name, value in state.items())
