"""A reader's own images: every format, windows, slices, patients, and nothing of them in the output."""

from __future__ import annotations

import csv
import json
import os
from io import BytesIO
from pathlib import Path

import dicoms
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from medbudget import load_images, make_phantoms
from medbudget.data.folder import prepare_folder
from medbudget.data.layouts import write_dicom
from medbudget.data.prepare import load_manifest
from medbudget.data.volumes import Source, find_sources, read_pixels
from medbudget.images import save_images, to_pil

sitk = pytest.importorskip("SimpleITK")
NAME, ID = "Doe^Jane", "MRN-4711-X"
PERSON = {"0010|0010": NAME, "0010|0020": ID, "0010|0030": "19700101"}


def ramp(height: int = 24, width: int = 32, dtype=np.uint16, scale: int = 40) -> np.ndarray:
    """Rises to the right, and downwards in steps: no flip or turn leaves it as it is."""
    rows, columns = np.indices((height, width))
    return (columns * scale + rows // 8 * scale // 4).astype(dtype)


def one(root: Path) -> tuple[Source, ...]:
    return tuple(find_sources(root))


def read(root: Path, **options):
    (source,) = one(root)
    return read_pixels(root, source, **options)


def shown(root: Path, out: Path, **options) -> torch.Tensor:
    """Prepare a folder with one image of one class; return it in gray at its own size."""
    report = prepare_folder(root, out, **{"proportions": [1], "size": 32, **options})
    assert not report.broken, report
    return load_images(next(out.glob("train/*/*.png")))[0, 0]


def compress_lossy(file: Path, comment: str = "") -> None:
    """Turn an uncompressed 8-bit file into JPEG baseline, with a comment in the stream."""
    data = pydicom.dcmread(file)
    stream = BytesIO()
    image = Image.fromarray(data.pixel_array)
    image.save(stream, format="JPEG", quality=95, comment=comment)
    data.PixelData = encapsulate([stream.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.save_as(file)


@pytest.mark.parametrize("compressor", [None, "JPEG2000", "lossy JPEG"])
def test_nothing_of_the_patient_is_in_what_is_written(
    tmp_path: Path, compressor: str | None
) -> None:
    for label in ("sick", "well"):
        for i in range(3):
            person = {"0010|0010": NAME, "0010|0020": f"{ID}{label}{i}", "0028|0301": "YES"}
            file = tmp_path / "in" / label / f"{NAME}{i}.dcm"
            shift = 20 * i + 70 * (label == "sick")
            if compressor == "lossy JPEG":
                write_dicom(file, ramp(dtype=np.uint8, scale=3) + np.uint8(shift), person)
                compress_lossy(file, comment=f"{NAME} {ID}")
            else:
                write_dicom(file, ramp() + shift, person, compressor=compressor)
            assert NAME.encode() in file.read_bytes()
    out, key = tmp_path / "out", tmp_path / "key.csv"
    report = prepare_folder(tmp_path / "in", out, size=32, key=key)
    assert report.made == 6
    words = [word.encode() for word in (NAME, "Doe", "Jane", ID, str(tmp_path), ".dcm")]
    for path in out.rglob("*"):
        assert not any(word in path.relative_to(out).as_posix().encode() for word in words)
        if path.is_file():
            content = path.read_bytes()
            assert not any(word in content for word in words), path
    assert set(Image.open(next(out.rglob("p*.png"))).info) == {"medbudget"}  # its row, as above
    with open(key, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["patient"] for row in rows} == {
        f"{ID}{c}{i}" for c in ("sick", "well") for i in "012"
    }
    assert {row["number"] for row in rows} == set(load_manifest(out)["patient"])
    notes = " ".join(report.notes)
    assert "cannot be detected" in notes and "text in the pixels: 6" in notes
    with pytest.raises(ValueError, match="meant to be shared"):
        prepare_folder(tmp_path / "in", out, size=32, key=out / "key.csv")
    assert prepare_folder(tmp_path / "in", out, size=32, key=key).kept == 6  # the same key


def write_volume(file: Path, code: str = "LPS", n: int = 4, spacing=(1.0, 1.0, 5.0)) -> np.ndarray:
    """Write a volume stored in an orientation; return it as it should be seen (LPS)."""
    values = np.stack([ramp(24, 32, np.int16) + 500 * k for k in range(n)])
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, code), str(file))
    return values


def test_slice_rules(tmp_path: Path) -> None:
    write_volume(tmp_path / "in" / "c" / "a.nii.gz", n=7)
    mask = np.zeros((7, 24, 32), np.uint8)
    mask[1, :3, :3], mask[5, :9, :9] = 1, 1
    image = sitk.GetImageFromArray(mask)
    image.SetSpacing((1, 1, 5))
    (tmp_path / "masks" / "c").mkdir(parents=True)
    sitk.WriteImage(image, str(tmp_path / "masks" / "c" / "a.mha"))

    def indices(out: str, **options) -> list[str]:
        prepare_folder(tmp_path / "in", tmp_path / out, proportions=[1], size=32, **options)
        return load_manifest(tmp_path / out)["slice_index"].tolist()

    assert indices("middle") == ["3"]
    assert indices("every", slices="every:3") == ["1", "4"]
    assert indices("mask", slices="mask", masks=tmp_path / "masks") == ["5"]
    for slices, masks in (("mask", None), ("middle", tmp_path)):
        with pytest.raises(ValueError, match="belong together"):
            indices("x", slices=slices, masks=masks)
    with pytest.raises(ValueError, match="every:K"):
        indices("x", slices="every:0")


def test_a_mask_of_another_place_or_spacing_is_refused(tmp_path: Path) -> None:
    values = np.arange(320, dtype=np.int16).reshape(5, 8, 8)
    for folder in ("in", "masks"):
        (tmp_path / folder / "c").mkdir(parents=True)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "in" / "c" / "v.nii.gz"))
    changes = (
        lambda mask: None,
        lambda mask: mask.SetOrigin((0.5, 0, 0)),
        lambda mask: mask.SetSpacing((1, 1, 3)),
        lambda mask: mask.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)),
    )
    for i, change in enumerate(changes):
        mask = sitk.GetImageFromArray((values == 200).astype(np.uint8))
        change(mask)
        sitk.WriteImage(mask, str(tmp_path / "masks" / "c" / "v.nii.gz"))
        report = prepare_folder(
            tmp_path / "in", tmp_path / f"out{i}", masks=tmp_path / "masks", slices="mask",
            proportions=[1], size=64,
        )  # fmt: skip
        assert report.made == (i == 0) and ("another grid" in str(report)) == (i > 0)


