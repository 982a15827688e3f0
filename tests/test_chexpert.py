"""CheXpert: the selection on the real label table and on trees of phantoms, and the crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medbudget import load_images
from medbudget.data import chexpert
from medbudget.data.chexpert import (
    OBSERVATIONS,
    count_patients,
    crop_borders,
    find_label_table,
    prepare_chexpert,
    select_clean,
)
from medbudget.data.layouts import write_chexpert
from medbudget.data.prepare import BrokenCase, load_manifest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_chexpert(tmp_path / "data", {"No Finding": 9, "Cardiomegaly": 9, "Pneumonia": 3})


def make_table(**findings: list[float | None]) -> pd.DataFrame:
    n = len(next(iter(findings.values())))
    table = pd.DataFrame({name: findings.get(name, [np.nan] * n) for name in OBSERVATIONS})
    table["Path"] = [f"CheXpert-v1.0-small/train/patient{i:05d}/study1/a.jpg" for i in range(n)]
    table["AP/PA"] = "AP"
    return table


def test_exactly_one_positive_and_uncertain_is_not_clean() -> None:
    table = make_table(
        Cardiomegaly=[1, 1, 1, 0, -1, 1], Edema=[None, 0, -1, None, None, 1], Fracture=[None] * 6
    )
    table.loc[1, "AP/PA"] = "PA"
    assert list(select_clean(table).index) == [0]
    assert select_clean(table)["label"].tolist() == ["Cardiomegaly"]
    lenient = select_clean(table, uncertain="ignore")
    assert lenient["patient"].tolist() == ["patient00000", "patient00002"]
    assert select_clean(table.assign(**{"AP/PA": "PA"})).empty
    with pytest.raises(ValueError, match="allowed are exclude, ignore"):
        select_clean(table, uncertain="maybe")
    with pytest.raises(ValueError, match="no column"):
        select_clean(table.drop(columns="Edema"))
    with pytest.raises(ValueError, match="no row of the table can be used"):
        select_clean(table.assign(Path="a.jpg"))
    with pytest.raises(ValueError, match="no row of the table can be used"):
        select_clean(table.assign(Edema=7.0))


def test_counts_on_the_real_label_table() -> None:
    """The rule by which Pneumonia has 132 clean patients, or 201 if uncertainty is ignored."""
    table = find_label_table()
    if table is None:
        pytest.skip("torchxrayvision, which carries CheXpert's label table, is not installed")
    assert len(table) == 223_414
    strict, lenient = (
        count_patients(select_clean(table, uncertain=rule)) for rule in ("exclude", "ignore")
    )
    assert (strict["Pneumonia"], lenient["Pneumonia"]) == (132, 201)
    assert all(strict[name] <= lenient[name] for name in OBSERVATIONS)
    # the same rule in other words, row by row
    rows = table[table["AP/PA"] == "AP"][["Path", *OBSERVATIONS]].to_numpy()
    patients = set()
    for path, *values in rows.tolist():
        if values.count(1.0) == 1 and -1.0 not in values and values[7] == 1.0:
            patients.add(path.split("/")[2])
    assert OBSERVATIONS[7] == "Pneumonia" and len(patients) == 132
    assert min(strict[name] for name in chexpert.TRAINED) >= 100  # the paper's splits
    assert min(strict[name] for name in chexpert.CLASSIFIED) >= 300


def test_prepares_only_clean_ap_images_one_a_patient(tree: Path, tmp_path: Path) -> None:
    report = prepare_chexpert(tree, tmp_path / "out", size=64, per_class=3, allow_fewer=True)
    table = load_manifest(tmp_path / "out")
    assert table["patient"].is_unique
    assert set(table[table["split"] != "train"]["label"]) == {"no_finding", "cardiomegaly"}
    assert report.counts["train", "pneumonia"] == 3 and report.counts["test", "cardiomegaly"] == 3
    labels = pd.read_csv(tree / "train.csv").set_index("Path")
    for row in table.itertuples():
        truth = labels.loc[row.sources]
        assert truth["AP/PA"] == "AP" and (truth[list(OBSERVATIONS)] == 1).sum() == 1
        assert not (truth[list(OBSERVATIONS)] == -1).any()
    row = table.iloc[0]
    assert row["window"] == "as stored (8 bit)"
    x0, x1, y0, y1 = (int(v) for v in row["crop"].replace("x ", "").replace("y ", "")
                      .split(" of")[0].replace(", ", "..").split(".."))  # fmt: skip
    assert abs((x1 - x0) - 96) <= 16 and abs((y1 - y0) - 96) <= 16  # JPEG blocks of 8 px
    images = load_images(tmp_path / "out" / "train" / "no_finding")
    assert images.shape == (3, 3, 64, 64)
    assert (images[:, :, 0].float().mean() > 3) and (images[:, :, -1].float().mean() > 3)


def test_too_few_and_missing(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pneumonia: 100 patients wanted \(100 train\), there are 3"
    ):
        prepare_chexpert(tree, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"train\.csv"):
        prepare_chexpert(tmp_path, tmp_path / "out")
    options = {"size": 32, "per_class": 3, "allow_fewer": True}
    prepare_chexpert(tree, tmp_path / "whole", **options)
    table = load_manifest(tmp_path / "whole")
    mine = table[(table["split"] == "train") & (table["label"] == "pneumonia")]["sources"]
    gone, cut, black = (tree.parent / source for source in mine)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    Image.new("L", (50, 50)).save(black)
    report = prepare_chexpert(tree, tmp_path / "out", **options)
    reasons = " ".join(reason for _, reason in report.broken)
    assert len(report.broken) == 3 and report.short == {("train", "pneumonia"): 3}
    assert "missing image" in reasons and "black" in reasons and "truncated" in reasons.lower()


def test_tables_with_any_prefix_or_semicolons(tree: Path, tmp_path: Path) -> None:
    options = {"size": 32, "per_class": 1, "allow_fewer": True}
    prepare_chexpert(tree, tmp_path / "plain", **options)
    patients = list(load_manifest(tmp_path / "plain")["patient"])
    table = pd.read_csv(tree / "train.csv", dtype={"Path": str})
    changes = (
        lambda path: path.removeprefix("CheXpert-v1.0-small/"),
        lambda path: f"/data/somewhere/{path}",
        lambda path: f"D:/x/{path}".replace("/", "\\\\"),
        lambda path: f" {path.upper()} ",
        lambda path: path.removesuffix(".jpg"),
    )
    for i, change in enumerate(changes):
        changed = table.assign(Path=table["Path"].map(change))
        excel = (
            {"sep": ";", "decimal": ","} if i == 0 else {}
        )  # in the Netherlands, Germany, France
        changed.to_csv(tree / "train.csv", index=False, **excel)
        assert not prepare_chexpert(tree, tmp_path / f"out{i}", **options).broken
        assert list(load_manifest(tmp_path / f"out{i}")["patient"]) == patients


def test_a_damaged_row_stops_nothing_and_is_counted(tree: Path, tmp_path: Path) -> None:
    table = pd.read_csv(tree / "train.csv", dtype=str, keep_default_na=False)
    table.loc[0, "Edema"], table.loc[1, "Path"] = "x", "nobody.jpg"
    table["AP/PA"] = table["AP/PA"].replace("AP", " ap")
    table["Pneumonia"] = table["Pneumonia"].replace("1.0", " 1 ")
    table.to_csv(tree / "train.csv", index=False)
    report = prepare_chexpert(tree, tmp_path / "out", size=32, per_class=2, allow_fewer=True)
    assert report.counts["train", "pneumonia"] == 2 and not report.broken
    assert any("left out (2)" in note for note in report.notes)
    with pytest.raises(ValueError, match="lies inside the input"):
        prepare_chexpert(tree, tree / "out")


def test_the_same_x_ray_of_two_patients_stays_in_one_split(tree: Path, tmp_path: Path) -> None:
    options = {"size": 32, "per_class": 3, "allow_fewer": True}
    prepare_chexpert(tree, tmp_path / "one", **options)
    table = load_manifest(tmp_path / "one")
    sources = {
        split: table[(table["split"] == split) & (table["label"] == "no_finding")]["sources"].iloc[
            0
        ]
        for split in ("train", "test")
    }
    (tree.parent / sources["test"]).write_bytes((tree.parent / sources["train"]).read_bytes())
    report = prepare_chexpert(tree, tmp_path / "two", **options)
    ((_, reason),) = report.broken
    assert "test/no_finding" in reason and "kept in train alone" in reason


def test_crop_to_non_zero_borders_then_longest_edge_then_pad() -> None:
    values = np.zeros((50, 80), np.uint8)
    values[10:30, 20:70] = 100
    values[15:20, 40:50] = 0  # a black part inside stays
    cropped, box = crop_borders(Image.fromarray(values))
    assert box == (20, 10, 70, 30) and cropped.size == (50, 20)
    assert np.array_equal(np.asarray(cropped), values[10:30, 20:70])
    with pytest.raises(BrokenCase, match="black"):
        crop_borders(Image.new("L", (4, 4)))
