"""One door for all formats: how volumes are turned, what their spacing is, and their masks."""

import gzip
import struct

import numpy as np
import pytest
from dicoms import prepare, read_one, read_or_refuse, read_row

from medbudget.data.itk import read_volume
from medbudget.data.layouts import write_picai
from medbudget.data.picai import GLAND, load_case
from medbudget.data.pixels import TURNS
from medbudget.data.prepare import BrokenCase

sitk = pytest.importorskip("SimpleITK")
nib = pytest.importorskip("nibabel")
X, Y, Z = np.meshgrid(np.arange(12), np.arange(10), np.arange(4), indexing="ij")
LEFT_BACK_UP = (X + 20 * Y + 300 * Z).astype(np.int16)  # axes to the patient's left, back, head
RIGHT = LEFT_BACK_UP.transpose(2, 1, 0)


def nifti(codes):
    o = nib.orientations
    turn = o.ornt_transform(o.axcodes2ornt("LPS"), o.axcodes2ornt(codes))
    return nib.Nifti1Image(LEFT_BACK_UP, np.diag([-1.0, -1, 1, 1])).as_reoriented(turn)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "ARS"])
@pytest.mark.parametrize("n", [1, 2])
def test_one_slice_is_turned_as_several_are(tmp_path, codes, n):
    nib.save(nifti(codes).slicer[:, :, 2 : 2 + n], tmp_path / "a.nii.gz")
    right = RIGHT[2 : 2 + n] if codes[2] == "S" else RIGHT[2 - n : 2]
    for plane in ("native", "axial"):
        assert np.array_equal(read_one(tmp_path, plane=plane).values, right)
    if n == 1:
        assert "one axial slice" in read_or_refuse(tmp_path, plane="sagittal")


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS"])
def test_a_nifti_of_two_dimensions_is_turned(tmp_path, codes):
    image = nifti(codes)
    flat = nib.Nifti1Image(np.asarray(image.dataobj)[:, :, 2], image.affine)
    assert flat.header["dim"][0] == 2
    nib.save(flat, tmp_path / "a.nii.gz")
    assert np.array_equal(read_one(tmp_path).values, RIGHT[2:3])


def drop(path, *lines):
    content = path.read_bytes()
    for line in lines:
        start = content.index(line)
        content = content[:start] + content[content.index(b"\n", start) + 1 :]
    path.write_bytes(content)


def test_a_volume_without_a_spacing_has_none_in_the_manifest(tmp_path):
    image = sitk.GetImageFromArray(RIGHT.copy())
    image.SetSpacing((2, 2, 4))
    for name, lines in (
        ("a.mha", [b"ElementSpacing"]),
        ("b.nrrd", [b"space directions"]),
        ("c.mha", []),
    ):
        root = tmp_path / name
        root.mkdir()
        sitk.WriteImage(image, str(root / name))
        drop(root / name, *lines)
        if name == "b.nrrd":
            drop(root / name, b"space: ", b"space origin")
        assert read_one(root).spacing == (None if lines else (2, 2))
        prepare(root, tmp_path / f"out{name}", size=12)
        assert read_row(tmp_path / f"out{name}")["spacing"] == ("" if lines else "2 x 2")
    nib.save(nib.Nifti1Image(LEFT_BACK_UP, None), tmp_path / "d.nii")
    (tmp_path / "d").mkdir()
    content = bytearray((tmp_path / "d.nii").read_bytes())
    content[123], content[252:256] = 0, struct.pack("<2h", 0, 0)
    (tmp_path / "d" / "d.nii").write_bytes(content)
    assert read_one(tmp_path / "d").spacing is None


@pytest.mark.parametrize("name", ["a.nii", "a.mha"])
def test_a_spacing_of_zero_or_less_is_refused(tmp_path, name):
    sitk.WriteImage(sitk.GetImageFromArray(RIGHT.copy()), str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    if name == "a.mha":
        content = content.replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1")
    else:
        content = content[:80] + struct.pack("<f", -1) + content[84:]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenCase):
        read_volume(tmp_path / name)


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = RIGHT.astype(np.float32)
    for bad in (np.nan, np.inf):
        values[0, 0, 0] = bad
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.mha"), True)
        assert "not a number" in read_or_refuse(tmp_path)


def test_a_cut_mask_is_refused_by_picai_and_by_prepare_folder(tmp_path):
    images, labels = write_picai(tmp_path / "picai", n=1, pixels=64)
    path = labels / GLAND / "10000_1000000.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenCase, match="truncated"):
        load_case(images, labels, "10000_1000000", size=64)
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(RIGHT.copy()), str(tmp_path / "in" / "a.mha"))
    mask = sitk.GetImageFromArray((RIGHT > 600).astype(np.uint8))
    sitk.WriteImage(mask, str(tmp_path / "masks" / "a.nii"))
    content = gzip.compress((tmp_path / "masks" / "a.nii").read_bytes())
    (tmp_path / "masks" / "a.nii").unlink()
    options = {"slices": "mask", "masks": tmp_path / "masks"}
    for n, made in ((len(content), 1), (len(content) - 20, 0)):
        (tmp_path / "masks" / "a.nii.gz").write_bytes(content[:n])
        report = prepare(tmp_path / "in", tmp_path / f"out{made}", **options)
        assert report.made == made and len(report.broken) == 1 - made


@pytest.mark.parametrize("suffix", [".nii", ".NII", ".Nii.Gz", ".MHA", ".NRRD"])
def test_masks_and_volumes_are_found_in_any_letter_case(tmp_path, suffix):
    for name, values in (("in", RIGHT), ("masks", (RIGHT > 600).astype(np.uint8))):
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"a{suffix.lower()}"
        sitk.WriteImage(sitk.GetImageFromArray(values.copy()), str(path))
        path.rename(tmp_path / name / f"a{suffix}")
    options = {"slices": "mask", "masks": tmp_path / "masks"}
    report = prepare(tmp_path / "in", tmp_path / "out", **options)
    assert report.made == 1, report.broken


@pytest.mark.parametrize("codes", ["LPS", "IRA"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_volumes_are_turned_as_itk_turns_them(tmp_path, codes, plane):
    image = sitk.GetImageFromArray(RIGHT.copy())
    image.SetSpacing((0.5, 0.7, 3))
    image.SetOrigin((-5, 2, 9))
    angle = np.cos(0.1), np.sin(0.1)
    image.SetDirection((angle[0], -angle[1], 0, angle[1], angle[0], 0, 0, 0, 1))
    sitk.WriteImage(sitk.DICOMOrient(image, codes), str(tmp_path / "a.mha"))
    right = sitk.DICOMOrient(image, TURNS[plane])
    pixels = read_one(tmp_path, plane=plane)
    assert np.array_equal(pixels.values, sitk.GetArrayFromImage(right))
    assert np.allclose(pixels.frame, (*right.GetOrigin(), *right.GetDirection()))
    assert np.allclose(pixels.spacing, right.GetSpacing()[1::-1])