def test_windows(tmp_path: Path) -> None:
    values = np.tile(np.arange(0, 3200, 100, dtype=np.int16), (32, 1))
    values[0, 0] = 30000  # one hot pixel
    root = tmp_path / "in"
    root.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(values), str(root / "a.nrrd"))
    fixed = shown(root, tmp_path / "fixed", window="1000,2000")
    assert fixed[5, :11].max() == 0 and fixed[5, 20:].min() == 255 and fixed[5, 15] == 128
    percentile = shown(root, tmp_path / "percentile", window="percentile")
    assert torch.equal(percentile, shown(root, tmp_path / "auto")), "no tags, more than 8 bits"
    assert percentile[5, 31] == 255 and percentile[5, 16] > 100, "not ruled by the hot pixel"
    report = prepare_folder(root, tmp_path / "tags", proportions=[1], window="tags")
    assert "no window tags" in report.broken[0][1]
    for window in ("wide", "5,1", "1,2,3"):
        with pytest.raises(ValueError, match="window"):
            prepare_folder(root, tmp_path / "x", window=window)


def picture(kind: str) -> Image.Image:
    gray = ramp(32, 32, np.uint8, 6)
    if kind == "16-bit":
        return Image.fromarray(gray.astype(np.uint16) * 100)
    if kind == "RGBA":
        return Image.fromarray(np.dstack([gray, gray, gray, np.full_like(gray, 255)]))
    image = Image.fromarray(gray)
    return image.convert("RGB").quantize(256) if kind == "palette" else image.convert(kind)


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "palette", "16-bit"])
def test_pictures_of_all_modes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    picture(kind).save(tmp_path / "in" / "a.png")
    image = shown(tmp_path / "in", tmp_path / "out")
    values = ramp(32, 32, np.uint8, 6).astype(float)
    if kind == "16-bit":
        low, high = np.percentile(values, (0.5, 99.5))
        values = ((values - low) / (high - low) * 255).clip(0, 255)
    assert (image - torch.from_numpy(values)).abs().max() <= 2


