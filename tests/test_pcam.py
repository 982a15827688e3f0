"""PatchCamelyon: the official layout, read piece by piece."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import load_images
from medbudget.data import pcam
from medbudget.data.pcam import iterate_patches, load_labels, load_patches, prepare_pcam
from medbudget.data.phantom_trees import write_pcam
from medbudget.data.prepare import load_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pcam(tmp_path / "pcam")


def raw(folder: Path, split: str = "train") -> np.ndarray:
    with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_x.h5") as file:
        return file["x"][:]


def test_reads_patches_in_the_order_asked_for(folder: Path) -> None:
    values = raw(folder)
    got = load_patches(folder, "train", [7, 2, 7, 0], size=96)
    assert got.shape == (4, 3, 96, 96) and got.dtype == torch.uint8
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), values[[7, 2, 7, 0]])
    large = load_patches(folder, "train", [3], size=512)[0].permute(1, 2, 0).numpy()
    theirs = Image.fromarray(values[3]).resize((512, 512), Image.Resampling.LANCZOS)
    assert np.array_equal(large, np.asarray(theirs))
    assert load_patches(folder, "test", []).shape[0] == 0
    for index in (24, -1):
        with pytest.raises(IndexError, match="24 patches"):
            load_patches(folder, "train", [index])
    with pytest.raises(ValueError, match="allowed are train, val, test"):
        load_labels(folder, "valid")


def test_validation_and_test_stay_in_their_files(folder: Path) -> None:
    batches = list(iterate_patches(folder, "val", batch=3, size=96))
    assert [len(x) for x, _ in batches] == [3, 3, 2]
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), raw(folder, "valid"))
    assert torch.equal(labels, load_labels(folder, "val")) and labels.sum() == 4


def test_never_reads_a_whole_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = h5py.Dataset.__getitem__

    def watch(self, what, *args, **kwargs):
        out = original(self, what, *args, **kwargs)
        read.append(len(out) if self.name == "/x" else 0)
        return out

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watch)
    list(iterate_patches(folder, "test", batch=2, size=96))
    assert max(read) == 2 and sum(read) == 8


def test_prepares_random_training_patches_of_both_classes(folder: Path, tmp_path: Path) -> None:
    report = prepare_pcam(folder, tmp_path / "out", size=96, per_class=5)
    table = load_manifest(tmp_path / "out")
    assert report.counts == {("train", "normal"): 5, ("train", "metastasis"): 5}
    assert set(table["split"]) == {"train"}
    values, labels = raw(folder), load_labels(folder, "train")
    for row in table.itertuples():
        index = int(Path(row.file).stem.split("_")[1])
        assert labels[index] == pcam.LABELS.index(row.label)
        image = load_images(tmp_path / "out" / row.file)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image, values[index])
    other = prepare_pcam(folder, tmp_path / "other", size=96, per_class=5, seed=1)
    assert other.made == 10
    assert list(load_manifest(tmp_path / "other")["file"]) != list(table["file"])
    with pytest.raises(ValueError, match="100 wanted for train, there are 12"):
        prepare_pcam(folder, tmp_path / "many")
    fewer = prepare_pcam(folder, tmp_path / "fewer", size=32, allow_fewer=True)
    assert fewer.made == 24


def test_slides_are_patients_where_they_are_known(folder: Path, tmp_path: Path) -> None:
    lines = ["coord_y,coord_x,tumor_patch,center_tumor_patch,wsi"]
    lines += [f"0,0,False,False,slide_{i // 6}" for i in range(24)]
    meta = folder / "camelyonpatch_level_2_split_train_meta.csv"
    meta.write_text("\n".join(lines))
    prepare_pcam(folder, tmp_path / "out", size=32, per_class=4)
    table = load_manifest(tmp_path / "out")
    for row in table.itertuples():
        assert row.patient == f"slide_{int(Path(row.file).stem.split('_')[1]) // 6}"
    meta.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="23 rows"):
        prepare_pcam(folder, tmp_path / "x", per_class=4)


def test_reference_patches_are_of_the_validation_split(folder: Path, tmp_path: Path) -> None:
    """Its slides are others, by the design of the data set."""
    report = prepare_pcam(folder, tmp_path / "out", size=96, per_class=2, reference=3)
    assert report.counts["reference", "normal"] == report.counts["reference", "metastasis"] == 3
    table = load_manifest(tmp_path / "out")
    extra = table[table["split"] == "reference"]
    values, labels = raw(folder, "valid"), load_labels(folder, "val")
    for row in extra.itertuples():
        index = int(Path(row.file).stem.split("_")[1])
        assert row.sources == f"camelyonpatch_level_2_split_valid_x.h5[{index}]"
        assert labels[index] == pcam.LABELS.index(row.label)
        image = load_images(tmp_path / "out" / row.file)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image, values[index])
    with pytest.raises(ValueError, match="official val split: normal: 9 wanted for reference"):
        prepare_pcam(folder, tmp_path / "x", per_class=2, reference=9)
    for wrong in ({"reference": -1}, {"per_class": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            prepare_pcam(folder, tmp_path / "x", **wrong)


def test_packed_files_are_unpacked_once_and_damage_is_told(folder: Path) -> None:
    file = folder / "camelyonpatch_level_2_split_train_x.h5"
    values = raw(folder)
    packed = file.with_name(f"{file.name}.gz")
    with open(file, "rb") as source, gzip.open(packed, "wb") as target:
        shutil.copyfileobj(source, target)
    whole = packed.read_bytes()
    file.unlink()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"damaged.*download it again"):
        load_patches(folder, "train", [0])
    assert not file.exists() and not list(folder.glob("*.tmp"))
    packed.write_bytes(whole)
    got = load_patches(folder, "train", [5], size=96)[0]
    assert np.array_equal(got.permute(1, 2, 0).numpy(), values[5])
    packed.unlink()
    load_patches(folder, "train", [5])
    file.write_bytes(b"no HDF5")
    with pytest.raises(OSError, match="download it again"):
        load_patches(folder, "train", [5])
    file.unlink()
    with pytest.raises(FileNotFoundError, match="train_x"):
        load_patches(folder, "train", [5])
