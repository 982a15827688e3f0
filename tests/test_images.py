import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import load_images, save_images
from medbudget.cases import check_twins
from medbudget.data.volumes import Source, read_pixels
from medbudget.images import ImageError, hash_pixels, load_image, make_grid, shrink


def write(folder, name, array, mode=None):
    Image.fromarray(array, mode).save(folder / name)


def test_saved_images_come_back_equal(tmp_path):
    images = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8)
    save_images(images, tmp_path)
    assert torch.equal(load_images(tmp_path), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png"]


def test_a_tiff_file_with_a_strip_missing_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    for height, strips in ((9, 3), (10, 4), (4, 2)):  # one strip holds three rows
        tags = {278: 3}
        Image.new("L", (5, height), 7).save(path, compression="tiff_lzw", tiffinfo=tags)
        assert load_images(tmp_path).shape == (1, 3, height, 5)
        with Image.open(path) as opened:
            assert len(opened.tag_v2[273]) == strips
        content = path.read_bytes()
        length = struct.pack("<HHIHH", 257, 3, 1, height, 0)
        assert content.count(length) == 1
        path.write_bytes(content.replace(length, struct.pack("<HHIHH", 257, 3, 1, height + 3, 0)))
        with pytest.raises(ImageError, match=f"has {strips} of {strips + 1} strips"):
            load_images(tmp_path)


def test_gray_and_opaque_pictures_are_rgb(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    write(tmp_path, "a.png", gray)
    opaque = np.full((8, 8, 4), 255, np.uint8)
    opaque[..., 0] = 7
    write(tmp_path, "b.png", opaque)
    first, second = load_images(tmp_path)
    assert torch.equal(first, torch.from_numpy(gray).expand(3, 8, 8))
    assert second[:, 0, 0].tolist() == [7, 255, 255]


@pytest.mark.parametrize(("edge", "size", "warned"), [(8, 16, True), (9, 16, False), (9, 8, False)])
def test_images_that_are_enlarged_a_lot_are_said(tmp_path, edge, size, warned):
    write(tmp_path, "a.png", np.zeros((edge - 1, edge, 3), np.uint8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_images(tmp_path, size=size)
    assert ["enlarged to 16" in str(one.message) for one in caught] == [True] * warned


def test_what_cannot_be_loaded_is_named_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_images(tmp_path / "no")
    (tmp_path / "normal").mkdir()
    with pytest.raises(ImageError, match=r"no images in .*itself .folders in it: normal;"):
        load_images(tmp_path)
    write(tmp_path, "a.png", np.zeros((8, 8, 3), np.uint8))
    write(tmp_path, "b.png", np.zeros((8, 9, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImageError, match="pass size="):
        load_images(tmp_path)
    write(tmp_path, "deep.png", np.full((8, 8), 4000, np.uint16))
    write(tmp_path, "alpha.png", np.zeros((8, 8, 4), np.uint8))
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(ImageError, match="3 of 5") as raised:
        load_images(tmp_path)
    for said in ("16-bit", "flatten", "c.png is not a readable image"):
        assert said in str(raised.value)


def test_resize_keeps_the_aspect_and_pads_with_black(tmp_path):
    write(tmp_path, "a.png", np.full((20, 40, 3), 200, np.uint8))
    (image,) = load_images(tmp_path, size=16)
    assert image.shape == (3, 16, 16)
    assert image[:, 4:12].eq(200).all()
    assert image[:, :4].eq(0).all() and image[:, 12:].eq(0).all()


def test_only_uint8_rgb_batches_are_images(tmp_path):
    for shape, kind in (((1, 3, 4, 4), None), ((3, 4, 4), torch.uint8), ((1, 1, 4, 4), torch.uint8),
                        ((0, 3, 4, 4), torch.uint8)):  # fmt: skip
        with pytest.raises(TypeError if kind is None else ValueError):
            save_images(torch.zeros(shape, dtype=kind), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_grid_is_white_between_images():
    grid = make_grid(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), columns=2, gap=2)
    assert grid.shape == (3, 10, 10)
    assert grid[:, 4:6].eq(255).all() and grid[:, :4, :4].eq(0).all()


# ----------------------------------------------------------------- one door for all image files


def both_doors(path):
    """Return what `load_image` and the preparation say of a file: arrays, or the refusals."""
    said = []
    for read in (
        lambda: load_image(path).permute(1, 2, 0).numpy(),
        lambda: read_pixels(path.parent, Source((path.name,), "picture")).values[0],
    ):
        try:
            said.append(read())
        except ValueError as error:
            said.append(str(error))
    return said


def corner():
    """A picture that no turn or flip leaves as it is: white above left, gray to its right."""
    array = np.zeros((16, 24), np.uint8)
    array[:8, :8], array[:8, 8:16] = 250, 120
    return array


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_orientation_is_honoured_at_both_doors(tmp_path, name):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, clockwise
    stored = Image.fromarray(corner()).transpose(Image.Transpose.ROTATE_90).convert("RGB")
    stored.save(tmp_path / name, exif=exif, quality=95)
    for seen in both_doors(tmp_path / name):
        assert seen.shape[:2] == (16, 24)
        assert np.abs(seen[..., 0].astype(int) - corner()).mean() < 3


@pytest.mark.parametrize("name", ["a.gif", "a.jp2", "a.JFIF", "a.avif", "a.heic", "a.jpe"])
def test_formats_of_cameras_and_hospitals_are_read(tmp_path, name):
    if name == "a.heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if name == "a.avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow reads AVIF since 11.3")
    kind = {"a.JFIF": "JPEG", "a.jpe": "JPEG"}.get(name)
    options = {} if name in ("a.gif", "a.jp2") else {"quality": 95}
    Image.fromarray(corner()).convert("RGB").save(tmp_path / name, kind, **options)
    for seen in both_doors(tmp_path / name):
        assert np.abs(seen[..., 0].astype(int) - corner()).mean() < 3
    assert len(load_images(tmp_path)) == 1


def test_heic_without_its_plugin_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("medbudget.pictures.list_formats", lambda: ("PNG",))
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"a\.heic is a HEIC .*pip install pillow-heif"):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_the_first_page_of_many_is_refused(tmp_path, name):
    pages = [Image.fromarray(corner()), Image.fromarray(corner()[::-1].copy())]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    for said in both_doors(tmp_path / name):
        assert "has 2 pages" in said


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_deep(path, kind):
    """Write a 16-bit picture of a kind that Pillow cannot write."""
    edge = 64 if kind == "JPEG 2000" else 8
    values = np.arange(edge**2, dtype=np.uint16).reshape(edge, edge) * (65535 // edge**2)
    if kind == "gray with alpha":
        body = np.stack([values, np.full_like(values, 65535)], -1).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in body)
        head = struct.pack(">IIBBBBB", 8, 8, 16, 4, 0, 0, 0)
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)
            + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        )  # fmt: skip
    elif kind == "JPEG 2000":
        encode = pytest.importorskip("openjpeg.utils").encode_array
        path.write_bytes(encode(np.stack([values] * 3, -1), photometric_interpretation=1))
    else:
        sitk = pytest.importorskip("SimpleITK")
        colour = sitk.GetImageFromArray(np.stack([values] * 3, -1), isVector=True)
        sitk.WriteImage(colour, str(path))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "RGB"), ("a.tif", "RGB"), ("a.png", "gray with alpha"), ("a.j2k", "JPEG 2000")],
)
def test_sixteen_bit_colour_is_refused_at_both_doors(tmp_path, name, kind):
    write_deep(tmp_path / name, kind)
    for said in both_doors(tmp_path / name):
        assert "16 bits a colour" in said, said


