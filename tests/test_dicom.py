"""DICOM: each frame with its own numbers and its own place, or one clear error."""

import io
import shutil
import zlib

import numpy as np
import pydicom
import pytest
from dicoms import (
    AXIAL,
    CORONAL,
    CR,
    CT,
    ENHANCED,
    MR,
    PARAMETRIC_MAP,
    SC,
    US,
    item,
    prepare,
    read_one,
    read_or_refuse,
    read_row,
    repack,
    shown,
    write,
)  # fmt: skip
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)  # fmt: skip

from medbudget import load_images
from medbudget.data.layouts import write_dicom
from medbudget.data.volumes import find_sources, read_pixels
from medbudget.images import ImageError

NATIVE = [
    ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian,
]  # fmt: skip
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
NOISE = np.random.default_rng(0).integers(0, 4000, (3, 32, 40)).astype(np.uint16)


def prepared(root, out, **options):
    """Prepare one image of a folder at 16 pixels and return it in gray."""
    prepare(root, out, size=16, **options)
    return shown(out)


def refused(root, out, **options):
    """Prepare a folder and return why its only image is left out."""
    (broken,) = prepare(root, out, size=16, **options).broken
    return broken[1]


# --------------------------------------------------------------- what the header promises is there

SHORT = [
    (np.full((3, 64, 64), 7, np.uint16), 2 * 64 * 64 * 2, {}),
    (np.full((64, 64, 3), 7, np.uint8), 64 * 64 * 2, {"sop": US}),
    (np.full((64, 64), 7, np.uint16), 64 * 64 * 2 - 2, {}),
    (np.full((63, 63), 7, np.uint8), 63 * 63 - 1, {"PhotometricInterpretation": "MONOCHROME1"}),
    (np.full((8, 8, 3), 7, np.uint8), 126, {"sop": US, "PhotometricInterpretation": "YBR_FULL_422"}),
    (np.zeros((3, 9), np.uint8), 20,
     {"Rows": 9, "Columns": 19, "BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}),
]  # fmt: skip


@pytest.mark.parametrize("syntax", NATIVE)
def test_native_pixels_are_read_as_they_are_or_refused_where_some_are_missing(tmp_path, syntax):
    for kind in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32):
        limits = np.iinfo(kind)
        values = np.linspace(limits.min // 2, limits.max // 2, 63).astype(kind).reshape(7, 9)
        write(tmp_path / "a.dcm", values, sop=SC, syntax=syntax)
        found = read_one(tmp_path).values
        assert found.dtype == kind and np.array_equal(found[0], values)
    for pixels, keep, tags in SHORT:
        write(tmp_path / "a.dcm", pixels, keep=keep, syntax=syntax, **tags)
        found = read_or_refuse(tmp_path)
        assert isinstance(found, str) and ("claims" in found or "damaged" in found)


def test_a_deflated_file_that_is_cut_or_holds_something_else(tmp_path):
    zeros = np.zeros((64, 64), np.uint16)
    path = write(tmp_path / "a.dcm", zeros, syntax=DeflatedExplicitVRLittleEndian)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert isinstance(read_or_refuse(tmp_path), str)
    start = 144 + int(pydicom.dcmread(io.BytesIO(content)).file_meta.FileMetaInformationGroupLength)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(content[:start] + packer.compress(bytes(2**20)) + packer.flush())
    assert isinstance(read_or_refuse(tmp_path), str)


def pack(frame, syntax, folder):
    """Return a frame as a compressed stream."""
    compressor = {JPEGLosslessSV1: "JPEG", JPEG2000Lossless: "JPEG2000"}.get(syntax)
    data = pydicom.dcmread(write_dicom(folder / "one.dcm", frame, compressor=compressor))
    if compressor is None:
        data.compress(syntax)
    return next(generate_frames(data.PixelData, number_of_frames=1))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_compressed_frames_that_are_damaged_missing_or_of_another_size(tmp_path, syntax, capfd):
    streams = [pack(frame, syntax, tmp_path) for frame in NOISE]

    def read(fragments, n=3, **tags):
        path = write(tmp_path / "in" / "a.dcm", NOISE, sop=SC, keep=2)
        return read_or_refuse(repack(path, fragments, syntax, NumberOfFrames=n, **tags).parent)

    assert np.array_equal(read(streams), NOISE)
    assert np.array_equal(read(streams[:1], 1), NOISE[:1])
    assert "Corrupt" not in capfd.readouterr().err
    half, first = len(streams[0]) // 4 * 2, streams[0]
    if syntax != RLELossless:  # RLE frames are of one fragment each (PS3.5 A.4.2)
        assert np.array_equal(read([first[:half], first[half:]], 1), NOISE[:1])
        assert isinstance(read([first], 1, Rows=40, Columns=32), str)
    for fragments, n in (
        (streams[:2], 3), (streams, 2), ([], 1), ([first[:half]], 1), ([first[:half], *streams[1:]], 3),
        ([first[half:]], 1), ([b""], 1), ([b"\0" * 64], 1),
        ([first[:half] + b"\xff\xd9"], 1),  # cut, and closed again
        *([([first[: half - 3] + first[half:]], 1)] if syntax == RLELossless else []),
    ):  # fmt: skip
        assert isinstance(read(fragments, n), str), (syntax, len(fragments), n)
    path = repack(write(tmp_path / "in" / "a.dcm", NOISE, sop=SC, keep=2), streams, syntax)
    content = path.read_bytes()
    for part in (0.3, 0.7, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        assert isinstance(read_or_refuse(tmp_path / "in"), str), part


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_stream_that_was_cut_and_closed_again_is_refused(tmp_path, options):
    values = (NOISE[0] // 16).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", **options)
    whole = stream.getvalue()
    for content, fine in ((whole, True), (whole[: len(whole) // 2] + b"\xff\xd9", False)):
        root = tmp_path / str(fine)
        repack(write(root / "a.dcm", values, sop=SC), [content], JPEGBaseline8Bit)
        assert isinstance(read_or_refuse(root), np.ndarray) == fine
        (root / "a.dcm").unlink()
        (root / "a.jpg").write_bytes(content + b"what follows is passed over \xff\xd9")
        assert isinstance(read_or_refuse(root), np.ndarray) == fine
    with pytest.raises(ImageError, match="end too early"):
        load_images(tmp_path / "False")


@pytest.mark.parametrize(
    ("name", "kind"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")]
)
def test_float_pixels_are_read(tmp_path, name, kind):
    values = np.linspace(-0.5, 2e-3, 3 * 64).astype(kind).reshape(3, 8, 8)
    tags = dict.fromkeys(("PixelData", "BitsStored", "HighBit", "PixelRepresentation"))
    tags |= {"BitsAllocated": values.itemsize * 8, "sop": PARAMETRIC_MAP}
    broken = np.where(np.arange(192).reshape(3, 8, 8) == 9, np.nan, values)
    for content, right in (
        (values.tobytes(), values), (broken.astype(kind).tobytes(), "not a number"),
        (values.tobytes()[:-8], "claims"),
    ):  # fmt: skip
        write(tmp_path / "a.dcm", values, **tags, **{name: content})
        found = read_or_refuse(tmp_path)
        assert right in found if isinstance(right, str) else np.array_equal(found, right)


# --------------------------------------------------------------- bits and numbers


@pytest.mark.parametrize(
    ("stored", "high"), [(12, 11), (12, 13), (12, 15), (10, 11), (16, 15), (1, 0)]
)
@pytest.mark.parametrize("signed", [False, True])
def test_bits_in_odd_places(tmp_path, stored, high, signed):
    """Bits beyond those that are stored mean nothing (PS3.5 8.1.1): here all of them are set."""
    low = -(2 ** (stored - 1)) if signed else 0
    values = np.linspace(low, low + 2**stored - 1, 96).astype(np.int64).reshape(8, 12)
    mask = (2**stored - 1) << (high + 1 - stored)
    cells = ((values & (2**stored - 1)) << (high + 1 - stored)) | (0xFFFF & ~mask)
    tags = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
    write(tmp_path / "a.dcm", cells.astype(np.uint16), **tags)
    assert np.array_equal(read_one(tmp_path).values[0], values)


def test_headers_that_contradict_themselves_are_refused(tmp_path):
    for tags, why in (
        ({"BitsStored": 12, "HighBit": 10}, "bits"), ({"BitsStored": 17}, "bits"),
        ({"BitsAllocated": 12}, "bits"), ({"BitsAllocated": 24}, "bits"), ({"BitsStored": 0}, "bits"),
        ({"HighBit": 16}, "bits"), ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope is 0"),
        ({"PixelData": None}, "claims"), ({"PixelData": b""}, "claims"), ({"Rows": None}, "claims"),
        ({"Rows": 0}, "claims"),
    ):  # fmt: skip
        write(tmp_path / "a.dcm", RAMP, sop=MR, **tags)
        assert why in read_or_refuse(tmp_path), tags


def test_single_bit_frames(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7), np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little")
    tags = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "NumberOfFrames": 3}
    write(tmp_path / "in" / "a.dcm", packed[None], sop=SC, Rows=5, Columns=7, **tags)
    assert np.array_equal(read_one(tmp_path / "in").values, bits)
    image = prepared(tmp_path / "in", tmp_path / "out")
    assert image.max() > 200 and image.min() == 0


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16])
def test_monochrome1_is_inverted_after_its_window(tmp_path, kind):
    values = np.linspace(0 if kind == np.uint8 else -100, 100, 256).astype(kind).reshape(16, 16)
    images = []
    for model in ("MONOCHROME1", "MONOCHROME2"):
        tags = {"WindowCenter": int(values[8, 0]), "WindowWidth": 101}
        write(tmp_path / model / "a.dcm", values, PhotometricInterpretation=model, **tags)
        assert np.array_equal(read_one(tmp_path / model).values[0], values)
        images.append(prepared(tmp_path / model, tmp_path / f"out{model}").astype(int))
    assert np.abs(images[0] - (255 - images[1])).max() <= 1
    assert images[0][0, 0] > images[0][-1, -1]


# --------------------------------------------------------------- each slice its own rescale


def write_slices(root, z, *, pixels=None, first=0, series="1.2.77", **tags):
    """Write axial slices; a tag that can be called gets the number of the slice."""
    for k, place in enumerate(z):
        own = {name: value(k) if callable(value) else value for name, value in tags.items()}
        plane = {"ImageOrientationPatient": AXIAL, "PixelSpacing": [1, 1], **own}
        values = RAMP + 1000 * (first + k) if pixels is None else pixels[k]
        write(root / f"{first + k:03d}.dcm", values, series=series,
              **{"ImagePositionPatient": [0, 0, place], **plane})  # fmt: skip


def same(value, kind=np.uint16):
    return [np.full((8, 8), value, kind)] * 4


@pytest.mark.parametrize(
    ("pixels", "right", "tags"),
    [
        (same(9), [9, 4.5, 2.25, 22.5], {"RescaleSlope": [1, 0.5, 0.25, 2.5], "RescaleIntercept": [0] * 4}),
        (same(30000, np.int16), [30000, 40000, -40000, 30000],
         {"RescaleSlope": [1] * 4, "RescaleIntercept": [0, 10000, -70000, 0]}),
        ([np.full((8, 8), 200, np.uint8), *same(-1000, np.int16)[:3]], [200, -1000, -1000, -1000], {}),
        (same(1500), [1500, 3000, 4500, 1500],
         {"RescaleSlope": [1, 2, 3, 1], "RescaleIntercept": [0] * 4,
          "PhotometricInterpretation": ["MONOCHROME1"] * 4, "BitsStored": [12] * 4, "HighBit": [11] * 4}),
        (same(70000, np.uint32), [70000, -1000, 70000, 70000],
         {"RescaleSlope": [1] * 4, "RescaleIntercept": [0, -71000, 0, 0]}),
    ],
)  # fmt: skip
def test_each_slice_has_its_own_numbers(tmp_path, pixels, right, tags):
    tags = {name: values.__getitem__ for name, values in tags.items()}
    write_slices(tmp_path, [0, 3, 6, 9], pixels=pixels, **tags)
    assert np.allclose(read_one(tmp_path).values[:, 0, 0].astype(float), right)


def test_each_slice_has_its_own_window(tmp_path):
    ramp = np.tile(np.arange(16, dtype=np.uint16) * 60, (16, 1))
    window = {"WindowCenter": lambda k: 450 if k else 10, "WindowWidth": lambda k: 901 if k else 20}
    write_slices(tmp_path / "in" / "c", range(0, 15, 3), pixels=[ramp] * 5, **window)
    assert (prepared(tmp_path / "in", tmp_path / "out") == 255).mean() < 0.2
    assert read_row(tmp_path / "out")["window"] == "tags: -0.5..899.5"
    prone = tmp_path / "prone"  # slices are turned over: the windows go with them
    window = {"WindowCenter": lambda k: 100 * (k + 1), "WindowWidth": 50}
    turned = {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]}
    write_slices(prone, [0, -1, -2], pixels=[ramp, ramp + 1, ramp + 2], **window, **turned)
    pixels = read_one(prone)
    assert pixels.values[:, 0, 0].tolist() == [2, 1, 0]
    assert [w.low + w.high for w in pixels.windows] == [599, 399, 199]


def lut(values, first=0, bits=16):
    return item(LUTDescriptor=[len(values), first, bits], LUTData=values.astype("<u2").tobytes())


def test_a_modality_lut_is_applied(tmp_path):
    table = np.arange(256) ** 2 // 4
    sequence = lut(table)
    sequence.ModalityLUTType = "OD"
    tags = {"WindowCenter": 8128, "WindowWidth": 16257, "ModalityLUTSequence": [sequence]}
    write(tmp_path / "in" / "a.dcm", RAMP, sop=CR, **tags)
    assert np.array_equal(read_one(tmp_path / "in").values[0], table[RAMP])
    image = prepared(tmp_path / "in", tmp_path / "out")
    assert image.max() == 255 and np.abs(image - table[RAMP] / 16256 * 255).max() < 1


def test_voi_luts_and_windows_are_those_of_pydicom(tmp_path):
    for i, tags in enumerate((
        {"VOILUTSequence": [lut(np.arange(200)[::-1] * 327, first=10)]},
        {"WindowCenter": [100, 3], "WindowWidth": [80, 2]},
        {"WindowCenter": 100, "WindowWidth": 80, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 100, "WindowWidth": 80, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100, "WindowWidth": 1},
    )):  # fmt: skip
        root = tmp_path / str(i)
        path = write(root / "in" / "a.dcm", RAMP, sop=CR, **tags)
        right = apply_voi_lut(RAMP, pydicom.dcmread(path)).astype(float)
        found = prepared(root / "in", root / "out").astype(float)
        assert np.abs(found - right / 65535 * 255).max() <= 1.1, tags
    # a table whose entries use 12 of the 16 bits that it claims
    write(tmp_path / "dark" / "a.dcm", RAMP * 16, sop=CR, VOILUTSequence=[lut(np.arange(4096))])
    assert np.abs(prepared(tmp_path / "dark", tmp_path / "out") - RAMP.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"WindowCenter": 100, "WindowWidth": 0}, "use --window percentile"),
        ({"WindowCenter": 50000, "WindowWidth": 100}, "lies beside all of its values"),
        ({"WindowCenter": -5000, "WindowWidth": 100}, "lies beside all of its values"),
        (
            {"VOILUTSequence": [item(LUTDescriptor=[300, 0, 16], LUTData=bytes(580))]},
            "LUT is damaged",
        ),
    ],
)
def test_a_damaged_window_is_refused_and_can_be_passed_by(tmp_path, tags, why):
    write(tmp_path / "in" / "a.dcm", RAMP, sop=CR, **tags)
    assert why in refused(tmp_path / "in", tmp_path / "tags")
    assert prepared(tmp_path / "in", tmp_path / "percentile", window="percentile").max() == 255


# --------------------------------------------------------------- padding


def test_padding_is_black_and_no_part_of_windows(tmp_path):
    signed, first, ranged = RAMP.astype(np.int16) + 1000, RAMP + 1000, RAMP + 1000
    signed[:4] = signed[12:] = -2000
    first[:4], ranged[:4] = 0, 5 + np.arange(16)
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    window = {"WindowCenter": 1127, "WindowWidth": 400}
    for name, values, tags in (
        ("signed", signed, {"PixelPaddingValue": -2000}),
        ("inverted", first, {"PixelPaddingValue": 0, **inverted}),
        ("range", ranged, {"PixelPaddingValue": 20, "PixelPaddingRangeLimit": 5, **window, **inverted}),
    ):  # fmt: skip
        write(tmp_path / name / "a.dcm", values, sop=CT, **tags)
        image = prepared(tmp_path / name, tmp_path / f"out_{name}")
        assert image[:4].max() == 0 and image[4:12].max() > 160, name
    write(tmp_path / "all" / "a.dcm", np.zeros((8, 8), np.uint16), PixelPaddingValue=0)
    assert "padding" in refused(tmp_path / "all", tmp_path / "out_all")


@pytest.mark.parametrize(
    ("kind", "bits", "said", "padded"),
    [
        (np.uint16, 12, 4096 + 7, None), (np.uint16, 12, 65535, None), (np.uint16, 12, 7, 7),
        (np.int16, 12, 4000, None), (np.int16, 12, 65536 - 7, -7), (np.int16, 16, 63536, -2000),
        (np.uint8, 8, 300, None), (np.uint8, 8, 7, 7),
    ],
)  # fmt: skip
def test_padding_is_what_the_value_says_and_does_not_wrap(tmp_path, kind, bits, said, padded):
    values = np.full((8, 8), 100, kind)
    values[0] = 7 if padded is None else padded
    tags = {"BitsStored": bits, "HighBit": bits - 1}
    data = pydicom.dcmread(write(tmp_path / "a.dcm", values, sop=SC, **tags))
    data.add_new(0x00280120, "US", said)  # as some do, also where pixels are signed
    data.save_as(tmp_path / "a.dcm")
    padding = read_one(tmp_path).padding
    assert padding is None if padded is None else padding[0].sum() == padding[0, 0].sum() == 8


# --------------------------------------------------------------- colour


def test_colour_of_all_models(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    planar = np.moveaxis(rgb, -1, 0).copy().reshape(12, 16, 3)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    index, names = RAMP.astype(np.uint8), ("Red", "Green", "Blue")
    shades = [np.arange(256, dtype="<u2") * 256 // (i + 1) for i in range(3)]
    palette = {f"{c}PaletteColorLookupTableData": s.tobytes() for c, s in zip(names, shades)}
    palette |= {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in names}
    right = np.stack([index.astype(int) * 256 // (i + 1) >> 8 for i in range(3)], axis=-1)
    for values, model, tags, expected in (
        (rgb, "RGB", {}, rgb), (planar, "RGB", {"PlanarConfiguration": 1}, rgb),
        (ybr, "YBR_FULL", {}, rgb), (index, "PALETTE COLOR", palette, right),
        (np.zeros((8, 8, 3), np.uint16), "RGB", {}, "16 bits"), (rgb, "CMYK", {}, "colour model"),
    ):  # fmt: skip
        write(tmp_path / "a.dcm", values, sop=US, PhotometricInterpretation=model, **tags)
        found = read_or_refuse(tmp_path)
        if isinstance(expected, str):
            assert expected in found
        else:
            assert np.abs(found[0].astype(int) - expected).max() <= (
                3 if model == "YBR_FULL" else 0
            )


def test_a_jfif_stream_is_ycbcr_whatever_the_tag_says(tmp_path):
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[..., 0], rgb[..., 1] = 200, 40
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=95)
    assert stream.getvalue()[6:10] == b"JFIF"
    for said in ("RGB", "YBR_FULL_422", "YBR_FULL"):
        path = write(tmp_path / "a.dcm", rgb, sop=US, PhotometricInterpretation=said)
        repack(path, [stream.getvalue()], JPEGBaseline8Bit)
        assert np.abs(read_one(tmp_path).values[0, 5, 5].astype(int) - [200, 40, 0]).max() < 12


# --------------------------------------------------------------- enhanced files of many frames


def rescaled(slope, intercept=0):
    return [item(RescaleIntercept=intercept, RescaleSlope=slope, RescaleType="US")]


def write_enhanced(path, z, slopes=None, planes=None, windows=None, shared_slope=None, spacings=None,
                   **tags):  # fmt: skip
    frames = np.stack([np.full((8, 8), 100 * (k + 1), np.uint16) for k in range(len(z))])
    measures = [item(PixelSpacing=s, SliceThickness=3) for s in spacings or [[1, 2]]]
    shared = item(PixelMeasuresSequence=measures[:1])
    if planes is None:
        shared.PlaneOrientationSequence = [item(ImageOrientationPatient=AXIAL)]
    if shared_slope:
        shared.PixelValueTransformationSequence = rescaled(shared_slope, 1)
    per_frame = []
    for k in range(len(z)):
        group = item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z[k]])])
        if planes:
            group.PlaneOrientationSequence = [item(ImageOrientationPatient=planes[k])]
        if slopes:
            group.PixelValueTransformationSequence = rescaled(slopes[k])
        if windows:
            group.FrameVOILUTSequence = [item(WindowCenter=windows[k], WindowWidth=101)]
        if spacings:
            group.PixelMeasuresSequence = [measures[k]]
        per_frame.append(group)
    groups = {
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": per_frame,
    }
    return write(path, frames, sop=ENHANCED, **{**groups, **tags})


