"""Files of strangers: nothing in them runs, and they take no more memory than they have bytes."""

import gzip
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import CANARY, make_pickles
from PIL import Image

from medbudget import load_images, save_images
from medbudget.data import pcam
from medbudget.data.folder import prepare_folder
from medbudget.data.prepare import BrokenCase
from medbudget.data.volumes import Source, find_sources, read_pixels
from medbudget.images import ImageError, load_image
from medbudget.reader import ReaderError, ReaderStudy
from medbudget.torchfiles import read_torch

sitk = pytest.importorskip("SimpleITK")
h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What came of reading the corpus, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("hostile")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("hostile.py"), folder],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**plain, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()], folder


def test_nothing_in_the_corpus_runs(corpus):
    lines, folder = corpus
    assert len(lines) > 180 and not (folder / CANARY).exists()


def test_the_corpus_would_run_in_an_ordinary_unpickler(tmp_path):
    """The canary can sing: otherwise its silence says nothing."""
    names = ("posix.system", "getattr of an import", "dotted name", "INST", "OBJ")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.pkl").write_bytes(make_pickles(tmp_path / name)[name])
    code = """
import contextlib, pickle, sys, torch
for path in sys.argv[1:]:
    with contextlib.suppress(Exception):
        pickle.load(open(path, "rb"))
"""
    paths = [tmp_path / name / "x.pkl" for name in names]
    subprocess.run([sys.executable, "-c", code, *paths], capture_output=True)
    assert [name for name in names if (tmp_path / name / CANARY).exists()] == [*names]


def test_every_file_of_the_corpus_is_refused_with_a_reason(corpus):
    for line in corpus[0]:
        assert line["ours"] and len(line["message"]) > 20, line
        assert "MemoryError" not in line["message"], line
        assert "Recursion" not in line["message"], line


def test_no_file_of_the_corpus_takes_memory_or_time_beyond_its_size(corpus):
    for line in corpus[0]:
        assert line["mib"] <= 4 * line["file_mib"] + 128, line  # 128: a million small objects
        assert line["seconds"] < 10, line


@pytest.mark.parametrize("new", [True, False], ids=["archive", "older format"])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_no_attack_is_read_as_torch_reads_it(tmp_path, new, mapped):
    grid = torch.arange(24.0).reshape(4, 6)
    content = {
        "views": [grid, grid[1:3].T, grid[:, ::2]],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "state": torch.nn.Linear(2, 3).state_dict(),
        "types": {str(t): torch.ones(3).to(t) for t in (torch.half, torch.bfloat16, torch.long)},
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3),
        "plain": [1, 2.5, "text", None, True, 2**70],
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new)

    def compare(a, b):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b.detach())
        elif isinstance(b, dict):
            assert list(a) == list(b)
            for key in b:
                compare(a[key], b[key])
        elif isinstance(b, list):
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        else:
            assert a == b

    compare(read_torch(path, mapped=mapped), content)


# ------------------------------------------------------------------------- images that claim much


