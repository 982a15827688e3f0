"""The embedded base: its corpus, that it needs no network, and that its training can go on."""

from __future__ import annotations

import ast
import json
import shutil
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medbudget import load_base, loading, sample
from pretraining import corpus, export, model, train

PACKAGE = Path(loading.__file__).parent


def test_it_loads_and_draws_without_a_socket(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    images = sample(load_base("tiny", device="cpu"), "red ground", n=1, steps=1)
    assert images.shape == (1, 3, 64, 64)


def test_a_colour_word_colours_the_image(tiny):
    """Means over the image, in gray levels: far from each other, whatever the machine's rounding."""
    for name, strongest in (("red", 0), ("green", 1), ("blue", 2)):
        means = sample(tiny, f"smooth {name} ground", n=2, steps=10).float().mean((0, 2, 3))
        others = [m for i, m in enumerate(means.tolist()) if i != strongest]
        assert means[strongest] > max(others) + 50, f"{name}: {means.tolist()}"


def test_captions_are_words_of_the_vocabulary_and_fit():
    tokenizer = model.build_tokenizer()
    for index in range(200):
        images, caption = corpus.make_concept(7, index, 1)
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) <= 77
        assert caption.split()[0] in corpus.AMOUNTS and " ground" in caption
        assert images.shape == (1, 64, 64, 3) and images.dtype == np.uint8


def test_a_caption_says_what_was_drawn():
    gray = np.full(3, 0.25, np.float32)
    thing = corpus.Thing(
        shape="ellipse", fill="flat", colour=np.array([1, 1, 1], np.float32),
        second=gray, x=0.8, y=0.2, radius=0.15, aspect=1, tilt=0, edge=0.01, opacity=1, wobble=0,
        pair=False, roam=0, presence=1, period=0.1,
    )  # fmt: skip
    concept = corpus.Concept(
        ground="plain", colours=np.stack([gray] * 3), scale=0.1, angle=0, warp=0, mirrored=False,
        gray=True, vary=0.15, grain=0, grain_blur=0, grain_shared=True, light=0, blur=0,
        things=[thing],
    )  # fmt: skip
    caption = "smooth charcoal plain ground medium white ellipse top right"
    assert corpus.make_caption(concept) == caption
    image = corpus.render(concept, np.random.default_rng(0))
    assert image[13, 51].min() > 240, "white where the ellipse is"
    assert abs(int(image[50, 10, 0]) - 64) < 30, "charcoal elsewhere"
    assert corpus.place_name(0.5, 0.5) == "center" and corpus.place_name(0, 0.99) == "bottom left"


