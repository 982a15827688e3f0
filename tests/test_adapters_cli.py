"""The command line of adapters: tune one, draw with it, and what is refused."""

from dataclasses import replace

import pytest

from medbudget import Adapter, Embedding, make_phantoms, sample, save_images
from medbudget.cli.options import read_adapters
from medbudget.images import load_images, read_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    save_images(make_phantoms("prostate", "tumour", 3).images, folder / "images")
    return folder


FEW = ("--rank", 2, "--steps", 2, "--batch-size", 1, "--token", "<x>", "--samples", 0)


@pytest.fixture(scope="module")
def tuned(folder, tiny):
    from medbudget import TuneSettings, tune_to

    settings = TuneSettings(rank=2, steps=2, batch_size=1, lr=0.05)
    images = load_images(folder / "images", size=64)
    path = folder / "a.safetensors"
    tune_to(path, tiny, images, token="<x>", settings=settings)
    return path


def test_tune_writes_an_adapter_once(medbudget, folder, tmp_path):
    out = tmp_path / "x.safetensors"
    code, said, error = medbudget("tune", folder / "images", "--out", out, *FEW)
    assert code == 0 and "<x>, rank 2" in said, error
    before, made = out.read_bytes(), out.stat().st_mtime_ns
    assert Adapter.load(out).step == 2 and not list(tmp_path.glob("*.ckpt"))
    assert "--token" not in said and (tmp_path / "x.settings.yaml").is_file()
    code, _, error = medbudget("tune", folder / "images", "--out", out, *FEW)
    assert code == 0 and out.read_bytes() == before and out.stat().st_mtime_ns == made
    code, _, error = medbudget("tune", folder / "images", "--out", out, *FEW, "--seed", 1)
    assert code == 1 and "seed (0 there, 1 now)" in error and "--overwrite" in error
    code, _, error = medbudget(
        "tune", folder / "images", "--out", out, *FEW, "--seed", 1, "--overwrite"
    )
    assert code == 0 and Adapter.load(out).record["settings"]["seed"] == 1
    few = dict(zip(FEW[::2], FEW[1::2])) | {"--out": tmp_path / "y.safetensors"}
    for option, value, message in (
        ("--out", tmp_path / "x.pt", "ends in .safetensors"), ("--rank", "65", "rank must be"),
        ("--rank", "half", "rank must be"), ("--rank", "²", "rank must be"),
        ("--token", "x", "not of the form"),
    ):  # fmt: skip
        options = [word for pair in (few | {option: value}).items() for word in pair]
        code, _, error = medbudget("tune", folder / "images", *options)
        assert code == 1 and message in error, option


def test_the_sheet_shows_what_was_tuned(medbudget, folder, tmp_path):
    out = tmp_path / "x.safetensors"
    options = ["--rank", 1, "--steps", 1, "--batch-size", 1, "--samples", 1]
    code, said, error = medbudget("tune", folder / "images", "--out", out, *options)
    assert code == 0 and "for all parts" in said, error
    assert read_record(tmp_path / "x.png") == {"sheet of": "an adapter"}


def test_sample_takes_adapters_with_weights(medbudget, tuned, tiny, tmp_path):
    few = ("--n", 2, "--steps", 2)
    drawn = {}
    for weight in ("", ":0.5", ":0"):
        out = tmp_path / f"out{weight[1:]}"
        code, _, error = medbudget(
            "sample", "<x>", "--out", out, "--adapter", f"{tuned}{weight}", *few
        )
        assert code == 0, error
        drawn[weight] = load_images(sorted(out.glob("0*.png")))
    adapter = Adapter.load(tuned)
    half = sample(tiny, "<x>", adapters=adapter.weighted(0.5), n=2, steps=2)
    assert drawn[":0.5"].equal(half) and not drawn[""].equal(half) and not drawn[":0"].equal(half)
    record = read_record(tmp_path / "out0.5" / "00000.png")
    assert record["adapters"] == [["<x>", adapter.hash, 0.5]]
    assert record["training_images"] == adapter.record["image_hashes"]
    code, _, error = medbudget("sample", "<x>", "--out", out, "--adapter", f"{tuned}:2", *few)
    assert code == 1 and "adapters" in error and "--overwrite" in error