def test_twelve_bits_of_jpeg_2000_keep_their_values(tmp_path):
    encode = pytest.importorskip("openjpeg.utils").encode_array
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    (tmp_path / "a.j2k").write_bytes(encode(values, bits_stored=12))
    refused, seen = both_doors(tmp_path / "a.j2k")
    assert "16-bit" in refused and np.array_equal(seen, values)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_white_is_zero_is_inverted(tmp_path, compression):
    """TIFF 6.0, photometric interpretation 0: the lowest value is white."""
    Image.fromarray(corner()).save(tmp_path / "plain.tif", compression=compression)
    Image.fromarray(corner()).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.tag_v2[262] == 0
    assert np.array_equal(both_doors(tmp_path / "a.tif")[0][..., 0], corner())
    assert np.array_equal(both_doors(tmp_path / "a.tif")[1], corner())
    deep = corner().astype(np.uint16) * 100
    Image.fromarray(deep).save(tmp_path / "deep.tif", compression=compression, tiffinfo={262: 0})
    pixels = read_pixels(tmp_path, Source(("deep.tif",), "picture"))
    assert pixels.inverted and np.array_equal(pixels.values[0], deep)


def test_what_is_passed_over_is_said(tmp_path):
    write(tmp_path, "a.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("b.dcm", "c.dcm", "d.tga", "notes.txt", "README", ".hidden.dcm"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"2 \.dcm \(b\.dcm …\), 1 \.tga \(d\.tga\)$"):
        assert len(load_images(tmp_path)) == 1
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"2 \.dcm .*medbudget prepare folder"):
        load_images(tmp_path)


def test_the_same_pixels_in_two_splits_or_two_classes_are_named(noise):
    one, two = map(hash_pixels, noise(2, size=8))
    check_twins([("train", "a", "1.png", one), ("test", "a", "2.png", two)])
    check_twins([("train", "a", "1.png", one), ("train", "a", "2.png", one)])
    with pytest.raises(ValueError, match=r"two splits.*test: 2\.png is train: 1\.png"):
        check_twins([("train", "a", "1.png", one), ("test", "a", "2.png", one)])
    with pytest.raises(ValueError, match=r"two classes.*train: 2\.png is 1\.png"):
        check_twins([("train", "a", "1.png", one), ("train", "b", "2.png", one)])


def test_the_same_image_twice_in_a_folder_is_said(tmp_path, noise):
    one, two = noise(2, size=8)
    save_images(torch.stack([one, two, one]), tmp_path)
    with pytest.warns(UserWarning, match=r"00002\.png is 00000\.png\), and all are used"):
        assert len(load_images(tmp_path)) == 3


def test_images_are_shrunk_by_averages():
    """Blocks of 2 x 2: (0 + 10 + 20 + 31) / 4 = 15.25, and 200 everywhere else."""
    image = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    image[..., :2, :2] = torch.tensor([[0, 10], [20, 31]], dtype=torch.uint8)
    small = shrink(image, 2)
    assert small.dtype == torch.uint8 and small[0, 0].tolist() == [[15, 200], [200, 200]]
    assert shrink(image, 4) is image
