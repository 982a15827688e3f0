"""The comparison of section 4.2: one folder, made once, refused when it is another study's."""

from dataclasses import replace

import pytest
import torch

from medbudget import make_phantoms
from medbudget.images import find_images, load_images
from medbudget.studies import stylegan3 as study
from medbudget.stylegan3 import TINY, make_stylegan3
from medbudget.tiny.trained import load_trained

QUICK = replace(
    study.PRESETS["tiny"], n=4, steps=1, extractors=("layout",),
    overrides={"kimg": 0.016, "snapshot_kimg": 0.008},
)  # fmt: skip


@pytest.fixture(scope="module")
def start():
    return make_stylegan3(replace(TINY, channel_max=8, channel_base=256))


@pytest.fixture(scope="module")
def made(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("study")
    return folder, study.run_comparison(folder, settings=QUICK, start=start, device="cpu")


def test_costs_are_counted_in_images_and_seconds(made, tiny):
    _, values = made
    gan, word = values["stylegan3"], values["diffusion"]
    assert gan["images_seen"] == 16 and gan["seconds"] > 0
    assert word["images_seen"] == 8000, "the shipped word: 1000 steps of 8"
    assert word["seconds"] == load_trained("prostate", "healthy", tiny).record["seconds"]


def test_both_are_scored_on_the_same_images_with_and_without_normalisation(made):
    scores = made[1]["scores"]
    assert set(scores) == {"none", "paper"}
    for rule, both in scores.items():
        for rows in both.values():
            assert rows[0]["name"] == "Layout distance" and rows[0]["n"] == 4
            assert {row["normalisation"] for row in rows[:1]} == {rule}
        assert any("p = " in row["note"] for row in both["stylegan3"])
    z, plain = (scores[rule]["stylegan3"][0]["value"] for rule in ("paper", "none"))
    assert z != plain


def test_the_folder_has_what_a_reader_study_needs(made):
    folder, _ = made
    names = [[p.name for p in find_images(folder / side)] for side in ("stylegan3", "diffusion")]
    assert names[0] == names[1] == [f"{i:05d}.png" for i in range(4)]
    shots = study.read_snapshots(folder)
    assert list(shots) == [0, 8, 16]
    assert all(images.shape == (8, 3, 64, 64) for images in shots.values())
    assert not torch.equal(shots[0], shots[16])


def test_a_finished_study_is_not_made_again(made, start, monkeypatch):
    folder, values = made
    for name in ("train_stylegan3", "sample", "save_images"):
        monkeypatch.setattr(study, name, None)
    again = study.run_comparison(folder, settings=QUICK, start=start, device="cpu")
    assert again["stylegan3"] == values["stylegan3"] and again["scores"] == values["scores"]


def test_another_study_in_the_folder_is_refused(made, start):
    folder, _ = made
    other = replace(QUICK, cfg_scale=3.0)
    with pytest.raises(ValueError, match="holds another study: settings differ"):
        study.run_comparison(folder, settings=other, start=start, device="cpu")
    with pytest.raises(ValueError, match="start differ"):
        new = make_stylegan3(start.generator.architecture, seed=1)
        study.run_comparison(folder, settings=QUICK, start=new, device="cpu")


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, start):
    with pytest.raises(ValueError, match="make 64 px, the preset wants 512"):
        study.run_comparison(tmp_path / "x", preset="paper", start=start)
    with pytest.raises(ValueError, match="allowed are tiny, paper"):
        study.run_comparison(tmp_path / "x", preset="colab")
    with pytest.raises(ValueError, match="no role 'test'"):
        study.run_comparison(tmp_path / "x", sources={"test": tmp_path}, start=start)
    assert not (tmp_path / "x").exists()


def test_own_images_are_trained_on_in_place_of_phantoms(tmp_path):
    from medbudget.images import save_images

    images = make_phantoms("prostate", "healthy", 5, seed=9).images
    save_images(images, tmp_path / "train")
    settings = replace(QUICK, cases=4)
    found = study.read_role(settings, {"train": tmp_path / "train"}, "train")
    assert torch.equal(found, images[:4])
    with pytest.raises(ValueError, match="5 images for train, 6 are needed"):
        study.read_role(replace(settings, cases=6), {"train": tmp_path / "train"}, "train")


def test_recorded_snapshots_come_back_by_images_seen(tmp_path, monkeypatch):
    from medbudget.images import make_grid, save_images

    images = make_phantoms("prostate", "healthy", 16).images
    save_images(make_grid(images, columns=8, gap=0)[None], tmp_path, names=["s"])
    monkeypatch.setattr(study, "SNAPSHOTS", tmp_path / "s.png")
    found = study.load_snapshots([0, 7])
    assert torch.equal(found[0], images[:8]) and torch.equal(found[7], images[8:])


def test_command_line_refuses_with_one_line(medbudget, tmp_path):
    code, _, error = medbudget("study", "stylegan3", "--preset", "colab")
    assert code == 1 and "allowed are tiny, paper" in error
    code, _, error = medbudget("study", "stylegan3", "--data", "x", "--store", tmp_path / "s")
    assert code == 1 and "ROLE=FOLDER" in error
    (tmp_path / "x.pkl").write_bytes(b"no")
    code, _, error = medbudget("study", "stylegan3", "--start", tmp_path / "x.pkl")
    assert code == 1 and "no readable pickle" in error
    code, _, error = medbudget("study", "stylegan3", "--data", "train=x", "--record")
    assert code == 1 and "--record keeps preset tiny" in error


def test_shipped_snapshots_fit_the_record(tiny):
    from medbudget.results import load_result

    recorded = load_result("stylegan3_tiny", base_hash=tiny.hash)
    shots = study.load_snapshots(recorded["snapshots"])
    assert max(shots) == recorded["stylegan3"]["images_seen"] and 0 in shots
    folder_less = load_images(study.SNAPSHOTS)
    assert folder_less.shape[2] == 64 * len(shots)
