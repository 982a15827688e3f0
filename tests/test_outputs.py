"""Images and words written into files: they go on where they were, and replace nothing."""

import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from medbudget import (
    Embedding,
    InversionSettings,
    ellipse,
    inpaint,
    inpaint_to,
    interpolate,
    interpolate_to,
    invert_to,
    make_phantoms,
    outputs,
    sample,
    sample_to,
)
from medbudget.images import load_images, read_record, to_pil
from medbudget.sampling.masks import check_masks
from medbudget.sampling.sampler import Condition

VECTORS = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
MINE = Embedding(VECTORS, "<mine>", record={"image_hashes": "aa bb"})
OTHER = Embedding(1 - 3 * VECTORS, "<other>", record={"image_hashes": "cc"})
HEALTHY = make_phantoms("prostate", "healthy", 2).images
TUMOURS = make_phantoms("prostate", "tumour", 6).images
MASK = ellipse((0.5, 0.55), (0.2, 0.15))


def gray_levels(a, b):
    return int((a.int() - b.int()).abs().max())


def write(folder, **images):
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        stem, ending = name.split("_")
        to_pil(image).save(folder / f"{stem}.{ending}")
    return folder


# ------------------------------------------------------------------------------------ sample


def test_sample_to_goes_on_where_it_was_and_overwrites_nothing(tiny, tmp_path, capsys):
    folder = tmp_path / "a"
    options = {"embeddings": MINE, "n": 18, "steps": 1, "seed": 3}
    paths = sample_to(folder, tiny, "<mine>", **options)
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(18)]
    whole = load_images(paths)
    assert torch.equal(whole[:16], sample(tiny, "<mine>", **{**options, "n": 16}))
    record = read_record(paths[7])
    assert (record["seed"], record["prompt"], record["training_images"]) == (10, "<mine>", "aa bb")
    sheet = folder / "contact_sheet.png"  # shown, but none of the images
    assert Image.open(sheet).size == (8 * 130 - 2, 3 * 130 - 2)
    assert torch.equal(load_images(folder), whole)
    kept = paths[2].stat().st_mtime_ns
    for path in [*paths[16:], sheet]:
        path.unlink()
    assert sample_to(folder, tiny, "<mine>", **options) == paths and sheet.exists()
    assert torch.equal(load_images(paths), whole) and paths[2].stat().st_mtime_ns == kept
    other = {**options, "steps": 2, "n": 2}
    with pytest.raises(FileExistsError, match=r"steps \(1 there, 2 now\)"):
        sample_to(folder, tiny, "<mine>", **other)
    with pytest.raises(FileExistsError, match=r"\.png is of another run and would lie among"):
        sample_to(folder, tiny, "<mine>", **other, overwrite=True)
    assert torch.equal(load_images(paths), whole)
    for path in paths[2:]:
        path.unlink()
    sample_to(folder, tiny, "<mine>", **other, overwrite=True)
    assert not torch.equal(load_images(paths[:2]), whole[:2])
    write(tmp_path / "b", contact_png=HEALTHY[0])
    (tmp_path / "b/contact.png").rename(tmp_path / "b/contact_sheet.png")
    with pytest.raises(FileExistsError, match=r"contact_sheet\.png is there already"):
        sample_to(tmp_path / "b", tiny, "red", n=1, steps=1)
    capsys.readouterr()
    sample_to(tmp_path / "c", tiny, " ", n=1, steps=1)
    assert "the prompt is empty" in capsys.readouterr().out


# ------------------------------------------------------------------------------- interpolate


def test_an_axis_runs_from_one_embedding_to_the_other_with_the_same_noise(tiny, tmp_path):
    options = {"n": 2, "steps": 2, "seed": 4}
    ends = [sample(tiny, e.token, embeddings=[e], **options) for e in (MINE, OTHER)]
    for method in ("and", "vectors"):
        axis = interpolate(tiny, MINE, OTHER, weights=(0, 0.5, 1), method=method, **options)
        assert list(axis) == [0.0, 0.5, 1.0]
        assert gray_levels(axis[0.0], ends[0]) <= 1 and gray_levels(axis[1.0], ends[1]) <= 1
        assert gray_levels(axis[0.5], ends[0]) > 5 and gray_levels(axis[0.5], ends[1]) > 5
    out = tmp_path / "axis"
    folders = interpolate_to(
        out, tiny, MINE, OTHER, weights=(0, 0.5, 1), method="vectors", gif=True, **options
    )
    assert [folder.name for folder in folders] == ["0", "0.5", "1"]
    assert torch.equal(load_images(folders[1]), axis[0.5])
    assert read_record(folders[1] / "00000.png")["training_images"] == "aa bb cc"
    assert Image.open(out / "contact_sheet.png").size == (3 * 130 - 2, 2 * 130 - 2)
    film = Image.open(out / "axis.gif")
    assert film.n_frames == 4 and film.size == (130, 64)
    again = {"weights": (0, 0.5, 1), "method": "vectors", "gif": True, **options}
    assert interpolate_to(out, tiny, MINE, OTHER, **again) == folders
    film.save(out / "axis.gif", save_all=True, comment=b"mine")
    with pytest.raises(FileExistsError, match=r"axis\.gif is there already"):
        interpolate_to(out, tiny, MINE, OTHER, **again)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "slerp"}, "allowed are 'and', 'vectors'"),
        ({"weights": ()}, "weights must be numbers"),
        ({"weights": (0, math.inf)}, "a weight must be a finite number"),
        ({"weights": ("0",)}, "a weight must be a number, got '0'"),
        ({"method": "vectors", "b": Embedding(VECTORS[:3], "<few>")}, "equal shape"),
    ],
)
def test_wrong_interpolation(tiny, options, problem):
    with pytest.raises(ValueError, match=problem):
        interpolate(tiny, MINE, options.pop("b", OTHER), **options)


