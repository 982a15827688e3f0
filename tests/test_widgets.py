"""The widgets' Python side; tests/test_browser.py moves them with a mouse."""

import html
import json
import re
import threading
import time

import pytest
import torch

pytest.importorskip("ipywidgets")

from medbudget import Embedding, make_phantoms
from medbudget.images import load_images, save_images
from medbudget.reader import ReaderStudy
from medbudget.sampling.masks import brush_mask
from medbudget.widgets import (
    Inpainter,
    Live,
    MaskPainter,
    PromptMixer,
    show_frames,
    show_reader_study,
)

VECTORS = 0.3 * torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
A, B = Embedding(VECTORS, "<a>"), Embedding(1 - 3 * VECTORS, "<b>")
IMAGE = make_phantoms("prostate", "healthy", 1).images
FRAMES = {
    f"{share} %": torch.full((2, 3, 8, 8), share, dtype=torch.uint8) for share in (0, 50, 100)
}


def test_frames_travel_in_the_output_with_alt_text():
    text = show_frames(
        FRAMES, label="share of <b>", alt="Gray squares.", caption="Synthetic.", start=1
    ).data
    assert len(re.findall(r"<img src=\"data:image/png;base64,", text)) == 3
    assert text.count(" hidden>") == 2 and 'data-frame="1" data-place="50 %"><img' in text
    assert 'aria-valuetext="50 %"' in text
    assert 'alt="Gray squares. share of &lt;b&gt;: 50 %."' in text
    assert "<b>" not in text and "http" not in text and "<script" not in text


def test_only_the_newest_of_quick_requests_is_worked_on_and_errors_are_shown():
    done, said = [], []
    live = Live(lambda check, x: done.append(1 / x), said.append, delay=0.05)
    live.wait()  # for nothing
    for x in (4, 2, 1):
        live.request(x)
    live.wait()
    assert done == [1] and said[-2:] == ["drawing", "done"]
    live.request(0)
    live.wait()
    assert said[-1] == "error: division by zero"


def test_stop_and_a_newer_request_end_a_running_job():
    steps, said, inside = [], [], threading.Event()

    def work(check, name):
        for _ in range(1000):
            inside.set()
            check()
            steps.append(name)
            time.sleep(0.005)

    live = Live(work, said.append, delay=0)
    live.request("old")
    inside.wait(10)
    live.request("new")
    time.sleep(0.2)
    live.stop()
    live.wait()
    assert len(steps) < 1000 and set(steps) <= {"old", "new"} and steps[-1] == "new"
    assert said[-1] == "stopped" and "done" not in said


def test_mixer_draws_what_its_sliders_say(tiny):
    mixer = PromptMixer(tiny, [A, B], n=1, steps=1, delay=0)
    assert "move a slider" in mixer.status.value and mixer.prompt == "<a>:0.50 AND <b>:0.50"
    mixer.scale.value = 3
    mixer.live.wait()
    first = bytes(mixer.picture.value)
    assert first.startswith(b"\x89PNG") and "total guidance 3 " in mixer.status.value
    mixer.sliders[0].value = 1.5
    mixer.live.wait()
    kept = bytes(mixer.picture.value)
    assert kept != first
    assert "done" in mixer.status.value and "total guidance 6 " in mixer.status.value
    mixer.live.delay = 60
    mixer.sliders[0].value = 0
    mixer.button.click()
    assert "stopped" in mixer.status.value and bytes(mixer.picture.value) == kept


def test_strokes_become_a_mask_and_can_be_undone():
    painter = MaskPainter(IMAGE)
    painter.radius.value = 0.1
    assert painter.mask.sum() == 0
    for stroke in ([[0.2, 0.5], [0.8, 0.5]], [[0.5, 0.1]]):
        painter.field.value = json.dumps(stroke)
    line, dot = 0.6 * 0.2 + 3.14159 * 0.01, 3.14159 * 0.01  # areas by hand
    assert painter.mask.mean().item() == pytest.approx(line + dot, rel=0.08)
    assert torch.equal(painter.mask, brush_mask(painter.strokes, size=64))
    painter.undo.click()
    assert painter.mask.mean().item() == pytest.approx(line, rel=0.08)
    painter.clear.click()
    assert painter.strokes == [] and "covers 0 percent" in painter.picture.value


def test_inpainter_paints_under_the_drawn_mask(tiny, tmp_path, monkeypatch):
    studio = Inpainter(tiny, IMAGE, "<b>", embeddings=[B], n=1, steps=2, delay=0)
    assert studio.result.layout.display == "none" and studio.save.disabled
    studio.painter.field.value = json.dumps([[0.4, 0.5], [0.6, 0.5]])
    studio.live.wait()
    first = bytes(studio.result.value)
    assert first.startswith(b"\x89PNG")
    studio.painter.field.value = json.dumps([[0.2, 0.2]])
    studio.live.wait()
    assert bytes(studio.result.value) != first and "done" in studio.status.value
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        studio.save.click()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["inpainted1", "inpainted2"]
    assert torch.equal(load_images(tmp_path / "inpainted1/00000.png"), studio.images)
    assert (tmp_path / "inpainted2/mask.png").exists() and "inpainted2" in studio.status.value
    studio.painter.clear.click()  # no image stands under a mask that is gone
    assert "stopped" in studio.status.value and studio.result.value == b""
    assert studio.save.disabled and studio.result.layout.display == "none"


def test_reader_study_in_a_frame_is_the_exported_page(tmp_path):
    for name, label in (("a", "healthy"), ("b", "tumour")):
        save_images(make_phantoms("prostate", label, 3, size=32).images, tmp_path / name)
    study = ReaderStudy.create(tmp_path / "a", tmp_path / "b", tmp_path / "s", n_pairs=3)
    (page,) = re.findall(r'srcdoc="([^"]*)"', show_reader_study(study).data)
    assert html.unescape(page) == study.export()
