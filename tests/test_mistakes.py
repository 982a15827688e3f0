"""What a newcomer does wrong on the command line: the first sentence of the answer, and no loss."""

import json

import pytest
import torch

from medbudget import Embedding, save_images
from medbudget.images import read_record, to_pil


def fill(folder, n=2, *, size=64, seed=0, name="{:05d}"):
    """Write n images of noise; return the folder."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    save_images(images, folder, names=[name.format(i) for i in range(n)])
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def word(tmp_path):
    path = tmp_path / "word.safetensors"
    Embedding(torch.randn(2, 96), "<word>").save(path)
    return path


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
    assert contents(out) == first
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
    commands = [
        ("sample", "red", "--out", mine, "--steps", 1, "--n", 1),
        ("phantoms", mine, "--n", 1),
        ("invert", real, "--token", "<new>", "--out", word, *FEW),
        ("embedding", "convert", word, word, "--token", "<other>"),
        ("embedding", "card", word, "--out", page),
        ("evaluate", real, mine, "--features", "layout", "--out", page),
    ]
    for command in commands:
        said = refused(*command)
        assert "is there already; choose another place, or add --overwrite" in said, command
    assert contents(mine) == before and word.read_bytes() == old and page.read_text() == "[]"
    assert medbudget(*commands[-1], "--overwrite")[0] == 0 and json.loads(page.read_text())
    assert medbudget("phantoms", tmp_path / "p", "--n", 1)[0] == 0
    assert medbudget("phantoms", tmp_path / "p", "--n", 2)[0] == 0, "the same, and one more"
    assert "size (64 there, 32 now)" in refused("phantoms", tmp_path / "p", "--size", 32)


def test_a_word_of_tiny_fits_no_other_program_and_one_of_sd_does(medbudget, word, tmp_path):
    _, said, _ = medbudget("embedding", "convert", word, tmp_path / "w.pt")
    assert "96 wide" in said and "no other program can use it" in said
    for width, name in ((768, "1.x"), (1024, "2.x")):
        Embedding(torch.randn(2, width), "<word>").save(tmp_path / f"{width}.safetensors")
        command = (tmp_path / f"{width}.safetensors", tmp_path / f"{width}.pt")
        _, said, _ = medbudget("embedding", "convert", *command)
        assert f"Stable Diffusion {name} in A1111, ComfyUI and diffusers" in said


def test_wrong_use_names_the_right_use(refused, tmp_path):
    assert 'Did you mean "sample"?' in refused("sampel", code=2)
    assert "--out is missing (medbudget sample --help)" in refused("sample", "x", code=2)
    assert "--n needs a value" in refused("sample", "x", "--n", code=2)
    assert "Did you mean --embeddings?" in refused(
        "sample", "x", "--out", "o", "--embedding", "y", code=2
    )
    assert "too many arguments: y" in refused("sample", "x", "y", "--out", tmp_path, code=2)
    said = refused("sample", "x", "--out", tmp_path / "o", "--device", "gpu")
    assert said.startswith("--device gpu: allowed are cpu, cuda")
    said = refused("sample", "x", "--out", tmp_path / "o", "--threads", 0)
    assert said == "--threads must be at least 1, got 0"


def test_an_output_folder_that_is_a_file_is_called_so(refused, word):
    said = refused("sample", "red", "--out", word, "--steps", 1)
    assert "word.safetensors is a file" in said


def test_images_that_are_not_there_or_not_images(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused("describe", tmp_path / "empty")
    assert "no such folder" in refused("describe", tmp_path / "none")


def test_the_cache_says_where_it_is_and_is_cleared(medbudget, own_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.npy").write_bytes(bytes(3 * 2**20))
    said = medbudget("cache")[1].splitlines()
    assert said[0].split() == ["features,", "weights", "3", "MiB", str(tmp_path / "cache")]
    assert (tmp_path / "cache" / "a.npy").exists() and "--clear" in said[2]
    assert medbudget("cache", "--clear")[0] == 0 and not (tmp_path / "cache").exists()


def test_options_come_from_a_file_and_the_command_line_wins(medbudget, refused, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "p"
    config.write_text(f"phantoms: {{n: 2, kind: chest, size: 32}}\nsample: {{out: {out}}}\n")
    assert medbudget("phantoms", out, "--config", config, "--n", 3)[0] == 0
    assert len(list(out.iterdir())) == 3
    record = read_record(out / "00000.png")
    assert record["phantoms"] == "chest" and record["size"] == 32
    config.write_text("phantoms: {nn: 2}")
    assert 'Unknown option: "[nn]"' in refused("phantoms", out, "--config", config, code=2)
    assert "no such file gone.yaml" in refused("phantoms", out, "--config", "gone.yaml")
    assert "--config: no such file" in refused("phantoms", out, "--config")


def test_a_pt_file_under_another_name_is_called_so(medbudget, refused, word, tmp_path):
    medbudget("embedding", "convert", word, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "y.safetensors")
    said = refused("embedding", "show", tmp_path / "y.safetensors")
    assert said == "y.safetensors holds what a .pt or .bin file holds: give it that ending"


def test_numbers_that_cannot_be_meant(refused, tmp_path):
    said = refused("sample", "red", "--n", 10**9, "--out", tmp_path / "o")
    assert said == "n must be at most 100000 in one folder, got 1000000000: use several folders"
    for option, value in (("--seed", "1.5"), ("--n", "2.5"), ("--threads", "1.2")):
        said = refused("sample", "red", "--out", tmp_path / "o", option, value, code=2)
        assert f"Invalid value for {option}: {value} is no whole number" in said
    real = fill(tmp_path / "real", 4)
    said = refused("evaluate", real, real, "--features", "layout", "--size", 0)
    assert said == "size must be at least 1 pixel, got 0"
    said = refused("evaluate", real, real, "--features", "layout", "--seed", -1)
    assert said == "seed must be at least 0, got -1"


def test_a_floor_of_zero_is_called_so(medbudget, tmp_path):
    save_images(torch.zeros(6, 3, 64, 64, dtype=torch.uint8), tmp_path / "black")
    real = ("evaluate", tmp_path / "black", fill(tmp_path / "made", 6), "--features", "layout")
    code, out, _ = medbudget(*real)
    assert code == 0 and "and its floor 0" in out and "inf times" not in out


def test_a_command_stopped_while_it_loads_says_how_to_go_on(medbudget, monkeypatch, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("medbudget.load_base", stop)
    for command in (("invert", fill(tmp_path / "in"), "--token", "<m>"), ("sample", "red")):
        code, _, said = medbudget(*command, "--out", tmp_path / "w.pt")
        assert code == 130 and said == "stopped: the same command goes on from here\n"


def test_a_checkpoint_is_not_the_word_itself(medbudget, tmp_path):
    out = tmp_path / "w.safetensors"
    train = ("invert", fill(tmp_path / "in"), "--token", "<m>", "--steps", 1, "--out", out)
    code, _, said = medbudget(*train, "--checkpoint", out)
    assert code == 1 and "name another file for the checkpoint" in said


def test_prompts_that_mean_something_else(medbudget, refused, word, tmp_path):
    few = ("--n", 1, "--steps", 1, "--embeddings", word)
    code, _, said = medbudget("sample", "0.5 <word> AND 0.5 red", "--out", tmp_path / "a", *few)
    assert code == 1 and said.startswith("error: a weight stands behind its part: write <word>:0.5")
    code, _, said = medbudget("sample", "word", "--out", tmp_path / "b", *few)
    assert code == 0 and "note: the prompt does not use <word>, which is loaded" in said
    code, _, said = medbudget("sample", "red", "--cfg-scale", 100, "--out", tmp_path / "c", *few)
    assert code == 0 and "total guidance is 100" in said
    said = refused("sample", "<word>", "--out", tmp_path / "d", *few, "--embeddings", word)
    assert said.startswith("two embeddings are called <word>") and "embedding convert" in said


def test_an_ellipse_in_pixels_is_told_its_unit(refused, tmp_path):
    command = ("inpaint", fill(tmp_path / "in"), "red", "--ellipse", "30,30,5,5", "--out")
    said = refused(*command, tmp_path / "out")
    assert said.startswith("an ellipse is given in fractions of the edge, not in pixels")


def test_plurals(medbudget, tmp_path):
    assert medbudget("phantoms", tmp_path / "p", "--n", 1)[1].startswith(
        "wrote 1 prostate phantom ("
    )
    said = medbudget("sample", "red", "--out", tmp_path / "s", "--n", 1, "--steps", 1)[1]
    assert said.startswith("1 synthetic image in ")
