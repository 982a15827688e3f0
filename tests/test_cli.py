"""The command line, as a user types it: results, and what it says to wrong input."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medbudget import Embedding, load_images, make_phantoms, save_images

FAST = ("--steps", 4, "--batch-size", 2, "--n-vectors", 4)


def draw(folder, n, kind="prostate", label="healthy", split="train", size=64):
    save_images(make_phantoms(kind, label, n, split=split, size=size).images, folder)
    return folder


def make_folder(path, **files):
    path.mkdir()
    for name, array in files.items():
        Image.fromarray(array).save(path / f"{name}.png")
    return path


def test_the_main_job(medbudget, tmp_path):
    real, out, made = tmp_path / "real", tmp_path / "x.safetensors", tmp_path / "made"
    assert medbudget("phantoms", real, "--kind", "prostate", "--label", "tumour", "--n", 8)[0] == 0
    assert len(load_images(real)) == 8
    code, said, _ = medbudget("invert", real, "--token", "<x>", "--out", out, *FAST,
                              "--samples", 2)  # fmt: skip
    assert code == 0 and "4 vectors" in said and f"look at {tmp_path / 'x.png'}" in said
    assert Image.open(tmp_path / "x.png").height > 9 * 128  # three rows for each modality
    command = ("sample", "<x>", "--embeddings", out, "--out", made, "--n", 4, "--steps", 2)
    code, said, _ = medbudget(*command)
    assert (
        code == 0
        and said
        == f"4 synthetic images in {made}; total guidance 2\nlook at {made / 'contact_sheet.png'}\n"
    )
    assert "4 of them kept" in medbudget(*command)[1]
    assert len(load_images(made)) == 4 and (made / "contact_sheet.png").exists()
    code, said, _ = medbudget("evaluate", real, made, "--out", tmp_path / "s.json")
    assert code == 0 and "against training images (4 of 4)" in said.splitlines()[0]
    names = [score["name"] for score in json.loads((tmp_path / "s.json").read_text())]
    assert "Layout distance" in names and "Layout distance, real vs real" in names
    code, said, _ = medbudget("embedding", "show", out, "--base", "tiny")
    assert code == 0 and "(4, 96)" in said and "made on these weights" in said
    assert medbudget("embedding", "convert", out, tmp_path / "x.pt")[0] == 0
    code, said, _ = medbudget("embedding", "show", tmp_path / "x.pt")
    assert "(4, 96)" in said and "step    4" in said


def test_settings_in_force_are_written_and_read_again(medbudget, tmp_path):
    real, out, made = draw(tmp_path / "real", 5), tmp_path / "x.pt", tmp_path / "made"
    command = ("invert", real, "--token", "<x>", "--out", out, *FAST, "--samples", 0)
    assert medbudget(*command)[0] == 0
    text = (tmp_path / "x.settings.yaml").read_text()
    settings = yaml.safe_load(text)["invert"]
    assert f"medbudget invert {real} --config x.settings.yaml --out OUT" in text.splitlines()[0]
    assert (settings["token"], settings["lr"], settings["init"]) == ("<x>", 0.01, "*")
    assert settings["n-vectors"] == 4 and settings["base"] == "tiny" and "out" not in settings
    again = ("invert", real, "--config", tmp_path / "x.settings.yaml", "--out", tmp_path / "y.pt")
    assert medbudget(*again)[0] == 0
    first, second = (Embedding.load(tmp_path / name).vectors for name in ("x.pt", "y.pt"))
    assert first.equal(second)
    few = ("--n", 1, "--steps", 1, "--embeddings", out, "--embeddings", tmp_path / "y.pt")
    code, _, said = medbudget("sample", "<x>", "--out", made, *few)
    assert code == 1 and not made.exists(), said  # two words of one name: nothing is written
    assert medbudget("sample", "<x>", "--out", made, *few[:-2])[0] == 0
    settings = yaml.safe_load((made / "settings.yaml").read_text())["sample"]
    assert settings["embeddings"] == [str(out)] and settings["steps"] == 1
    (made / "settings.yaml").write_text("mine: 1")
    code, _, said = medbudget("sample", "<x>", "--out", made, *few[:-2])
    assert code == 0 and "settings.yaml is not medbudget's" in said
    assert (made / "settings.yaml").read_text() == "mine: 1"
    options = ("--split", "1", "--size", 64, "--workers", 1)
    assert (
        medbudget("prepare", "folder", tmp_path / "real", "--out", tmp_path / "p", *options)[0] == 0
    )
    settings = yaml.safe_load((tmp_path / "p/settings.yaml").read_text())["prepare"]["folder"]
    assert settings["split"] == "1" and settings["size"] == 64


def test_an_axis_from_one_word_to_the_other(medbudget, tmp_path):
    words = [
        Embedding(torch.rand(2, 96), f"<{name}>").save(tmp_path / f"{name}.pt") for name in "ab"
    ]
    out = tmp_path / "axis"
    command = ("interpolate", *words, "--out", out, "--n", 2, "--steps", 1, "--gif")
    code, said, error = medbudget(*command, "--weights", "0,1")
    assert code == 0 and said == f"2 synthetic images at each of 2 shares in {out}\n", error
    names = {"0", "1", "axis.gif", "contact_sheet.png", "settings.yaml"}
    assert {p.name for p in out.iterdir()} == names and len(load_images(out / "1")) == 2
    code, _, said = medbudget(*command, "--weights", "0;1")
    assert code == 1 and "--weights '0;1': write shares such as 0,0.5,1" in said


def test_describe_and_doctor(medbudget, tmp_path):
    code, said, _ = medbudget("describe", draw(tmp_path / "r", 2))
    assert code == 0 and len(said.split()) == 60
    code, said, _ = medbudget("doctor")
    assert code == 0 and "base tiny: ready" in said and "torch" in said


def test_wrong_input_is_one_message_and_nothing_is_written(medbudget, tmp_path):
    good = make_folder(tmp_path / "good", a=np.zeros((64, 64), np.uint8))
    deep = make_folder(tmp_path / "deep", a=np.full((64, 64), 999, np.uint16))
    empty = make_folder(tmp_path / "empty")
    out = tmp_path / "x.safetensors"
    cases = [
        ((empty, "--token", "<x>", "--out", out), "no images in"),
        ((deep, "--token", "<x>", "--out", out), "16-bit"),
        ((tmp_path / "none", "--token", "<x>", "--out", out), "no such folder"),
        ((good, "--token", "x", "--out", out), "write <x>"),
        ((good, "--token", "<|pad|>", "--out", out), "vocabulary"),
        ((good, "--token", "<x>", "--out", out, "--base", "sd9"), "unknown base"),
        ((good, "--token", "<x>", "--out", tmp_path / "x.txt"), "allowed endings"),
        ((good, "--token", "<x>", "--out", out, "--preset", "big"), "tiny, colab, paper"),
        ((good, "--token", "<x>", "--out", out, "--n-vectors", 75), "1 to 74"),
        ((good, "--token", "<x>", "--out", deep / "a.png" / "x.pt"), "cannot write"),
        ((good, "--token", "<x>", "--out", good / "x.pt"), "lies inside the input"),
    ]
    for arguments, message in cases:
        code, _, said = medbudget("invert", *arguments, *(() if "75" in str(arguments) else FAST))
        assert code == 1 and message in said and "Traceback" not in said, (arguments, said)
    for words, message in (
        (("sample", "<y>"), "unknown token <y>"),
        (("inpaint", good, "red"), "IMAGE MASK PROMPT"),
        (("inpaint", good, "red", "--ellipse", "1,2"), "x,y,rx,ry"),
    ):
        code, _, said = medbudget(*words, "--out", tmp_path / "made")
        assert code == 1 and message in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "good"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_permission(medbudget, tmp_path):
    tmp_path.chmod(0o500)
    code, _, said = medbudget("sample", "red", "--out", tmp_path / "made")
    assert code == 1 and "cannot write" in said


def test_evaluate_prints_a_table_and_writes_what_it_is_asked_for(medbudget, tmp_path):
    real = draw(tmp_path / "real", 24, split="test")
    made = draw(tmp_path / "made", 12, split="val")
    train = draw(tmp_path / "train", 12)
    other = draw(tmp_path / "other", 12, "histology", "normal")
    command = ("evaluate", real, made, "--features", "layout")
    options = ("--train", train, "--permutation", other, "--repeats", 99, "--paired")
    out = tmp_path / "new" / "s.json"
    code, said, err = medbudget(*command, *options, "--out", out)
    assert code == 0, err
    lines = said.splitlines()
    assert lines[0].startswith("verdict: cannot be told: only 12 images; Layout distance is")
    assert lines[1].split() == ["score", "value", "95", "%", "interval", "n", "remark"]
    names = [score["name"] for score in json.loads(out.read_text(encoding="utf-8"))]
    assert names == [
        "Layout distance",
        "Layout distance, real vs real",
        "Layout distance, difference to the other set",
        "Copied share (pixels)",
        "C_T (pixels)",
    ]
    assert [line.startswith(name) for line, name in zip(lines[2:], names[:4])] == [True] * 4
    assert not any(line.startswith("C_T") for line in lines) and "p = 0.01" in said
    _, said, _ = medbudget(*command, *options, "--verbose")
    assert [line.startswith(name) for line, name in zip(said.splitlines()[2:], names)] == [True] * 5
    assert "p = 0.01 (99 paired permutations)" in said and "paired by number" in said
    code, said, _ = medbudget(*command, "--no-floor", "--normalize", "paper")
    assert code == 0 and "real vs real" not in said and "normalisation paper" in said


def test_evaluate_refuses_before_it_works(medbudget, tmp_path):
    pixels = {f"i{k}": np.full((32, 32), k, np.uint8) for k in range(4)}
    folder = make_folder(tmp_path / "a", **pixels)
    cases = [
        (("--paired",), "--permutation"),
        (("--features", "resnet"), "efficientnet-lite0"),
        (("--features", "layout", "--interval", "wide"), "influence, bootstrap, paper"),
        (("--features", "layout", "--normalize", "z"), "none"),
        (("--train", tmp_path / "absent"), "no such folder"),
        (("--out", folder), "is a folder"),
    ]
    for arguments, message in cases:
        code, _, said = medbudget("evaluate", folder, folder, *arguments)
        assert code == 1 and message in said and "Traceback" not in said, (arguments, said)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def fill(folder, files):
    folder.mkdir()
    for file in files:
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.realdata
@pytest.mark.slow
def test_the_main_job_on_real_x_rays(medbudget, real_data, tmp_path):
    files = sorted((real_data / "chest_xray" / "pneumonia").iterdir())[:12]
    real, out, made = fill(tmp_path / "real", files), tmp_path / "x.safetensors", tmp_path / "made"
    assert medbudget("invert", real, "--token", "<x>", "--out", out, *FAST, "--samples", 0)[0] == 0
    sampling = ("--embeddings", out, "--out", made, "--n", 6, "--steps", 3)
    assert medbudget("sample", "<x>", *sampling)[0] == 0
    code, said, _ = medbudget("evaluate", real, made)
    assert code == 0 and "real vs real" in said


@pytest.mark.realdata
@pytest.mark.slow
def test_evaluate_on_real_x_rays(medbudget, real_data, tmp_path):
    normal = sorted((real_data / "chest_xray" / "normal").iterdir())
    sick = sorted((real_data / "chest_xray" / "pneumonia").iterdir())
    real, train = fill(tmp_path / "real", normal[:80]), fill(tmp_path / "train", normal[80:100])
    other = fill(tmp_path / "other", sick[:20])
    # a perfect generator but for three copies, against one that draws another disease
    made = fill(tmp_path / "made", normal[100:117] + normal[80:83])
    out = tmp_path / "s.json"
    code, said, err = medbudget(
        "evaluate", real, made, "--train", train, "--features", "efficientnet-lite0",
        "--permutation", other, "--repeats", 199, "--out", out, "--verbose",
    )  # fmt: skip
    assert code == 0, err
    scores = {score["name"]: score for score in json.loads(out.read_text(encoding="utf-8"))}
    assert all(name in said for name in scores)
    fd, floor = scores["FD (EfficientNet-Lite0)"], scores["FD (EfficientNet-Lite0), real vs real"]
    assert fd["n"] == floor["n"] == 20 and fd["value"] < 1.3 * floor["value"]
    test = scores["FD (EfficientNet-Lite0), difference to the other set"]
    assert test["value"] < 0 and "p = 0.005 (199 permutations)" in test["note"]
    for space in ("pixels", "EfficientNet-Lite0"):
        assert scores[f"Copied share ({space})"]["value"] >= 3 / 20
        assert "calibrated on 80 held-out" in scores[f"Copied share ({space})"]["note"]


def test_a_study_is_planned_without_computing_and_bad_roles_are_refused(medbudget, tmp_path):
    code, said, _ = medbudget("study", "status", "table1", "--store", tmp_path / "s")
    assert code == 0 and not (tmp_path / "s").exists()
    assert "block            0    52" in said
    code, _, error = medbudget("study", "status", "table1", "--data", "training=x")
    assert code == 1 and "train, reference, floor" in error
    code, _, error = medbudget("study", "table1", "--shard", "5/3", "--store", tmp_path / "t")
    assert code == 1 and "i/k" in error


def test_inpainting_makes_a_labelled_set(medbudget, tmp_path):
    real, one, two = draw(tmp_path / "real", 2), tmp_path / "one", tmp_path / "two"
    ellipses = ("--ellipse", ".4,.5,.1,.1", "--ellipse", ".6,.5,.15,.1")
    few = ("--steps", 3, "--n", 2, "--save-masks")
    code, said, _ = medbudget("inpaint", real, "red field", "--out", one, *ellipses, *few)
    assert code == 0 and "8 inpainted images in" in said
    names = sorted(p.name for p in one.glob("*.png"))
    assert names[0] == "00000_ellipse0_0.png" and len(names) == 8
    record = json.loads(Image.open(one / names[1]).text["medbudget"])
    assert record["synthetic"] and record["prompt"] == "red field" and record["steps"] == 3
    for name in names:
        original = np.asarray(Image.open(real / f"{name[:5]}.png").convert("RGB"))
        mask = np.asarray(Image.open(one / "masks" / name).convert("L"))
        made = np.asarray(Image.open(one / name).convert("RGB"))
        assert (made != original)[mask > 0].any()
        assert np.array_equal(made[:, :8], original[:, :8]), "far from the masks"
    mask = np.zeros((128, 128), np.uint8)
    mask[40:80, 40:80] = 255
    masks = make_folder(tmp_path / "masks", **{"00000": mask, "00001": mask.T})
    code, said, _ = medbudget("inpaint", real, masks, "red field", "--out", two, "--steps", 2)
    assert code == 0 and sorted(p.name for p in two.glob("*.png")) == ["00000.png", "00001.png"]


def test_a_command_that_was_stopped_goes_on_where_it_was(medbudget, tmp_path, monkeypatch):
    from medbudget import outputs

    whole, part = tmp_path / "whole", tmp_path / "part"
    command = ("sample", "red ground", "--n", 18, "--steps", 1, "--seed", 3, "--out")
    assert medbudget(*command, whole)[0] == 0

    def stop_at_the_second(*arguments, images=outputs.draw_images):
        if arguments[-1][0] > 3:
            raise KeyboardInterrupt
        return images(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "draw_images", stop_at_the_second)
        code, _, said = medbudget(*command, part)
    assert code == 130 and said == "stopped: the same command goes on from here\n"
    assert sorted(p.name for p in part.iterdir()) == [f"{i:05d}.png" for i in range(16)]
    made = (part / "00000.png").stat().st_mtime_ns
    assert medbudget(*command, part)[0] == 0
    assert (part / "00000.png").stat().st_mtime_ns == made
    for path in sorted(whole.iterdir()):
        assert (part / path.name).read_bytes() == path.read_bytes()
