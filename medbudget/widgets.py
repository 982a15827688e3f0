"""Widgets that a reader plays with: frames to flip through, live sampling, a mask to draw.

`show_frames` and `show_reader_study` need no kernel and no network. The others sample in a thread
of their own, wait until the hand rests, and have a Stop button.
"""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import torch
from IPython.display import HTML

from medbudget.base import Base
from medbudget.embeddings import Embedding
from medbudget.images import check_images, make_grid, save_images, to_png, to_url
from medbudget.reader import ReaderStudy, default_key
from medbudget.sampling.inpainting import inpaint
from medbudget.sampling.masks import brush_mask
from medbudget.sampling.sampler import sample, total_guidance

EDGE = 384  # screen pixels of an image that is drawn on
SHOWN = 160  # screen pixels of an image in a row of frames
DELAY = 0.4  # seconds without a change before a drawing starts


def _draw_png(images: torch.Tensor, *, columns: int = 4, edge: int = 128) -> bytes:
    """Return images as one PNG file in reading order, each about `edge` pixels wide."""
    zoom = max(1, round(edge / images.shape[-1]))
    grid = make_grid(images, columns=columns, gap=2)
    return to_png(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))


# shows one frame of its figure; it travels with the output, as a page of the book has no kernel
_SHOW = (
    "for (const [i, frame] of this.closest('figure').querySelectorAll('[data-frame]').entries())"
    " { frame.hidden = i != this.value;"
    " if (!frame.hidden) this.setAttribute('aria-valuetext', frame.dataset.place) }"
)


def show_frames(
    frames: Mapping[str, torch.Tensor],
    *,
    label: str,
    alt: str,
    caption: str,
    start: int | None = None,
    columns: int = 4,
) -> HTML:
    """Return a slider over precomputed images that works without a kernel.

    `frames` map what the slider, called `label`, says at each place to the images shown there,
    ``(N, 3, H, W) uint8``. `alt` says what they show, and `caption` that they are synthetic, if they
    are. The frame shown first, and where scripts are off, is `start`, by default the middle one.
    """
    start = len(frames) // 2 if start is None else start
    say = html.escape
    wide = SHOWN * min(columns, *map(len, frames.values()))
    parts = []
    for i, (place, images) in enumerate(frames.items()):
        png = _draw_png(check_images(images), columns=columns, edge=images.shape[-1])
        hidden = "" if i == start else " hidden"
        parts.append(
            f'<div data-frame="{i}" data-place="{say(place)}"{hidden}><img src="{to_url(png)}" '
            f'alt="{say(f"{alt} {label}: {place}.")}" style="width: {wide}px; max-width: 100%">'
            f"<div>{say(label)}: <strong>{say(place)}</strong></div></div>"
        )
    return HTML(
        '<figure class="medbudget-frames" style="margin: 1em 0">'
        f'{"".join(parts)}<input type="range" min="0" max="{len(frames) - 1}" step="1" '
        f'value="{start}" aria-label="{say(label)}" aria-valuetext="{say(list(frames)[start])}" '
        f'style="width: {EDGE}px; max-width: 100%" '
        f'oninput="{say(_SHOW)}"><figcaption>{say(caption)}</figcaption></figure>'
    )


def show_reader_study(
    study: ReaderStudy,
    *,
    reveal: bool = False,
    reference: tuple[torch.Tensor, str] | None = None,
) -> HTML:
    """Return a study's exported page in a frame: it works without a kernel.

    `reveal`, for teaching only, ends it with the result beside that of the paper's reader and with
    where each image came from; it needs the key beside the study's folder. For `reference` see
    `ReaderStudy.export`.
    """
    page = study.export(reveal=default_key(study.folder) if reveal else None, reference=reference)
    return HTML(
        '<figure class="medbudget-reader" style="margin: 1em 0">'
        f'<iframe title="{html.escape(study.question)}" srcdoc="{html.escape(page)}" '
        'style="width: 100%; height: 560px; border: 1px solid #767676"></iframe></figure>'
    )


class Stopped(Exception):
    """Raised inside a job when it is out of date or was stopped."""


