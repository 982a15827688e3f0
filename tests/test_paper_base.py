"""The paper's preset without its weights: what stands in for Stable Diffusion 2.0 is like it."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from paper_base import SIZE

from medbudget import Embedding, known, load_base, load_images, sample, verify
from medbudget.hub import PAPER_EMBEDDINGS, find_word
from medbudget.known import KNOWN


def test_the_papers_base_and_words_are_found_offline(paper):
    base = load_base("sd20", device="cpu")
    assert (base.width, base.prediction, base.preset, base.note) == (1024, "epsilon", "paper", "")
    words = [find_word("chest", label, base) for label in ("healthy", "cardiomegaly")]
    images = sample(
        base, "<healthy>:0.25 AND <cardiomegaly>:0.75", embeddings=words, n=2, steps=2
    )  # fmt: skip
    assert images.shape == (2, 3, SIZE, SIZE) and images.float().std() > 5
    assert len(list((paper.cache / "embeddings").iterdir())) == len(PAPER_EMBEDDINGS)


def test_the_folders_are_those_that_prepare_writes(paper_base):
    for folder, n in (
        ("prostate/train/negative", 4), ("prostate/test/positive", 4), ("prostate/reference/negative", 8),
        ("chest/train/pneumonia", 4), ("chest/val/no_finding", 4), ("chest/reference/no_finding", 8),
        ("histology/train/metastasis", 4), ("own/train/tumour", 11),
    ):  # fmt: skip
        assert load_images(paper_base.data / folder).shape == (n, 3, SIZE, SIZE), folder


def test_verify_proves_the_base_and_finds_one_swapped_layer(paper, medbudget, monkeypatch):
    draw = partial(verify.draw_golden, size=128)  # as at 512 pixels, in less time
    monkeypatch.setattr(verify, "draw_golden", draw)
    code, said, _ = medbudget("base", "verify", "sd20", "--known", "sd20")
    lines = dict(line.split(maxsplit=1) for line in said.splitlines()[1:])
    assert code == 1 and lines.pop("identity").startswith("FAILED: not Stable Diffusion 2.0")
    assert lines.pop("hash")
    assert all(line.startswith("ok:") for line in lines.values()) and len(lines) == 3, said
    base = load_base("sd20", device="cpu")
    for weights in base.vae.decoder.conv_out.parameters():
        weights.mul_(0.02)  # random weights draw black and white
    drawn = tuple(draw(base, KNOWN[0].golden))
    golden = replace(KNOWN[0].golden, values=drawn)
    row = replace(KNOWN[0], golden=golden)
    monkeypatch.setattr(known, "KNOWN", (row, *KNOWN[1:]))
    assert verify.verify_base(base)["identity"][1]
    layer = base.unet.up_blocks[3].resnets[2].conv_shortcut.weight.data
    layer.copy_(layer.flip(0))
    assert not verify.verify_base(base)["identity"][1]


@pytest.mark.parametrize("name", ["prostate_neg", "pcam_pos"])
def test_the_words_are_in_a1111s_format(paper, name):
    path = paper.cache / "embeddings" / f"{name}.pt"
    content = torch.load(path, weights_only=True)
    assert content["string_to_param"]["*"].shape == (64, 1024)
    assert Embedding.load(path).base_hash == content["sd_checkpoint"] == "09dd2ae4"


@pytest.mark.slow
@pytest.mark.realdata
def test_a_new_users_hundred_xrays_from_folder_to_verdict(
    paper, medbudget, real_data, tmp_path, monkeypatch
):
    """README's five commands and `classify`, as written there, on the small Stable Diffusion."""
    for label in ("normal", "pneumonia"):
        for file in sorted((real_data / "chest_xray" / label).iterdir())[:50]:
            (tmp_path / "xrays" / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "xrays" / label)
    monkeypatch.chdir(tmp_path)

    def run(*command):
        code, said, error = medbudget(*command)
        assert code == 0, error
        return said

    assert "base sd20: " in run("doctor")
    assert "100 made" in run("prepare", "folder", "xrays", "--out", "mine", "--size", SIZE)
    learn = ("--out", "mine.safetensors", "--base", "sd2", "--steps", 2, "--samples", 0)
    assert "64 vectors" in run("invert", "mine/train/pneumonia", "--token", "<mine>", *learn)
    draw = ("--embeddings", "mine.safetensors", "--n", 8, "--base", "sd2", "--steps", 2)
    for seed, label in enumerate(("normal", "pneumonia")):
        there = ("--out", f"drawn/{label}", "--seed", 100 * seed)
        assert "8 synthetic images" in run("sample", "<mine>", *there, *draw)
    held_out = ("mine/test/pneumonia", "drawn/pneumonia", "--train", "mine/train/pneumonia")
    said = run("evaluate", *held_out)
    assert said.startswith("verdict: far from") and "n is half of the 10 real images" in said
    splits = [f"mine/{split}" for split in ("train", "val", "test")]
    few = ("--synthetic", "drawn", "--preset", "tiny", "--steps", 2, "--runs", 2)
    assert "58 train, 22 val, 20 test, 16 synthetic" in run("classify", *splits, *few)
    swapped = run("evaluate", "drawn/normal", "mine/test/normal")
    assert "no test of the generator: 8 of the 8 real images are synthetic" in swapped


def test_what_is_missing_is_said_before_a_base_is_fetched(paper, medbudget, tmp_path):
    word = paper.cache / "embeddings" / "pcam_pos.pt"
    there = ("--out", tmp_path / "out", "--base", "sd15")  # which is not in the cache
    for command, problem in (
        (("sample", "<x>", "--embeddings", tmp_path / "none.pt"), "no embedding file"),
        (("sample", "<x>", "--embeddings", word), "unknown token <x>"),
        (("interpolate", word, tmp_path / "none.pt"), "no embedding file"),
        (("inpaint", tmp_path / "none", "a scan", "--ellipse", ".5,.5,.1,.1"), "no such folder"),
        (("inpaint", paper.images, tmp_path / "none", "a scan"), "no such folder"),
    ):
        code, _, error = medbudget(*command, *there)
        assert code == 1 and problem in error, (command, error)
    word = ("--token", "<x>", "--out", tmp_path / "x.pt", "--base", "sd15")
    assert "no such folder" in medbudget("invert", tmp_path / "none", *word)[2]
    assert "n_vectors must be" in medbudget("invert", paper.images, "--n-vectors", 90, *word)[2]
    assert "Stable Diffusion 1.5 could not be found" in medbudget("invert", paper.images, *word)[2]
