"""The command line of adapters: tune one, draw with it, and what is refused."""

import pytest

from medbudget import Adapter, make_phantoms, sample, save_images
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
        ("--rank", "half", "rank must be"), ("--token", "x", "not of the form"),
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
