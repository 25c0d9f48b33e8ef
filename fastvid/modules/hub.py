"""Sharing models: a folder with `config.json` and `model.safetensors`, here or on the Hub."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class HubModel(nn.Module, ModelHubMixin):
    """A module with `save_pretrained`, `from_pretrained`, `push_to_hub`, and strict about them.

    The constructor takes one frozen dataclass, named by `config_class` and kept as `config`.
    Weights are safetensors only; a tensor that is missing, left over or of another shape is named
    in the error, and so is a key of the JSON that the config does not have.
    """

    config_class: ClassVar[type]
    config: Any
    checkpoint_blocks: int  # the first so many are recomputed in the backward pass

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the folder. Files appear whole: an interrupted save leaves the old ones."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            result = super().save_pretrained(scratch, **kwargs)
            for file in sorted(Path(scratch).iterdir()):
                os.replace(file, folder / file.name)
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        config = json.dumps(asdict(self.config), indent=2)
        (save_directory / CONFIG).write_text(config + "\n")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "HubModel":
        device = kwargs.pop("device", "cpu")
        kwargs.pop("config", None)  # read here, strictly

        def find(name: str) -> Path:
            if not os.path.isdir(model_id):
                return Path(hf_hub_download(repo_id=model_id, filename=name, **kwargs))
            if not (path := Path(model_id, name)).is_file():
                raise FileNotFoundError(f"{model_id} holds no {name}")
            return path

        config = read_config(find(CONFIG), cls.config_class)
        with torch.device("meta"):
            model = cls(config)
        state = read_weights(find(WEIGHTS), device)
        load_strictly(model, state)
        return model.eval()


def read_config(path: Path, config_class: type) -> Any:
    """Build `config_class` from a JSON file.

    Raises:
        ValueError: not a JSON object, a key that the class does not have, or a value it refuses.
        TypeError: a value of another type than the class wants.
    """
    values = read_json(path)
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has keys unknown to {config_class.__name__}: {unknown}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, or ValueError."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def expect_types(config: Any) -> None:
    """TypeError unless the int, float and bool fields of a dataclass hold just that.

    An int will do for a float; a bool is no number.
    """
    allowed: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
    for field in fields(config):
        value = getattr(config, field.name)
        types = allowed.get(field.type)
        if types and type(value) not in types:
            raise TypeError(f"{field.name} must be {types[-1].__name__}, got {value!r}")


def read_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is truncated or something else.
    """
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give `model` the tensors of `state`, which become its own.

    Raises:
        ValueError: names that are missing, left over, of another shape or not finite, all listed.
    """
    own = model.state_dict()
    refuse_misfits({name: value.shape for name, value in own.items()}, state)
    model.load_state_dict(state, assign=True)


def refuse_misfits(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """ValueError unless `state` has exactly the names and shapes of `expected`, all finite."""
    complaints = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    complaints += [f"left over {name}" for name in sorted(state.keys() - expected.keys())]
    complaints += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    complaints = complaints or [
        f"{name} has NaN or infinite values" for name in expected if not _is_finite(state[name])
    ]
    if complaints:
        raise ValueError("the weights do not fit the model: " + "; ".join(complaints))


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.stack(value.aminmax()).isfinite().all())  # both NaN where one value is