# ----------------------------------------------------------------------------------- inpaint


def test_inpaint_to_replaces_no_original_and_no_other_result(tiny, tmp_path):
    source = write(tmp_path / "in", a_png=HEALTHY[0], a_bmp=HEALTHY[1])
    before = (source / "a.png").read_bytes()
    paint, out = {"steps": 2, "seed": 4}, tmp_path / "o"
    with pytest.raises(ValueError, match="lies inside the input"):
        inpaint_to(source, tiny, source, MASK, "red ground", **paint)
    with pytest.raises(FileExistsError, match="is there already"):
        inpaint_to(source, tiny, write(tmp_path / "x", a_png=HEALTHY[0]), MASK, "red", **paint)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is an original"):
            inpaint_to(source, tiny, source / "a.png", MASK, "red", overwrite=overwrite, **paint)
    assert (source / "a.png").read_bytes() == before
    paths = inpaint_to(out, tiny, source, MASK, "red ground", **paint)
    assert [p.name for p in paths] == ["a_bmp.png", "a_png.png"]
    drawn = load_images(paths)
    assert torch.equal(drawn, inpaint(tiny, HEALTHY.flip(0), MASK, "red ground", **paint))
    for problem, mask, prompt, options in (
        (r"prompt .red ground there, blue ground now", MASK, "blue ground", {}),
        ("mask_hash", ellipse((0.4, 0.4), 0.2), "red ground", {}),
        (r"a_\w+\.png is of another run and would lie among", MASK, "red ground", {"n": 2}),
    ):
        with pytest.raises(FileExistsError, match=problem):
            inpaint_to(out, tiny, source, mask, prompt, **paint, **options)
    kept = paths[0].stat().st_mtime_ns
    assert inpaint_to(out, tiny, source, MASK, "red ground", **paint) == paths
    assert torch.equal(load_images(paths), drawn) and paths[0].stat().st_mtime_ns == kept
    with pytest.raises(TypeError, match="no option colour"):
        inpaint_to(out, tiny, source, MASK, "red ground", colour=1)


def test_inpaint_to_takes_named_masks_variants_and_a_mask_for_each_image(tiny, tmp_path, capsys):
    big = HEALTHY.repeat_interleave(2, 2).repeat_interleave(2, 3)
    source = write(tmp_path / "in", a_png=big[0], b_png=big[1])
    named = {"left": ellipse((0.3, 0.5), 0.15), "right": ellipse((0.7, 0.5), 0.15)}
    paths = inpaint_to(tmp_path / "o", tiny, source, named, "red", steps=1, n=2, save_masks=True)
    names = [f"{i}_{m}_{k}.png" for i in "ab" for m in ("left", "right") for k in (0, 1)]
    assert [p.name for p in paths] == names
    masks = sorted((tmp_path / "o/masks").iterdir())
    assert [p.name for p in masks] == sorted(names)
    assert set(np.unique(np.asarray(Image.open(masks[0])))) == {0, 255}
    assert "images come out with 64 pixels" in capsys.readouterr().out
    two = inpaint_to(
        tmp_path / "two", tiny, source / "a.png", torch.stack([MASK, MASK]), "", steps=1
    )
    assert [p.name for p in two] == ["a_0.png", "a_1.png"], "no mask is dropped"
    mask = (check_masks(MASK, 128)[0] > 0.5).byte().expand(3, -1, -1) * 255
    masks = write(tmp_path / "m", a_png=mask)
    with pytest.raises(ValueError, match="has no mask for b"):
        inpaint_to(tmp_path / "p", tiny, source, masks, "red", steps=1)
    write(masks, b_png=mask[:, :, :90])
    with pytest.raises(ValueError, match=r"90 x 128 pixels.*128 x 128: draw it on the image"):
        inpaint_to(tmp_path / "p", tiny, source, masks, "red", steps=1)
    assert not (tmp_path / "p").exists()