def test_pictures_that_need_a_decision_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    frames = [picture("L"), picture("L").rotate(90)]
    frames[0].save(root / "pages.tif", save_all=True, append_images=frames[1:])
    picture("RGB").convert("CMYK").save(root / "ink.tif")
    clear = picture("RGBA")
    clear.putpixel((31, 31), (255, 255, 255, 0))
    clear.save(root / "clear.png")
    (root / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (root / "cut.nii.gz").write_bytes(b"no volume")
    Image.new("L", (9, 9)).save(root / "fine.jpg")
    sitk.WriteImage(sitk.Image([4, 4, 4, 3], sitk.sitkInt16), str(root / "time.nii"))
    deep = sitk.Image([8, 8], sitk.sitkVectorUInt16, 3)
    sitk.WriteImage(deep, str(root / "deep.png"))
    report = prepare_folder(root, tmp_path / "out", proportions=[1], size=32)
    reasons = {reason.split(":")[0]: reason for _, reason in report.broken}
    assert report.made == 1 and set(reasons) == {
        "pages.tif", "ink.tif", "clear.png", "cut.png", "cut.dcm", "cut.nii.gz", "time.nii", "deep.png",
    }  # fmt: skip
    for name, why in (
        ("pages.tif", "2 pages"),
        ("ink.tif", "CMYK"),
        ("clear.png", "transparent"),
        ("time.nii", "4-D"),
        ("deep.png", "16 bits"),
        ("cut.dcm", "DICOM"),
    ):
        assert why in reasons[name]


def write_pictures(root: Path, names: list[str]) -> None:
    images = make_phantoms("chest", "healthy", len(names), size=32).images
    for name, image in zip(names, images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil(image).save(root / name)


def assert_patients_kept_together(table) -> None:
    assert (table.groupby("patient")["split"].nunique() == 1).all()


def test_patients_from_a_pattern_a_table_or_nobody(tmp_path: Path) -> None:
    root = tmp_path / "in"
    names = [f"{c}/pat{p:02d}_{v}.png" for c in "ab" for p in range(6) for v in range(3)]
    write_pictures(root, names)
    report = prepare_folder(root, tmp_path / "pattern", size=32, patient_pattern=r"(\w/pat\d+)")
    table = load_manifest(tmp_path / "pattern")
    assert_patients_kept_together(table)
    assert table["patient"].nunique() == 12 and len(table) == 36
    assert set(table["split"]) == {"train", "val", "test"}
    assert not any("unknown" in note for note in report.notes)

    lines = ["name,diagnosis,who"]
    lines += [f"{name},{name[0].upper()} 1/2,{name[5:7]}" for name in names[:-1]]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\ngone.png,A 1/2,00\n")
    columns = {"file_column": "name", "label_column": "diagnosis", "patient_column": "who"}
    report = prepare_folder(root, tmp_path / "table", labels=tmp_path / "t.csv", size=32, **columns)
    table = load_manifest(tmp_path / "table")
    assert_patients_kept_together(table)
    assert set(table["label"]) == {"A_1_2", "B_1_2"} and len(table) == 35
    assert any("not in the table and left out: 1" in note for note in report.notes)
    assert len(report.broken) == 1 and "not in the folder" in report.broken[0][1]

    report = prepare_folder(root, tmp_path / "nobody", size=32)
    assert any("unknown patients: 36" in note for note in report.notes)


def test_reference_of_each_class(tmp_path: Path) -> None:
    write_pictures(
        tmp_path / "in", [f"{c}/p{i}_{v}.png" for c in "ab" for i in range(9) for v in "xy"]
    )
    options = {"size": 32, "patient_pattern": r"(\w/p\d)", "reference": 3}
    report = prepare_folder(tmp_path / "in", tmp_path / "out", per_class=2, **options)
    assert report.counts["train", "a"] == 4
    with pytest.raises(ValueError, match="there are 9"):
        prepare_folder(tmp_path / "in", tmp_path / "x", per_class=5, **options)
    assert report.counts["reference", "a"] == report.counts["reference", "b"] == 6
    table = load_manifest(tmp_path / "out")
    assert_patients_kept_together(table)
    assert table["patient"].nunique() == 18 and len(table) == 36
    with pytest.raises(ValueError, match="there are 0"):
        prepare_folder(tmp_path / "in", tmp_path / "x", **options)
    report = prepare_folder(tmp_path / "in", tmp_path / "over", disjoint=False, **options)
    table = load_manifest(tmp_path / "over")
    twice = table[table["split"] == "reference"]
    assert len(twice) == 12 and set(twice["note"]) <= {
        "also in test",
        "also in val",
        "also in train",
    }
    rest = table[table["split"] != "reference"].set_index("sha256")
    for row in twice.itertuples():
        assert row.note == f"also in {rest.loc[row.sha256, 'split']}"
    assert len([note for note in report.notes if "shares patients" in note]) == 2


def test_wrong_folders_and_tables(tmp_path: Path) -> None:
    root = tmp_path / "in"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        prepare_folder(root, tmp_path / "out")
    root.mkdir()
    with pytest.raises(ValueError, match="no images"):
        prepare_folder(root, tmp_path / "out")
    write_pictures(root, [f"jane/{i}.png" for i in range(2)] + ["a.png", "b.png", "c.png"])
    with pytest.raises(ValueError, match="'jane': 2"):
        prepare_folder(root, tmp_path / "out")
    with pytest.raises(ValueError, match="names no patient in a"):
        prepare_folder(root, tmp_path / "out", patient_pattern=r"jane/(\d)")
    with pytest.raises(ValueError, match="names no patient"):
        prepare_folder(root, tmp_path / "out", patient_pattern="jane")
    with pytest.raises(ValueError, match="no regular expression"):
        prepare_folder(root, tmp_path / "out", patient_pattern="(")
    for wrong in ((0.5, 0.5, 0.5), (0.6, 0.4), (0.5,), (float("nan"),) * 3):
        with pytest.raises(ValueError, match="add up to 1"):
            prepare_folder(root, tmp_path / "out", proportions=wrong)
    table = tmp_path / "t.csv"
    for text, said in (
        ("path,class\na.png,x\n", "no 'file'"),
        ("file,class\nz.png,x\n", "must be relative"),
        ("file,class\na.png,x\na.png,y\n", "twice"),
        ("file,class\na.png,\n", "no class"),
        ("file,class\na.png,x\n", "no 'Patient'"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=said):
            column = "Patient" if "Patient" in said else None
            prepare_folder(root, tmp_path / "out", labels=table, patient_column=column)
    with pytest.raises(FileNotFoundError, match="no such table"):
        prepare_folder(root, tmp_path / "out", labels=tmp_path / "none.csv")


def table_of(root: Path, text: str, **options):
    """Prepare a folder with a table; return report and manifest."""
    (root.parent / "t.csv").write_text(text, encoding="utf-8")
    out = root.parent / "out"
    report = prepare_folder(root, out, labels=root.parent / "t.csv", size=32, **options)
    return report, load_manifest(out)


def test_a_key_replaces_no_other_file(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", [f"a/{i}.png" for i in range(3)])
    other = tmp_path / "labels.csv"
    other.write_text("precious", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not the key of these images"):
        prepare_folder(tmp_path / "in", tmp_path / "out", size=32, key=other)
    assert other.read_text(encoding="utf-8") == "precious" and not (tmp_path / "out").exists()


def test_a_table_without_rows_or_with_a_row_without_a_file_is_called_so(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", [f"{i}.png" for i in range(3)])
    with pytest.raises(ValueError, match="has no rows"):
        table_of(tmp_path / "in", "file,class,patient\n")
    text = "file,class\n" + "".join(f"{i}.png,a\n" for i in range(3)) + ",a\n"
    report, _ = table_of(tmp_path / "in", text, proportions=[1])
    assert [reason for _, reason in report.broken] == [
        ": listed in the table, but its row names no file"
    ]


def test_a_patient_column_that_is_not_named_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", [f"{i}.png" for i in range(6)])
    text = "\n".join(["file,class,PatientID", *(f"{i}.png,a,P{i}" for i in range(6))])
    report, _ = table_of(tmp_path / "in", text)
    assert any("column PatientID is not used" in note for note in report.notes)


def test_one_patient_in_several_spellings_is_one_and_that_is_said(tmp_path: Path) -> None:
    """Excel and SQL's CHAR columns pad; macOS writes accents in two ways; people mix cases."""
    write_pictures(tmp_path / "in", [f"{i}.png" for i in range(40)])
    patients = [f"{'Pp'[i % 2]}{i // 2}{' ' * (i % 2)}" for i in range(40)]
    patients[38:] = ["Mu\u0308ller", "M\u00fcller"]
    rows = [f"{i}.png,a,{patient}" for i, patient in enumerate(patients)]
    text = "\n".join(["file,class,patient", *rows])
    report, table = table_of(tmp_path / "in", text, key=tmp_path / "key.csv")
    assert table["patient"].nunique() == 20 == sum(report.patients.values())
    assert_patients_kept_together(table)
    assert any("counts as one: 19" in n and "0.png and 1.png" in n for n in report.notes)
    with open(tmp_path / "key.csv", newline="", encoding="utf-8") as file:
        assert {row["patient"] for row in csv.DictReader(file)} == {
            "M\u00fcller", *(f"P{i}" for i in range(19)),
        }  # fmt: skip


def test_tables_of_windows_and_excel_fit(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", [f"Sub/{i}.PNG" for i in range(6)])
    rows = [f"sub\\{i};x;P{i}" for i in range(6)] + [
        "Sub\\0.png;x;P0",
        "Sub/1.jpg;x;P1",
        "2.png;;P",
    ]
    report, table = table_of(tmp_path / "in", "\n".join(["File;Class;Patient", *rows]))
    assert len(table) == 6
    reasons = " ".join(reason for _, reason in report.broken)
    assert "there is Sub/1.PNG" in reasons and "gives it no Class" in reasons
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["labels"] == "t.csv" and settings["patient_pattern"] is None
    with pytest.raises(ValueError) as raised:  # the pattern as it was typed
        prepare_folder(tmp_path / "in", tmp_path / "x", patient_pattern=r"^(\d+)_")
    assert r"pattern ^(\d+)_ names no patient in Sub/0.PNG" in str(raised.value)


def test_the_same_pixels_stay_in_one_split_whatever_the_file(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_pictures(root, [f"a/{i}.png" for i in range(10)])
    for i in range(5):
        image = Image.open(root / "a" / f"{i}.png")
        image.save(root / "a" / f"copy{i}.bmp")  # other bytes, same pixels
        (root / "a" / f"again{i}.png").write_bytes((root / "a" / f"{i}.png").read_bytes())
    report = prepare_folder(root, tmp_path / "out", size=32, key=tmp_path / "key.csv")
    table = load_manifest(tmp_path / "out")
    assert len(table) == 20 and table["patient"].nunique() == 10
    assert_patients_kept_together(table)
    assert any(
        "15 images are 5 ones, pixel for pixel (a/again0.png is a/0.png" in note
        for note in report.notes
    )


def test_the_same_pixels_in_two_classes_are_refused_by_name(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_pictures(root, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    write_dicom(root / "a" / "x.dcm", ramp(), {"0010|0020": "P1"})
    write_dicom(root / "b" / "y.dcm", ramp(), {"0010|0020": "P1"})
    for patient, label in ("P2", "a"), ("P3", "b"):  # whoever is named
        write_dicom(root / label / f"{patient}.dcm", ramp() + 99, {"0010|0020": patient})
    report = prepare_folder(root, tmp_path / "out", size=32, proportions=[1])
    assert report.made == 10 and report.patients == {("train", "a"): 5, ("train", "b"): 5}
    assert dict(report.broken).keys() == {"a/x.dcm", "b/y.dcm", "a/P2.dcm", "b/P3.dcm"}
    assert "the same pixels as b/P3.dcm in class b" in dict(report.broken)["a/P2.dcm"]
    assert "the same pixels as b/y.dcm in class b" in dict(report.broken)["a/x.dcm"]


def test_folders_named_after_patients_are_one_class(tmp_path: Path) -> None:
    for i in range(4):
        person = {"0010|0020": f"ProstateX-000{i}", "0010|0010": f"ProstateX-000{i}"}
        write_dicom(tmp_path / "in" / f"ProstateX-000{i}" / "a.dcm", ramp() + 9 * i, person)
    report = prepare_folder(tmp_path / "in", tmp_path / "out", proportions=[1], size=32)
    assert report.counts == {("train", "all"): 4}
    assert any("named after their patients" in note for note in report.notes)
    for path in (tmp_path / "out").rglob("*"):
        assert "prostatex" not in path.relative_to(tmp_path).as_posix().lower()
        assert not path.is_file() or b"rostate" not in path.read_bytes()


def test_a_class_named_after_a_patient_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_dicom(root / "healthy" / "a.dcm", ramp(), {"0010|0020": "P1", "0010|0010": "Roe^Ann"})
    write_dicom(root / "Jane_Doe" / "b.dcm", ramp() + 9, PERSON)
    with pytest.raises(ValueError, match="1 of 2 classes are named after their patients") as raised:
        prepare_folder(root, tmp_path / "out", proportions=[1])
    assert "Jane" not in str(raised.value) and not (tmp_path / "out").exists()
    (tmp_path / "t.csv").write_text(f"file,class\nhealthy/a.dcm,healthy\nJane_Doe/b.dcm,{ID}\n")
    with pytest.raises(ValueError, match="named after their patients"):
        prepare_folder(root, tmp_path / "out", labels=tmp_path / "t.csv", proportions=[1])
    write_pictures(tmp_path / "png", [f"anna{i}/x.png" for i in range(3)])
    report = prepare_folder(
        tmp_path / "png", tmp_path / "out", proportions=[1], patient_pattern="^([^/]+)/"
    )
    assert report.counts == {("train", "all"): 3}


def test_what_was_prepared_or_drawn_is_no_input(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_pictures(root, [f"a/{i}.png" for i in range(6)])
    for out in (root, root / "out", root / "a" / "deep" / "out"):
        with pytest.raises(ValueError, match="lies inside the input"):
            prepare_folder(root, out)
    prepare_folder(root, tmp_path / "out", proportions=[1], size=32)
    with pytest.raises(ValueError, match="was made by `medbudget prepare`"):
        prepare_folder(tmp_path / "out", tmp_path / "x")
    (tmp_path / "out").rename(root / "prepared")
    drawn = make_phantoms("chest", "pneumonia", 1, size=32).images
    save_images(drawn, root / "a", names=["drawn"], records=[{"prompt": "<x>", "seed": 1}])
    report = prepare_folder(root, tmp_path / "new", proportions=[1], size=32)
    assert report.counts == {("train", "a"): 6}
    assert any("prepared was made by" in note for note in report.notes)
    assert any("synthetic" in note and "left out (1)" in note for note in report.notes)


def test_a_file_name_in_no_character_set_stops_nothing(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", [f"a/{i}.png" for i in range(6)])
    odd = os.fsdecode(b"\xdcbel.png")
    (tmp_path / "in" / "a" / "0.png").rename(tmp_path / "in" / "a" / odd)
    (tmp_path / "in" / "a" / os.fsdecode(b"kaputt\xfc.png")).write_bytes(b"x")
    report = prepare_folder(
        tmp_path / "in", tmp_path / "out", size=32, proportions=[1], key=tmp_path / "key.csv"
    )
    assert report.made == 6 and "kaputt" in str(report)
    str(report).encode("utf-8")


@pytest.mark.realdata
def test_real_xrays_with_their_patients(real_data: Path, tmp_path: Path) -> None:
    root, listed = real_data / "chest_xray", tmp_path / "t.csv"
    if not (root / "index.csv").is_file():
        pytest.skip(f"no chest_xray in {real_data}")
    head, *lines = (root / "index.csv").read_text().splitlines()
    listed.write_text("\n".join([head, *lines[::4]]))
    report = prepare_folder(root, tmp_path / "out", labels=listed, size=64)
    assert not report.broken and sum(report.counts.values()) == 150
    table = load_manifest(tmp_path / "out")
    assert_patients_kept_together(table)
    rows = csv.DictReader(listed.read_text().splitlines())
    assert table["patient"].nunique() == len({row["patient"] for row in rows})
    assert report.counts["train", "normal"] > report.counts["val", "normal"] > 8
    assert load_images(tmp_path / "out" / "test" / "pneumonia").shape[1:] == (3, 64, 64)


def write_study(root: Path, name: str, hidden: tuple[str, ...] = ()) -> None:
    """Write a study with one bright block: T2W in two planes, ADC and two b-values, coarser."""
    common = {
        "patient": name, "StudyInstanceUID": f"1.9.{name}", "FrameOfReferenceUID": f"1.8.{name}",
        "Modality": "MR",
    }  # fmt: skip
    series = {
        "t2": ("t2_tse_tra", 1, None, dicoms.AXIAL, 40),
        "cor": ("t2_tse_cor", 1, None, dicoms.CORONAL, 40),
        "adc": ("ep2d_diff_ADC", 2, None, dicoms.AXIAL, 20),
        "b50": ("ep2d_diff", 2, 50, dicoms.AXIAL, 20),
        "b1400": ("ep2d_diff", 2, 1400, dicoms.AXIAL, 20),
    }
    for number, (key, (text, mm, b, plane, edge)) in enumerate(series.items()):
        for k in range(4 if key not in hidden else 0):
            values = np.full((edge, edge), 100, np.uint16) + 10 * number
            block = slice(8 // mm, 16 // mm)
            values[block, block] = {"adc": 10, "b1400": 900}.get(key, 400) + int(name)
            place = [(mm - 1) / 2, (mm - 1) / 2, 3 * k]
            if key == "cor":
                place = [0, 3 * k, 0]
            dicoms.write(
                root / f"s{name}" / key / f"{k}.dcm", values, series=f"1.7.{name}.{number}",
                SeriesDescription=text, ImagePositionPatient=place, PixelSpacing=[mm, mm],
                ImageOrientationPatient=plane, DiffusionBValue=b, **common,
            )  # fmt: skip


def test_channels_of_a_study_lie_on_one_grid(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_study(tmp_path / "in" / "c", name)
    write_study(tmp_path / "in" / "c", "3", hidden=("adc",))
    options = {"proportions": [1], "size": 40, "channels": "t2w,adc,hbv", "window": "percentile"}
    report = prepare_folder(tmp_path / "in", tmp_path / "out", **options)
    ((_, reason),) = report.broken
    assert report.made == 2 and "channel adc: 0 of the 4 series of its study" in reason
    assert "s3/b1400/0.dcm" in reason and "--channels" in reason
    red, green, blue = load_images(next((tmp_path / "out" / "train" / "c").iterdir()))[0].int()
    assert all(
        (plane[10:14, 10:14] == level).all()
        for plane, level in zip((red, green, blue), (255, 0, 255))
    )
    assert red[20, 20] == 0 and green[20, 20] == 255 and blue[20, 20] == 0
    edges = [(plane[12].float() - 127.5).abs().argmin().item() for plane in (green, blue)]
    assert all(abs(edge - 7.5) <= 1 or abs(edge - 15.5) <= 1 for edge in edges)
    row = load_manifest(tmp_path / "out").iloc[0]
    assert row["sources"].count("sha256:") == 3 and row["slice_index"] == "2"
    assert row["window"].startswith("R percentile: ") and "; B percentile: " in row["window"]
    assert any("4 series and files are no channel" in note for note in report.notes)
    options["channels"] = "t2_tse,adc,hbv"  # fits two
    report = prepare_folder(tmp_path / "in", tmp_path / "two", **options)
    assert not report.made and "channel t2_tse: 2 of the 5 series" in str(report)
    for wrong in ("t2w,adc", "t2w,adc,adc", "t2w,,adc"):
        with pytest.raises(ValueError, match="name three series"):
            prepare_folder(tmp_path / "in", tmp_path / "x", channels=wrong)
    with pytest.raises(ValueError, match="auto, tags or percentile"):
        prepare_folder(tmp_path / "in", tmp_path / "x", channels="t2w,adc,hbv", window="0,9")
