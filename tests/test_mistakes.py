"""What a newcomer does wrong on the command line: the first sentence of the answer, and no loss."""

import json

import pytest
import torch

from medbudget import Embedding, save_images
from medbudget.data.folder import prepare_folder
from medbudget.images import read_record, to_pil


def fill(folder, n=2, *, size=64, seed=0):
    """Write n images of noise; return the folder."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    save_images(images, folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def word(tmp_path):
    return Embedding(torch.randn(2, 96), "<word>").save(tmp_path / "word.safetensors")


@pytest.fixture
def refused(medbudget):
    """Run a command that must fail; return its message, which is one line."""

    def run(*arguments, code=1):
        got, _, said = medbudget(*arguments)
        lines = [line for line in said.splitlines() if not line.startswith("note:")]
        assert got == code and len(lines) == 1 and lines[0].startswith("error: "), (got, said)
        return lines[0].removeprefix("error: ")

    return run


ELLIPSE = ("--ellipse", ".5,.5,.2,.2", "--steps", 2)
FEW = ("--steps", 2, "--n-vectors", 2, "--batch-size", 1)


def test_inpainting_never_replaces_originals_nor_earlier_results(medbudget, refused, tmp_path):
    folder, out = fill(tmp_path / "in"), tmp_path / "out"
    before = contents(folder)
    for inside in (folder, folder / "made"):
        said = refused("inpaint", folder, "red ground", "--out", inside, *ELLIPSE)
        assert "lies inside the input" in said and contents(folder) == before
    assert medbudget("inpaint", folder, "red ground", "--out", out, *ELLIPSE)[0] == 0
    first = contents(out)
    said = refused("inpaint", folder, "blue ground", "--out", out, *ELLIPSE)
    assert "prompt (red ground there, blue ground now)" in said and "--overwrite" in said
    assert medbudget("inpaint", folder, "red ground", "--out", out, *ELLIPSE)[0] == 0
    assert contents(out) == first
    again = ("inpaint", folder, "blue ground", "--out", out, *ELLIPSE, "--overwrite")
    assert medbudget(*again)[0] == 0 and contents(out) != first
    to_pil(torch.zeros(3, 64, 64, dtype=torch.uint8)).save(folder / "00000.bmp")
    two = tmp_path / "two"  # two images of one stem do not share an output
    assert medbudget("inpaint", folder, "red ground", "--out", two, *ELLIPSE)[0] == 0
    assert {"00000_png.png", "00000_bmp.png"} <= {p.name for p in two.iterdir()}


def test_no_command_replaces_what_it_did_not_make(medbudget, refused, tmp_path, word):
    real, mine = fill(tmp_path / "real", 4), fill(tmp_path / "mine", 4, seed=1)
    before, old = contents(mine), word.read_bytes()
    page = tmp_path / "scores.json"
    page.write_text("[]")
    to_pil(torch.zeros(3, 8, 8, dtype=torch.uint8)).save(tmp_path / "new.png")
    commands = [
        ("sample", "red", "--out", mine, "--steps", 1, "--n", 1),
        ("phantoms", mine, "--n", 1),
        ("invert", real, "--token", "<new>", "--out", word, *FEW),
        ("invert", real, "--token", "<new>", "--out", tmp_path / "new.pt", *FEW),  # its sheet
        ("embedding", "convert", word, word, "--token", "<other>"),
        ("embedding", "card", word, "--out", page),
        ("evaluate", real, mine, "--features", "layout", "--out", page),
    ]
    for command in commands:
        said = refused(*command)
        assert "is there already; choose another place, or add --overwrite" in said, command
    assert contents(mine) == before and word.read_bytes() == old and page.read_text() == "[]"
    assert medbudget(*commands[-1], "--overwrite")[0] == 0 and json.loads(page.read_text())
    said = medbudget("phantoms", tmp_path / "p", "--n", 1)[1]
    assert said.startswith("wrote 1 prostate phantom (")
    assert medbudget("phantoms", tmp_path / "p", "--n", 2)[0] == 0, "the same, and one more"
    assert "size (64 there, 32 now)" in refused("phantoms", tmp_path / "p", "--size", 32)


@pytest.mark.parametrize("name", ["p00001_001.png", "scan.JPG"])
def test_nothing_is_drawn_among_images_that_are_none_of_ours(refused, tmp_path, name):
    held_out = tmp_path / "test"
    held_out.mkdir()
    to_pil(torch.zeros(3, 64, 64, dtype=torch.uint8)).save(held_out / name)
    if name.startswith("p0"):
        prepare_folder(fill(tmp_path / "raw", 1), tmp_path / "made", size=64, proportions=[1])
        held_out = tmp_path / "made/train/all"
    before, source = contents(held_out), fill(tmp_path / "in")
    for command in (
        ("sample", "red ground", "--n", 1, "--steps", 2),
        ("inpaint", source, "red ground", *ELLIPSE),
    ):
        for more in ((), ("--overwrite",)):
            said = refused(*command, "--out", held_out, *more)
            assert f"{name} is none of the images" in said and contents(held_out) == before


def test_a_word_of_tiny_fits_no_other_program_and_one_of_sd_does(medbudget, word, tmp_path):
    _, said, _ = medbudget("embedding", "convert", word, tmp_path / "w.pt")
    assert "96 wide" in said and "no other program can use it" in said
    for width, name in ((768, "1.x"), (1024, "2.x")):
        Embedding(torch.randn(2, width), "<word>").save(tmp_path / f"{width}.safetensors")
        command = (tmp_path / f"{width}.safetensors", tmp_path / f"{width}.pt")
        _, said, _ = medbudget("embedding", "convert", *command)
        assert f"Stable Diffusion {name} in A1111, ComfyUI and diffusers" in said


def test_wrong_use_names_the_right_use(refused, word, tmp_path):
    out = ("--out", tmp_path / "o")
    for command, code, problem in (
        (("sampel",), 2, 'Did you mean "sample"?'),
        (("sample", "x"), 2, "--out is missing (medbudget sample --help)"),
        (("sample", "x", "--n"), 2, "--n needs a value"),
        (("sample", "x", *out, "--embedding", "y"), 2, "Did you mean --embeddings?"),
        (("sample", "x", "y", *out), 2, "too many arguments: y"),
        (("sample", "x", *out, "--device", "gpu"), 1, "--device gpu: allowed are cpu, cuda"),
        (("sample", "x", *out, "--threads", 0), 1, "--threads must be at least 1, got 0"),
        (("sample", "x", "--out", word, "--steps", 1), 1, "word.safetensors is a file"),
        (("sample", "x", "--n", 10**9, *out), 1, "n must be at most 100000 in one folder"),
        (("sample", "x", *out, "--seed", "1.5"), 2, "Invalid value for --seed: 1.5 is no whole"),
        (("describe", tmp_path / "none"), 1, "no such folder"),
        (("phantoms", tmp_path, "--config", "gone.yaml"), 1, "no such file gone.yaml"),
        (("phantoms", tmp_path, "--config"), 1, "--config: no such file"),
    ):
        assert problem in refused(*command, code=code), command
    assert not (tmp_path / "o").exists()


def test_the_cache_says_where_it_is_and_is_cleared(medbudget, own_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.npy").write_bytes(bytes(3 * 2**20))
    said = medbudget("cache")[1].splitlines()
    assert said[0].split() == ["features,", "weights", "3", "MiB", str(tmp_path / "cache")]
    assert (tmp_path / "cache" / "a.npy").exists() and "--clear" in said[2]
    assert medbudget("cache", "--clear")[0] == 0 and not (tmp_path / "cache").exists()


def test_options_come_from_a_file_and_the_command_line_wins(medbudget, refused, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "p"
    config.write_text("phantoms: {n: 2, kind: chest, size: 32}\nsample: {n: 3}\n")
    assert medbudget("phantoms", out, "--config", config, "--n", 3)[0] == 0
    assert len(list(out.glob("*.png"))) == 3
    record = read_record(out / "00000.png")
    assert record["phantoms"] == "chest" and record["size"] == 32
    config.write_text("phantoms: {nn: 2}")
    assert 'Unknown option: "[nn]"' in refused("phantoms", out, "--config", config, code=2)


def test_a_pt_file_under_another_name_is_called_so(medbudget, refused, word, tmp_path):
    medbudget("embedding", "convert", word, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "y.safetensors")
    said = refused("embedding", "show", tmp_path / "y.safetensors")
    assert said == "y.safetensors: it holds what a .pt or .bin file holds; give it that ending"


def test_numbers_that_evaluate_cannot_use(medbudget, refused, tmp_path):
    real = fill(tmp_path / "real", 4)
    said = refused("evaluate", real, real, "--features", "layout", "--size", 0)
    assert said == "size must be at least 1, got 0"
    said = refused("evaluate", real, real, "--features", "layout", "--seed", -1)
    assert said == "seed must be at least 0, got -1"
    save_images(torch.zeros(6, 3, 64, 64, dtype=torch.uint8), tmp_path / "black")
    real = ("evaluate", tmp_path / "black", fill(tmp_path / "made", 6), "--features", "layout")
    code, out, _ = medbudget(*real)
    assert code == 0 and "its floor 0" in out and "inf times" not in out


def test_prompts_that_mean_something_else(medbudget, refused, word, tmp_path):
    few = ("--n", 1, "--steps", 1, "--embeddings", word)
    code, _, said = medbudget("sample", "0.5 <word> AND 0.5 red", "--out", tmp_path / "a", *few)
    assert code == 1 and said.startswith(
        "error: a weight stands behind its part: write e.g. <a>:0.5"
    )
    code, out, said = medbudget("sample", "word", "--out", tmp_path / "b", *few)
    assert code == 0 and "note: the prompt does not use <word>, which is loaded" in said
    assert out.startswith("1 synthetic image in ")
    code, out, said = medbudget("sample", "red", "--cfg-scale", 100, "--out", tmp_path / "c", *few)
    assert code == 0 and "total guidance is 100" in said and "total guidance 100" in out
    said = refused("sample", "<word>", "--out", tmp_path / "d", *few, "--embeddings", word)
    assert said.startswith("two embeddings are called <word>") and "embedding convert" in said
    said = refused("inpaint", fill(tmp_path / "in"), "red", "--ellipse", "30,30,5,5", "--out",
                   tmp_path / "e")  # fmt: skip
    assert said.startswith("an ellipse is given in fractions of the edge, not in pixels")
