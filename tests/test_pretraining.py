"""The program that makes the embedded base of 128 px: its corpus, and files that come back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from pretraining import all as whole
from pretraining.decoder import DecoderRun
from pretraining.pictures import draw_siblings


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


def test_the_decoder_step_goes_on_as_if_it_had_not_stopped(tiny: object) -> None:
    pictures = np.concatenate([draw_siblings(i, 4, 128) for i in range(17)])
    runs = [DecoderRun(tiny, 2, 1e-3) for _ in range(2)]
    first = [runs[0].train(pictures, fade=1.0) for _ in range(2)]
    runs[1].load_state_dict(deepcopy(runs[0].state_dict()))
    ends = [run.train(pictures, fade=0.5) for run in runs]
    assert runs[0].step == 3 and ends[0] == ends[1]
    assert first[0] != first[1] and all(np.isfinite(list(end.values())).all() for end in ends)
    assert runs[0].optimizers["critic"].param_groups[0]["lr"] == pytest.approx(1e-3)
    pair = [run.new.state_dict() for run in runs]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
