"""Membership: who remembers is found out, by losses, by a word, and on the command line."""

import json

import numpy as np
import pytest
import torch

from medbudget import Embedding, make_phantoms, metrics, save_images
from medbudget.images import hash_images
from medbudget.membership import membership_test

WORD = Embedding(0.3 * torch.randn(2, 96, generator=torch.Generator().manual_seed(1)), "<w>")


def test_losses_of_a_model_that_remembers_and_one_that_does_not():
    rng = np.random.default_rng(0)
    attack = metrics.membership_inference
    forgets = attack(rng.normal(1, 1, 200), rng.normal(1, 1, 200))
    assert forgets.interval[0] < 0.5 < forgets.interval[1]
    inside, outside = rng.normal(0, 1, (200, 4)), rng.normal(1, 1, (200, 4))
    remembers = attack(inside, outside)
    assert remembers.interval[0] > 0.8 and remembers.n == (200, 200)  # lower loss: member
    said = metrics.judge_membership([remembers, forgets])
    assert said.startswith("the word gives its training images away: Membership AUC (loss) is 0.9")
    assert "cannot tell members from others" in metrics.judge_membership([forgets])
    assert "rough: only 4 images" in metrics.judge_membership([attack([1] * 4, [2] * 4)])
    # ten images of each patient, all alike, tell as much as one of them
    few = attack(inside[:20], outside[:20])
    patients = np.repeat([f"p{i}" for i in range(20)], 10)
    many = [np.repeat(losses[:20], 10, axis=0) for losses in (inside, outside)]
    known, blind = attack(*many, groups=(patients, None)), attack(*many)
    assert known.value == blind.value == few.value and "patients" in known.note
    width = [score.interval[1] - score.interval[0] for score in (known, blind)]
    assert width[0] > 1.5 * width[1]


def test_command_line_tells_loss_and_difference(medbudget, tiny, tmp_path):
    images = make_phantoms("prostate", "tumour", 8).images
    save_images(images[:4], tmp_path / "in")
    save_images(images[4:], tmp_path / "out")
    WORD.save(tmp_path / "w.safetensors")
    file = tmp_path / "s.json"
    command = ("membership", tmp_path / "w.safetensors", tmp_path / "in")
    code, said, err = medbudget(*command, tmp_path / "out", "--draws", 2, "--out", file)
    assert code == 0, err
    assert said.startswith("verdict: ")
    scores = json.loads(file.read_text(encoding="utf-8"))
    assert [s["name"] for s in scores] == ["Membership AUC (loss)", "Membership AUC (difference)"]
    assert [s["n"] for s in scores] == [[4, 4]] * 2 and scores[0]["extractor_hash"] == tiny.hash
    code, _, err = medbudget(*command, tmp_path / "in")
    assert code == 1 and "4 of the 4 other images are members" in err
    code, _, err = medbudget(*command, tmp_path / "out", "--out", file)
    assert code == 1 and "--overwrite" in err


def test_images_that_the_word_records_are_known(tiny):
    images = make_phantoms("prostate", "tumour", 6).images
    record = {"image_hashes": " ".join(hash_images(images[:2]))}
    word = Embedding(WORD.vectors, "<w>", record=record)
    scores = membership_test(tiny, word, images[:3], images[3:], draws=1)
    assert scores[0].remark == "1 of 3 members are not recorded in the word; only 3 images"
    with pytest.raises(ValueError, match="2 of the 3 other images are members"):
        membership_test(tiny, word, images[3:], images[:3], draws=1)