class Live:
    """Runs the newest of many requests in a thread, so that the kernel stays free.

    ``work(check, *arguments)`` starts after `delay` seconds without a newer request, and ends at its
    next ``check()`` when a newer one comes or `stop` is called. ``report`` is told how it goes.
    """

    def __init__(
        self, work: Callable[..., None], report: Callable[[str], None], *, delay: float = DELAY
    ) -> None:
        self.work, self.report, self.delay = work, report, delay
        self._newest = 0
        self._lock = threading.Lock()  # one job at a time
        self._timer = threading.Timer(0, print)

    def request(self, *arguments: Any) -> None:
        """Ask for ``work(check, *arguments)`` soon."""
        self.stop(say="waiting")
        self._timer = threading.Timer(self.delay, self._run, (self._newest, arguments))
        self._timer.daemon = True
        self._timer.start()

    def stop(self, *_: Any, say: str = "stopped") -> None:
        """End what waits or runs."""
        self._newest += 1
        self._timer.cancel()
        self.report(say)

    def _run(self, number: int, arguments: tuple[Any, ...]) -> None:
        def check(_: Any = None) -> None:
            if number != self._newest:
                raise Stopped

        with self._lock:
            try:
                check()
                self.report("drawing")
                self.work(check, *arguments)
                check()
                self.report("done")
            except Stopped:
                pass
            except Exception as error:  # a thread's exception would be lost: show it
                self.report(f"error: {error}")

    def wait(self, seconds: float = 60) -> None:
        """Block until the last request is done."""
        if self._timer.is_alive():
            self._timer.join(seconds)


def _slider(name: str, value: float, low: float, high: float, *, step: float = 0.05) -> Any:
    return ipw.FloatSlider(value, min=low, max=high, step=step, description=name)


def _button(name: str, icon: str, click: Callable[..., None]) -> Any:
    button = ipw.Button(description=name, icon=icon)
    button.on_click(click)
    return button


class PromptMixer(ipw.VBox):
    """Weight sliders for several embeddings, at first equal, and what the composed prompt draws.

    The `options` are those of `sample`: n, steps, seed, …
    """

    def __init__(
        self,
        base: Base,
        embeddings: Iterable[Embedding],
        *,
        cfg_scale: float = 2.0,
        delay: float = DELAY,
        **options: Any,
    ) -> None:
        self.base, self.embeddings = base, list(embeddings)
        self.options = {"n": 4, **options}
        share = round(1 / len(self.embeddings), 2)
        self.sliders = [_slider(e.token, share, -0.5, 1.5) for e in self.embeddings]
        self.scale = _slider("guidance", cfg_scale, 0, 6, step=0.25)
        self.live = Live(self._draw, self._report, delay=delay)
        self.button = _button("Stop", "stop", self.live.stop)
        self.status = ipw.Label()
        self.picture = ipw.Image(format="png")
        for slider in (*self.sliders, self.scale):
            slider.observe(
                lambda _: self.live.request(self.prompt, self.scale.value), names="value"
            )
        row = ipw.HBox([self.button, self.status])
        super().__init__([*self.sliders, self.scale, row, self.picture])
        self.add_class("medbudget-mixer")
        self._report("move a slider")

    @property
    def prompt(self) -> str:
        """The prompt that the sliders write."""
        pairs = zip(self.embeddings, self.sliders)
        return " AND ".join(f"{e.token}:{slider.value:.2f}" for e, slider in pairs)

    def _report(self, state: str) -> None:
        total = total_guidance(self.prompt, self.scale.value)
        self.status.value = f"{state} · {self.prompt} · total guidance {total:.3g} · synthetic"

    def _draw(self, check: Callable[..., None], prompt: str, scale: float) -> None:
        words = {"embeddings": self.embeddings, **self.options}
        images = sample(self.base, prompt, cfg_scale=scale, callback=check, **words)
        self.picture.value = _draw_png(images)


# sends a stroke, the points in fractions of the edge, to the text field beside the picture
_DRAW = """
const box = this.getBoundingClientRect(), at = e =>
  [(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height];
const stroke = [at(event)];
this.setPointerCapture(event.pointerId);
this.onpointermove = e => { stroke.push(at(e)); };
this.onpointerup = () => {
  this.onpointermove = this.onpointerup = null;
  const field = this.closest('.medbudget-painter').querySelector('.medbudget-stroke input');
  field.value = JSON.stringify(stroke);
  field.dispatchEvent(new Event('input', {bubbles: true}));
  field.dispatchEvent(new Event('change', {bubbles: true}));
};
event.preventDefault();
"""


