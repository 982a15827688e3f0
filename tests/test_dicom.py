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
from medbudget.data.prepare import BrokenCase
from medbudget.data.volumes import find_sources, read_pixels
from medbudget.images import ImageError

NATIVE = [
    ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian,
]  # fmt: skip
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


# --------------------------------------------------------------- what the header promises is there


@pytest.mark.parametrize(
    ("pixels", "keep", "tags"),
    [
        (np.full((256, 256), 7, np.uint16), 1000, {}),
        (np.full((3, 64, 64), 7, np.uint16), 2 * 64 * 64 * 2, {}),
        (np.full((64, 64, 3), 7, np.uint8), 64 * 64 * 2, {"sop": US}),
        (np.full((64, 64), 7, np.uint8), 64 * 60, {"PhotometricInterpretation": "MONOCHROME1"}),
        (np.full((64, 64), 7, np.uint16), 64 * 64 * 2 - 2, {}),
        (np.full((63, 63), 7, np.uint8), 63 * 63 - 1, {}),
        (np.full((8, 8, 3), 7, np.uint8), 126, {"sop": US, "PhotometricInterpretation": "YBR_FULL_422"}),
        (np.zeros((3, 9), np.uint8), 20,
         {"Rows": 9, "Columns": 19, "BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("syntax", NATIVE)
def test_pixel_data_that_are_too_short(tmp_path, pixels, keep, tags, syntax):
    write(tmp_path / "a.dcm", pixels, keep=keep, syntax=syntax, **tags)
    found = read_or_refuse(tmp_path)
    assert isinstance(found, str), found.shape
    assert "claims" in found or "damaged" in found


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_native_number_types_and_byte_orders(tmp_path, syntax, kind):
    limits = np.iinfo(kind)
    values = np.linspace(limits.min // 2, limits.max // 2, 63).astype(kind).reshape(7, 9)
    write(tmp_path / "a.dcm", values, sop=SC, syntax=syntax)
    found = read_one(tmp_path).values
    assert found.dtype == kind and np.array_equal(found[0], values)


def test_a_deflated_file_that_is_cut_or_a_bomb(tmp_path):
    zeros = np.zeros((64, 64), np.uint16)
    path = write(tmp_path / "a.dcm", zeros, syntax=DeflatedExplicitVRLittleEndian)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert isinstance(read_or_refuse(tmp_path), str)
    start = 144 + int(pydicom.dcmread(io.BytesIO(content)).file_meta.FileMetaInformationGroupLength)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(2**20)) + packer.flush()
    path.write_bytes(content[:start] + bomb)
    assert isinstance(read_or_refuse(tmp_path), str)


@pytest.mark.parametrize(
    ("compressor", "syntax"),
    [("JPEG", JPEGLosslessSV1), ("JPEG2000", JPEG2000Lossless), (None, JPEGLSLossless), (None, RLELossless)],
)  # fmt: skip
def test_compressed_frames_that_are_cut_missing_or_of_another_size(tmp_path, compressor, syntax):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 4000, (3, 32, 40)).astype(np.uint16)
    streams = []
    for frame in frames:
        path = tmp_path / "one" / "x.dcm"
        write_dicom(path, frame, compressor=compressor)
        data = pydicom.dcmread(path)
        if compressor is None:
            data.compress(syntax)
        streams.append(next(generate_frames(data.PixelData, number_of_frames=1)))
    root = tmp_path / "in"

    def read(fragments, n=3, **tags):
        write(root / "a.dcm", frames, sop=SC, keep=2)
        return read_or_refuse(
            repack(root / "a.dcm", fragments, syntax, NumberOfFrames=n, **tags).parent
        )

    assert np.array_equal(read(streams), frames)
    assert np.array_equal(read(streams[:1], 1), frames[:1])
    half = len(streams[0]) // 4 * 2
    if syntax != RLELossless:  # RLE frames are of one fragment each (PS3.5 A.4.2)
        assert np.array_equal(read([streams[0][:half], streams[0][half:]], 1), frames[:1])
        assert isinstance(read(streams[:1], 1, Rows=40, Columns=32), str)
    for fragments, n in (
        (streams[:2], 3), (streams, 2), ([], 1), ([streams[0][:half]], 1),
        ([streams[0][:half], *streams[1:]], 3), ([streams[0][half:]], 1), ([b""], 1), ([b"\0" * 64], 1),
    ):  # fmt: skip
        assert isinstance(read(fragments, n), str), (syntax, len(fragments), n)


def test_a_cut_file_with_compressed_pixels(tmp_path):
    for compressor in ("JPEG", "JPEG2000", "JPEGLS"):
        values = np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16)
        path = write_dicom(tmp_path / "a.dcm", values, compressor=compressor)
        content = path.read_bytes()
        for part in (0.3, 0.7, 0.99):
            path.write_bytes(content[: int(len(content) * part)])
            assert isinstance(read_or_refuse(tmp_path), str), (compressor, part)


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
    cells = (((values & (2**stored - 1)) << (high + 1 - stored)) | (0xFFFF & ~mask)).astype(
        np.uint16
    )
    tags = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
    write(tmp_path / "a.dcm", cells, **tags)
    assert np.array_equal(read_one(tmp_path).values[0], values)


@pytest.mark.parametrize(
    "tags",
    [{"BitsStored": 12, "HighBit": 10}, {"BitsStored": 17}, {"BitsAllocated": 12}, {"BitsAllocated": 24},
     {"BitsStored": 0}, {"HighBit": 16}],
)  # fmt: skip
def test_bits_that_contradict_themselves_are_refused(tmp_path, tags):
    write(tmp_path / "a.dcm", RAMP, **tags)
    assert "bits" in read_or_refuse(tmp_path)


def test_single_bit_frames(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7), np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little")
    tags = {
        "BitsAllocated": 1,
        "BitsStored": 1,
        "HighBit": 0,
        "NumberOfFrames": 3,
        "Rows": 5,
        "Columns": 7,
    }
    write(tmp_path / "in" / "a.dcm", packed[None], sop=SC, **tags)
    assert np.array_equal(read_one(tmp_path / "in").values, bits)
    prepare(tmp_path / "in", tmp_path / "out", size=8)
    image = np.asarray(Image.open(next((tmp_path / "out").rglob("p*.png"))))
    assert image.max() > 200 and image.min() == 0


@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_monochrome1_with_signed_pixels(tmp_path, kind):
    values = np.linspace(-100, 100, 256).astype(kind).reshape(16, 16)
    for model in ("MONOCHROME1", "MONOCHROME2"):
        write(
            tmp_path / model / "a.dcm",
            values,
            PhotometricInterpretation=model,
            WindowCenter=0,
            WindowWidth=201,
        )
        assert np.array_equal(read_one(tmp_path / model).values[0], values)
        prepare(tmp_path / model, tmp_path / f"out{model}", size=16)
    one, two = (
        np.asarray(Image.open(next((tmp_path / f"outMONOCHROME{i}").rglob("p*.png"))))
        for i in (1, 2)
    )
    assert np.abs(one.astype(int) - (255 - two.astype(int))).max() <= 1
    assert one[0, 0, 0] >= 254 and two[0, 0, 0] <= 1


# --------------------------------------------------------------- each slice its own rescale


def write_series(root, pixels, **per_slice):
    series = generate_uid()
    for k, values in enumerate(pixels):
        write(
            root / f"{k}.dcm", values, series=series, ImagePositionPatient=[0, 0, 3.0 * k],
            ImageOrientationPatient=AXIAL, PixelSpacing=[1, 1],
            **{name: values[k] for name, values in per_slice.items()},
        )  # fmt: skip


def same(value, kind=np.uint16):
    return [np.full((8, 8), value, kind)] * 4


@pytest.mark.parametrize(
    ("pixels", "right", "tags"),
    [
        (same(9), [9, 4.5, 2.25, 22.5], {"RescaleSlope": [1, 0.5, 0.25, 2.5], "RescaleIntercept": [0] * 4}),
        (same(30000), [30000, 120000, 30000, 30000],
         {"RescaleSlope": [1, 4, 1, 1], "RescaleIntercept": [0] * 4}),
        (same(30000, np.int16), [30000, 40000, -40000, 30000],
         {"RescaleSlope": [1] * 4, "RescaleIntercept": [0, 10000, -70000, 0]}),
        ([np.full((8, 8), 200, np.uint8), *same(1000)[:3]], [200, 1000, 1000, 1000], {}),
        ([np.full((8, 8), 200, np.uint16), *same(-1000, np.int16)[:3]], [200, -1000, -1000, -1000], {}),
        (same(1500), [1500, 3000, 4500, 1500],
         {"RescaleSlope": [1, 2, 3, 1], "RescaleIntercept": [0] * 4,
          "PhotometricInterpretation": ["MONOCHROME1"] * 4, "BitsStored": [12] * 4, "HighBit": [11] * 4}),
        ([np.full((8, 8), 70000, np.uint32)] * 4, [70000, -1000, 70000, 70000],
         {"RescaleSlope": [1] * 4, "RescaleIntercept": [0, -71000, 0, 0]}),
    ],
)  # fmt: skip
def test_each_slice_has_its_own_numbers(tmp_path, pixels, right, tags):
    write_series(tmp_path, pixels, **tags)
    assert np.allclose(read_one(tmp_path).values[:, 0, 0].astype(float), right)


def test_each_slice_has_its_own_window(tmp_path):
    ramp = np.tile(np.arange(16, dtype=np.uint16) * 60, (16, 1))
    widths = {"WindowCenter": [10, 450, 450, 450, 450], "WindowWidth": [20, 901, 901, 901, 901]}
    write_series(tmp_path / "in" / "c", [ramp] * 5, **widths)
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    image = shown(tmp_path / "out")
    assert (image == 255).mean() < 0.2
    row = read_row(tmp_path / "out")
    assert row["window"] == "tags: -0.5..899.5"
    prone = tmp_path / "prone"  # slices are turned over: the windows go with them
    for k in range(3):
        write(prone / f"{k}.dcm", ramp + k, series="1.2.9", ImagePositionPatient=[0, 0, -k],
              ImageOrientationPatient=[1, 0, 0, 0, -1, 0], PixelSpacing=[1, 1],
              WindowCenter=100 * (k + 1), WindowWidth=50)  # fmt: skip
    pixels = read_one(prone)
    assert pixels.values[:, 0, 0].tolist() == [2, 1, 0]
    assert [w.low + w.high for w in pixels.windows] == [599, 399, 199]


def test_a_slope_of_zero_and_text_for_a_number_are_refused(tmp_path):
    write(tmp_path / "a.dcm", RAMP, RescaleSlope=0, RescaleIntercept=0)
    assert "slope is 0" in read_or_refuse(tmp_path)


def lut(function="sq", first=0, bits=16, n=256, signed=False):
    table = (
        np.arange(n) ** 2 // 4 if function == "sq" else np.arange(n)[::-1] * (2**bits // n)
    ).astype("<u2")
    return item(LUTDescriptor=[n, first, bits], LUTData=table.tobytes()), table


def test_a_modality_lut_is_applied(tmp_path):
    sequence, table = lut()
    sequence.ModalityLUTType = "OD"
    write(
        tmp_path / "in" / "a.dcm",
        RAMP,
        sop=CR,
        WindowCenter=8128,
        WindowWidth=16257,
        ModalityLUTSequence=[sequence],
    )
    assert np.array_equal(read_one(tmp_path / "in").values[0], table[RAMP])
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    image = shown(tmp_path / "out")
    assert (
        image.max() == 255
        and np.array_equal(image, np.rint(np.clip((table[RAMP] + 0.5) / 16256, 0, 1) * 255))
    ) or (np.abs(image - table[RAMP] / 16256 * 255).max() < 1)


def test_voi_luts_and_windows_are_those_of_pydicom(tmp_path):
    sequence, _ = lut("falling", first=10, n=200)
    kinds = [
        {"VOILUTSequence": [sequence]}, {"WindowCenter": [100, 3], "WindowWidth": [80, 2]},
        {"WindowCenter": 100, "WindowWidth": 80, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 100, "WindowWidth": 80, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100, "WindowWidth": 1},
    ]  # fmt: skip
    for i, tags in enumerate(kinds):
        root = tmp_path / str(i)
        path = write(root / "in" / "a.dcm", RAMP, sop=CR, **tags)
        prepare(root / "in", root / "out", size=16)
        found = shown(root / "out").astype(float)
        right = apply_voi_lut(RAMP, pydicom.dcmread(path)).astype(float)
        assert np.abs(found - right / 65535 * 255).max() <= 1.1, tags


def test_a_damaged_window_can_be_passed_by(tmp_path):
    write(tmp_path / "in" / "a.dcm", RAMP, WindowCenter=100, WindowWidth=0)
    report = prepare(tmp_path / "in", tmp_path / "tags", size=16)
    assert "use --window percentile" in report.broken[0][1]
    assert prepare(tmp_path / "in", tmp_path / "percentile", size=16, window="percentile").made == 1


@pytest.mark.parametrize("centre", [50000, -5000])
def test_a_window_beside_all_values_is_refused(tmp_path, centre):
    write(tmp_path / "in" / "a.dcm", RAMP, WindowCenter=centre, WindowWidth=100)
    report = prepare(tmp_path / "in", tmp_path / "tags", size=16)
    assert "lies beside all of its values" in report.broken[0][1]
    assert prepare(tmp_path / "in", tmp_path / "percentile", size=16, window="percentile").made == 1


def test_a_voi_lut_with_too_few_entries_is_refused(tmp_path):
    table = item(LUTDescriptor=[300, 0, 16], LUTData=np.arange(290, dtype="<u2").tobytes())
    write(tmp_path / "in" / "a.dcm", RAMP, sop=CR, VOILUTSequence=[table])
    report = prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert "its VOI LUT is damaged" in report.broken[0][1]


# --------------------------------------------------------------- padding


def prepared(root, out):
    prepare(root, out, size=16)
    return shown(out)


def test_padding_is_black_and_no_part_of_windows(tmp_path):
    values = RAMP.astype(np.int16) + 1000
    values[:4] = values[12:] = -2000
    for name, said in (("signed", -2000), ("unsigned", None)):
        write(tmp_path / name / "a.dcm", values, sop=CT, PixelPaddingValue=said)
        if said is None:  # written as an unsigned number, as some do
            data = pydicom.dcmread(tmp_path / name / "a.dcm")
            data.add_new(0x00280120, "US", 63536)
            data.save_as(tmp_path / name / "a.dcm")
        image = prepared(tmp_path / name, tmp_path / f"out_{name}")
        assert image[4:12].min() < 30 and image[4:12].max() > 225 and image[:4].max() == 0
    first = RAMP.copy() + 1000
    first[:4] = 0
    write(
        tmp_path / "m1" / "a.dcm",
        first,
        sop=CR,
        PixelPaddingValue=0,
        PhotometricInterpretation="MONOCHROME1",
    )
    image = prepared(tmp_path / "m1", tmp_path / "out_m1")
    assert image[:4].max() == 0 and image[4, 0] > 225
    ranged = RAMP.copy() + 1000
    ranged[:4] = 5 + np.arange(16)
    write(tmp_path / "range" / "a.dcm", ranged, PixelPaddingValue=20, PixelPaddingRangeLimit=5,
          WindowCenter=1127, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert prepared(tmp_path / "range", tmp_path / "out_range")[:4].max() == 0
    write(tmp_path / "all" / "a.dcm", np.zeros((8, 8), np.uint16), PixelPaddingValue=0)
    report = prepare(tmp_path / "all", tmp_path / "out_all")
    assert "padding" in report.broken[0][1]


# --------------------------------------------------------------- colour


def test_colour_of_all_models(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    write(tmp_path / "rgb" / "a.dcm", rgb, sop=US)
    assert np.array_equal(read_one(tmp_path / "rgb").values[0], rgb)
    write(
        tmp_path / "planar" / "a.dcm",
        np.moveaxis(rgb, -1, 0).copy().reshape(12, 16, 3),
        sop=US,
        PlanarConfiguration=1,
    )
    assert np.array_equal(read_one(tmp_path / "planar").values[0], rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    write(tmp_path / "ybr" / "a.dcm", ybr, sop=US, PhotometricInterpretation="YBR_FULL")
    assert np.abs(read_one(tmp_path / "ybr").values[0].astype(int) - rgb).max() <= 3
    table = {f"{c}PaletteColorLookupTableData": (np.arange(256, dtype="<u2") * 256 // (i + 1)).tobytes()
             for i, c in enumerate(("Red", "Green", "Blue"))}  # fmt: skip
    about = {
        f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")
    }
    index = RAMP.astype(np.uint8)
    write(
        tmp_path / "palette" / "a.dcm",
        index,
        sop=US,
        PhotometricInterpretation="PALETTE COLOR",
        **table,
        **about,
    )
    right = np.stack([index.astype(int) * 256 // (i + 1) >> 8 for i in range(3)], axis=-1)
    assert np.array_equal(read_one(tmp_path / "palette").values[0], right)
    deep = np.zeros((8, 8, 3), np.uint16)
    write(tmp_path / "deep" / "a.dcm", deep, sop=US)
    assert "16 bits" in read_or_refuse(tmp_path / "deep")
    write(tmp_path / "odd" / "a.dcm", rgb, sop=US, PhotometricInterpretation="CMYK")
    assert "colour model" in read_or_refuse(tmp_path / "odd")


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL_422", "YBR_FULL"])
def test_a_jfif_stream_is_ycbcr_whatever_the_tag_says(tmp_path, said):
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[..., 0], rgb[..., 1] = 200, 40
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=95)
    assert stream.getvalue()[6:10] == b"JFIF"
    write(tmp_path / "a.dcm", rgb, sop=US, PhotometricInterpretation=said)
    repack(tmp_path / "a.dcm", [stream.getvalue()], JPEGBaseline8Bit)
    assert np.abs(read_one(tmp_path).values[0, 5, 5].astype(int) - [200, 40, 0]).max() < 12


# --------------------------------------------------------------- enhanced files of many frames


def write_enhanced(
    path, z, slopes=None, planes=None, windows=None, shared_slope=None, spacings=None, **tags
):
    frames = np.stack([np.full((8, 8), 100 * (k + 1), np.uint16) for k in range(len(z))])
    measures = [item(PixelSpacing=s, SliceThickness=3) for s in spacings or [[1, 2]]]
    shared = item(PixelMeasuresSequence=measures[:1])
    if planes is None:
        shared.PlaneOrientationSequence = [item(ImageOrientationPatient=AXIAL)]
    if shared_slope:
        shared.PixelValueTransformationSequence = [
            item(RescaleIntercept=1, RescaleSlope=shared_slope, RescaleType="US")
        ]
    per_frame = []
    for k in range(len(z)):
        group = item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z[k]])])
        if planes:
            group.PlaneOrientationSequence = [item(ImageOrientationPatient=planes[k])]
        if slopes:
            group.PixelValueTransformationSequence = [
                item(RescaleIntercept=0, RescaleSlope=slopes[k], RescaleType="US")
            ]
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
        ([100, 400, 900], [0, 3, 6], {"slopes": [1, 2, 3]}),
        ([201, 401, 601], [0, 3, 6], {"shared_slope": 2}),
        ([100, 400, 900], [0, 3, 6], {"slopes": [1, 2, 3], "shared_slope": 9}),
        ([100, 400, 200, 500, 300], [0, 6, 12, 3, 9], {"slopes": [1] * 5}),
        ([300, 200, 100], [6, 3, 0], {}),
        ("one position", [0, 3, 6, 0, 3, 6], {}),
        ("several planes", [0, 3, 0, 3], {"planes": [AXIAL] * 2 + [CORONAL] * 2}),
        ("several planes", [0, 3, 6, 9], {"planes": [AXIAL] * 3 + [CORONAL]}),
        ("describes 2 frames", [0, 3, 6], {"PerFrameFunctionalGroupsSequence": [item(), item()]}),
        ("spacings", [0, 3], {"spacings": [[1, 1], [2, 2]]}),
    ],
)  # fmt: skip
def test_enhanced_files(tmp_path, right, z, options):
    write_enhanced(tmp_path / "a.dcm", z, **options)
    found = read_or_refuse(tmp_path)
    if isinstance(right, str):
        assert right in found
    else:
        assert np.allclose(found[:, 0, 0], right)
        assert read_one(tmp_path).spacing == (1, 2)


def test_windows_of_frames_follow_their_order(tmp_path):
    write_enhanced(tmp_path / "a.dcm", [6, 0, 3], windows=[60, 10, 30])
    pixels = read_one(tmp_path)
    assert [w.low for w in pixels.windows] == [10 - 50.5, 30 - 50.5, 60 - 50.5]
    assert pixels.values[:, 0, 0].tolist() == [200, 300, 100]


def test_frames_without_positions_stay_in_their_order(tmp_path):
    write(tmp_path / "a.dcm", np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), sop=US)
    assert read_one(tmp_path).values[:, 0, 0].tolist() == [0, 64, 128, 192]
    assert "no axial plane" in read_or_refuse(tmp_path, plane="axial")