def test_inpaint_and_interpolate_take_adapters(medbudget, tuned, folder, tmp_path):
    code, _, error = medbudget(
        "inpaint", folder / "images" / "00000.png", "<x>", "--ellipse", ".5,.5,.1,.1", "--steps", 2,
        "--out", tmp_path / "painted", "--adapter", tuned,
    )  # fmt: skip
    assert code == 0, error
    other = Adapter.load(tuned).renamed("<y>").save(tmp_path / "y.safetensors")
    code, _, error = medbudget(
        "interpolate", tuned, other, "--weights", "0.5", "--n", 1, "--steps", 2,
        "--out", tmp_path / "axis",
    )  # fmt: skip
    assert code == 0, error
    record = read_record(tmp_path / "axis" / "0.5" / "00000.png")
    assert [name for name, _, _ in record["adapters"]] == ["<x>", "<y>"]


def test_adapters_of_one_token_get_another_by_convert(medbudget, tuned, tmp_path):
    both, few = ("--adapter", tuned, "--adapter"), ("--n", 1, "--steps", 1)
    copy = tuned.with_name("copy.safetensors")
    copy.write_bytes(tuned.read_bytes())
    code, _, error = medbudget("sample", "<x>", "--out", tmp_path / "a", *both, copy, *few)
    assert code == 1 and "two embeddings are called <x>" in error and "embedding convert" in error
    other, word = tmp_path / "y.safetensors", tmp_path / "word.pt"
    code, said, error = medbudget("embedding", "convert", copy, other, "--token", "<y>")
    assert code == 0 and "wrote" in said, error
    prompt = "<x>:0.5 AND <y>:0.5"
    code, _, error = medbudget("sample", prompt, "--out", tmp_path / "b", *both, other, *few)
    assert code == 0, error
    adapter = Adapter.load(tuned)
    assert Adapter.load(other).hash == adapter.hash and Adapter.load(other).token == "<y>"
    assert medbudget("embedding", "convert", tuned, word)[0] == 0  # for A1111
    assert Embedding.load(word).vectors.equal(adapter.word.vectors)
    plain = replace(adapter, word=None).save(tmp_path / "plain.safetensors")
    for command in ((plain, tmp_path / "no.pt"), (plain, other, "--token", "<z>", "--overwrite")):
        code, _, error = medbudget("embedding", "convert", *command)
        assert code == 1 and "without a word" in error
    assert Adapter.load(other).token == "<y>" and not (tmp_path / "no.pt").exists()


def test_show_tells_what_an_adapter_changes(medbudget, tuned, tmp_path):
    code, said, error = medbudget("embedding", "show", tuned, "--base", "tiny")
    assert code == 0, error
    for line in (
        "token   <x>",
        "rank 2, 56 layers",
        "(1, 96)",
        "step    2",
        "made on these weights",
    ):
        assert line in said, line
    plain = replace(Adapter.load(tuned), word=None, base_hash="012345678901")
    path = plain.save(tmp_path / "plain.safetensors")
    said = medbudget("embedding", "show", path, "--base", "tiny")[1]
    assert "none: it applies to all parts" in said and "! made on a base with hash 012345" in said


def test_files_of_adapters_are_named_with_or_without_a_weight(tuned, tmp_path):
    (one,) = read_adapters([f"{tuned}:-1.5"])
    assert (
        one.weight == -1.5
        and read_adapters([str(tuned)])[0].weight == 1
        and not read_adapters(None)
    )
    odd = tmp_path / "a:2"
    odd.mkdir()
    named = Adapter.load(tuned).save(odd / "b.safetensors")
    assert read_adapters([str(named)])[0].weight == 1
    for text in (f"{tuned}:much", f"{tmp_path}/none.safetensors:1"):
        with pytest.raises(FileNotFoundError, match="no adapter file"):
            read_adapters([text])
    with pytest.raises(ValueError, match="finite number"):
        read_adapters([f"{tuned}:nan"])
