"""Configs: what is refused, and that files say the same as objects."""

from dataclasses import asdict, replace

import pytest

from fastvid.training.build import build_schedule
from fastvid.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    config_from,
    config_hash,
    read_config,
    write_config,
)
from fastvid.training.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_a_file_and_build_a_schedule(name, tmp_path):
    config = RECIPES[name]()
    write_config(config, tmp_path / "config.yaml")
    again = read_config(tmp_path / "config.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert len(build_schedule(config.diffusion)) in (config.diffusion.steps, 500)
    doc = RECIPES[name].__doc__
    assert "Cost:" in doc
    assert "Expect:" in doc


def test_every_value_changes_the_hash():
    config = RECIPES["vdt-demo"]()
    hashes = {config_hash(config)}
    hashes.add(config_hash(replace(config, run=replace(config.run, seed=1))))
    hashes.add(config_hash(replace(config, model=replace(config.model, depth=9))))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learning_rate": 1}}, r"unknown key optim\.learning_rate"),
        ({"modell": {}}, "unknown key modell"),
        ({"optim": 3}, "optim. must be a mapping, got int"),
        ({"optim": {"lr": -1}}, "lr must be positive"),
    ],
)
def test_wrong_files_are_refused_by_key_and_name(tmp_path, values, message):
    import yaml

    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"wrong.yaml: {message}"):
        read_config(path)


def test_yaml_tags_do_not_run(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir [{tmp_path / 'trap'}]")
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        read_config(path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(size=(8,)), r"height, width"),
        (lambda: DataConfig(validation_share=1.0), "validation_share"),
        (lambda: DiffusionConfig(tasks={"guess": 1.0}), "guess"),
        (lambda: DiffusionConfig(tasks={"predict": 0.0}), "at least one task"),
        (lambda: DiffusionConfig(given={"guess": 1}), "guess"),
        (lambda: DiffusionConfig(zero_snr=True), "needs prediction 'v' or 'x0'"),
        (lambda: OptimConfig(batch=6, accumulate=4), "multiple of accumulate = 4"),
        (lambda: OptimConfig(lr=1e-4, lr_end=1e-3), "lr_end"),
        (lambda: OptimConfig(ema=1.0), "ema"),
    ],
)
def test_nonsense_is_refused_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_must_fit_each_other():
    values = asdict(RECIPES["vdt-demo"]())
    frames = values["model"]["frames"]
    with pytest.raises(ValueError, match=f"at most model.frames = {frames}"):
        config_from(values | {"data": values["data"] | {"frames": frames + 1}})
    with pytest.raises(ValueError, match=r"what the codec makes of data\.size"):
        config_from(values | {"codec": values["codec"] | {"factor": 8}})