def png(width, height):
    """A PNG file that claims a size, with no pixels to show for it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def test_pictures_that_claim_too_many_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(50_000, 50_000))
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(tmp_path / "a.png")
    with pytest.raises(BrokenCase, match="too many pixels"):
        read_pixels(tmp_path, Source(("a.png",), "picture"))


def test_volumes_that_claim_more_than_their_file_can_hold(tmp_path):
    volume = sitk.GetImageFromArray(np.ones((2, 4, 4), np.int16))
    for name in ("a.mha", "b.nrrd", "c.nii", "d.nii.gz", "e.dcm"):
        sitk.WriteImage(volume[:, :, 0] if name == "e.dcm" else volume, str(tmp_path / name))
    for name in ("a.mha", "b.nrrd"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b"4 4 2", b"30000 30000 9000"))
    header = bytearray((tmp_path / "c.nii").read_bytes())
    header[40:48] = struct.pack("<4h", 3, 30_000, 30_000, 9000)
    (tmp_path / "c.nii").write_bytes(header)
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(bytes(header)))
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(tmp_path / "e.dcm")
    data.Rows, data.Columns, data.NumberOfFrames = 60_000, 60_000, 9000
    data.save_as(tmp_path / "e.dcm")
    sources = find_sources(tmp_path)
    assert len(sources) == 5
    claims = [s for s in sources if "claims" in _why(tmp_path, s)]
    assert len(claims) == 5, [_why(tmp_path, s) for s in sources]


def _why(root, source):
    try:
        read_pixels(root, source)
    except BrokenCase as error:
        return str(error)
    return "read"


def test_a_volume_shows_no_file_but_its_own(tmp_path):
    """MetaImage and NRRD headers may name another file for the pixels."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"s" * 1000)
    folder = tmp_path / "images"
    folder.mkdir()
    meta = "ObjectType = Image\nNDims = 2\nDimSize = 8 8\nElementType = MET_UCHAR\n"
    nrrd = "NRRD0004\ntype: uchar\ndimension: 2\nsizes: 8 8\nencoding: raw\n"
    for name in (str(secret), "../secret.txt", "link"):
        (folder / "a.mha").write_text(f"{meta}ElementDataFile = {name}\n")
        (folder / "a.mhd").write_text(f"{meta}ElementDataFile={name}\n")
        (folder / "a.nrrd").write_text(f"{nrrd}data file: {name}\n")
        (folder / "a.nhdr").write_text(f"{nrrd}datafile: {name}\n")
        if not (folder / "link").is_symlink():
            (folder / "link").symlink_to(secret)
        for source in find_sources(folder):
            assert "lie beside it" in _why(folder, source), (source, name)
    (folder / "a.raw").write_bytes(bytes(range(64)))
    (folder / "a.mhd").write_text(f"{meta}ElementDataFile = a.raw\n")
    assert read_pixels(folder, Source(("a.mhd",), "volume")).values.ravel().tolist() == [*range(64)]


