"""Reference files: how they are found, read, laid out and judged."""

import json
from functools import cache
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fastvid.models.vdt import VDT, VDTConfig


def cases(config, pattern: str) -> list[Path]:
    """The files of `--parity-dir` that match; none where the option is not given."""
    folder = config.getoption("--parity-dir")
    return sorted(Path(folder).glob(pattern)) if folder else []


@cache
def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The `config` of the file's metadata, if any, and all tensors. Do not write to them."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata().get("config", "{}"))
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, named without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_vdt(path: Path) -> tuple[VDT, dict[str, Tensor]]:
    """The file's model in eval mode, and its tensors."""
    config, tensors = load(path)
    model = VDT.from_official(under(tensors, "weights/"), config=vdt_config(config))
    return model.eval(), tensors


def vdt_config(official: dict, **changes) -> VDTConfig:
    """The official constructor arguments as our config."""
    fields = {
        "channels": official["in_channels"],
        "height": official["input_size"],
        "width": official["input_size"],
        "frames": official["num_frames"],
        "patch": official["patch_size"],
        "dim": official["hidden_size"],
        "depth": official["depth"],
        "heads": official["num_heads"],
        "mlp_ratio": official["mlp_ratio"],
        "num_classes": official["num_classes"],
        "class_dropout": official["class_dropout_prob"],
        "learned_variance": official["learn_sigma"],
        "mode": official["mode"],
    }
    return VDTConfig(**(fields | changes))


def swap(x: Tensor) -> Tensor:
    """(B, T, C, H, W) to (B, C, T, H, W), and back."""
    return x.transpose(1, 2)


def close(actual: Tensor, reference: Tensor, name: str, *, relative: float | None = None) -> None:
    """Within 1e-5 * max(1, max|reference|), or within `relative` * max|reference|."""
    assert actual.shape == reference.shape, name
    peak = reference.abs().max().item()
    allowed = 1e-5 * max(1.0, peak) if relative is None else relative * peak
    error = (actual.double() - reference.double()).abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
