"""LPIPS against the `lpips` package, both with one random backbone, without torchvision."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fastvid.metrics import LPIPS
from fastvid.metrics import lpips as room

# torchvision's feature stacks: (out, kernel, stride, padding) is a convolution + ReLU, M a pool.
M = None
LAYERS = {
    "alex": [(64, 11, 4, 2), M, (192, 5, 1, 2), M, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
    "vgg": [
        (width, 3, 1, 1) if width else M
        for width in (64, 64, M, 128, 128, M, 256, 256, 256, M, 512, 512, 512, M, 512, 512, 512)
    ],
}
POOL = {"alex": (3, 2), "vgg": (2, 2)}


def torchvision_features(net):
    layers, width = [], 3
    for layer in [*LAYERS[net], M]:
        if layer is M:
            layers.append(nn.MaxPool2d(*POOL[net]))
        else:
            layers += [nn.Conv2d(width, *layer), nn.ReLU(inplace=True)]
            width = layer[0]
    return nn.Sequential(*layers)


def random_backbone(net):
    """A state dict under torchvision's names, classifier included, as in the published file."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in torchvision_features(net).state_dict().items():
        fan = like[0].numel() if like.ndim == 4 else 100
        draw = torch.randn(like.shape, generator=generator)
        state[f"features.{name}"] = draw * (2 / fan) ** 0.5
    state["classifier.1.weight"] = torch.zeros(2, 2)
    return state


def torchvision_model(net, pretrained):
    """What `torchvision.models.alexnet(...)` would be, as far as `lpips` looks."""
    model = nn.ModuleDict({"features": torchvision_features(net)})
    model.load_state_dict(random_backbone(net), strict=False)
    return SimpleNamespace(features=model["features"])


def random_heads(net):
    widths = room.WIDTHS[net]
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}


@pytest.fixture
def pair(rand):
    return rand(2, 3, 3, 48, 40).sigmoid(), rand(2, 3, 3, 48, 40).sigmoid()


@pytest.fixture
def alex():
    torch.manual_seed(0)
    return LPIPS(random_backbone("alex"), heads=random_heads("alex"))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_the_lpips_package(net, pair, monkeypatch):
    stand_in = ModuleType("torchvision")
    stand_in.models = ModuleType("torchvision.models")
    stand_in.models.alexnet = partial(torchvision_model, "alex")
    stand_in.models.vgg16 = partial(torchvision_model, "vgg")
    monkeypatch.setitem(sys.modules, "torchvision", stand_in)
    monkeypatch.setitem(sys.modules, "torchvision.models", stand_in.models)
    package = pytest.importorskip("lpips")

    theirs = package.LPIPS(net=net, verbose=False)
    video, target = pair
    frames = (v.movedim(2, 1).flatten(0, 1) for v in pair)
    with torch.no_grad():
        expected = theirs(*frames, normalize=True).reshape(2, 3)
    ours = LPIPS(random_backbone(net), net=net)(video, target)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_reads_weight_files_by_path(tmp_path, pair, alex):
    torch.manual_seed(0)
    torch.save(random_backbone("alex"), tmp_path / "alexnet.pth")
    torch.save(random_heads("alex"), tmp_path / "alex.pth")
    loaded = LPIPS(tmp_path / "alexnet.pth", heads=str(tmp_path / "alex.pth"))
    assert torch.equal(loaded(*pair), alex(*pair))


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"features.0.weight": Planted()}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match=r"alexnet\.pth is no readable weight file"):
        LPIPS(tmp_path / "alexnet.pth", heads=random_heads("alex"))
    assert not (tmp_path / "ran").exists()


def test_chunks_do_not_change_the_result(pair, alex):
    whole = alex(*pair)
    alex.chunk = 1
    torch.testing.assert_close(alex(*pair), whole, rtol=1e-5, atol=1e-7)


def test_is_zero_on_equal_frames_and_grows_with_the_error(pair, alex):
    video, target = pair
    near = alex(video, torch.lerp(video, target, 0.1))
    assert torch.equal(alex(video, video), torch.zeros(2, 3))
    assert (near > 0).all()
    assert (near < alex(video, target)).all()


class TestRefusals:
    def test_video_in_minus_one_to_one(self, pair, alex):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            alex(2 * pair[0] - 1, pair[1])

    def test_frames_too_small(self, alex):
        with pytest.raises(ValueError, match=r"alex\) needs frames of 31x31, got 30x64"):
            alex(torch.zeros(1, 3, 1, 30, 64), torch.zeros(1, 3, 1, 30, 64))

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79\.pth.*nothing"):
            LPIPS(tmp_path / "nowhere.pth", heads=random_heads("alex"))

    def test_damaged_file(self, tmp_path):
        torch.save(random_backbone("alex"), tmp_path / "alexnet.pth")
        content = (tmp_path / "alexnet.pth").read_bytes()
        (tmp_path / "alexnet.pth").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"alexnet\.pth is no readable weight file"):
            LPIPS(tmp_path / "alexnet.pth", heads=random_heads("alex"))

    def test_file_with_something_else(self, tmp_path):
        torch.save([torch.zeros(2)], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="holds list, not a state dict"):
            LPIPS(tmp_path / "list.pth", heads=random_heads("alex"))

    def test_weights_of_the_other_network(self):
        with pytest.raises(ValueError, match=r"(?s)features.*Missing key"):
            LPIPS(random_backbone("vgg"), heads=random_heads("alex"))

    def test_heads_not_installed(self, monkeypatch):
        monkeypatch.setattr(room, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match="pip install --no-deps lpips"):
            LPIPS(random_backbone("alex"))

    def test_unknown_network(self):
        with pytest.raises(ValueError, match="'alex' or 'vgg', got 'squeeze'"):
            LPIPS({}, net="squeeze")


def test_smallest_sizes_are_the_smallest(alex):
    assert alex(torch.zeros(1, 3, 1, 31, 31), torch.ones(1, 3, 1, 31, 31)).isfinite().all()
    vgg = LPIPS(random_backbone("vgg"), net="vgg", heads=random_heads("vgg"))
    assert vgg(torch.zeros(1, 3, 1, 16, 16), torch.ones(1, 3, 1, 16, 16)).isfinite().all()