@pytest.mark.parametrize(
    ("right", "z", "options"),
    [
        ([50, 200, 600], [0, 3, 6], {"slopes": [0.5, 1, 2]}),
        ([201, 401, 601], [0, 3, 6], {"shared_slope": 2}),
        ([100, 400, 900], [0, 3, 6], {"slopes": [1, 2, 3], "shared_slope": 9}),
        ([100, 400, 200, 500, 300], [0, 6, 12, 3, 9], {"slopes": [1] * 5}),
        ([300, 200, 100], [6, 3, 0], {"windows": [60, 30, 10]}),
        ("one position", [0, 3, 6, 0, 3, 6], {}),
        ("several planes", [0, 3, 6, 9], {"planes": [AXIAL] * 3 + [CORONAL]}),
        ("describes 2 frames", [0, 3, 6], {"PerFrameFunctionalGroupsSequence": [item(), item()]}),
        ("spacings", [0, 3], {"spacings": [[1, 1], [2, 2]]}),
    ],
)
def test_enhanced_files(tmp_path, right, z, options):
    write_enhanced(tmp_path / "a.dcm", z, **options)
    found = read_or_refuse(tmp_path)
    if isinstance(right, str):
        assert right in found
    else:
        assert np.allclose(found[:, 0, 0], right)
        pixels = read_one(tmp_path)
        assert pixels.spacing == (1, 2)
        assert [w.low + 50.5 for w in pixels.windows] == sorted(options.get("windows", []))


