import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fastvid.data.latents import INDEX, LatentDataset, LatentWriter

ROOT = Path(__file__).parents[2]
CODEC = {"name": "pixel", "factor": 4}


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with LatentWriter(tmp_path / "set", CODEC, per_shard=2) as writer:
        for i in range(5):
            latents = torch.randn(4, 3, 8, 8, generator=generator)
            writer.add(latents, path=f"{i}.mp4", start=i)
    return tmp_path / "set"


def test_what_is_written_comes_back(folder):
    generator = torch.Generator().manual_seed(0)
    data = LatentDataset(folder, codec=CODEC)
    assert len(data) == 5
    assert data.codec == CODEC
    for i, item in enumerate(data):
        assert torch.equal(item["latents"], torch.randn(4, 3, 8, 8, generator=generator))
        assert (item["path"], item["start"]) == (f"{i}.mp4", i)
    assert torch.equal(data[(3, 1)]["latents"], data[1]["latents"])
    assert sorted(p.name for p in folder.iterdir()) == [
        INDEX,
        *(f"latents-{i:05d}.safetensors" for i in range(3)),
    ]


def test_views_and_half_precision_are_kept(tmp_path):
    base = torch.randn(2, 8, 4, 6, 6, dtype=torch.float32).to(torch.bfloat16)
    view = base[1].transpose(2, 3)[:, ::2]
    with LatentWriter(tmp_path / "set", CODEC) as writer:
        writer.add(view, path="a", start=0)
    back = LatentDataset(tmp_path / "set")[0]["latents"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, view)


def test_workers_read_the_same(folder):
    data = LatentDataset(folder)
    loader = DataLoader(data, batch_size=5, num_workers=2)
    (batch,) = loader
    assert torch.equal(batch["latents"], torch.stack([item["latents"] for item in data]))


def test_a_rewritten_folder_gives_its_new_latents(tmp_path):
    for value in (1.0, 2.0):
        if value == 2:
            shutil.rmtree(tmp_path / "set")
        with LatentWriter(tmp_path / "set", CODEC) as writer:
            writer.add(torch.full((1, 1, 2, 2), value), path="a", start=0)
        assert (LatentDataset(tmp_path / "set")[0]["latents"] == value).all()


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".set.{os.getpid()}.part").mkdir()
    (tmp_path / f".set.{os.getpid()}.part" / "latents-00000.safetensors").touch()
    with LatentWriter(tmp_path / "set", CODEC) as writer:
        writer.add(torch.zeros(1, 1, 2, 2), path="a", start=0)
    assert len(LatentDataset(tmp_path / "set")) == 1


FULL_DISK = """
import resource, sys
import torch
from fastvid.data.latents import LatentWriter

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with LatentWriter(sys.argv[1], {}, per_shard=1) as writer:
        writer.add(torch.zeros(1, 1, 64, 64), path="a" * 30_000, start=0)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "name"), [(10_000, "latents-00000.safetensors"), (20_000, INDEX)]
)
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, limit, name):
    """A process may write so many bytes to a file: shards have 16 kB here, the index 30."""
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "set", str(limit)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert f"{tmp_path}/set/{name} cannot be written" in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no clip was added"), LatentWriter(tmp_path / "s", CODEC):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing(tmp_path):
    writer = LatentWriter(tmp_path / "set", CODEC, per_shard=1)

    def fail():
        with writer:
            writer.add(torch.zeros(1, 1, 2, 2), path="a", start=0)
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_written_into(folder):
    with pytest.raises(FileExistsError, match="set exists"):
        LatentWriter(folder, CODEC)


def test_another_codec_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"encoded with codec .*'factor': 4.* not with .*8"):
        LatentDataset(folder, codec={"name": "pixel", "factor": 8})


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "latents-00000.safetensors/../x", "a/b", "..", ""],
)
def test_no_name_leads_out_of_the_folder(folder, name):
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0]["file"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is malformed"):
        LatentDataset(folder, verify=False)


def test_no_link_leads_out_of_the_folder(folder, tmp_path):
    shard = folder / "latents-00000.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="is malformed"):
        LatentDataset(folder)


def test_damage_is_found(folder):
    shard = folder / "latents-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"latents-00001.*SHA-256 differs"):
        LatentDataset(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="latents-00001"):
        LatentDataset(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format="other"),
        lambda index: index.pop("codec"),
        lambda index: index["items"][0].update(shard=7),
        lambda index: index["items"][0].update(shard=-1),
        lambda index: index["items"][0].pop("start"),
        lambda index: index["items"].clear(),
    ],
)
def test_a_malformed_index_is_refused(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json"):
        LatentDataset(folder)


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a finished latent folder"):
        LatentDataset(tmp_path)


def test_a_wrong_shape_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"latents must be \(C, T, H, W\)"),
        LatentWriter(tmp_path / "set", CODEC) as writer,
    ):
        writer.add(torch.zeros(2, 2), path="a", start=0)
