"""Widgets that a reader plays with: frames to flip through, live sampling, a mask to draw.

`show_frames` needs no kernel, no library and no network: it works on the book's pages as in
JupyterLab. The others talk to Python, so they need a kernel; they sample in a thread of their own,
wait until the hand rests, drop what is out of date, and have a Stop button.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import torch
from IPython.display import HTML

from medbudget.base import Base
from medbudget.embeddings import Embedding
from medbudget.images import check_images, make_grid, save_images, to_pil
from medbudget.inpainting import inpaint
from medbudget.live import DELAY, Live
from medbudget.masks import brush_mask
from medbudget.reader import ReaderStudy, default_key
from medbudget.sampling import sample, total_guidance

EDGE = 384  # screen pixels of an image that is drawn on
SHOWN = 160  # screen pixels of an image in a row of frames
Stroke = tuple[list[list[float]], float]  # points and radius, in fractions of the image's edge


def _to_png(images: torch.Tensor, *, columns: int = 4, edge: int = 128) -> bytes:
    """Return images as one PNG file in reading order, each about `edge` pixels wide."""
    zoom = max(1, round(edge / images.shape[-1]))
    grid = make_grid(images, columns=columns, gap=2)
    grid = grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    file = io.BytesIO()
    to_pil(grid).save(file, format="PNG")
    return file.getvalue()


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ---- without a kernel ---------------------------------------------------------------------------

# a range input that shows one of its figure's frames; repeated here because it must travel with
# the output: a page of the book has no kernel to ask
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

    Everything is in the output itself, so it needs neither saved widget state nor a script from
    elsewhere. Where scripts are off, the frame at the start stands.

    Parameters
    ----------
    frames : mapping of str to torch.Tensor
        What the slider says at each place, and the images ``(N, 3, H, W) uint8`` shown there.
    label : str
        The slider's name.
    alt : str
        What the images show; each frame adds its own place.
    caption : str
        Must say that the images are synthetic, if they are.
    start : int, optional
        The frame shown first; default the middle one, which differs from both ends.
    columns : int
        Images in a row.
    """
    start = len(frames) // 2 if start is None else start
    if not 0 <= start < len(frames):
        raise ValueError(f"start {start} is not one of {len(frames)} frames")
    if not alt.strip() or not caption.strip():
        raise ValueError("alt and caption must say what the frames show")
    say = html.escape
    wide = SHOWN * min(columns, *map(len, frames.values()))
    parts = []
    for i, (place, images) in enumerate(frames.items()):
        png = _to_png(check_images(images), columns=columns, edge=images.shape[-1])
        hidden = "" if i == start else " hidden"
        parts.append(
            f'<div data-frame="{i}" data-place="{say(place)}"{hidden}><img src="{_embed(png)}" '
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
    height: int = 560,
) -> HTML:
    """Return a study's exported page in a frame: it works without a kernel.

    Parameters
    ----------
    reveal : bool
        End with the result, beside that of the paper's reader, and with where each image came
        from; needs the key beside the study's folder. For teaching only.
    reference : (torch.Tensor, str), optional
        See `ReaderStudy.export`.
    height : int
        Pixels, until the page has set its own.
    """
    page = study.export(reveal=default_key(study.folder) if reveal else None, reference=reference)
    return HTML(
        '<figure class="medbudget-reader" style="margin: 1em 0">'
        f'<iframe title="{html.escape(study.question)}" srcdoc="{html.escape(page)}" '
        f'style="width: 100%; height: {height}px; border: 1px solid #767676"></iframe></figure>'
    )


# ---- with a kernel ------------------------------------------------------------------------------


