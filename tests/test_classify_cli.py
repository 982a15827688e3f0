"""medbudget classify: comparison, saved scores, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import torch

from medbudget import save_images
from medbudget.data.layouts import write_pcam
from medbudget.data.pcam import prepare_pcam
from medbudget.metrics import compute_auc


@pytest.fixture
def splits(tmp_path):
    """Folders of two classes: class b has a brighter middle."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 8), ("test", 10), ("made", 8)):
        for label, gap in (("a", 0), ("b", 60)):
            images = rng.normal(100, 25, (n, 3, 32, 32))
            images[:, :, 8:24, 8:24] += gap
            made = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
            save_images(made, tmp_path / split / label)
    return tmp_path


def test_classify_compares_and_saves_every_score(medbudget, splits):
    folders = [splits / name for name in ("train", "val", "test")]
    options = ["--synthetic", splits / "made", "--runs", 2, "--steps", 6, "--out", splits / "out"]
    code, out, err = medbudget("classify", *folders, *options)
    assert code == 0, err
    assert "b against a: 24 train, 16 val, 20 test, 16 synthetic" in out
    for words in (
        "AUC, real ",
        "AUC, real + synthetic",
        "gain, real + synthetic",
        "detectable",
        "p = ",
    ):
        assert words in out
    with open(splits / "out" / "scores.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 20 * 2 * 2 and {line["seed"] for line in lines} == {"0", "1"}
    truth = {line["case"]: line["label"] for line in lines}
    assert truth["a/00000.png"] == "0" and truth["b/00000.png"] == "1"
    result = {s["name"]: s for s in json.loads((splits / "out" / "result.json").read_text())}
    real = [line for line in lines if line["trained on"] == "real"]
    by_run = [[float(x["score"]) for x in real if x["seed"] == seed] for seed in "01"]
    want = compute_auc([int(x["label"]) for x in real if x["seed"] == "0"], by_run)
    assert result["AUC, real"]["value"] == pytest.approx(want)
    again = medbudget("classify", *folders, *options)[1]  # taken from the saved runs
    assert again == out
    assert "verdict: " in out and ("could have been found" in out or "is shown" in out)


def test_classify_replaces_no_other_comparison(medbudget, splits):
    folders = [splits / name for name in ("train", "val", "test")]
    options = ["--steps", 3, "--runs", 1, "--out", splits / "out"]
    made = ["--synthetic", splits / "made"]
    assert medbudget("classify", *folders, *options, *made)[0] == 0
    files = [p for p in (splits / "out").rglob("*") if p.is_file()]
    before = {file: file.read_bytes() for file in files}
    assert len(before) == 6  # settings (two files), scores, result, a run of each training set
    for other in (
        [*folders, *options],
        [*folders, *options, *made, "--seed", 4],
        [*folders[:2], splits / "made", *options],
    ):
        code, _, err = medbudget("classify", *other)
        assert code == 1 and "made with other settings" in err and "--overwrite" in err
        assert before == {file: file.read_bytes() for file in before}
        assert "settings (" not in err, "each by its name"
    more = [2 if part == 1 else part for part in options]
    assert medbudget("classify", *folders, *more, *made)[0] == 0  # the same with one more run
    run = splits / "out" / "real" / "run_0.json"
    assert run.read_bytes() == before[run]
    code, _, err = medbudget("classify", *folders, *options, *made)
    assert code == 1 and "runs (2 there, 1 now)" in err
    assert medbudget("classify", *folders, *options, *made, "--seed", 4, "--overwrite")[0] == 0
    assert not run.exists() and run.with_name("run_4.json").exists()
    (splits / "mine").mkdir()
    (splits / "mine" / "result.json").write_text("mine")
    options[-1] = splits / "mine"
    code, _, err = medbudget("classify", *folders, *options)
    assert code == 1 and "result.json is there already" in err
    assert (splits / "mine" / "result.json").read_text() == "mine"


def test_classify_writes_nothing_into_its_inputs_and_refuses_seeds_beyond(medbudget, splits):
    folders = [splits / name for name in ("train", "val", "test")]
    for out in (splits / "train", splits / "test" / "runs"):
        code, _, said = medbudget("classify", *folders, "--steps", 3, "--runs", 1, "--out", out)
        assert code == 1 and "lies inside the input" in said
    assert {path.name for path in (splits / "train").iterdir()} == {"a", "b"}
    few = ("--steps", 3, "--runs", 2, "--out", splits / "out")
    code, _, said = medbudget("classify", *folders, *few, "--seed", 2**64 - 1)
    assert code == 1 and "seed must be" in said and str(2**64) in said
    code, _, said = medbudget("classify", *folders, *few, "--seed", 2**64 - 2)
    assert code == 0, said


def test_classify_resamples_patients_that_the_manifest_names(medbudget, splits):
    rows = ["file,patient"]
    for split, n in (("train", 12), ("val", 8), ("test", 10)):
        for label in "ab":
            rows += [f"{split}/{label}/{i:05d}.png,{split}{label}{i // 5}" for i in range(n)]
    (splits / "manifest.csv").write_text("\n".join(rows) + "\n")
    folders = [splits / name for name in ("train", "val", "test")]
    options = ["--synthetic", splits / "made", "--runs", 1, "--steps", 5]
    code, out, err = medbudget("classify", *folders, *options, "--out", splits / "out")
    assert code == 0, err
    assert "the test cases are of 4 patients" in out and "bootstrap over 4 patients" in out
    assert "DeLong" not in out  # it takes cases for independent
    one = (splits / "manifest.csv").read_text().replace("testb1", "testb0")
    (splits / "manifest.csv").write_text(one)
    code, _, err = medbudget("classify", *folders, *options, "--out", splits / "one")
    assert code == 1 and "test has one patient with b" in err
    (splits / "manifest.csv").write_text(one.replace("testb0", "vala0"))
    code, _, err = medbudget("classify", *folders, *options, "--out", splits / "one")
    assert code == 1 and "patients are in two splits" in err


def test_classify_tests_on_official_patches(medbudget, tmp_path):
    official = write_pcam(tmp_path / "pcam", {"train": 24, "valid": 8, "test": 12})
    prepare_pcam(official, tmp_path / "out", size=128, per_class=8)
    name = "camelyonpatch_level_2_split_{}_x.h5"
    folders = [tmp_path / "out" / "train", *(official / name.format(s) for s in ("valid", "test"))]
    options = ["--runs", 1, "--steps", 3, "--out", tmp_path / "cls"]
    code, out, err = medbudget("classify", *folders, *options)
    assert code == 0, err
    assert "metastasis against normal: 16 train, 8 val, 12 test" in out
    with open(tmp_path / "cls" / "scores.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["label"]) for line in lines[:2]] == [
        ("test_000000", "0"), ("test_000001", "1")
    ]  # fmt: skip
    assert len(lines) == 12


def test_classify_refuses_what_would_be_worth_nothing(medbudget, splits):
    def error(*arguments):
        code, _, err = medbudget("classify", *arguments, "--out", splits / "out")
        assert (
            code == 1
            and err.splitlines()[-1].startswith("error: ")
            and not (splits / "out").exists()
        )
        return err

    train, val, test, made = (splits / name for name in ("train", "val", "test", "made"))
    (test / "a" / "leak.png").write_bytes((train / "a" / "00003.png").read_bytes())
    assert "test: a/leak.png is train: a/00003.png" in error(train, val, test)
    (test / "a" / "leak.png").unlink()
    (splits / "one").mkdir()
    (made / "b").rename(splits / "one" / "b")
    assert "1 class folders (b); two are needed" in error(train, val, splits / "one")
    assert "1 class folders (a)" in error(train, val, test, "--synthetic", made)
    (made / "a").rename(splits / "one" / "c")
    assert "class folders differ" in error(train, val, splits / "one")
    save_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), splits / "black" / "a")
    save_images(torch.eye(32).mul(255).byte().expand(1, 3, -1, -1), splits / "black" / "b")
    assert "1 synthetic images show one value only (a/00000.png)" in error(
        train, val, test, "--synthetic", splits / "black"
    )
    save_images(torch.zeros(2, 3, 48, 48, dtype=torch.uint8), splits / "large" / "a")
    save_images(torch.ones(2, 3, 48, 48, dtype=torch.uint8), splits / "large" / "b")
    assert "sizes differ" in error(train, val, splits / "large")