def test_frames_without_positions_stay_in_their_order(tmp_path):
    write(tmp_path / "a.dcm", np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), sop=US)
    assert read_one(tmp_path).values[:, 0, 0].tolist() == [0, 64, 128, 192]
    assert "no axial plane" in read_or_refuse(tmp_path, plane="axial")


# --------------------------------------------------------------- which slices are one volume


def sizes(root, notes=None):
    return sorted(len(source.files) for source in find_sources(root, notes=notes))


def test_orientations_and_spacings_are_numbers(tmp_path):
    tilt = lambda k: [1, 0, 0, 0, 1 - 1e-7 * k, 1e-5 * k]  # noqa: E731
    near = lambda k: [1 + 1e-6 * k, 1]  # noqa: E731
    write_slices(tmp_path, [0, 3, 6, 9], ImageOrientationPatient=tilt, PixelSpacing=near)
    assert sizes(tmp_path, notes := []) == [4] and not notes


def test_scouts_and_other_planes_are_set_apart(tmp_path):
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_slices(tmp_path / "a", [0, 3, 6], ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    write_slices(tmp_path / "a", [0], first=9, ImageType=localizer, ImageOrientationPatient=CORONAL)
    assert sizes(tmp_path, notes := []) == [3] and "scouts" in notes[0]
    write_slices(tmp_path / "b", [0, 3, 6], series="1.2.78")
    write_slices(tmp_path / "b", [0, 3], first=9, series="1.2.78", ImageOrientationPatient=CORONAL,
                 ImagePositionPatient=lambda k: [0, 5 * k, 0])  # fmt: skip
    write_slices(tmp_path / "c", [0, 3, 6], series="1.2.79")
    write_slices(tmp_path / "c", [9, 12], first=9, series="1.2.79", PixelSpacing=[2, 2])
    write_slices(
        tmp_path / "d", [0, 3, 6, 9], series="1.2.80", ImageType=localizer
    )  # used as it is
    assert sizes(tmp_path, notes := []) == [2, 2, 3, 3, 3, 4]
    assert any("2 series: split" in note for note in notes)


def test_gaps_and_tilts_are_named_and_refused_for_another_plane(tmp_path):
    for i, z in enumerate(([0, 3, 6, 12, 15], [0, 3, 8, 13])):
        write_slices(tmp_path / str(i), z)
        assert sizes(tmp_path / str(i), notes := []) == [len(z)] and "unevenly" in notes[0]
        assert len(read_one(tmp_path / str(i)).values) == len(z)
        assert "is one missing" in read_or_refuse(tmp_path / str(i), plane="coronal")
    write_slices(tmp_path / "even", [0, 3, 6.1, 9])
    assert read_one(tmp_path / "even", plane="coronal").values.shape == (16, 4, 16)
    tilted = lambda k: [0, 1.0 * k, 3.0 * k]  # noqa: E731
    write_slices(tmp_path / "tilted", range(4), ImagePositionPatient=tilted)
    assert len(read_one(tmp_path / "tilted").values) == 4
    assert "gantry" in read_or_refuse(tmp_path / "tilted", plane="sagittal")


@pytest.mark.parametrize("tag", ["TemporalPositionIdentifier", "DiffusionBValue", "SequenceName"])
def test_time_points_and_b_values_are_kept_apart(tmp_path, tag):
    for t in range(3):
        value = f"*ep_b{50 * t}" if tag == "SequenceName" else 50 * t + 1
        write_slices(tmp_path, [0, 3, 6, 9], first=10 * t, **{tag: value})
    assert sizes(tmp_path, notes := []) == [4, 4, 4] and tag in notes[0]
    for source in find_sources(tmp_path):
        values = read_pixels(tmp_path, source).values[:, 0, 0]
        assert (np.diff(values.astype(int)) == 1000).all()


def test_a_position_twice_is_refused(tmp_path):
    write_slices(tmp_path, [0, 3, 6, 0, 3, 6])
    assert "one position" in read_or_refuse(tmp_path)


def test_slices_of_a_series_in_two_classes_stay_images_of_their_own(tmp_path):
    root, flat, series = tmp_path / "in", tmp_path / "flat", generate_uid()
    flat.mkdir()
    for k in range(6):
        label = "haemorrhage" if k in (3, 4) else "normal"
        path = write(root / label / f"{k}.dcm", RAMP + 100 * k, series=series, PixelSpacing=[1, 1],
                     ImagePositionPatient=[0, 0, 3.0 * k], ImageOrientationPatient=AXIAL)  # fmt: skip
        shutil.copy(path, flat / path.name)
    both = {("train", "haemorrhage"): 2, ("train", "normal"): 4}
    report = prepare(root, tmp_path / "out")
    assert report.counts == both
    assert any("several folders of classes" in note for note in report.notes)
    rows = [f"{k}.dcm,{'haemorrhage' if k in (3, 4) else 'normal'}\n" for k in range(6)]
    for name, lines, counts in (
        ("all", rows, both),
        ("one", rows[3:4], {("train", "haemorrhage"): 1}),
    ):
        (tmp_path / "t.csv").write_text("file,class\n" + "".join(lines))
        report = prepare(flat, tmp_path / name, labels=tmp_path / "t.csv")
        assert report.counts == counts and not report.broken


# --------------------------------------------------------------- places, spacing, patients


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        ([1, 0, 0, 0, 1, 0], lambda v: v),
        ([-1, 0, 0, 0, -1, 0], lambda v: v[::-1, ::-1]),  # prone
        ([-1, 0, 0, 0, 1, 0], lambda v: v[:, ::-1]),  # feet first, seen from above
        ([0, 1, 0, 1, 0, 0], lambda v: v.T),
    ],
)
def test_a_single_slice_is_turned(tmp_path, orientation, turn):
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": orientation}
    write(tmp_path / "a.dcm", turn(RAMP).copy(), PixelSpacing=[1, 1], **place)
    for plane in ("native", "axial"):
        assert np.array_equal(read_one(tmp_path, plane=plane).values[0], RAMP)
    assert "one axial slice" in read_or_refuse(tmp_path, plane="coronal")


