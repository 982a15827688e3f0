"""Nothing of a DICOM header gets out: not into files, not onto the screen, not into an error."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from medbudget.data.layouts import write_dicom
from medbudget.data.prepare import BrokenCase
from medbudget.data.volumes import find_sources, read_pixels

pydicom = pytest.importorskip("pydicom")
MARK = "ZZMARK"  # in every marked text; nothing else holds it
TEXTS = {
    "PatientName": "NAME^Jane", "PatientID": "ID4711", "PatientAddress": "STREET", "StudyID": "ST",
    "OtherPatientIDs": "OTHER", "InstitutionName": "HOSPITAL", "ReferringPhysicianName": "REF^Dr",
    "OperatorsName": "OPER^A", "AccessionNumber": "ACC", "StudyDescription": "STUDY",
    "SeriesDescription": "SERIES", "PatientComments": "COMMENT", "ImageComments": "IMAGE",
    "ProtocolName": "PROTOCOL", "StationName": "STATION", "RequestingPhysician": "REQ^B",
}  # fmt: skip
DATES = {"PatientBirthDate": "19010203", "StudyDate": "19040506", "AcquisitionDate": "19070809"}
NUMBER = "99887766"
UID = "1.2.826.0.1.3680043.9.999999"


def mark(path, **tags):
    """Write marks into a file's header: texts, dates, UIDs and private tags."""
    data = pydicom.dcmread(path)
    for name, value in {**{k: f"{MARK}{v}"[:16] for k, v in TEXTS.items()}, **DATES}.items():
        setattr(data, name, value)
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{UID}.1", f"{UID}.4{path.stem[1:]}"
    data.FrameOfReferenceUID = f"{UID}.3"
    block = data.private_block(0x0011, f"{MARK} PRIVATE", create=True)
    block.add_new(0x01, "LO", f"{MARK} hidden")
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)
    # pydicom writes no text where a number belongs: put it there afterwards
    path.write_bytes(path.read_bytes().replace(NUMBER.encode(), f"{MARK}_1".encode()))


MARKS = [MARK, "STREET", "HOSPITAL", *DATES.values(), "999999"]


def assert_clean(text, where):
    if isinstance(text, str):
        text = text.encode()
    for word in MARKS:
        assert word.encode() not in text, f"{word} is in {where}: {text[:400]!r}"
        assert word.encode("utf-16-le") not in text, f"{word} (UTF-16) is in {where}"


def break_file(path, kind):
    """Damage a marked file in one way."""
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[:-300])
    elif kind == "cut in the header":
        path.write_bytes(content[: content.find(MARK.encode()) + 12])
    elif kind == "no pixels":
        data = pydicom.dcmread(path)
        del data.PixelData
        data.save_as(path)
    elif kind == "length of an element":
        place = content.find(b"\x10\x00\x10\x00PN")
        path.write_bytes(content[: place + 6] + b"\xff\xff" + content[place + 8 :])
    else:
        name, value = kind
        mark(path, **{name: value})