def test_a_header_that_ends_itk_is_refused(tmp_path):
    """NDims = -1 is a segmentation fault in SimpleITK 2.5; found by benchmarks/fuzz.py."""
    sitk.WriteImage(sitk.Image([4, 4, 2], sitk.sitkInt16), str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes().replace(b"NDims = 3", b"NDims = -1")
    (tmp_path / "a.mha").write_bytes(content)
    assert "dimensions" in _why(tmp_path, Source(("a.mha",), "volume"))


def test_postscript_under_the_name_of_a_picture_is_not_run(tmp_path, monkeypatch):
    """Pillow goes by content and gives PostScript to Ghostscript."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("a.png", "b.jpg", "c.tif"):
        (tmp_path / name).write_bytes(page)
    assert Image.open(tmp_path / "a.png").format == "EPS", "Pillow would have taken it"

    def started(*args, **options):
        raise AssertionError(f"a program was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    for name in ("a.png", "b.jpg", "c.tif"):
        with pytest.raises(ImageError, match="allowed are PNG, JPEG"):
            load_image(tmp_path / name)
        assert "not an image" in _why(tmp_path, Source((name,), "picture"))


def write_h5(folder, part, shape, **options):
    with h5py.File(folder / f"camelyonpatch_level_2_split_train_{part}.h5", "w") as file:
        file.create_dataset(part, shape, np.uint8, **options)


@pytest.mark.parametrize(
    ("part", "shape", "options"),
    [
        ("y", (2**40,), {"chunks": (1000,)}),
        ("y", (8,), {"external": [("/etc/hostname", 0, 8)]}),
        ("x", (2**40, 96, 96, 3), {"chunks": (1, 96, 96, 3)}),
        ("x", (4, 96, 96, 3), {"chunks": (4000, 96, 96, 3), "maxshape": (None, 96, 96, 3)}),
        ("x", (4, 9000, 9000, 3), {"chunks": (1, 96, 96, 3)}),
    ],
)  # fmt: skip
def test_hdf5_files_that_claim_much_or_point_elsewhere(tmp_path, part, shape, options):
    write_h5(tmp_path, part, shape, **options)
    with pytest.raises(OSError, match="of its own"):
        pcam.open_pcam(tmp_path, "train", part)


def test_hdf5_links_and_groups_are_no_data(tmp_path):
    write_h5(tmp_path, "y", (8,))
    place = tmp_path / "camelyonpatch_level_2_split_train_x.h5"
    for make in (
        lambda file: file.create_group("x"),
        lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "/x")),
        lambda file: file.__setitem__("x", h5py.SoftLink("/x")),
    ):
        with h5py.File(place, "w") as file:
            make(file)
        with pytest.raises(OSError, match="of its own"):
            pcam.load_patches(tmp_path, "train", [0])


def test_a_gzip_bomb_is_given_up_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pcam, "MAX_UNPACKED", 10 * 2**20)
    packed = tmp_path / "camelyonpatch_level_2_split_train_y.h5.gz"
    packed.write_bytes(gzip.compress(bytes(30 * 2**20)))
    with pytest.raises(OSError, match="unpacks to more"):
        pcam.load_labels(tmp_path, "train")
    assert [p.name for p in tmp_path.iterdir()] == [packed.name]


# ------------------------------------------------------------------------- names and places


ODD = (
    "with space", "-rf", "--out", "naïve ⊕ 图", "new\nline", "tab\there", "a;b$(touch x)`y`",
    "dots..in..it", "quote'\"", "%s{0}", "x" * 200,
)  # fmt: skip


def test_folders_of_oddly_named_images_are_read_and_prepared(tmp_path, noise):
    save_images(noise(len(ODD), size=16), tmp_path / "in" / "class", names=ODD)
    found = load_images(tmp_path / "in" / "class")
    assert len(found) == len(ODD)
    report = prepare_folder(tmp_path / "in", tmp_path / "out", proportions=[1], size=16)
    assert report.made == len(ODD) and not report.broken
    names = {p.name for p in (tmp_path / "out").rglob("*.png")}
    assert all(n.startswith("p0") or n == "contact_sheet.png" for n in names), names
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_labels_of_a_table_do_not_lead_out_of_the_folder(tmp_path, noise):
    names = [f"{i}" for i in range(6)]
    save_images(noise(6, size=16), tmp_path / "in", names=names)
    labels = ["../../up", "/etc", "a/b", "..", "C:\\x", "a\0b"]
    for label in labels:
        table = tmp_path / "labels.csv"
        table.write_text("file,class\n" + "".join(f'{n}.png,"{label}"\n' for n in names))
        out = tmp_path / "out" / str(labels.index(label))
        try:
            prepare_folder(tmp_path / "in", out, labels=table, proportions=[1], size=16)
        except ValueError as error:
            assert "folder name" in str(error) or "CSV" in str(error)
            assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "labels.csv"}
    assert not {p.name for p in (tmp_path / "out").iterdir()} - {"0", "1", "2", "3", "4", "5"}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", "a\0b", "..\\x"])
def test_images_are_only_saved_under_plain_names(tmp_path, noise, name):
    with pytest.raises(ValueError, match="no plain file name"):
        save_images(noise(1, size=8), tmp_path / "out", names=[name])
    assert not list((tmp_path / "out").glob("**/*.png")) and len(list(tmp_path.iterdir())) <= 1


def test_a_reader_study_shows_only_its_own_images(tmp_path, noise):
    for i, source in enumerate("ab"):
        save_images(noise(3, size=16, seed=i), tmp_path / source)
    ReaderStudy.create(tmp_path / "a", tmp_path / "b", tmp_path / "s", seed=1, n_pairs=3)
    about = json.loads((tmp_path / "s" / "study.json").read_text())
    for name in ("../a/00000.png", "/etc/hostname", "images/../../a/00000.png"):
        about["pairs"][0][0] = name
        (tmp_path / "s" / "study.json").write_text(json.dumps(about))
        with pytest.raises(ReaderError, match="has no image"):
            ReaderStudy.load(tmp_path / "s")


@pytest.mark.parametrize(
    "token", ["<../up>", "<a/b>", "<a\\b>", "../x", "<\x1b[2J>", "<" + "x" * 999 + ">"]
)
def test_tokens_lead_nowhere_and_nothing_is_made(medbudget, tmp_path, noise, token):
    save_images(noise(2, size=64), tmp_path / "in")
    code, _, err = medbudget(
        "invert", tmp_path / "in", "--token", token, "--out", tmp_path / "e.pt"
    )
    assert code == 1 and err.startswith("error: token ") and "\x1b" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