@pytest.mark.parametrize(
    ("tags", "spacing", "high"),
    [
        ({"PixelSpacing": [2, 1], "ImagerPixelSpacing": [1, 1]}, "1 x 1", 32),
        ({"ImagerPixelSpacing": [0.5, 0.5]}, "0.25 x 0.25", 32),
        ({}, "", 32),
        ({"PixelAspectRatio": [1, 2]}, "", 16),
    ],
)
def test_spacing_that_nobody_stated_is_not_in_the_manifest(tmp_path, tags, spacing, high):
    write(tmp_path / "in" / "a.dcm", RAMP, sop=CR, **tags)
    prepare(tmp_path / "in", tmp_path / "out", size=32)
    row = read_row(tmp_path / "out")
    assert row["spacing"] == spacing
    assert (shown(tmp_path / "out").max(axis=1) > 0).sum() == high
    assert ("at the detector" in row["window"]) == (list(tags) == ["ImagerPixelSpacing"])


def test_a_patient_id_in_any_character_set(tmp_path):
    patients = {"ISO_IR 192": "MÜLLER", "ISO_IR 100": "MÖLLER", "GB18030": "患者1",
                "ISO_IR 144": "Иван", "NONE": "X"}  # fmt: skip
    for i, (charset, patient) in enumerate(patients.items()):
        path = tmp_path / f"in/c/{i}.dcm"
        write(path, RAMP + i, patient=patient, SpecificCharacterSet=charset)
    assert [s.patient for s in find_sources(tmp_path / "in")] == [*patients.values()]
    assert prepare(tmp_path / "in", tmp_path / "out", key=tmp_path / "key.csv").made == 5
    key = (tmp_path / "key.csv").read_text(encoding="utf-8")
    assert all(patient in key for patient in patients.values())


