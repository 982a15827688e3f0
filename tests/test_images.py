import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import load_images, save_images
from medbudget.images import ImageError, make_grid


def write(folder, name, array, mode=None):
    Image.fromarray(array, mode).save(folder / name)


def test_saved_images_come_back_equal(tmp_path):
    images = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8)
    save_images(images, tmp_path)
    assert torch.equal(load_images(tmp_path), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.png", "00001.png", "00002.png"]


def test_gray_becomes_three_equal_channels(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    write(tmp_path, "a.png", gray)
    loaded = load_images(tmp_path)
    assert torch.equal(loaded[0], torch.from_numpy(gray).expand(3, 8, 8))


def test_resize_keeps_the_aspect_and_pads_with_black(tmp_path):
    write(tmp_path, "a.png", np.full((20, 40, 3), 200, np.uint8))
    (image,) = load_images(tmp_path, size=16)
    assert image.shape == (3, 16, 16)
    assert image[:, 4:12].eq(200).all()
    assert image[:, :4].eq(0).all() and image[:, 12:].eq(0).all()


def test_empty_folder_and_missing_folder(tmp_path):
    with pytest.raises(ImageError, match="no images in"):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_images(tmp_path / "no")


def test_a_folder_of_folders_names_them(tmp_path):
    (tmp_path / "normal").mkdir()
    with pytest.raises(ImageError, match="normal"):
        load_images(tmp_path)


def test_a_text_file_beside_images_is_passed_over_but_a_broken_image_is_not(tmp_path):
    write(tmp_path, "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("hello")
    assert len(load_images(tmp_path)) == 1
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ImageError, match=r"1 of 2 .*\n.*b\.png is not a readable image"):
        load_images(tmp_path)


def test_sixteen_bit_and_transparency_are_refused_with_a_way_out(tmp_path):
    write(tmp_path, "deep.png", np.full((8, 8), 4000, np.uint16))
    clear = np.zeros((8, 8, 4), np.uint8)
    write(tmp_path, "alpha.png", clear)
    with pytest.raises(ImageError, match="2 of 2") as raised:
        load_images(tmp_path)
    assert "16-bit" in str(raised.value) and "flatten" in str(raised.value)


def test_opaque_alpha_is_dropped(tmp_path):
    opaque = np.full((8, 8, 4), 255, np.uint8)
    opaque[..., 0] = 7
    write(tmp_path, "a.png", opaque)
    assert load_images(tmp_path)[0, :, 0, 0].tolist() == [7, 255, 255]


def test_different_sizes_ask_for_a_size(tmp_path):
    write(tmp_path, "a.png", np.zeros((8, 8, 3), np.uint8))
    write(tmp_path, "b.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(ImageError, match="pass size="):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(1, 3, 4, 4), TypeError),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ValueError),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ValueError),
    ],
)
def test_only_uint8_rgb_batches_are_images(value, error, tmp_path):
    with pytest.raises(error):
        save_images(value, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_grid_is_white_between_images():
    grid = make_grid(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), columns=2, gap=2)
    assert grid.shape == (3, 10, 10)
    assert grid[:, 4:6].eq(255).all() and grid[:, :4, :4].eq(0).all()
