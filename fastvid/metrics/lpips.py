"""LPIPS v0.1 on AlexNet or VGG16, with torchvision's key names, without torchvision."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import expect_pair

BACKBONE_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs that are compared
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side that leave one cell at the last tap
SHIFT = (-0.030, -0.088, -0.188)  # of input in [-1, 1]
SCALE = (0.458, 0.448, 0.450)

StateDict = Mapping[str, Tensor]


class LPIPS(nn.Module):
    """Learned perceptual distance of each frame; 0 is equal, lower is nearer.

    Args:
        backbone: path of torchvision's weight file (`alexnet-owt-7be5be79.pth` or
            `vgg16-397923af.pth`, unchanged), or its state dict.
        net: "alex" (the usual one in papers) or "vgg".
        heads: path or state dict of the linear heads (keys `lin0.model.1.weight` to `lin4`);
            None takes the file that the installed `lpips` package carries.
        chunk: pairs of frames per forward; bounds memory, does not change the result.
    Raises:
        FileNotFoundError: a file is not there; says which and where it comes from.
        ValueError: a file is damaged, a key is missing, or a size is another network's.
    Source: Zhang et al., arXiv:1801.03924, version 0.1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: str | Path | StateDict,
        *,
        net: Literal["alex", "vgg"] = "alex",
        heads: str | Path | StateDict | None = None,
        chunk: int = 16,
    ):
        super().__init__()
        if net not in TAPS:
            raise ValueError(f"net must be 'alex' or 'vgg', got {net!r}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.net, self.chunk = net, chunk
        self.definition = f"LPIPS 0.1 ({net}) of each frame, input mapped to [-1, 1]"
        self.features = _alexnet() if net == "alex" else _vgg16()
        self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in WIDTHS[net])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        _fill(self.features, _read(backbone, f"backbone ({BACKBONE_FILES[net]})"), "features.")
        state = _read(_heads_file(net) if heads is None else heads, f"heads ({net}.pth)")
        _fill(self.heads, {k.replace(".model.1.weight", ""): v for k, v in state.items()}, "lin")
        self.eval().requires_grad_(False)

    def forward(self, video: Tensor, target: Tensor) -> Tensor:
        """Distance of each frame.

        Args:
            video, target: (B, 3, T, H, W) in [0, 1], at least 31 (alex) or 16 (vgg) pixels a side.
        Returns:
            (B, T) float32.
        Raises:
            TypeError, ValueError: see `expect_pair`; frames too small for the network.
        """
        expect_pair(video, target)
        B, _, _, H, W = video.shape
        if min(H, W) < SMALLEST[self.net]:
            least = SMALLEST[self.net]
            raise ValueError(f"LPIPS ({self.net}) needs frames of {least}x{least}, got {H}x{W}")
        x = rearrange(video, "b c t h w -> (b t) c h w").split(self.chunk)
        y = rearrange(target, "b c t h w -> (b t) c h w").split(self.chunk)
        distances = [self._distance(a, b) for a, b in zip(x, y, strict=True)]
        return rearrange(torch.cat(distances), "(b t) -> b t", b=B)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, 3, H, W) pairs -> (N,)."""
        both = (2 * torch.cat([x, y]).float() - 1 - self.shift) / self.scale
        total = both.new_zeros(len(x))
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            both = layer(both)
            if index in TAPS[self.net]:
                a, b = (both / (both.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
                total = total + (next(heads) * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
        return total


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for blocks, out in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(blocks):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])  # nothing is read after the last ReLU


def _heads_file(net: str) -> Path:
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            f"the linear heads ({net}.pth, some kB) were not given and the lpips package is not "
            "installed: pip install --no-deps lpips, or pass heads=PATH"
        )
    return Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth"


def _read(source: str | Path | StateDict, what: str) -> StateDict:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"LPIPS {what}: no file at {path}; nothing is downloaded")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or one with code in it, fails in many ways
        raise ValueError(f"LPIPS {what}: {path} is no readable weight file: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"LPIPS {what}: {path} holds {type(state).__name__}, not a state dict")
    return state


def _fill(module: nn.Module, state: StateDict, prefix: str) -> None:
    """Load the keys under `prefix` strictly; others (a classifier) are not ours."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise ValueError(f"LPIPS weights under {prefix!r} do not fit: {error}") from None