# --------------------------------------------------------------- which slices are one volume


def write_slices(root, z, *, first=0, **tags):
    series = tags.pop("series", "1.2.77")
    for k, place in enumerate(z):
        own = {name: value(k) if callable(value) else value for name, value in tags.items()}
        plane = {"ImageOrientationPatient": AXIAL, "PixelSpacing": [1, 1], **own}
        write(root / f"{first + k:03d}.dcm", RAMP + 1000 * (first + k), series=series,
              **{"ImagePositionPatient": [0, 0, place], **plane})  # fmt: skip


def sizes(root, notes=None):
    return sorted(len(source.files) for source in find_sources(root, notes=notes))


def test_orientations_and_spacings_are_numbers(tmp_path):
    tilt = lambda k: [1, 0, 0, 0, 1 - 1e-7 * k, 1e-5 * k]  # noqa: E731
    write_slices(
        tmp_path,
        [0, 3, 6, 9],
        ImageOrientationPatient=tilt,
        PixelSpacing=lambda k: [1 + 1e-6 * k, 1],
    )
    notes = []
    assert sizes(tmp_path, notes) == [4] and not notes


def test_scouts_and_other_planes_are_set_apart(tmp_path):
    write_slices(tmp_path / "a", [0, 3, 6], ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": CORONAL}
    write_slices(tmp_path / "a", [0], first=9, **scout)
    notes = []
    assert sizes(tmp_path, notes) == [3] and "scouts" in notes[0]
    write_slices(tmp_path / "b", [0, 3, 6], series="1.2.78")
    write_slices(tmp_path / "b", [0, 3], first=9, series="1.2.78", ImageOrientationPatient=CORONAL,
                 ImagePositionPatient=lambda k: [0, 5 * k, 0])  # fmt: skip
    write_slices(tmp_path / "c", [0, 3, 6], series="1.2.79")
    write_slices(tmp_path / "c", [9, 12], first=9, series="1.2.79", PixelSpacing=[2, 2])
    assert sizes(tmp_path, notes := []) == [2, 2, 3, 3, 3]
    assert any("2 series: split" in note for note in notes)


def test_only_scouts_are_used_as_they_are(tmp_path):
    write_slices(tmp_path, [0, 3], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert sizes(tmp_path) == [2]


def test_gaps_are_named_and_refused_for_another_plane(tmp_path):
    for z in ([0, 3, 6, 12, 15], [0, 3, 8, 13]):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        write_slices(tmp_path / "a", z)
        notes = []
        assert sizes(tmp_path, notes) == [len(z)] and "unevenly" in notes[0]
        assert read_one(tmp_path).values.shape[0] == len(z)
        assert "is one missing" in read_or_refuse(tmp_path, plane="coronal")
    write_slices(tmp_path / "even", [0, 3, 6.1, 9], series="1.2.5")
    source = next(s for s in find_sources(tmp_path) if s.files[0].startswith("even"))
    assert read_pixels(tmp_path, source, plane="coronal").values.shape == (16, 4, 16)


def test_a_tilted_gantry_is_refused_for_another_plane(tmp_path):
    write_slices(tmp_path, range(4), ImagePositionPatient=lambda k: [0, 1.0 * k, 3.0 * k])
    assert read_one(tmp_path).values.shape == (4, 16, 16)
    assert "gantry" in read_or_refuse(tmp_path, plane="sagittal")


@pytest.mark.parametrize(
    "tag", ["TemporalPositionIdentifier", "DiffusionBValue", "EchoTime", "SequenceName"]
)
def test_time_points_and_b_values_are_kept_apart(tmp_path, tag):
    for t in range(3):
        value = f"*ep_b{50 * t}" if tag == "SequenceName" else 50 * t + 1
        write_slices(tmp_path, [0, 3, 6, 9], first=10 * t, **{tag: value})
    notes = []
    assert sizes(tmp_path, notes) == [4, 4, 4] and tag in notes[0]
    for source in find_sources(tmp_path):
        values = read_pixels(tmp_path, source).values[:, 0, 0]
        assert (np.diff(values.astype(int)) == 1000).all()


def test_repeated_positions_that_nothing_tells_apart_are_refused(tmp_path):
    write_slices(tmp_path, [0, 3, 6, 0, 3, 6])
    assert "one position" in read_or_refuse(tmp_path)
    shutil.copy(tmp_path / "000.dcm", tmp_path / "100.dcm")
    assert "one position" in read_or_refuse(tmp_path)


def test_a_slice_that_is_there_twice_is_used_once(tmp_path):
    write_slices(tmp_path, [0, 3, 6])
    shutil.copy(tmp_path / "000.dcm", tmp_path / "100.dcm")
    notes = []
    assert sizes(tmp_path, notes) == [3] and "twice" in notes[0]


def test_slices_of_a_series_in_two_classes_stay_images_of_their_own(tmp_path):
    root, flat, series = tmp_path / "in", tmp_path / "flat", generate_uid()
    for k in range(6):
        label = "haemorrhage" if k in (3, 4) else "normal"
        path = write(root / label / f"{k}.dcm", RAMP + 100 * k, series=series, PixelSpacing=[1, 1],
                     ImagePositionPatient=[0, 0, 3.0 * k], ImageOrientationPatient=AXIAL)  # fmt: skip
        flat.mkdir(exist_ok=True)
        shutil.copy(path, flat / path.name)
    report = prepare(root, tmp_path / "out")
    assert report.counts == {("train", "haemorrhage"): 2, ("train", "normal"): 4}
    assert any("several folders of classes" in note for note in report.notes)
    lines = [f"{k}.dcm,{'haemorrhage' if k in (3, 4) else 'normal'}\n" for k in range(6)]
    (tmp_path / "t.csv").write_text("file,class\n" + "".join(lines))
    report = prepare(flat, tmp_path / "table", labels=tmp_path / "t.csv")
    assert (
        report.counts == {("train", "haemorrhage"): 2, ("train", "normal"): 4} and not report.broken
    )
    (tmp_path / "t.csv").write_text("file,class\n3.dcm,haemorrhage\n")
    report = prepare(flat, tmp_path / "one", labels=tmp_path / "t.csv")
    assert report.counts == {("train", "haemorrhage"): 1}


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
    assert "one axial slice" in read_or_refuse(
        tmp_path, plane="coronal"
    ) or "one slice" in read_or_refuse(tmp_path, plane="coronal")


@pytest.mark.parametrize(
    ("tags", "spacing", "high"),
    [
        ({"PixelSpacing": [2, 1]}, "1 x 1", 32),
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
    image = shown(tmp_path / "out")
    assert (image.max(axis=1) > 0).sum() == high
    assert ("at the detector" in row["window"]) == (list(tags) == ["ImagerPixelSpacing"])


@pytest.mark.parametrize(
    ("charset", "patient"),
    [("ISO_IR 192", "MÜLLER"), ("ISO_IR 100", "MÜLLER"), ("GB18030", "患者1"),
     ("ISO_IR 144", "Иван"), ("NONE", "X")],
)  # fmt: skip
def test_a_patient_id_in_any_character_set(tmp_path, charset, patient):
    for i in range(4):
        write(tmp_path / f"in/c/{i}.dcm", RAMP + i, patient=f"P{i}")
    write(tmp_path / "in/c/9.dcm", RAMP, patient=patient, SpecificCharacterSet=charset)
    assert find_sources(tmp_path / "in")[-1].patient == patient
    assert prepare(tmp_path / "in", tmp_path / "out", key=tmp_path / "key.csv").made == 5
    assert patient in (tmp_path / "key.csv").read_text(encoding="utf-8")


# --------------------------------------------------------------- what is no image


def test_what_is_no_image_is_said(tmp_path):
    root = tmp_path / "in"
    for label in "ab":
        for i in range(6):
            pixels = RAMP + i + 10 * (label == "b")
            write(root / label / f"{i}.dcm", pixels, patient=f"{label}{i}")
    bare = pydicom.dcmread(write(tmp_path / "x", RAMP, patient="P9"))
    for name, implicit in (("IM0009", True), ("IM0010", False)):
        plain = pydicom.Dataset()
        plain.update(bare)
        plain.PixelData = (RAMP + 100 + implicit).tobytes()
        pydicom.dcmwrite(
            root / "a" / name,
            plain,
            implicit_vr=implicit,
            little_endian=True,
            enforce_file_format=False,
        )
    no_image = {"PixelData": None, "Rows": None, "Columns": None}
    for name, kind in (
        ("DICOMDIR", "1.2.840.10008.1.3.10"), ("a/sr.dcm", "1.2.840.10008.5.1.4.1.1.88.11"),
        ("a/pr.dcm", "1.2.840.10008.5.1.4.1.1.11.1"), ("b/ko.dcm", "1.2.840.10008.5.1.4.1.1.88.59"),
    ):  # fmt: skip
        write(root / name, RAMP, sop=kind, **no_image)
    for name in (
        "a/x.svg",
        "a/z.mgz",
        "a/v.hdr",
        "a/v.img",
        "a/i.dcm.gz",
        "a/README",
        "a/noise",
    ):
        (root / name).write_bytes(b"\x02\0\x10\0UI" if name == "a/noise" else b"text")
    report = prepare(root, tmp_path / "out", proportions=(0.6, 0.2, 0.2))
    assert report.made == 14 and not report.broken
    (said,) = (note for note in report.notes if "passed over" in note)
    for kind in (
        "1 DICOM Media Storage Directory",
        "Basic Text SR",
        "1 .svg",
        "1 .gz",
        "1 .mgz",
        "1 .img",
    ):
        assert kind in said
    assert "README" not in said


def test_a_file_without_pixels_is_named(tmp_path):
    for name, tags in (
        ("a", {"PixelData": None}),
        ("b", {"PixelData": b""}),
        ("c", {"Rows": None}),
        ("d", {"Rows": 0}),
    ):
        write(tmp_path / name / "a.dcm", RAMP, sop=MR, **tags)
        (source,) = find_sources(tmp_path / name)
        with pytest.raises(BrokenCase):
            read_pixels(tmp_path / name, source)


# --------------------------------------------------------------- what decoders invent


def spoil(stream):
    """Return a compressed stream that is cut and closed again, and one with bytes lost inside."""
    half = len(stream) // 2
    return stream[:half] + b"\xff\xd9", stream[: half - 3] + stream[half:]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_stream_that_was_cut_and_closed_again_is_refused(tmp_path, options):
    values = np.random.default_rng(0).integers(0, 256, (40, 56)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", **options)
    cut = spoil(stream.getvalue())[0]
    for name, content, fine in (("whole", stream.getvalue(), True), ("cut", cut, False)):
        root = tmp_path / name
        write(root / "a.dcm", values, sop=SC)
        repack(root / "a.dcm", [content], JPEGBaseline8Bit)
        assert isinstance(read_or_refuse(root), np.ndarray) == fine
        (root / "a.dcm").unlink()
        (root / "a.jpg").write_bytes(content + b"what follows is passed over \xff\xd9")
        assert isinstance(read_or_refuse(root), np.ndarray) == fine
        if not fine:
            with pytest.raises(ImageError, match="end too early"):
                load_images(root)


def test_lossless_jpeg_and_rle_without_some_of_their_bytes_are_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 4000, (32, 40)).astype(np.uint16)
    data = pydicom.dcmread(write_dicom(tmp_path / "one.dcm", values, compressor="JPEG"))
    lossless = next(generate_frames(data.PixelData, number_of_frames=1)).rstrip(b"\0")
    data = pydicom.dcmread(write(tmp_path / "two.dcm", values, sop=SC))
    data.compress(RLELossless)
    rle = next(generate_frames(data.PixelData, number_of_frames=1))
    for stream, syntax in ((spoil(lossless)[0], JPEGLosslessSV1), (spoil(rle)[1], RLELossless)):
        write(tmp_path / "in" / "a.dcm", values, sop=SC)
        repack(tmp_path / "in" / "a.dcm", [stream], syntax)
        assert "damaged" in read_or_refuse(tmp_path / "in")


# --------------------------------------------------------------- numbers beyond the stored bits


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
    values[0] = {7: 7, -7: -7, -2000: -2000}.get(padded, 7)
    tags = {"BitsStored": bits, "HighBit": bits - 1}
    data = pydicom.dcmread(write(tmp_path / "a.dcm", values, sop=SC, **tags))
    data.add_new(0x00280120, "US", said)
    data.save_as(tmp_path / "a.dcm")
    padding = read_one(tmp_path).padding
    if padded is None:
        assert padding is None
    else:
        assert padding[0, 0].all() and not padding[0, 1:].any()


def test_a_voi_lut_of_16_bits_with_12_bits_in_it_is_not_dark(tmp_path):
    table = item(LUTDescriptor=[4096, 0, 16], LUTData=np.arange(4096, dtype="<u2").tobytes())
    write(tmp_path / "in" / "a.dcm", RAMP * 16, sop=CR, VOILUTSequence=[table])
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert np.abs(shown(tmp_path / "out") - RAMP.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "kind"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")]
)
def test_float_pixels_are_read(tmp_path, name, kind):
    values = np.linspace(-0.5, 2e-3, 3 * 64).astype(kind).reshape(3, 8, 8)
    left_out = dict.fromkeys(("PixelData", "BitsStored", "HighBit", "PixelRepresentation"))
    tags = {"BitsAllocated": values.itemsize * 8, **left_out, "sop": PARAMETRIC_MAP}
    write(tmp_path / "a.dcm", values, **tags, **{name: values.tobytes()})
    assert np.array_equal(read_one(tmp_path).values, values)
    values[1, 2, 3] = np.nan
    write(tmp_path / "a.dcm", values, **tags, **{name: values.tobytes()})
    assert "not a number" in read_or_refuse(tmp_path)
    write(tmp_path / "a.dcm", values, **tags, **{name: values.tobytes()[:-8]})
    assert "claims" in read_or_refuse(tmp_path)