class PromptMixer(ipw.VBox):
    """Weight sliders for several embeddings, and what the composed prompt draws.

    Parameters
    ----------
    embeddings : iterable of Embedding
        One slider each, at first of equal weight.
    **options
        For `sample`: n, steps, seed, …
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
            slider.observe(self._changed, names="value")
        row = ipw.HBox([self.button, self.status])
        super().__init__([*self.sliders, self.scale, row, self.picture])
        self.add_class("medbudget-mixer")
        self._report("move a slider")

    @property
    def prompt(self) -> str:
        """The prompt that the sliders write."""
        pairs = zip(self.embeddings, self.sliders)
        return " AND ".join(f"{e.token}:{slider.value:.2f}" for e, slider in pairs)

    def _changed(self, _: Any = None) -> None:
        self.live.request(self.prompt, self.scale.value)

    def _report(self, state: str) -> None:
        total = total_guidance(self.prompt, self.scale.value)
        self.status.value = f"{state} · {self.prompt} · total guidance {total:.3g} · synthetic"

    def _draw(self, check: Callable[..., None], prompt: str, scale: float) -> None:
        words = {"embeddings": self.embeddings, **self.options}
        self.picture.value = _to_png(
            sample(self.base, prompt, cfg_scale=scale, callback=check, **words)
        )


def _slider(name: str, value: float, low: float, high: float, *, step: float = 0.05) -> Any:
    return ipw.FloatSlider(value, min=low, max=high, step=step, description=name)


def _button(name: str, icon: str, click: Callable[..., None]) -> Any:
    button = ipw.Button(description=name, icon=icon)
    button.on_click(click)
    return button


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

    def __init__(
        self,
        image: torch.Tensor,
        *,
        radius: float = 0.07,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.image = check_images(image[None] if image.ndim == 3 else image)[:1]
        self.strokes: list[Stroke] = []
        self.changed = changed
        self.picture = ipw.HTML()
        self.field = ipw.Text(layout={"display": "none"})
        self.field.add_class("medbudget-stroke")
        self.field.observe(self._stroke, names="value")
        self.radius = _slider("brush", radius, 0.02, 0.3, step=0.01)
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

    def _set(self, strokes: list[Stroke]) -> None:
        news, self.strokes = strokes != self.strokes, strokes
        tint = torch.tensor([255, 160, 0]).view(1, 3, 1, 1)
        share = 0.45 * self.mask
        shown = (self.image * (1 - share) + tint * share).round().to(torch.uint8)
        covered = 100 * self.mask.mean().item()
        self.picture.value = (
            f'<img draggable="false" src="{_embed(_to_png(shown, edge=EDGE))}" width="{EDGE}" '
            f'alt="The image to draw on; the mask covers {covered:.0f} percent of it." '
            'style="image-rendering: pixelated; touch-action: none; cursor: crosshair" '
            f'onpointerdown="{html.escape(_DRAW)}">'
        )
        if news:
            self.changed()


class Inpainter(ipw.VBox):
    """A mask to draw, and what `inpaint` puts under it.

    Parameters
    ----------
    image : torch.Tensor
        ``(1, 3, H, H) uint8`` or without the first axis.
    **options
        For `inpaint`: n, steps, seed, content, …
    """

    def __init__(
        self,
        base: Base,
        image: torch.Tensor,
        prompt: str,
        *,
        embeddings: Iterable[Embedding] = (),
        strength: float = 0.75,
        delay: float = DELAY,
        **options: Any,
    ) -> None:
        self.base, self.prompt, self.embeddings = base, prompt, list(embeddings)
        self.options = {"n": 4, **options}
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
        self.result.value = b"" if images is None else _to_png(images)
        self.result.layout.display = "none" if images is None else ""
        self.save.disabled = images is None

    def _save(self, _: Any = None) -> None:
        """Write the images and their mask as PNG files into a new folder."""
        if self.images is None:
            return
        number = next(i for i in range(1, 10_000) if not Path(f"inpainted{i}").exists())
        folder = Path(f"inpainted{number}")
        save_images(self.images, folder)
        mask = (self.painter.mask * 255).to(torch.uint8).expand(1, 3, -1, -1)
        save_images(mask, folder, names=["mask"])
        self._report(f"saved in {folder}")

    def _report(self, state: str) -> None:
        self.status.value = f"{state} · {self.prompt} · synthetic under the mask"

    def _draw(self, check: Callable[..., None], mask: torch.Tensor, strength: float) -> None:
        about = {"embeddings": self.embeddings, "strength": strength, **self.options}
        made = inpaint(self.base, self.painter.image, mask, self.prompt, callback=check, **about)
        check()
        self._show(made)