class MaskPainter(ipw.VBox):
    """An image to draw a mask on with the mouse, a finger or a pen."""

    def __init__(self, image: torch.Tensor, *, changed: Callable[[], None] = lambda: None) -> None:
        self.image = check_images(image[None] if image.ndim == 3 else image)[:1]
        self.strokes: list[tuple[list[list[float]], float]] = []  # points, radius: see brush_mask
        self.changed = changed
        self.picture = ipw.HTML()
        self.field = ipw.Text(layout={"display": "none"})
        self.field.add_class("medbudget-stroke")
        self.field.observe(self._stroke, names="value")
        self.radius = _slider("brush", 0.07, 0.02, 0.3, step=0.01)
        self.undo = _button("Undo", "undo", lambda _: self._set(self.strokes[:-1]))
        self.clear = _button("Clear", "", lambda _: self._set([]))
        row = ipw.HBox([self.radius, self.undo, self.clear])
        super().__init__([self.picture, self.field, row])
        self.add_class("medbudget-painter")
        self._set([])

    @property
    def mask(self) -> torch.Tensor:
        """The mask drawn so far, ``(H, H) float32``, 1 where it was drawn."""
        return brush_mask(self.strokes, size=self.image.shape[-1])

    def _stroke(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self._set([*self.strokes, (json.loads(change["new"]), self.radius.value)])
            self.field.value = ""  # the same stroke may come again

    def _set(self, strokes: list[tuple[list[list[float]], float]]) -> None:
        news, self.strokes = strokes != self.strokes, strokes
        tint = torch.tensor([255, 160, 0]).view(1, 3, 1, 1)
        share = 0.45 * self.mask
        shown = (self.image * (1 - share) + tint * share).round().to(torch.uint8)
        covered = 100 * self.mask.mean().item()
        self.picture.value = (
            f'<img draggable="false" src="{to_url(_draw_png(shown, edge=EDGE))}" width="{EDGE}" '
            f'alt="The image to draw on; the mask covers {covered:.0f} percent of it." '
            'style="image-rendering: pixelated; touch-action: none; cursor: crosshair" '
            f'onpointerdown="{html.escape(_DRAW)}">'
        )
        if news:
            self.changed()


class Inpainter(ipw.VBox):
    """A mask to draw, and what `inpaint` puts under it; the `options` are those of `inpaint`."""

    def __init__(
        self,
        base: Base,
        image: torch.Tensor,
        prompt: str,
        *,
        strength: float = 0.75,
        delay: float = DELAY,
        **options: Any,
    ) -> None:
        self.base, self.prompt, self.options = base, prompt, {"n": 4, **options}
        self.status = ipw.Label()
        self.live = Live(self._draw, self._report, delay=delay)
        self.painter = MaskPainter(image, changed=self._changed)
        self.strength = _slider("strength", strength, 0.1, 1)
        self.strength.observe(self._changed, names="value")
        self.button = _button("Stop", "stop", self.live.stop)
        self.save = _button("Save", "save", self._save)
        self.result = ipw.Image(format="png", layout={"display": "none"})
        row = ipw.HBox([self.strength, self.button, self.save, self.status])
        super().__init__([self.painter, row, self.result])
        self._show(None)
        self._report("draw a mask on the image")

    def _changed(self, _: Any = None) -> None:
        self._show(None)  # what was painted under another mask does not stand under this one
        if self.painter.strokes:
            self.live.request(self.painter.mask, self.strength.value)
        else:
            self.live.stop()

    def _show(self, images: torch.Tensor | None) -> None:
        """Show images, or with None no picture at all."""
        self.images = images
        self.result.value = b"" if images is None else _draw_png(images)
        self.result.layout.display = "none" if images is None else ""
        self.save.disabled = images is None

    def _save(self, _: Any) -> None:
        """Write the images and their mask as PNG files into a new folder."""
        number = next(i for i in range(1, 10_000) if not Path(f"inpainted{i}").exists())
        folder = Path(f"inpainted{number}")
        assert self.images is not None  # the button is off without
        save_images(self.images, folder)
        mask = (self.painter.mask * 255).to(torch.uint8).expand(1, 3, -1, -1)
        save_images(mask, folder, names=["mask"])
        self._report(f"saved in {folder}")

    def _report(self, state: str) -> None:
        self.status.value = f"{state} · {self.prompt} · synthetic under the mask"

    def _draw(self, check: Callable[..., None], mask: torch.Tensor, strength: float) -> None:
        about = {"strength": strength, "callback": check, **self.options}
        images = inpaint(self.base, self.painter.image, mask, self.prompt, **about)
        check()
        self._show(images)
