"""Weights of VDT in files: the official ones and our folders, whole, broken and hostile."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvid.cli import main
from fastvid.data.synthetic import make_motion_clips
from fastvid.models.vdt import VDT, VDTConfig
from fastvid.modules import hub
from tests.models.tiny import TINY, close, redraw


class TestOfficialWeights:
    @pytest.fixture
    def state(self, model):
        return model.to_official_state_dict()

    @pytest.mark.parametrize("kind", ["pt", "legacy pt", "safetensors"])
    def test_from_a_file(self, model, state, clip, tmp_path, kind):
        path = tmp_path / f"weights.{kind.split()[-1]}"
        if kind == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
        assert torch.equal(VDT.from_official(path, config=TINY).eval()(*clip), model(*clip))

    def test_the_config_is_read_off_the_shapes(self):
        config = replace(TINY, width=8, class_dropout=0.1, num_classes=5, learned_variance=False)
        state = VDT(config).to_official_state_dict()
        assert VDT.from_official(state, heads=2).config == replace(config, drop_labels=True)
        with pytest.raises(ValueError, match="heads must be given: width 32"):
            VDT.from_official(state)

    def test_a_grid_that_is_not_square_needs_a_config(self, state):
        state["pos_embed"] = state["pos_embed"][:, :6]
        with pytest.raises(ValueError, match="pos_embed of 6 tokens is not square"):
            VDT.from_official(state, heads=2)

    def test_larger_grids_and_longer_clips(self, model, state, rand):
        large = VDT.from_official(state, config=TINY, frames=9, height=16, width=16)
        assert large(rand(1, 4, 9, 16, 16), torch.tensor([3])).shape == (1, 8, 9, 16, 16)
        assert torch.equal(large.time, VDT(replace(TINY, frames=9)).time)
        stretched = VDT.from_official(state, config=TINY, frames=11, time_interpolation=True)
        close(stretched.time[::2], model.time)
        close(stretched.time[1], (model.time[0] + model.time[1]) / 2)

    @pytest.mark.parametrize("interpolated", [False, True])
    def test_new_tables_have_the_dtype_of_the_others(self, state, interpolated):
        state = {name: value.bfloat16() for name, value in state.items()}
        sizes = {"frames": 9, "height": 16, "time_interpolation": interpolated}
        model = VDT.from_official(state, config=TINY, **sizes)
        assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}

    @pytest.mark.parametrize("name", ["frames", "height", "width"])
    def test_a_size_of_zero_is_not_the_old_one(self, state, name):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            VDT.from_official(state, config=TINY, **{name: 0})

    def test_own_time_table_is_kept(self, state):
        state["time_embed"] = state["time_embed"] + 1
        assert torch.equal(VDT.from_official(state, config=TINY).time, state["time_embed"][0])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"missing blocks\.1\.attn\.qkv\.bias"),
            (lambda s: s.update({"ema.x": torch.ones(1)}), r"left over ema\.x"),
            (
                lambda s: s.update({"time_embed": torch.ones(1, 5, 32)}),
                r"time_embed is \(1, 5, 32\) instead of \(1, 6, 32\)",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, state, change, message):
        change(state)
        with pytest.raises(ValueError, match=message):
            VDT.from_official(state, config=TINY)

    def test_other_weights_and_contradictions(self, state):
        with pytest.raises(ValueError, match="not the weights of a VDT: missing pos_embed"):
            VDT.from_official({"weight": torch.ones(1)})
        with pytest.raises(ValueError, match="heads=4 contradicts"):
            VDT.from_official(state, config=TINY, heads=4)
        with pytest.raises(ValueError, match="heads must be positive, got 0"):
            VDT.from_official(VDT(replace(TINY, width=8)).to_official_state_dict(), heads=0)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_values_that_are_not_finite_are_named(self, state, value, dtype):
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        state["blocks.1.attn.proj.weight"][3, 5] = value
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight has NaN or infinite"):
            VDT.from_official(state, config=TINY)

    @pytest.mark.parametrize("name", ["pos_embed", "time_embed", "x_embedder.proj.weight"])
    def test_another_rank_is_named(self, state, name):
        for value in (state[name][0], state[name][..., :0]):
            with pytest.raises(ValueError, match=f"{name} must have . axes, none of them empty"):
                VDT.from_official(state | {name: value}, heads=2)

    def test_what_holds_no_tensors_is_named(self, state, tmp_path):
        with pytest.raises(TypeError, match="source must hold a dict of tensors, got list"):
            VDT.from_official([state])
        torch.save({"model": state, "step": 3}, tmp_path / "nested.pt")
        for source in ({"model": state, "step": 3}, tmp_path / "nested.pt"):
            with pytest.raises(TypeError, match=r"'model': .*dict, among the keys model, step;"):
                VDT.from_official(source, config=TINY)
        with pytest.raises(ValueError, match=r"missing pos_embed, .*, got weight, bias"):
            VDT.from_official({"weight": torch.ones(1), "bias": torch.ones(1)})

    def test_image_weights_do_not_become_longer(self):
        image = VDT(replace(TINY, mode="image", frames=1, width=8)).to_official_state_dict()
        with pytest.raises(ValueError, match=r"frames=4 needs .* VDT\.from_image"):
            VDT.from_official(image, heads=2, frames=4)
        assert VDT.from_official(image, heads=2, frames=1).config.mode == "image"


class Planted:
    """A checkpoint with this in it would run code where objects are unpickled."""

    def __reduce__(self):
        return print, ("planted",)


def broken(kind, state, path):
    """Write a file that is no checkpoint of tensors."""
    torch.save({"model": Planted()} if kind == "planted" else state, path)
    whole = path.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "empty": b"", "junk": b"no checkpoint" * 9}
    path.write_bytes(contents.get(kind, whole))
    return path


@pytest.mark.parametrize("kind", ["cut", "empty", "junk", "planted"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_not_whole(model, tmp_path, capfd, kind, suffix):
    path = broken(kind, model.to_official_state_dict(), tmp_path / f"weights.{suffix}")
    with pytest.raises(ValueError, match=rf"weights\.{suffix} is not a whole"):
        VDT.from_official(path)
    assert "planted" not in capfd.readouterr().out


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        VDT.from_official(tmp_path / "gone.pt")


def test_training_from_a_cut_file_says_which(model, tmp_path, capsys):
    for name in ("jsonargparse", "tqdm", "av"):
        pytest.importorskip(name)
    make_motion_clips(tmp_path / "clips", clips=8, frames=16, size=64)
    path = broken("cut", model.to_official_state_dict(), tmp_path / "cut.pt")
    places = ["--data.train", str(tmp_path / "clips"), "--run.folder", str(tmp_path / "run")]
    assert main(["train", "vdt-demo", "--run.init", str(path), *places]) == 1
    said = capsys.readouterr().err
    assert f"{path} is not a whole checkpoint of tensors" in said
    assert "Traceback" not in said


class TestHubFolder:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_comes_back(self, model, clip, folder):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors"} <= names <= {"README.md", *names}
        back = VDT.from_pretrained(folder)
        assert back.config == TINY
        assert not back.training
        assert torch.equal(back(*clip), model(*clip))
        assert all(value.requires_grad for value in back.parameters())

    def test_unknown_config_key(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"colour": 1}))
        with pytest.raises(ValueError, match=r"unknown to VDTConfig: \['colour'\]"):
            VDT.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("final.bias"), r"missing final\.bias"),
            (lambda s: s.update({"extra": torch.ones(1)}), "left over extra"),
            (lambda s: s.update({"final.bias": torch.ones(3)}), r"final\.bias is \(3,\) instead"),
        ],
    )
    def test_weights_that_do_not_fit(self, folder, change, message):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            VDT.from_pretrained(folder)

    def test_truncated_weights(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            VDT.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            VDT.from_pretrained(folder)

    def test_a_full_disk_leaves_the_old_folder(self, model, folder, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        shutil.copytree(folder, tmp_path / "copy")
        monkeypatch.setattr(hub, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            redraw(model, 0.2).save_pretrained(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()
        }

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("[1]", ValueError, r"config\.json must hold a JSON object, got list"),
            ("{", ValueError, r"config\.json is not JSON"),
            ('{"depth": 2.5}', TypeError, r"config\.json: depth must be int, got 2\.5"),
            ('{"mlp_ratio": "4"}', TypeError, r"config\.json: mlp_ratio must be float"),
            ('{"dim": 1000000000000}', ValueError, r"config\.json: dim must be at most"),
            ('{"depth": 1000000000000}', ValueError, r"config\.json: depth must be at most"),
            ('{"mlp_ratio": 1e999}', ValueError, r"config\.json: mlp_ratio must be in"),
        ],
    )
    def test_a_config_written_by_hand(self, folder, text, error, message):
        path = folder / "config.json"
        path.write_text(text)
        with pytest.raises(error, match=message):
            hub.read_config(path, VDTConfig)
        with pytest.raises((error, AttributeError)):  # the mixin of the Hub reads it before us
            VDT.from_pretrained(folder)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite(self, folder, value):
        state = load_file(folder / "model.safetensors")
        state["final.weight"][1, 2] = value
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"final\.weight has NaN or infinite values"):
            VDT.from_pretrained(folder)
