"""The command line, as a user types it: results, and what it says to wrong input."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medbudget.tiny import FOLDER, SPECS, load_trained

FAST = ("--steps", 4, "--batch-size", 2, "--n-vectors", 4)


def test_the_main_job(medbudget, tmp_path):
    real, out, made = tmp_path / "real", tmp_path / "x.safetensors", tmp_path / "made"
    assert medbudget("phantoms", real, "--kind", "prostate", "--label", "tumour", "--n", 8)[0] == 0
    assert len(list(real.iterdir())) == 8
    options = ("--preview-every", 4, "--log-dir", tmp_path / "log")
    code, said, _ = medbudget("invert", real, "--token", "<x>", "--out", out, *FAST, *options)
    assert code == 0 and "4 vectors" in said
    assert len(list((tmp_path / "x_previews").glob("step000004_*.png"))) == 4
    assert list((tmp_path / "log").glob("events*"))
    code, _, _ = medbudget(
        "sample", "<x>", "--embeddings", out, "--out", made, "--n", 4, "--steps", 2
    )
    assert code == 0 and len(list(made.glob("*.png"))) == 4
    code, said, _ = medbudget("evaluate", real, made, "--out", tmp_path / "s.json")
    assert code == 0 and "against training images (4 of 4)" in said.splitlines()[0]
    names = [
        score["name"] for score in json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    ]
    assert "Layout distance" in names and "Layout distance, real vs real" in names
    code, said, _ = medbudget("embedding", "show", out, "--base", "tiny")
    assert code == 0 and "(4, 96)" in said and "made on these weights" in said
    assert medbudget("embedding", "convert", out, tmp_path / "x.pt")[0] == 0
    code, said, _ = medbudget("embedding", "show", tmp_path / "x.pt")
    assert "(4, 96)" in said and "step    4" in said


def test_sample_goes_on_where_it_was_and_keeps_other_images(medbudget, tmp_path, monkeypatch):
    from medbudget import sampling

    whole, part = tmp_path / "whole", tmp_path / "part"
    command = ("sample", "red ground", "--n", 18, "--steps", 1, "--seed", 3, "--out")
    assert medbudget(*command, whole)[0] == 0
    draw = sampling._draw

    def stop_at_the_second(base, condition, steps, shape, seeds):
        if seeds[0] > 3:
            raise KeyboardInterrupt
        return draw(base, condition, steps, shape, seeds)

    monkeypatch.setattr(sampling, "_draw", stop_at_the_second)
    assert medbudget(*command, part)[0] != 0
    assert sorted(p.name for p in part.iterdir()) == [f"{i:05d}.png" for i in range(16)]
    made = (part / "00000.png").stat().st_mtime_ns
    monkeypatch.setattr(sampling, "_draw", draw)
    assert medbudget(*command, part)[0] == 0
    assert (part / "00000.png").stat().st_mtime_ns == made
    for path in sorted(whole.iterdir()):
        assert (part / path.name).read_bytes() == path.read_bytes()
    other = ("sample", "blue ground", *command[2:])
    code, _, error = medbudget(*other, part)
    assert (
        code == 1
        and "00000.png is there already, made with other settings: prompt (red ground there"
        in error
    )
    assert (part / "00000.png").stat().st_mtime_ns == made


def test_describe_and_doctor(medbudget, tmp_path):
    medbudget("phantoms", tmp_path / "r", "--kind", "chest", "--n", 2)
    code, said, _ = medbudget("describe", tmp_path / "r")
    assert code == 0 and len(said.split()) == 60
    code, said, _ = medbudget("doctor")
    assert code == 0 and "base tiny: ready" in said and "torch" in said


def make_folder(path, **files):
    path.mkdir()
    for name, array in files.items():
        Image.fromarray(array).save(path / f"{name}.png")
    return path


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "good"]
    code, _, said = medbudget("sample", "<y>", "--out", tmp_path / "made")
    assert code == 1 and "unknown token <y>" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_permission(medbudget, tmp_path):
    tmp_path.chmod(0o500)
    code, _, said = medbudget("sample", "red", "--out", tmp_path / "made")
    assert code == 1 and "cannot write" in said


def test_evaluate_prints_a_table_and_writes_what_it_is_asked_for(medbudget, tmp_path):
    folders = {}
    for name, split, n in (("real", "test", 24), ("made", "val", 12), ("train", "train", 12)):
        folders[name] = tmp_path / name
        medbudget("phantoms", folders[name], "--n", n, "--split", split, "--label", "healthy")
    other = tmp_path / "other"
    medbudget("phantoms", other, "--n", 12, "--kind", "histology", "--label", "normal")
    command = ("evaluate", folders["real"], folders["made"], "--features", "layout")
    options = ("--train", folders["train"], "--permutation", other, "--repeats", 99, "--paired")
    out, pairs = tmp_path / "new" / "s.json", tmp_path / "new" / "pairs.png"
    code, said, err = medbudget(*command, *options, "--out", out, "--pairs", pairs)
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
    assert Image.open(pairs).format == "PNG"
    code, said, _ = medbudget(*command, "--no-floor", "--normalize", "paper")
    assert code == 0 and "real vs real" not in said and "normalisation paper" in said


def test_evaluate_refuses_before_it_works(medbudget, tmp_path):
    pixels = {f"i{k}": np.full((32, 32), k, np.uint8) for k in range(4)}
    folder = make_folder(tmp_path / "a", **pixels)
    cases = [
        (("--pairs", tmp_path / "p.png"), "--train"),
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


def test_one_image_is_enough_and_the_user_is_told_what_it_means(medbudget, tmp_path):
    good = make_folder(tmp_path / "good", a=np.zeros((50, 64), np.uint8))
    code, said, _ = medbudget("invert", good, "--token", "<x>", "--out", tmp_path / "x.pt", *FAST)
    assert code == 0 and "1 image," in said and "copies them" in said


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("label", ["normal", "pneumonia"])
def test_the_main_job_on_real_x_rays(medbudget, real_data, tmp_path, label):
    files = sorted((real_data / "chest_xray" / label).iterdir())[:12]
    (tmp_path / "real").mkdir()
    for file in files:
        (tmp_path / "real" / file.name).symlink_to(file)
    out, made = tmp_path / "x.safetensors", tmp_path / "made"
    token = f"<{label}>"
    assert medbudget("invert", tmp_path / "real", "--token", token, "--out", out, *FAST)[0] == 0
    sampling = ("--embeddings", out, "--out", made, "--n", 6, "--steps", 3)
    assert medbudget("sample", token, *sampling)[0] == 0
    code, said, _ = medbudget("evaluate", tmp_path / "real", made)
    assert code == 0 and "real vs real" in said


def fill(folder, files):
    folder.mkdir()
    for file in files:
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.realdata
@pytest.mark.slow
def test_evaluate_on_real_x_rays(medbudget, real_data, tmp_path):
    normal = sorted((real_data / "chest_xray" / "normal").iterdir())
    sick = sorted((real_data / "chest_xray" / "pneumonia").iterdir())
    real, train = fill(tmp_path / "real", normal[:80]), fill(tmp_path / "train", normal[80:100])
    other = fill(tmp_path / "other", sick[:20])
    # a perfect generator but for three copies, against one that draws another disease
    made = fill(tmp_path / "made", normal[100:117] + normal[80:83])
    command = ("evaluate", real, made, "--train", train, "--features", "efficientnet-lite0")
    out, pairs = tmp_path / "s.json", tmp_path / "pairs.png"
    options = (
        "--permutation",
        other,
        "--repeats",
        199,
        "--out",
        out,
        "--pairs",
        pairs,
        "--verbose",
    )
    code, said, err = medbudget(*command, *options)
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
    assert Image.open(pairs).width > 500


@pytest.mark.parametrize("spec", SPECS)
def test_shipped_embeddings_belong_to_the_shipped_base(tiny, spec):
    kind, label, n_vectors, cases = spec
    embedding = load_trained(kind, label, tiny, n_vectors=n_vectors, cases=cases)
    assert embedding.vectors.shape == (n_vectors, 96) and embedding.token == f"<{label}>"
    assert embedding.record["images"] == cases and embedding.history["loss"]


def test_another_base_is_told_where_its_words_come_from(tiny):
    with pytest.raises(ValueError, match=r"for the base 'tiny', this one is 'sd2'.*load_word"):
        load_trained("prostate", "tumour", replace(tiny, name="sd2"))


def test_nothing_else_is_shipped():
    assert len(list(FOLDER.glob("*"))) == len(SPECS) == 15


def test_a_study_is_planned_without_computing_and_bad_roles_are_refused(medbudget, tmp_path):
    code, said, _ = medbudget("study", "table1", "--dry-run", "--store", tmp_path / "s")
    assert code == 0 and not (tmp_path / "s").exists()
    assert "block            0    52" in said
    code, _, error = medbudget("study", "table1", "--data", "training=x", "--dry-run")
    assert code == 1 and "train, reference, floor" in error
    code, _, error = medbudget("study", "table1", "--shard", "5/3", "--store", tmp_path / "t")
    assert code == 1 and "i/k" in error and not (tmp_path / "t").exists()


def test_inpainting_makes_a_labelled_set(medbudget, tmp_path):
    real, one = tmp_path / "real", tmp_path / "one"
    medbudget("phantoms", real, "--kind", "prostate", "--n", 2)
    ellipses = ("--ellipse", ".4,.5,.1,.1", "--ellipse", ".6,.5,.15,.1")
    few = ("--steps", 3, "--n", 2, "--save-masks")
    code, said, _ = medbudget("inpaint", real, "red field", "--out", one, *ellipses, *few)
    assert code == 0 and "8 inpainted images in" in said
    names = sorted(p.name for p in one.glob("*.png"))
    assert names[0] == "00000_ellipse0_0.png" and len(names) == 8
    record = json.loads(Image.open(one / names[1]).text["medbudget"])
    assert record["synthetic"] and record["prompt"] == "red field" and record["steps"] == 3
    assert sorted(p.name for p in (one / "masks").iterdir()) == names
    for name in names:
        original = np.asarray(Image.open(real / f"{name[:5]}.png").convert("RGB"))
        mask = np.asarray(Image.open(one / "masks" / name).convert("L"))
        made = np.asarray(Image.open(one / name).convert("RGB"))
        assert set(np.unique(mask)) == {0, 255}
        assert (made != original)[mask > 0].any()
        assert np.array_equal(made[:, :8], original[:, :8]), "far from the masks"
    two, masks = tmp_path / "two", tmp_path / "masks"
    masks.mkdir()
    for place, name in enumerate(("00000", "00001")):
        array = np.zeros((128, 128), np.uint8)
        array[40:80, 40 + 20 * place : 80 + 20 * place] = 255
        Image.fromarray(array).save(masks / f"{name}.png")
    code, said, _ = medbudget("inpaint", real, masks, "red field", "--out", two, "--steps", 2)
    assert code == 0 and sorted(p.name for p in two.iterdir()) == ["00000.png", "00001.png"]
    (masks / "00001.png").unlink()
    code, _, said = medbudget("inpaint", real, masks, "red", "--out", tmp_path / "three")
    assert code == 1 and "no mask for 00001" in said
    code, _, said = medbudget("inpaint", real, "red", "--out", tmp_path / "three")
    assert code == 1 and "IMAGE MASK PROMPT" in said
    code, _, said = medbudget("inpaint", real, "r", "--ellipse", "1,2", "--out", tmp_path / "t")
    assert code == 1 and "x,y,rx,ry" in said


def test_sampling_reports_the_total_guidance(medbudget, tmp_path):
    prompt, options = "red field:0.5 AND blue field", ("--n", 1, "--steps", 1, "--cfg-scale", 3)
    code, said, _ = medbudget("sample", prompt, "--out", tmp_path / "made", *options)
    assert code == 0 and "total guidance 4.5" in said