def test_what_is_no_image_is_said(tmp_path):
    root = tmp_path / "in"
    for i in range(3):
        write(root / "a" / f"{i}.dcm", RAMP + i, patient=f"a{i}")
    bare = pydicom.dcmread(write(tmp_path / "x", RAMP, patient="P9"))
    for name, implicit in (("IM0009", True), ("IM0010", False)):  # without preamble
        plain = pydicom.Dataset()
        plain.update(bare)
        plain.PixelData = (RAMP + 100 + implicit).tobytes()
        encoding = {"implicit_vr": implicit, "little_endian": True, "enforce_file_format": False}
        pydicom.dcmwrite(root / "a" / name, plain, **encoding)
    for name, kind in (
        ("DICOMDIR", "1.2.840.10008.1.3.10"), ("a/sr.dcm", "1.2.840.10008.5.1.4.1.1.88.11"),
        ("a/pr.dcm", "1.2.840.10008.5.1.4.1.1.11.1"), ("a/ko.dcm", "1.2.840.10008.5.1.4.1.1.88.59"),
    ):  # fmt: skip
        write(root / name, RAMP, sop=kind, PixelData=None, Rows=None, Columns=None)
    for name in ("x.svg", "z.mgz", "v.hdr", "v.img", "i.dcm.gz", "README", "noise"):
        (root / "a" / name).write_bytes(b"\x02\0\x10\0UI" if name == "noise" else b"text")
    report = prepare(root, tmp_path / "out")
    assert report.made == 5 and not report.broken
    (said,) = (note for note in report.notes if "passed over" in note)
    for kind in ("1 DICOM Media Storage Directory", "Basic Text SR", ".svg", ".gz", ".mgz", ".img"):
        assert kind in said
    assert "README" not in said