def test_corpus_and_phantoms_share_no_drawing_code():
    modules = {}
    root = PACKAGE.parent
    phantoms = [p for p in (root / "medbudget/data").rglob("*.py") if "phantom" in str(p)]
    assert phantoms
    for path in (root / "pretraining/corpus.py", *phantoms):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules[name] = {
            node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        } | {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not any("medbudget" in (name or "") for name in modules["pretraining/corpus.py"])
    for path in phantoms:
        assert not any(
            "pretraining" in (n or "") for n in modules[path.relative_to(root).as_posix()]
        )


def test_word_maps_are_recovered_from_the_shipped_table(tiny):
    maps = model.WordMap()
    maps.load_state_dict(train.solve_maps(tiny.text_encoder, tiny.tokenizer))
    first = tiny.tokenizer.convert_tokens_to_ids("v0000")
    table = tiny.text_encoder.get_input_embeddings().weight[first : first + 50]
    with torch.no_grad():
        torch.testing.assert_close(
            maps.cell_map(tiny.words["cells"][:50].float()), table, rtol=0, atol=5e-3
        )


def run_stage(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--no-bf16"])
    train.main()


def test_training_goes_on_from_the_package(tmp_path, monkeypatch):
    """Corpus, latents, two and then one more step of the U-Net, export: the autoencoder stays."""
    pytest.importorskip("timm", minversion="1.0.27")  # Muon with two learning rates
    weights = tmp_path / "weights"
    shutil.copytree(export.WEIGHTS, weights)
    monkeypatch.setattr(export, "WEIGHTS", weights)
    monkeypatch.setattr(train, "WEIGHTS", weights)
    work = str(tmp_path / "work")
    run_stage(
        monkeypatch, "corpus", "--work", work, "--concepts", "4", "--images", "2", "--workers", "1"
    )
    run_stage(monkeypatch, "latents", "--work", work)
    for steps in ("2", "3"):
        run_stage(
            monkeypatch, "unet", "--work", work, "--start", "--batch", "4", "--steps", steps,
            "--decay", "1",
        )  # fmt: skip
    (tmp_path / "work" / "unet.csv").write_text("step,loss,words,plain,empty\n1,.1,.2,.3,.4\n")
    run_stage(monkeypatch, "export", "--work", work)
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (weights / vae).read_bytes() == (PACKAGE / "weights" / "tiny" / vae).read_bytes()
    before = json.loads((PACKAGE / "weights" / "tiny" / "training.json").read_text())
    after = json.loads((weights / "training.json").read_text())
    assert after["vae"] == before["vae"]
    assert after["unet"][:-1] == before["unet"]
    last = after["unet"][-1]
    assert (last["steps"], last["images"]) == (3, 12) and last["device"].startswith("CPU")
    old, new = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (PACKAGE / "weights" / "tiny", weights)
    )
    changed = [not torch.equal(old[name], new[name]) for name in old]
    assert np.mean(changed) > 0.5, "the U-Net was trained"
    assert load_base(weights, device="cpu").hash != load_base("tiny", device="cpu").hash


@pytest.mark.parametrize(("low", "share"), [(0, 0.25), (0.5, 0.625), (1, 1)])
def test_a_share_of_the_timesteps_is_drawn_at_low_noise(low, share):
    torch.manual_seed(0)
    t = train.draw_timesteps(40_000, low)
    assert (t < 250).float().mean() == pytest.approx(share, abs=0.01)
    assert t.min() == 0 and t.max() == (249 if low == 1 else 999)


def test_low_noise_keeps_the_weight_of_snr_5():
    """SNR = 1, 5 and 20: min(1 + SNR, 5)/SNR is 2, 1 and 1/4, which is raised to 1."""
    snr = torch.tensor([20.0, 5.0, 1.0])
    weights = train.weigh_timesteps(snr / (1 + snr))
    assert weights.tolist() == pytest.approx([0.75, 0.75, 1.5])


def test_a_resumed_training_does_not_draw_its_noise_again():
    drawn = {}
    for step in (0, 500, 500):
        rng = train.begin_draws(0, step)
        found = [*torch.randn(4).tolist(), *rng.random(4)]
        assert drawn.setdefault(step, found) == found
    assert not set(drawn[0]) & set(drawn[500])


@pytest.mark.parametrize("stage", ["latents", "unet"])
def test_a_stage_without_the_one_before_says_so(tmp_path, monkeypatch, capsys, stage):
    with pytest.raises(SystemExit) as stop:
        run_stage(monkeypatch, stage, "--work", str(tmp_path / "new"), "--start")
    assert stop.value.code == 2 and "run the stage `corpus` first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_training_for_minutes_plans_what_fits_and_then_lets_the_rate_fall(monkeypatch):
    """100 steps in 30 s of 2 minutes: 300 more fit; of the 400, the last 160 decay."""
    args = SimpleNamespace(minutes=2.0, steps=10**9, decay=1)
    run = SimpleNamespace(args=args, step=100, first=0, begun=1000.0)
    monkeypatch.setattr(train.time, "time", lambda: 1030.0)
    train.Run.pace(run)
    assert (args.steps, args.decay) == (400, 160)
    run.step = 240  # the decay has begun: the plan stands, however slow the machine becomes
    monkeypatch.setattr(train.time, "time", lambda: 1115.0)
    train.Run.pace(run)
    assert (args.steps, args.decay) == (400, 160)


def test_sentences_are_cut_dropped_plain_or_empty(tiny, monkeypatch):
    """Rows of the text encoder's input, by token: 0 begin, 1 end, 2 pad, 4 blank; -1 a word."""
    seen = {}

    @contextmanager
    def keep(text, rows):
        seen["rows"] = rows
        yield

    class Text:
        embeddings = SimpleNamespace(token_embedding=lambda ids: ids[..., None].float())

        def __call__(self, ids):
            seen["ids"] = ids
            return SimpleNamespace(last_hidden_state=None)

    monkeypatch.setattr(model, "replaced_rows", keep)
    n, kind = 900, np.repeat([0, 1, 2], 300)
    plain = torch.full((n, 77), 7)
    train.embed_sentences(
        Text(), lambda numbers: torch.full((n, 60, 1), -1.0), tiny.tokenizer, torch.zeros(n, 60, 6),
        plain, kind, np.random.default_rng(0),
    )  # fmt: skip
    ids, rows = seen["ids"], seen["rows"][..., 0]
    assert (ids[300:600] == 7).all() and (rows[300:600] == 7).all()
    assert (ids[600:, :2] == torch.tensor([0, 1])).all() and (ids[600:, 2:] == 2).all()
    visual = ids[:300]
    ends = (visual == 1).int().argmax(1)
    places = torch.arange(77)
    expected = torch.where(places < ends[:, None], 4, torch.where(places == ends[:, None], 1, 2))
    expected[:, 0] = 0
    assert torch.equal(visual, expected)
    assert ends.min() == 2 and ends.max() == 65, "1 to 64 words before the end"
    assert (ends == 65).float().mean() == pytest.approx(0.5, abs=0.1)
    words = rows[:300] == -1
    assert not words[:, 61:].any() and not words[:, 0].any()
    assert torch.equal(rows[:300][~words], visual[~words].float())
    within = (places[1:61] < ends[:, None]).sum(1)
    kept = words.sum(1) / within
    shares = [(kept == 1).float().mean(), (kept[ends == 65] < 0.75).float().mean()]
    assert shares == pytest.approx([0.45, 0.33], abs=0.12), "a third each: none, 10 %, half dropped"
