"""Volumes of NIfTI, MetaImage and NRRD: the right pixels, or one clear error."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from medbudget.data.itk import read_volume
from medbudget.data.prepare import BrokenCase

sitk = pytest.importorskip("SimpleITK")
nib = pytest.importorskip("nibabel")
LPS = np.diag([-1.0, -1, 1, 1])
TYPES = [
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
]
V = np.random.default_rng(0).integers(100, 3000, (10, 64, 64)).astype(np.int16)


def write(path: Path, values=V, packed: bool = False) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((0.5, 0.7, 3)[: image.GetDimension()])
    image.SetOrigin((1, 2, 3)[: image.GetDimension()])
    sitk.WriteImage(
        sitk.DICOMOrient(image, "RAS") if values.ndim == 3 else image, str(path), packed
    )
    return path


def values_of(path: Path):
    return sitk.GetArrayFromImage(read_volume(path))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("packed", [False, True])
def test_whole_volumes_are_what_itk_reads(tmp_path, suffix, packed):
    for kind in TYPES:
        for values in (V[:3, :8, :6].astype(kind), V[0, :8, :6].astype(kind)):
            path = write(tmp_path / f"a{suffix}", values, packed)
            ours, itk = read_volume(path), sitk.ReadImage(str(path))
            found, right = sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(itk)
            assert found.dtype == right.dtype and np.array_equal(found.reshape(right.shape), right)
            n = itk.GetDimension()
            assert ours.GetSpacing()[:n] == itk.GetSpacing()
            assert ours.GetOrigin()[:n] == itk.GetOrigin()
            if n == 3:
                assert ours.GetDirection() == itk.GetDirection()


def test_colour_volumes(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), np.uint8)
    for suffix in (".mha", ".nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / f"a{suffix}"))
        assert np.array_equal(values_of(tmp_path / f"a{suffix}"), colour)
    rgb = np.zeros((4, 5, 3), np.dtype([(c, "u1") for c in "RGB"]))
    for i, c in enumerate("RGB"):
        rgb[c] = colour[..., i].T
    nib.save(nib.Nifti1Image(rgb, LPS), tmp_path / "a.nii")
    assert np.array_equal(values_of(tmp_path / "a.nii"), colour)
    header = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 5 3\n"
    colour = colour[1]
    kinds = b"kinds: domain domain RGB-color\nencoding: raw\n\n"
    (tmp_path / "b.nrrd").write_bytes(header + kinds + np.moveaxis(colour, -1, 0).tobytes())
    assert np.array_equal(values_of(tmp_path / "b.nrrd"), colour)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd", ".nhdr", ".mhd"])
def test_a_damaged_stream_gives_the_right_pixels_or_an_error(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", V[:3], packed=True)
    right, rng = values_of(path), np.random.default_rng(0)
    names = {".nhdr": "a.raw.gz", ".mhd": "a.zraw"}
    data = path.with_name(names.get(suffix, path.name))
    whole, refused = data.read_bytes(), 0
    for part in (0.99, 0.5, 0.1, 0.01):
        data.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(BrokenCase):
            read_volume(path)
    for place in rng.integers(400, len(whole) - 1, 40):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        data.write_bytes(changed)
        try:
            assert np.array_equal(values_of(path), right)
        except BrokenCase:
            refused += 1
    assert refused >= 36


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd", ".nhdr", ".mhd"])
def test_a_file_short_by_a_few_bytes_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", V[:3])
    data = path.with_suffix(".raw") if suffix in (".nhdr", ".mhd") else path
    whole = data.read_bytes()
    for missing in (1, 2, 100, 400):
        data.write_bytes(whole[:-missing])
        with pytest.raises(BrokenCase, match="truncated"):
            read_volume(path)


def test_a_wrong_size_of_the_compressed_data_is_refused(tmp_path):
    content = write(tmp_path / "a.mha", packed=True).read_bytes()
    head, _, rest = content.partition(b"CompressedDataSize = ")
    size, _, rest = rest.partition(b"\n")
    for other in (int(size) // 2, int(size) * 2, 0, 1):
        changed = head + b"CompressedDataSize = %d\n" % other + rest
        (tmp_path / "b.mha").write_bytes(changed)
        with pytest.raises(BrokenCase):
            read_volume(tmp_path / "b.mha")


@pytest.mark.parametrize(("encoding", "skip"), [("raw", 0), ("raw", 7), ("raw", -1), ("gzip", 7)])
def test_detached_nrrd_data(tmp_path, encoding, skip):
    pack = {"raw": bytes, "gzip": gzip.compress}[encoding]
    (tmp_path / "a.data").write_bytes(pack(b"#" * (7 if skip else 0) + V.astype(">i2").tobytes()))
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 64 64 10\nendian: big\n"
    head += f"encoding: {encoding}\nbyte skip: {skip}\ndata file: a.data\n"
    (tmp_path / "a.nhdr").write_text(head)
    assert np.array_equal(values_of(tmp_path / "a.nhdr"), V)
    (tmp_path / "a.data").write_bytes((tmp_path / "a.data").read_bytes()[:-9])
    with pytest.raises(BrokenCase, match=r"truncated|claims"):
        read_volume(tmp_path / "a.nhdr")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slope_and_intercept_of_nifti(tmp_path, suffix):
    """A slope of 0 means none (nifti1.h); NaN is none, as nibabel has it."""
    nib.save(nib.Nifti1Image(V.T, LPS), tmp_path / "a.nii")
    content, pack = bytearray((tmp_path / "a.nii").read_bytes()), gzip.compress
    for slope, intercept, right in (
        (1, 0, (1, 0)), (2, -3, (2, -3)), (0.37, 0, (0.37, 0)), (1, 7, (1, 7)), (0, 7, (1, 0)),
        (np.nan, np.nan, (1, 0)), (-1, 0, (-1, 0)),
    ):  # fmt: skip
        content[112:120] = struct.pack("<ff", slope, intercept)
        path = tmp_path / f"b{suffix}"
        path.write_bytes(pack(content) if suffix == ".nii.gz" else content)
        found = values_of(path)
        assert np.allclose(found, V * np.float32(right[0]) + right[1])
        assert found.dtype == np.int16 or right != (1, 0)


def test_nifti_of_other_kinds(tmp_path):
    big = nib.Nifti1Image(V.T.astype(">i2"), LPS, nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    assert np.array_equal(values_of(tmp_path / "big.nii"), V)
    nib.save(nib.Nifti1Image(V.T[..., None], LPS), tmp_path / "one.nii.gz")
    assert np.array_equal(values_of(tmp_path / "one.nii.gz"), V)
    nib.save(nib.Nifti1Image(np.stack([V.T, V.T], -1), LPS), tmp_path / "time.nii.gz")
    with pytest.raises(BrokenCase, match="4-D"):
        read_volume(tmp_path / "time.nii.gz")
    nib.save(nib.Nifti1Image(V.T.astype(np.complex64), LPS), tmp_path / "complex.nii")
    with pytest.raises(BrokenCase, match="complex"):
        read_volume(tmp_path / "complex.nii")
    # two gzip streams, one behind the other, are one file (RFC 1952)
    content = (tmp_path / "big.nii").read_bytes()
    pair = gzip.compress(content[:5000]) + gzip.compress(content[5000:])
    (tmp_path / "pair.nii.gz").write_bytes(pair)
    assert np.array_equal(values_of(tmp_path / "pair.nii.gz"), V)


def test_a_bomb_is_given_up(tmp_path):
    nib.save(nib.Nifti1Image(V.T[:2, :2, :1], LPS), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes() + bytes(200 * 2**20)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content, 1))
    write(tmp_path / "c.mha", V[:1, :2, :2], packed=True)
    content = (tmp_path / "c.mha").read_bytes()
    head = content[: content.index(b"LOCAL") + 6]
    (tmp_path / "c.mha").write_bytes(head + zlib.compress(bytes(200 * 2**20), 1))
    for name in ("b.nii.gz", "c.mha"):
        with pytest.raises(BrokenCase, match="claims"):
            read_volume(tmp_path / name)


def test_where_nifti_pixels_start(tmp_path):
    path = write(tmp_path / "a.nii", V[:3])
    whole, right = bytearray(path.read_bytes()), values_of(path)
    for start, kept, fine in ((352, None, True), (352, -4, False), (9, None, False)):
        struct.pack_into("<f", whole, 108, start)
        path.write_bytes(whole[:kept])
        if fine:
            assert np.array_equal(values_of(path), right)
        else:
            with pytest.raises(BrokenCase):
                values_of(path)


@pytest.mark.parametrize("word", ["1", "true"])
def test_metaimage_says_true_in_several_ways(tmp_path, word):
    path = write(tmp_path / "a.mha", V[:3])
    right = values_of(path)
    head, tag, pixels = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    head = head.replace(b"ByteOrderMSB = False", b"ByteOrderMSB = " + word.encode())
    path.write_bytes(head + tag + np.frombuffer(pixels, "<i2").byteswap().tobytes())
    assert np.array_equal(values_of(path), right)
    path = write(tmp_path / "b.mha", V[:3], True)
    packed = path.read_bytes().replace(
        b"CompressedData = True", b"CompressedData = " + word.encode()
    )
    path.write_bytes(packed)
    assert np.array_equal(values_of(path), right)
