"""The program that makes the embedded base of 128 px: its corpus, and files that come back."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from medbudget import load_base, loading
from medbudget.base import Base
from medbudget.runs import Steps
from pretraining import all as whole
from pretraining import export
from pretraining.decoder import DecoderRun
from pretraining.pictures import draw_siblings


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.concatenate([draw_siblings(i, 4, 128) for i in range(17)])


def test_siblings_are_of_one_scene_and_differ() -> None:
    scenes = np.stack([draw_siblings(i, 3, 32).astype(float) for i in range(12)])
    assert scenes.shape == (12, 3, 3, 32, 32)
    within = np.abs(scenes[:, 0] - scenes[:, 1]).mean()
    between = np.abs(scenes[1:, 0] - scenes[:-1, 1]).mean()
    assert 1 < within < 0.6 * between
    assert np.array_equal(draw_siblings(3, 3, 32), scenes[3])


def test_pieces_join_to_what_they_were_cut_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "PIECE", 1000)
    content = np.random.default_rng(0).bytes(2500)
    work, other, pieces = (tmp_path / name for name in ("work", "other", "pieces"))
    work.mkdir()
    other.mkdir()
    (work / "decoder.ckpt").write_bytes(content)
    whole.put_pieces(work, pieces)
    assert [p.stat().st_size for p in sorted(pieces.iterdir())] == [1000, 1000, 500]
    whole.take_pieces(pieces, other)
    assert (other / "decoder.ckpt").read_bytes() == content
    (work / "decoder.ckpt").write_bytes(b"newer")
    whole.take_pieces(pieces, work)
    assert (work / "decoder.ckpt").read_bytes() == b"newer"


def test_the_decoder_step_goes_on_as_if_it_had_not_stopped(
    tiny: Base, pictures: np.ndarray
) -> None:
    runs = [DecoderRun(tiny, 2, 1e-3) for _ in range(2)]
    first = [runs[0].train(pictures, fade=1.0) for _ in range(2)]
    runs[1].load_state_dict(deepcopy(runs[0].state_dict()))
    ends = [run.train(pictures, fade=0.5) for run in runs]
    assert runs[0].step == 3 and ends[0] == ends[1]
    assert first[0] != first[1] and all(np.isfinite(list(end.values())).all() for end in ends)
    assert runs[0].optimizers["critic"].param_groups[0]["lr"] == pytest.approx(1e-3)
    pair = [run.new.state_dict() for run in runs]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_a_decoder_becomes_the_autoencoder_of_the_package(
    tiny: Base, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base then draws 128 px out of the latents that it had; nothing but the VAE changes."""
    weights = tmp_path / "weights"
    shutil.copytree(export.WEIGHTS, weights)
    monkeypatch.setattr(export, "WEIGHTS", weights)
    (tmp_path / "decoder.csv").write_text("step,l1\n1,.1\n")
    run = DecoderRun(tiny, 2, 1e-3)
    before = json.loads((weights / "training.json").read_text())
    hashes = {tiny.hash}
    for steps in (1, 3):  # the second time a longer training replaces the first one
        checkpoint = tmp_path / "decoder.ckpt"
        for _ in Steps(run, steps, checkpoint=checkpoint, identity={"base": tiny.hash, "batch": 2}):
            run.train(pictures)
        export.export_decoder(checkpoint)
        base = load_base(weights, device="cpu")
        hashes.add(base.hash)
        assert (base.size, base.latent_shape()) == (128, tiny.latent_shape())
        record = json.loads((weights / "training.json").read_text())
        *earlier, last = record["vae"]
        assert earlier == before["vae"] and record["unet"] == before["unet"]
        assert (last["steps"], last["images"], last["around"]) == (steps, 2 * steps, tiny.hash)
    assert len(hashes) == 3, "each has a name of its own"
    latents = tiny.encode(torch.full((1, 3, tiny.size, tiny.size), 90, dtype=torch.uint8))
    scale = base.vae.config.scaling_factor
    with torch.no_grad():
        wanted = (run.average.decode(latents / scale).sample + 1) * 127.5
    torch.testing.assert_close(base.decode(latents).float(), wanted.clamp(0, 255), rtol=0, atol=2)
    names = ("unet/diffusion_pytorch_model", "text_encoder/model", "words")
    for name in names:
        file = f"{name}.safetensors"
        assert (weights / file).read_bytes() == (loading.TINY / file).read_bytes()


def test_a_share_of_a_decoder_is_the_mean_of_both(
    tiny: Base, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder stays to the byte; the decoder's weights lie between those before and after."""
    weights = tmp_path / "weights"
    shutil.copytree(export.WEIGHTS, weights)
    monkeypatch.setattr(export, "WEIGHTS", weights)
    (tmp_path / "decoder.csv").write_text("step,l1\n1,.1\n")
    run, checkpoint = DecoderRun(tiny, 2, 1e-2, 64), tmp_path / "decoder.ckpt"
    identity = {"base": tiny.hash, "batch": 2, "size": 64}
    for _ in Steps(run, 3, checkpoint=checkpoint, identity=identity):
        run.train(pictures)
    export.export_decoder(checkpoint, share=0.5)
    assert str(tmp_path) not in (weights / "vae" / "config.json").read_text()
    before, after = tiny.vae.state_dict(), run.average.state_dict()
    for name, tensor in load_base(weights, device="cpu").vae.state_dict().items():
        wanted = (before[name] + after[name]) / 2
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-3)
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith(("decoder", "post_quant_conv")), name
    with pytest.raises(ValueError, match="needs the autoencoder that training began with"):
        export.export_decoder(checkpoint, share=0.5)  # the package's is no longer that one


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        export.export_decoder(tmp_path / "decoder.ckpt", share=share)


def test_a_decoder_has_the_size_of_the_old_or_twice_that(tiny: Base) -> None:
    for size in (32, 256):
        with pytest.raises(ValueError, match=f"{size} px cannot be built around one of 64 px"):
            DecoderRun(tiny, 2, 1e-2, size)


def test_a_decoder_around_another_base_is_refused(tiny: Base, tmp_path: Path) -> None:
    content = {"identity": {"base": "0123456789ab", "batch": 2}, "state": {"step": 1}}
    torch.save(content, tmp_path / "decoder.ckpt")
    with pytest.raises(ValueError, match=r"does not say how long.*--minutes"):
        export.export_decoder(tmp_path / "decoder.ckpt")
    with pytest.raises(ValueError, match=f"around the base 0123456789ab.*has {tiny.hash}"):
        export.export_decoder(tmp_path / "decoder.ckpt", minutes=3)
