"""medbudget classify: comparison, saved scores, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import torch

from medbudget import save_images
from medbudget.metrics import auc


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
    options = ["--synthetic", splits / "made", "--runs", 2, "--steps", 25, "--out", splits / "out"]
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
    want = auc([int(x["label"]) for x in real if x["seed"] == "0"], by_run)
    assert result["AUC, real"]["value"] == pytest.approx(want)
    again = medbudget("classify", *folders, *options)[1]  # taken from the saved runs
    assert again == out


def test_classify_refuses_what_would_be_worth_nothing(medbudget, splits):
    def error(*arguments):
        code, _, err = medbudget("classify", *arguments, "--out", splits / "out")
        assert code == 1 and err.startswith("error: ") and not (splits / "out").exists()
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
    save_images(torch.zeros(2, 3, 48, 48, dtype=torch.uint8), splits / "large" / "a")
    save_images(torch.ones(2, 3, 48, 48, dtype=torch.uint8), splits / "large" / "b")
    assert "sizes differ" in error(train, val, splits / "large")
