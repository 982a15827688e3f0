"""Folders to score: one rule of size, pairs by seed or number, patients, training images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medbudget import Score, make_phantoms, save_images
from medbudget.images import hash_images, load_images
from medbudget.metrics import evaluate, judge, memorisation
from medbudget.metrics.image_sets import ImageSet, load_sets, pair


def chests(n, seed=0, *, high=48, size=64):
    """Phantoms that are not square: (n, 3, high, size)."""
    start = (size - high) // 2
    images = make_phantoms("chest", "healthy", n, size=size, seed=seed).images
    return images[:, :, start : start + high]


def test_a_folder_against_its_own_copy_has_distance_zero(medbudget, tmp_path):
    save_images(chests(24), tmp_path / "real")
    save_images(chests(24), tmp_path / "made", names=[f"other_{24 - i}" for i in range(24)])
    command = ("evaluate", tmp_path / "real", tmp_path / "made", "--features", "layout")
    for floor in ((), ("--no-floor",)):
        (tmp_path / "s.json").unlink(missing_ok=True)
        code, said, error = medbudget(*command, *floor, "--out", tmp_path / "s.json")
        assert code == 0, error
        score = json.loads((tmp_path / "s.json").read_text())[0]
        assert score["name"] == "Layout distance" and score["value"] < 1e-6
        assert "24 of 24 synthetic images are among the real ones" in said


def test_all_copies_of_training_images_are_found_square_or_not(medbudget, tmp_path):
    more = chests(60)
    save_images(more[:40], tmp_path / "train")
    save_images(more[:20], tmp_path / "copies")
    save_images(more[40:], tmp_path / "held")
    code, said, error = medbudget(
        "evaluate", tmp_path / "held", tmp_path / "copies", "--train", tmp_path / "train",
        "--no-floor", "--features", "layout", "--out", tmp_path / "m.json",
    )  # fmt: skip
    assert code == 0, error
    scores = {score["name"]: score for score in json.loads((tmp_path / "m.json").read_text())}
    assert scores["Copied share (pixels)"]["value"] == 1
    assert "rests on only 20 held-out images" in said


def test_all_folders_are_brought_to_one_size_by_one_rule(tmp_path):
    large = chests(4, high=96, size=128)
    save_images(large, tmp_path / "real")
    save_images(chests(4), tmp_path / "made")
    Image.new("RGB", (30, 90), "white").save(tmp_path / "made" / "tall.png")
    Image.new("L", (40, 40)).save(tmp_path / "real" / "gray.png")
    Image.new("RGBA", (40, 40), "white").save(tmp_path / "real" / "opaque.png")
    save_images(large[:1], tmp_path / "made", names=["contact_sheet"], records=[{}])
    sets = load_sets({"real": tmp_path / "real", "synthetic": tmp_path / "made"})
    assert sets["real"].images.shape == (6, 3, 90, 90)
    assert sets["synthetic"].images.shape == (5, 3, 90, 90)
    assert torch.equal(sets["real"].images, load_images(tmp_path / "real", size=90))
    assert sets["synthetic"].images[4, :, :, :30].max() == 0  # the tall one is padded left
    sets = load_sets({"real": tmp_path / "real", "synthetic": tmp_path / "made"}, size=32)
    assert {tuple(part.images.shape[1:]) for part in sets.values()} == {(3, 32, 32)}


def test_tensors_of_another_shape_are_refused_as_evaluate_would_stretch_them():
    square, wide = make_phantoms("chest", "healthy", 6).images, chests(6)
    with pytest.raises(ValueError, match=r"real images are 48 x 64 and synthetic images 64 x 64"):
        evaluate(wide, square, features="layout")
    with pytest.raises(ValueError, match="of another shape"):
        memorisation(square, wide, square)
    half = torch.nn.functional.avg_pool2d(square.float(), 2).byte()
    assert len(evaluate(square, half, features="layout")) == 2  # another size is no other shape


SPOILT = {
    "16-bit": lambda f: Image.fromarray(np.full((64, 64), 999, np.uint16)).save(f / "x.png"),
    "transparent pixels": lambda f: Image.new("RGBA", (64, 64)).save(f / "x.png"),
    "not a readable image": lambda f: (f / "x.png").write_bytes(b"nothing"),
    "no images in": lambda f: [file.unlink() for file in f.iterdir()],
}


@pytest.mark.parametrize(("side", "message"), zip(("real", "made", "train", "other"), SPOILT))
def test_what_cannot_be_scored_is_refused_on_every_side(medbudget, tmp_path, side, message):
    for name in ("real", "made", "train", "other"):
        save_images(chests(4), tmp_path / name)
    SPOILT[message](tmp_path / side)
    command = ("evaluate", tmp_path / "real", tmp_path / "made", "--features", "layout")
    more = ("--train", tmp_path / "train", "--permutation", tmp_path / "other")
    code, _, said = medbudget(*command, *more, "--out", tmp_path / "s.json")
    assert code == 1 and message in said and not (tmp_path / "s.json").exists()


def test_a_prepared_folder_as_a_whole_is_no_set_of_real_images(medbudget, tmp_path):
    save_images(make_phantoms("chest", "healthy", 8).images, tmp_path / "all" / "healthy")
    # `find_images` would give its training images
    data = tmp_path / "data"
    assert medbudget("prepare", "folder", tmp_path / "all", "--out", data, "--size", 64)[0] == 0
    code, _, said = medbudget("evaluate", data, tmp_path / "all" / "healthy")
    assert code == 1 and "test/healthy" in said and "name one of them for the real images" in said
    part = load_sets({"synthetic": tmp_path / "all" / "healthy", "train": data})["train"]
    assert {file.parent.parent.name for file in part.files} == {"train"}


def a_set(folder, numbers=None, seeds=None):
    """Write one image for each number; `seeds` are recorded in the files."""
    images = torch.arange(len(numbers)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    records = None if seeds is None else [{"seed": seed} for seed in seeds]
    save_images(images, folder, names=[f"i_{n:03d}" for n in numbers], records=records)
    return load_sets({"synthetic": folder})["synthetic"]


def test_pairs_are_made_by_recorded_seed_or_else_by_number(tmp_path):
    a = a_set(tmp_path / "a", [0, 1, 2], [7, 5, 6])
    b = a_set(tmp_path / "b", [0, 1, 2], [5, 6, 7])
    first, second, by = pair(a, b)
    assert by == "seed"  # image 1 of a (seed 5) with image 0 of b, and so on
    assert dict(zip(first.tolist(), second.tolist())) == {1: 0, 2: 1, 0: 2}
    a, b = a_set(tmp_path / "c", [3, 10, 4]), a_set(tmp_path / "d", [10, 3, 4])
    first, second, by = pair(a, b)
    assert by == "number" and [a.files[i].stem for i in first] == [b.files[i].stem for i in second]
    tensors = ImageSet(a.images)
    assert pair(tensors, tensors)[2] == "order"


def test_seeds_of_a_web_ui_are_read(tmp_path):
    for folder, seeds in (("a", (11, 12)), ("b", (12, 11))):
        (tmp_path / folder).mkdir()
        for i, seed in enumerate(seeds):
            text = PngInfo()
            text.add_text("parameters", f"a prompt\nSteps: 20, Seed: {seed}, Size: 8x8")
            Image.new("L", (8, 8), i).save(tmp_path / folder / f"{i}.png", pnginfo=text)
    sets = [load_sets({"synthetic": tmp_path / name})["synthetic"] for name in "ab"]
    first, second, _ = pair(*sets)
    assert (first.tolist(), second.tolist()) == ([0, 1], [1, 0])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (([0, 1], [5, 6]), ([0, 1], [6, 7]), "paired by seed: .*b has 2 images with 2"),
        (([0, 1], None), ([1, 2], None), "paired by number: .*b has 2 images with 2"),
        (([0, 1], [5, 5]), ([0, 1], [5, 6]), "a has 2 images with 1 different seeds"),
        (([0, 1], [5, 6]), ([0, 1], None), "b has 2 images with 0 different seeds"),
        (([0, 1], None), ([0, 1, 2], None), "b has 3 images with 3 different numbers"),
    ],
)
def test_what_does_not_pair_is_refused(tmp_path, a, b, message):
    first, second = a_set(tmp_path / "a", *a), a_set(tmp_path / "b", *b)
    with pytest.raises(ValueError, match=message):
        pair(first, second)


def prepared(root, images, patients):
    """A folder as `medbudget prepare` leaves it."""
    paths = save_images(images, root / "test" / "healthy")
    lines = [f"test/healthy/{p.name},{who}" for p, who in zip(paths, patients)]
    (root / "manifest.csv").write_text("\n".join(["file,patient", *lines]) + "\n")
    return root / "test" / "healthy"


def test_intervals_and_floor_respect_the_patients_of_a_manifest(tmp_path):
    # 10 patients with 4 equal images each: 40 images tell no more than 10
    images, made = chests(10).repeat_interleave(4, 0), chests(10, seed=9)
    patients = [f"p{i // 4}" for i in range(40)]
    folder = prepared(tmp_path / "data", images, patients)
    save_images(made, tmp_path / "made")
    known = evaluate(folder, tmp_path / "made", features="layout", floor=False)[0]
    save_images(images, tmp_path / "plain")
    blind = evaluate(tmp_path / "plain", tmp_path / "made", features="layout", floor=False)[0]
    assert known.value == pytest.approx(blind.value)
    wide, narrow = (s.interval[1] - s.value for s in (known, blind))
    assert wide > 1.1 * narrow and "10 patients in 40 images" in known.note
    # the floor of equal twins in both sets would be near 0
    save_images(chests(20, seed=9), tmp_path / "more")
    floor = evaluate(folder, tmp_path / "more", features="layout")[1]
    leaky = evaluate(tmp_path / "plain", tmp_path / "more", features="layout")[1]
    assert floor.value > 2 * leaky.value
    alone = prepared(tmp_path / "one", chests(8), ["p"] * 8)
    with pytest.raises(ValueError, match=r"of 1 patients: too few for two disjoint"):
        evaluate(alone, tmp_path / "made", features="layout")


def test_scores_against_training_images_say_so_in_their_own_line(medbudget, tmp_path):
    real, made = chests(12), chests(6, seed=4)
    save_images(real, tmp_path / "real")
    digests = " ".join(hash_images(load_images(tmp_path / "real", size=64)[:9]))
    save_images(made, tmp_path / "made", records=[{"training_images": digests}] * 6)
    command = ("evaluate", tmp_path / "real", tmp_path / "made", "--features", "layout")
    code, said, error = medbudget(*command, "--no-floor")
    assert code == 0, error
    line = next(line for line in said.splitlines() if line.startswith("Layout distance"))
    assert "against training images (9 of 12)" in line
    assert "no test of the generator: against training images" in said.splitlines()[0]
    _, said, _ = medbudget(*command)
    assert "no test of the generator: against training images" in said.splitlines()[0]
    _, said, _ = medbudget(*command, "--size", 32, "--no-floor")  # found at another size too
    assert "against training images (9 of 12)" in said
    plain = evaluate(real, made, features="layout", floor=False)[0]
    assert "training" not in plain.remark
    told = evaluate(real, made, features="layout", floor=False, train=real[:5])[0]
    assert "against training images (5 of 12)" in told.remark


def test_samples_of_a_trained_word_know_its_training_images(medbudget, tmp_path):
    images = make_phantoms("chest", "healthy", 4).images
    save_images(images, tmp_path / "real")
    word, made = tmp_path / "w.safetensors", tmp_path / "made"
    few = ("--steps", 1, "--batch-size", 1, "--n-vectors", 1)
    assert medbudget("invert", tmp_path / "real", "--token", "<w>", "--out", word, *few)[0] == 0
    draw = ("--out", made, "--n", 2, "--steps", 1)
    assert medbudget("sample", "<w>", "--embeddings", word, *draw)[0] == 0
    scores = evaluate(tmp_path / "real", made, features="layout", floor=False)
    assert "against training images (4 of 4)" in scores[0].remark


def test_few_images_stand_in_the_scores_own_line():
    images = make_phantoms("chest", "healthy", 66).images
    (score,) = evaluate(images[:31], images[31:61], features="layout", floor=False)
    assert score.remark == ""
    (score,) = evaluate(images[:29], images[31:61], features="layout", floor=False)
    assert score.remark == "only 29 images" and "n = 29 vs 30; only 29 images;" in str(score)
    found = memorisation(images[:5], images[5:65], images[65:66]).scores()[0]
    assert "rests on only 1 held-out image;" in str(found)


def score(name, value, half, n=100):
    return Score(name, value, (value - half, value + half), n, "X")


@pytest.mark.parametrize(
    ("distance", "n", "said"),
    [
        (80, 100, "near the floor: at n = 100"),
        (110, 100, "above the floor: FD (X) is 1.4 times its floor"),
        (171, 100, "far from the real images: FD (X) is 2.2 times its floor; copies"),
        (80, 11, "cannot be told: only 11 images"),
        (171, 11, "2.2 times its floor (rough: only 11 images)"),
    ],
)
def test_the_verdict_follows_from_distance_floor_and_n(distance, n, said):
    scores = [score("FD (X)", distance, 9, n), score("FD (X), real vs real", 77, 9, n)]
    assert said in judge(scores)


def test_the_verdict_on_copies():
    def copied(value, low, remark=""):
        return Score("Copied share (pixels)", value, (low, 1.0), 20, remark=remark)

    assert "copies: none beyond chance (0 of 20 flagged)" in judge([copied(0, 0)])
    assert "copies: 8 of 20 are nearer to training" in judge([copied(0.4, 0.2)])
    few = copied(1, 0.8, "rests on only 1 held-out image")
    assert "20 of 20 flagged, but this rests on only 1 held-out image" in judge([few])
    assert "not checked" in judge([])
