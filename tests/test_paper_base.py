"""The paper's preset without its weights: what stands in for Stable Diffusion 2.0 is like it."""

from dataclasses import replace

import pytest
import torch
from paper_base import SIZE

from medbudget import Embedding, known, load_base, load_images, sample, verify
from medbudget.hub import PAPER_EMBEDDINGS, load_word
from medbudget.known import KNOWN


def test_the_papers_base_and_words_are_found_offline(paper):
    base = load_base("sd20", device="cpu")
    assert (base.width, base.prediction, base.preset, base.note) == (1024, "epsilon", "paper", "")
    words = [load_word("chest", label) for label in ("healthy", "cardiomegaly")]
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
    code, said, _ = medbudget("base", "verify", "sd20", "--known", "sd20")
    lines = dict(line.split(maxsplit=1) for line in said.splitlines()[1:])
    assert code == 1 and lines.pop("identity").startswith("FAILED: not Stable Diffusion 2.0")
    assert lines.pop("hash")
    assert all(line.startswith("ok:") for line in lines.values()) and len(lines) == 4, said
    base = load_base("sd20", device="cpu")
    for weights in base.vae.decoder.conv_out.parameters():
        weights.mul_(0.1)  # random weights draw black and white
    golden = replace(KNOWN[0].golden, values=tuple(verify.draw_golden(base, KNOWN[0].golden)))
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
