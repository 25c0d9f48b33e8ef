"""Configs: what is refused, and that files say the same as objects."""

from dataclasses import asdict, replace

import pytest

from fastvid.training.build import build_schedule
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    RunConfig,
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


def test_what_cityscapes_does_otherwise_is_told():
    """The original clips nothing, averages nothing, stays at one rate and computes in fp32."""
    optim, run = (recipe := RECIPES["vdt-cityscapes"]()).optim, recipe.run
    told = RECIPES["vdt-cityscapes"].__doc__
    for differs, words in (
        (optim.clip > 0, "clipped"),
        (optim.ema > 0, "averaged"),
        (optim.lr_end != optim.lr, "cosine"),
        (run.precision == "bf16", "autocast"),
        (True, "own task"),
    ):
        assert (words in told) is differs


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
        ({"optim": {"lr": -1}}, r"optim\.lr must be positive"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr must be float, got 'fast'"),
        ({"optim": {"lr": True}}, r"optim\.lr must be float, got True"),
        ({"optim": {"batch": "16"}}, r"optim\.batch must be int, got '16'"),
        ({"optim": {"batch": 2.5}}, r"optim\.batch must be int, got 2\.5"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas must be tuple\[float, float\], got \[0\.9\]"),
        ({"optim": {"betas": [0.9, "x"]}}, r"optim\.betas must be float, got 'x'"),
        ({"data": {"hflip": "no way"}}, r"data\.hflip must be bool, got 'no way'"),
        ({"data": {"train": 3}}, r"data\.train must be str, got 3"),
        ({"diffusion": {"schedule": "cosine"}}, r"diffusion\.schedule must be one of linear, "),
        ({"diffusion": {"tasks": {"predict": "x"}}}, r"diffusion\.tasks\.predict must be float"),
        ({"diffusion": {"given": {"predict": 1.5}}}, r"diffusion\.given\.predict must be int"),
        ({"diffusion": {"tasks": ["predict"]}}, r"diffusion\.tasks must be dict"),
        ({"model": {"depth": 2.5}}, r"model\.depth must be int, got 2\.5"),
        ({"model": {"mode": "film"}}, r"model\.mode must be one of video, image, got 'film'"),
    ],
)
def test_wrong_files_are_refused_by_key_and_name(tmp_path, values, message):
    import yaml

    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"wrong.yaml: {message}"):
        read_config(path)


def test_numbers_may_be_written_as_yaml_reads_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 1e-4, lr_end: 0, betas: [0.9, 0.95]}\ndata: {size: [128, 128]}\n")
    values = {"data": {"size": (128, 128)}, "model": {"channels": 48, "height": 32, "width": 32}}
    values["optim"] = {"lr": 1e-4, "lr_end": 0, "betas": (0.9, 0.95)}
    path.write_text(path.read_text() + "model: {channels: 48, height: 32, width: 32}\n")
    assert read_config(path) == config_from(values)


def test_a_file_without_a_family_is_of_vdt(tmp_path):
    """Runs from before there were families go on."""
    config = RECIPES["vdt-demo"]()
    write_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "family: vdt\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("family: vdt\n", "", 1))
    assert read_config(tmp_path / "config.yaml") == config


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family must be one of vdt, mardini, pyramid, got 'gan'"):
        config_from({"family": "gan"})


def test_yaml_tags_do_not_run(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir [{tmp_path / 'trap'}]")
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        read_config(path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(size=(8,)), r"data\.size must be tuple\[int, int\]"),
        (lambda: DataConfig(size=(0, 8)), r"height, width"),
        (lambda: RunConfig(steps="10"), r"run\.steps must be int, got '10'"),
        (lambda: CodecConfig(kind="vae"), r"codec\.kind must be one of pixel, diffusers"),
        (lambda: DiffusionConfig(schedule="cosine"), r"diffusion\.schedule must be one of"),
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
