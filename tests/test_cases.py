"""Cases: folders and official files of two classes, their patients, and splits that leak."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_classifier import dots

from medbudget.cases import Cases, check_drawn, check_splits, load_cases
from medbudget.data.layouts import write_pcam
from medbudget.data.pcam import prepare_pcam
from medbudget.images import save_images


@pytest.fixture(scope="module")
def splits():
    return dots(16, 0), dots(12, 1), dots(12, 2)


def write(folder, cases, names=("healthy", "ill")):
    for label, name in enumerate(names):
        save_images(cases.images[cases.labels == label], folder / name)


def test_folders_become_cases_and_either_class_can_be_the_positive(tmp_path, splits):
    write(tmp_path, splits[0])
    cases = load_cases(tmp_path)
    assert cases.classes == ("healthy", "ill") and torch.equal(cases.images, splits[0].images)
    assert cases.names[0] == "healthy/00000.png" and cases.names[-1] == "ill/00015.png"
    other = load_cases(tmp_path, positive="healthy")
    assert other.classes == ("ill", "healthy")
    assert torch.equal(other.images[other.labels == 0], cases.images[cases.labels == 1])


def test_of_a_prepared_folder_a_split_is_asked_for(tmp_path):
    settings = '{"medbudget": "0.1.0", "dataset": "folder", "selection": "1"}'
    (tmp_path / "prepared/train").mkdir(parents=True)
    (tmp_path / "prepared/settings.json").write_text(settings)
    with pytest.raises(ValueError, match=r"name a split in it: \['train'\]"):
        load_cases(tmp_path / "prepared")


def test_folders_that_cannot_be_are_refused_with_a_reason(tmp_path, splits):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_cases(tmp_path / "nothing")
    save_images(splits[0].images[:2], tmp_path / "healthy")
    with pytest.raises(ValueError, match=r"1 class folders \(healthy\); two are needed"):
        load_cases(tmp_path)
    save_images(dots(1, 0, size=48).images, tmp_path / "ill")
    with pytest.raises(ValueError, match="a classifier could learn the size"):
        load_cases(tmp_path)
    assert load_cases(tmp_path, size=32).images.shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"no class 'sick'.*healthy, ill"):
        load_cases(tmp_path, positive="sick")


def test_splits_that_do_not_fit_are_refused_with_a_reason(splits):
    train, val, test = splits
    check_splits({"train": train, "val": val, "test": test})
    leak = Cases(
        torch.cat([test.images, train.images[:2]]), torch.cat([test.labels, val.labels[-2:]])
    )
    with pytest.raises(ValueError, match=r"2 images are in two splits.*test: image 24 is train"):
        check_splits({"train": train, "val": val, "test": leak})
    with pytest.raises(ValueError, match="the sizes differ"):
        check_splits({"train": train, "val": dots(2, 0, size=48)})
    named = Cases.of(val.images[:2], val.images[-2:], classes=("benign", "malignant"))
    with pytest.raises(ValueError, match=r"class folders differ.*benign', 'malignant"):
        check_splits({"train": train, "val": named})


@pytest.mark.parametrize(
    ("names", "positive"),
    [
        (("negative", "positive"), "positive"),
        (("metastasis", "normal"), "metastasis"),
        (("cardiomegaly", "no_finding"), "cardiomegaly"),
        (("Cardiomegaly", "No Finding"), "Cardiomegaly"),
        (("benign", "malignant"), "malignant"),
        (("control", "healthy"), "healthy"),
    ],
)
def test_the_healthy_class_is_not_the_positive_one(tmp_path, splits, names, positive):
    write(tmp_path, splits[0], names)
    cases = load_cases(tmp_path)
    assert cases.classes[1] == positive and set(cases.classes) == set(names)
    index = next(i for i, name in enumerate(cases.names) if name.startswith(positive))
    assert cases.labels[index] == 1
    assert load_cases(tmp_path, positive=cases.classes[0]).classes[1] == cases.classes[0]


def write_prepared(root: Path, splits, owners) -> None:
    """Write splits as `medbudget prepare` does; owners: split to patient of each image."""
    rows = []
    for name, cases in splits.items():
        write(root / name, cases)
        files = [f"{name}/{label}/{i:05d}.png" for label in ("healthy", "ill")
                 for i in range(len(cases) // 2)]  # fmt: skip
        rows += zip(files, owners[name])
    with open(root / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "patient"])
        writer.writerows(rows)


def test_patients_come_from_the_manifest_and_stand_in_one_split(tmp_path, splits):
    train, val, _ = splits
    sets = {"train": train, "val": val}
    apart = {"train": [f"p{i // 2}" for i in range(32)], "val": [f"q{i // 2}" for i in range(24)]}
    write_prepared(tmp_path / "a", sets, apart)
    cases = {name: load_cases(tmp_path / "a" / name) for name in sets}
    assert len(set(cases["train"].patients)) == 16 and len(cases["train"].patients) == 32
    check_splits(cases)
    other = load_cases(tmp_path / "a" / "train", positive="healthy")
    assert dict(zip(other.names, other.patients)) == dict(
        zip(cases["train"].names, cases["train"].patients)
    )
    shared = apart | {"val": [*apart["val"][:-1], "p3"]}
    write_prepared(tmp_path / "b", sets, shared)
    leak = {name: load_cases(tmp_path / "b" / name) for name in sets}
    with pytest.raises(
        ValueError, match=r"1 patients are in two splits.*val: ill/00011\.png.*train"
    ):
        check_splits(leak)
    check_splits({"train": cases["train"], "val": leak["val"]})  # p3 of another folder is another
    (tmp_path / "b" / "manifest.csv").write_text("file,patient\ntrain/ill/00000.png,x\n")
    assert load_cases(tmp_path / "b" / "train").patients == ()
    assert load_cases(tmp_path / "a" / "train", size=16).patients == cases["train"].patients


def test_an_image_in_two_classes_is_refused_by_name(splits):
    train = splits[0]
    twice = train.images.clone()
    twice[20] = twice[3]
    with pytest.raises(ValueError, match=r"two classes.*image 20 is image 3"):
        check_splits({"train": Cases(twice, train.labels)})


def test_images_of_one_value_are_not_trained_on(splits):
    images = splits[0].images.clone()
    check_drawn(Cases(images, splits[0].labels), "synthetic")
    images[4], images[9] = 0, 128  # what NaN becomes, and a drawing that shows nothing
    with pytest.raises(ValueError, match=r"2 synthetic images show one value .*image 4; image 9"):
        check_drawn(Cases(images, splits[0].labels), "synthetic")
    images[4, 0, 3, 3], images[9, 2, 0, 0] = 1, 127
    check_drawn(Cases(images, splits[0].labels), "synthetic")


def test_official_patches_are_read_from_their_files(tmp_path):
    folder = write_pcam(tmp_path / "pcam")
    file = folder / "camelyonpatch_level_2_split_test_x.h5"
    cases = load_cases(file)
    assert cases.classes == ("normal", "metastasis") and cases.images.shape == (8, 3, 96, 96)
    assert cases.labels.tolist() == [0, 1] * 4 and cases.names[5] == "test_000005"
    swapped = load_cases(file, positive="normal")
    assert swapped.classes == ("metastasis", "normal") and swapped.labels.tolist() == [1, 0] * 4
    small = load_cases(file, size=128, change=lambda images: images[:, :, ::4, ::4])
    assert small.images.shape == (8, 3, 32, 32)
    assert small.hashes == load_cases(file, size=128).hashes, "known by what was read"
    with pytest.raises(ValueError, match="no class 'ill'"):
        load_cases(file, positive="ill")
    prepare_pcam(folder, tmp_path / "out", size=128, per_class=6)
    train = load_cases(tmp_path / "out" / "train")
    check_splits({"train": train, "test": load_cases(file, size=128)})
    leak = load_cases(folder / "camelyonpatch_level_2_split_train_x.h5", size=128)
    with pytest.raises(ValueError, match="12 images are in two splits"):
        check_splits({"train": train, "test": leak})


def test_cases_that_are_joined_keep_what_both_have(splits):
    train, val, _ = splits
    named = Cases(train.images, train.labels, patients=tuple("abcdefgh" * 4))
    both = named + named
    assert both.patients == named.patients * 2 and len(both) == 64 and both.names == ()
    assert (named + val).patients == ()
    half = named.transform(lambda images: images[:, :, ::2, ::2])
    assert half.images.shape[2:] == (16, 16) and half.hashes == named.hashes
    assert (half + half).hashes == named.hashes * 2
    with pytest.raises(ValueError, match="3 patients for 32 images"):
        Cases(train.images, train.labels, patients=("a", "b", "c"))
    assert np.array_equal(torch.cat([train.images, val.images]), (train + val).images)
