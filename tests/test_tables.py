"""Tables as people write them, and the files that they list."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from medbudget.data.compare import Person, is_identity
from medbudget.data.tables import Listing, read_table


@pytest.mark.parametrize("text", [
    "file,class,patient\na.png,x, P1 \n",
    "file;class;patient\na.png;x;P1\n",
    "file\tclass\tpatient\r\na.png\tx\tP1\r\n",
    "\ufefffile, class ,patient\n a.png ,x,P1\u00a0\n\n,,\n",
    'file,"class",patient\n"a.png","x","P1 "',
])  # fmt: skip
def test_cells_are_stripped_whatever_the_separator(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == [{"file": "a.png", "class": "x", "patient": "P1"}]


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,class, file\na,b,c\n")
    with pytest.raises(ValueError, match="more than one column file"):
        read_table(tmp_path / "t.csv")


def test_listed_files_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    root = tmp_path / "Data"
    names = [
        "a/One.png",
        "a/scan.nii.gz",
        "b/x.png",
        "b/x.jpg",
        "b/1.2.dcm",
        "b/1.2.3.dcm",
        "c.png",
    ]
    accent = unicodedata.normalize("NFD", "b/M\u00fcller.png")
    for name in [*names, accent]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    find = Listing(root).find
    for spelled, right in (
        ("a/One.png", "a/One.png"), ("a\\One.png", "a/One.png"), ("A/ONE.PNG", "a/One.png"),
        ("./a/one", "a/One.png"), (" a/scan ", "a/scan.nii.gz"), ("b/1.2", "b/1.2.dcm"),
        ("data/c.png", "c.png"), (str(root / "c.png"), "c.png"), ("b", "b"),
        ("b/M\u00fcller.png", accent),
    ):  # fmt: skip
        assert find(spelled) == (right, ""), spelled
    for spelled, why in (
        ("b/x", "fits several files: b/x.jpg, b/x.png"),
        ("../c.png", "leads out"),
        ("/etc/passwd", "not in the folder"),
        ("c.jpg", "not in the folder; there is c.png"),
        ("gone.png", "not in the folder"),
        ("", "names no file"),
    ):
        path, reason = find(spelled)
        assert path == "" and why in reason, (spelled, reason)


DOE = Person(("MRN-4711-X",), ("Doe^Jane",))


@pytest.mark.parametrize("label", [
    "MRN-4711-X", "mrn4711x", "4711", "004711_scans", "Doe", "jane", "DOE_JANE", "Jane Doe",
    "scans of MRN 4711 X", "Do\u00e9^Jane", "x_mrn4711x_t2",
])  # fmt: skip
def test_names_of_patients_are_known(label: str) -> None:
    assert is_identity(label, [DOE])
    assert is_identity(label, [Person(("1",), ("Roe^Richard",)), DOE])


@pytest.mark.parametrize(
    "label", ["healthy", "pneumonia", "all", "grade_3", "x", "class 471", "T2"]
)
def test_classes_are_no_names_of_patients(label: str) -> None:
    assert not is_identity(label, [DOE, Person(("3", "P1"), ("X", ""))])


def test_other_scripts_and_words_that_all_carry() -> None:
    assert is_identity("\u5f20\u4f1f", [Person((), ("Zhang^Wei", "\u5f20^\u4f1f"))])
    assert is_identity("Mueller", [Person((), ("M\u00fcller^Eva",))])
    assert is_identity("ProstateX-0000", [Person(("ProstateX-0000",), ("ProstateX-0000",))])
    same = [Person((f"n{i}",), ("normal",)) for i in range(3)]
    assert not is_identity("normal", same) and is_identity("normal", same[:2])
    assert is_identity("n1", same) and not is_identity("n", same)
    assert is_identity("007", [Person(("007",))]) and not is_identity("grade 7", [Person(("007",))])