def test_saved_masks_replace_no_mask_and_no_other_file(tiny, tmp_path):
    source = write(tmp_path / "in", a_png=HEALTHY[0])
    disc = (check_masks(MASK, 64)[0] * 200).byte().expand(3, -1, -1)
    (tmp_path / "o").mkdir()
    masks = write(tmp_path / "o/masks", a_png=disc)
    before = (masks / "a.png").read_bytes()
    paint = {"steps": 1, "save_masks": True}
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"a\.png is an original"):
            inpaint_to(tmp_path / "o", tiny, source, masks, "red", overwrite=overwrite, **paint)
    with pytest.raises(FileExistsError, match="is there already"):
        inpaint_to(tmp_path / "o", tiny, source, MASK, "red", **paint)
    assert (masks / "a.png").read_bytes() == before
    assert not list((tmp_path / "o").glob("*.png"))
    for _ in range(2):  # the second call finds its own masks
        inpaint_to(tmp_path / "p", tiny, source, MASK, "red", **paint)


# ------------------------------------------------------------------------------------ invert

FEW = InversionSettings.preset(
    "paper", n_vectors=4, steps=2, lr=0.01, batch_size=1, checkpoint_every=2
)


def test_invert_to_keeps_the_state_until_the_word_is_saved(tiny, tmp_path, capsys):
    path, settings = (
        tmp_path / "x.safetensors",
        InversionSettings(n_vectors=2, steps=24, batch_size=1),
    )
    steps = []

    def stop(state):
        steps.append(state["step"])
        if state["step"] == 22:
            signal.raise_signal(signal.SIGINT)

    options = {"token": "<x>", "settings": settings, "preview_every": 20, "callback": stop}
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 22 of 24.*x\.safetensors\.ckpt"):
        invert_to(path, tiny, TUMOURS[:2], **options)
    said = capsys.readouterr().out
    assert "2 images, 24 steps of 1, learning rate 0.01 (linear), 2 vectors on cpu" in said
    assert (
        "(preset tiny; given: batch_size, n_vectors, steps)" in said
        and "so few images copies" in said
    )
    assert f"the state is kept in {path}.ckpt every 500 steps and at Ctrl-C" in said
    assert f"images of the word go into {path}.previews every 20 steps" in said
    preview = "x.safetensors.previews/step000020.png"
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(files) == ["x.safetensors.ckpt", preview]
    assert Image.open(tmp_path / preview).width > 4 * 64
    with pytest.raises(FileExistsError, match=r"step000020\.png is there already.*token"):
        invert_to(path, tiny, TUMOURS[:2], **{**options, "token": "<y>"})
    word = invert_to(path, tiny, TUMOURS[:2], **options)
    assert steps == [*range(1, 25)] and word.step == 24
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "x.safetensors.previews"]
    again = invert_to(path, tiny, TUMOURS[:2], **options)
    assert len(steps) == 24 and torch.equal(again.vectors, word.vectors)


def test_invert_to_replaces_no_other_word(tiny, tmp_path):
    path, options = tmp_path / "x.pt", {"token": "<x>", "settings": FEW}
    word = invert_to(path, tiny, TUMOURS, **options)
    content = path.read_bytes()
    assert torch.equal(invert_to(path, tiny, TUMOURS, **options).vectors, word.vectors)
    with pytest.raises(FileExistsError, match=r"token \(<x> there, <y> now\)"):
        invert_to(path, tiny, TUMOURS, token="<y>", settings=FEW)
    with pytest.raises(FileExistsError, match="made with other settings: images"):
        invert_to(path, tiny, TUMOURS[:5], **options)
    word.save(tmp_path / "x.bin")  # says nothing of its making
    with pytest.raises(FileExistsError, match="is there already; choose another place"):
        invert_to(tmp_path / "x.bin", tiny, TUMOURS, **options)
    with pytest.raises(ValueError, match="name another file for the checkpoint"):
        invert_to(tmp_path / "z.pt", tiny, TUMOURS, checkpoint=tmp_path / "z.pt", **options)
    assert path.read_bytes() == content
    own = tmp_path / "mine.ckpt"  # a checkpoint of one's own stays, for a longer run
    invert_to(path, tiny, TUMOURS, token="<y>", settings=FEW, checkpoint=own, overwrite=True)
    assert Embedding.load(path).token == "<y>" and own.exists()


def test_a_folder_of_many_images_is_set_up_once(tiny, tmp_path, monkeypatch):
    """1000 images by command cost no more than by one call of `sample`."""
    calls: list[str] = []

    def listen(place, name):
        whole = getattr(place, name)

        def call(*args, **options):
            calls.append(name)
            return whole(*args, **options)

        monkeypatch.setattr(place, name, call)

    for place, name in (
        (outputs, "choose_speed"), (Condition, "encode"), (outputs, "draw_images"),
    ):  # fmt: skip
        listen(place, name)
    sample_to(tmp_path / "many", tiny, "red ground", n=20, steps=1)  # a block is 16 images
    assert calls == ["encode", "choose_speed", "draw_images", "draw_images"]
