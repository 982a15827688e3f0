"""PatchCamelyon: the official layout, read piece by piece."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import load_images
from medbudget.data import pcam
from medbudget.data.layouts import write_pcam
from medbudget.data.pcam import iterate_patches, load_labels, load_patches, prepare_pcam
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


def assert_patches(out: Path, rows, values: np.ndarray, labels: torch.Tensor) -> None:
    """Each written image is the patch that its name says, in the folder of its label."""
    for row in rows.itertuples():
        index = int(Path(row.file).stem.split("_")[1])
        assert labels[index] == pcam.LABELS.index(row.label)
        image = load_images(out / row.file)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image, values[index])
        assert row.sources.endswith(f"_x.h5[{index}]")


def test_prepares_random_training_patches_of_both_classes(folder: Path, tmp_path: Path) -> None:
    report = prepare_pcam(folder, tmp_path / "out", size=96, per_class=5)
    table = load_manifest(tmp_path / "out")
    assert report.counts == {("train", "normal"): 5, ("train", "metastasis"): 5}
    assert set(table["split"]) == {"train"}
    assert_patches(tmp_path / "out", table, raw(folder), load_labels(folder, "train"))
    other = prepare_pcam(folder, tmp_path / "other", size=96, per_class=5, seed=1)
    assert other.made == 10
    assert list(load_manifest(tmp_path / "other")["file"]) != list(table["file"])
    with pytest.raises(ValueError, match="100 wanted for train, there are 12"):
        prepare_pcam(folder, tmp_path / "many")
    fewer = prepare_pcam(folder, tmp_path / "fewer", size=32, allow_fewer=True)
    assert fewer.made == 24


def test_slides_are_patients_where_they_are_known(folder: Path, tmp_path: Path) -> None:
    lines = ["coord_y,coord_x,tumor_patch,center_tumor_patch,wsi"]
    lines += [f"0,0,False,{i % 2 == 1},slide_{i // 6}" for i in range(24)]
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
    assert_patches(tmp_path / "out", extra, raw(folder, "valid"), load_labels(folder, "val"))
    with pytest.raises(ValueError, match="official val split: normal: 9 wanted for reference"):
        prepare_pcam(folder, tmp_path / "x", per_class=2, reference=9)
    with pytest.raises(ValueError, match="lies inside the input"):
        prepare_pcam(folder, folder / "out")
    for wrong in ({"reference": -1}, {"per_class": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            prepare_pcam(folder, tmp_path / "x", **wrong)


def rewrite(folder: Path, name: str, values: np.ndarray) -> None:
    with h5py.File(folder / f"camelyonpatch_level_2_split_{name}.h5", "w") as file:
        file.create_dataset(name[-1], data=values)


def write_meta(folder: Path, split: str, labels, slide: str = "slide") -> None:
    lines = ["coord_y,coord_x,tumor_patch,center_tumor_patch,wsi"]
    lines += [f"0,0,True,{bool(label)},{slide}_{i // 6}" for i, label in enumerate(labels)]
    file = folder / f"camelyonpatch_level_2_split_{split}_meta.csv"
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("part", "rows"), [("x", 7), ("y", 9)])
def test_patches_and_labels_of_different_splits_are_refused(folder: Path, part, rows) -> None:
    values = np.resize(raw(folder, "valid"), (rows, 96, 96, 3))
    labels = (np.arange(rows, dtype=np.uint8) % 2).reshape(rows, 1, 1, 1)
    rewrite(folder, f"valid_{part}", values if part == "x" else labels)
    counts = (rows, 8) if part == "x" else (8, rows)
    for use in (
        lambda: list(iterate_patches(folder, "val", size=96)),
        lambda: load_labels(folder, "val"),
        lambda: prepare_pcam(folder, folder.parent / "out", per_class=2, reference=2),
    ):
        with pytest.raises(OSError, match="different splits") as caught:
            use()
        assert all(f" {n}" in str(caught.value) for n in counts)
    assert not (folder.parent / "out").exists()


def test_labels_that_contradict_the_meta_table_are_refused(folder: Path, tmp_path: Path) -> None:
    labels = np.arange(24) % 2
    write_meta(folder, "train", labels)
    prepare_pcam(folder, tmp_path / "agree", per_class=8, size=96)
    write_meta(folder, "train", 1 - labels)
    with pytest.raises(ValueError, match=r"disagree about 24 of 24 patches.*patch 0"):
        prepare_pcam(folder, tmp_path / "out", per_class=8, size=96)
    write_meta(folder, "train", [*labels[:23], 0])
    with pytest.raises(ValueError, match=r"disagree about 1 of 24 patches.*patch 23"):
        load_labels(folder, "train")
    write_meta(folder, "valid", np.arange(7) % 2)
    with pytest.raises(ValueError, match="7 rows"):
        list(iterate_patches(folder, "val", size=96))


def test_the_reference_shares_neither_pixels_nor_slides_with_training(
    folder: Path, tmp_path: Path
) -> None:
    labels = load_labels(folder, "val").numpy()
    values = raw(folder, "valid")
    values[:2] = raw(folder)[:2]  # one patch of each class
    rewrite(folder, "valid_x", values)
    report = prepare_pcam(folder, tmp_path / "a", size=96, per_class=12, reference=3)
    names = set(load_manifest(tmp_path / "a").query("split == 'reference'")["file"])
    assert report.counts["reference", "normal"] == 3
    assert not any("val_000000" in name or "val_000001" in name for name in names)
    assert any("2 patches of the official val split" in note for note in report.notes)
    with pytest.raises(ValueError, match="4 wanted for reference, there are 3"):
        prepare_pcam(folder, tmp_path / "b", size=96, per_class=12, reference=4)
    write_meta(folder, "train", np.arange(24) % 2)
    write_meta(folder, "valid", labels)  # slides 0 and 1, of which training has both
    with pytest.raises(ValueError, match="1 wanted for reference, there are 0"):
        prepare_pcam(folder, tmp_path / "c", size=96, per_class=12, reference=1)


def test_equal_patches_in_one_class_are_kept_and_in_two_refused(folder, tmp_path) -> None:
    values = raw(folder)
    values[2] = values[0]
    rewrite(folder, "train_x", values)
    assert prepare_pcam(folder, tmp_path / "out", size=96, per_class=12).made == 24
    values[3] = values[0]
    rewrite(folder, "train_x", values)
    with pytest.raises(
        ValueError, match=r"train_00000\d \(normal\) and train_000003 \(metastasis\)"
    ):
        prepare_pcam(folder, tmp_path / "two", size=96, per_class=12)


def pack(folder: Path, name: str) -> Path:
    file = folder / f"camelyonpatch_level_2_split_{name}.h5"
    packed = file.with_name(f"{file.name}.gz")
    packed.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()
    return packed


def test_official_files_have_their_official_sums(folder, monkeypatch) -> None:
    """The published sums cannot be met by phantoms, so other sums stand in for them."""
    assert pcam.MD5["test_x"] == "d8c2d60d490dbd479f8199bdfa0cf6ec"  # torchvision's, not swapped
    for name in ("valid_x", "valid_y", "test_x"):
        packed = pack(folder, name)
        monkeypatch.setitem(pcam.MD5, name, hashlib.md5(packed.read_bytes()).hexdigest())
    test = folder / "camelyonpatch_level_2_split_test_x.h5.gz"
    valid = test.with_name(test.name.replace("test", "valid"))
    keep = valid.read_bytes()
    valid.write_bytes(test.read_bytes())
    with pytest.raises(OSError, match="is the official test_x by its MD5 sum"):
        load_patches(folder, "val", [0])
    assert not valid.with_suffix("").exists()
    valid.write_bytes(keep)
    assert len(load_patches(folder, "val", [0], size=96)) == 1
    monkeypatch.setitem(pcam.OFFICIAL, "test", 8)
    monkeypatch.setitem(pcam.MD5, "test_x", "0" * 32)
    with pytest.raises(OSError, match=r"its MD5 sum is .*the official one is 000"):
        load_patches(folder, "test", [0])
    assert not test.with_suffix("").exists() and not list(folder.glob(".*"))


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