BREAKS = [
    "cut", "cut in the header", "no pixels", "length of an element",
    ("PhotometricInterpretation", NUMBER), ("WindowCenter", NUMBER), ("VOILUTFunction", NUMBER),
    ("RescaleSlope", NUMBER), ("RescaleIntercept", NUMBER), ("NumberOfFrames", NUMBER),
    ("ImagePositionPatient", [NUMBER, "1", "2"]), ("PixelSpacing", [NUMBER, "1"]),
    ("ImageOrientationPatient", [NUMBER, "0", "0", "0", "1", "0"]), ("BitsAllocated", 13),
    ("SamplesPerPixel", 7), ("BurnedInAnnotation", NUMBER), ("Rows", 60_000), ("Modality", NUMBER),
]  # fmt: skip


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A folder with whole and damaged marked files of two classes."""
    root = tmp_path_factory.mktemp("dicom")
    pixels = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32)
    n = 0
    for label in ("sick", "well"):
        for kind in ["whole", "whole", "whole", *BREAKS]:
            path = root / "in" / label / f"f{n:03d}.dcm"
            write_dicom(path, pixels + n, {"0010|0020": f"P{n}"})
            mark(path, WindowCenter="300", WindowWidth="500", PatientID=f"{MARK}ID{n}")
            assert MARK.encode() in path.read_bytes()
            if kind != "whole":
                break_file(path, kind)
            n += 1
        for i in (1, 2):  # a series whose positions are no numbers
            path = root / "in" / label / "series" / f"s{i}.dcm"
            write_dicom(path, pixels, {"0010|0020": "S"})
            same = f"{UID}.5{label == 'sick':d}"
            place = [NUMBER, "0", str(i)]
            mark(path, ImagePositionPatient=place, PatientID=f"{MARK}S", SeriesInstanceUID=same)
    return root


@pytest.fixture(scope="module")
def prepared(marked):
    """What the command wrote and said, in a process of its own: decoders print from C++."""
    code = "from medbudget.cli import main; main()"
    command = [sys.executable, "-c", code, "prepare", "folder", marked / "in"]
    options = ["--out", marked / "out", "--size", "32", "--allow-broken", "--workers", "1"]
    options += ["--slices", "every:1"]
    done = subprocess.run([*command, *options], capture_output=True, cwd=marked)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_no_output_file_holds_anything_of_a_header(marked, prepared):
    files = [p for p in (marked / "out").rglob("*") if p.is_file()]
    assert len(files) >= 10
    for path in files:
        assert_clean(path.read_bytes(), path)
        assert_clean(str(path.relative_to(marked)), "a name")
    for name in ("manifest.csv", "settings.json"):
        assert ".dcm" not in (marked / "out" / name).read_text()
    json.loads((marked / "out" / "settings.json").read_text())


def test_nothing_of_a_header_is_shown_but_files_are_named(marked, prepared):
    for stream in (prepared.stdout, prepared.stderr):
        assert_clean(stream, "what is shown")
    assert b"broken cases were left out" in prepared.stdout
    assert b"sick/f003.dcm" in prepared.stdout  # or nobody could mend it


def test_no_error_holds_anything_of_a_header(marked):
    sources = find_sources(marked / "in")
    said = [source.problem for source in sources if source.problem]
    for source in sources:
        if not source.problem:
            try:
                read_pixels(marked / "in", source)
            except ValueError as error:
                said.append(str(error))
                assert error.__cause__ is None or MARK not in str(error.__cause__)
    assert len(said) >= 12
    for text in said:
        assert_clean(text, "an error")


def test_a_word_has_nothing_to_lose(marked, prepared, medbudget, tmp_path):
    """What a word is trained on tells only counts and the name of the folder."""
    images, word = next((marked / "out" / "train").iterdir()), tmp_path / "x.safetensors"
    options = ["--steps", 1, "--n-vectors", 1, "--batch-size", 1, "--samples", 1, "--out", word]
    code, out, err = medbudget("invert", images, "--token", "<x>", *options)
    assert code == 0
    assert_clean(out + err, "what is shown")
    assert word.stat().st_size < 10_000
    for path in filter(Path.is_file, tmp_path.rglob("*")):  # the word, its sheet, its settings
        assert_clean(path.read_bytes(), path)
        assert b".dcm" not in path.read_bytes() and b"p0000" not in path.read_bytes()


def test_a_warning_holds_nothing_of_a_header_either(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.ones((8, 8), np.uint16))
    mark(path)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"1.2.826.0.1.3680043.9.999999.3", b"1.2.826.0.1.3680043.9.999999.+")
    )
    data = pydicom.dcmread(path)
    data.ContentDate, data.ContentTime = "19010203", "999999"
    data.save_as(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (source,) = find_sources(tmp_path)
        read_pixels(tmp_path, source)
    assert not caught


def test_a_value_of_an_unknown_kind_is_refused_without_its_words(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.ones((64, 64), np.uint8), compressor="JPEG2000")
    content = path.read_bytes()
    assert b"\xe0\x7f\x10\x00OB" in content
    path.write_bytes(content.replace(b"\xe0\x7f\x10\x00OB", b"\xe0\x7f\x10\x00GB"))
    (source,) = find_sources(tmp_path)
    with pytest.raises(BrokenCase, match="can be read") as caught:
        read_pixels(tmp_path, source)
    assert "GB" not in str(caught.value)
