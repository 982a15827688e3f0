"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from medbudget._version import __version__

Text = Annotated[str, Parameter(metavar="TEXT")]
Paths = Annotated[list[Path] | None, Parameter(consume_multiple=False)]
File = Annotated[Path, Parameter(help="an embedding: .safetensors, .pt or .bin")]
Licence = Annotated[str, Parameter(help="as the hub spells it, e.g. mit", metavar="TEXT")]
Overwrite = Annotated[bool, Parameter(help="replace OUT if it is there")]
ScoresFile = Annotated[Path | None, Parameter(help="what medbudget evaluate --out wrote")]
Seed = Annotated[int, Parameter(help="the same seed gives the same result")]
Words = Annotated[list[str] | None, Parameter(consume_multiple=False, metavar="TEXT...")]


def read_adapters(texts: Sequence[str] | None) -> list[Any]:
    """Return the adapters of ``FILE[:WEIGHT]``, each with its weight."""
    from medbudget.adapters import Adapter

    adapters = []
    for text in texts or []:
        file, _, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = None
        if weight is None or Path(text).is_file():
            adapters.append(Adapter.load(text))
        else:
            adapters.append(Adapter.load(file).weighted(weight))
    return adapters


def write_scores(scores: Any, out: Path | None) -> None:
    """Write scores as JSON, where a command was asked to."""
    from medbudget.metrics import to_json

    if out is not None:
        to_json(scores, out)
        print(f"wrote {out}")


def check_free(out: Path | None, overwrite: bool) -> None:
    """Refuse an output that is there, before the work."""
    from medbudget.files import check_output

    if out is not None:
        check_output(out, overwrite=overwrite)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute.

    Args:
        device: cpu or cuda; default: cuda if there is one
        threads: of the processor; default: one for each core
    """

    device: Text | None = None
    threads: int | None = None

    def prepare(self) -> str | None:
        """Set the number of threads, check the device and return it."""
        import torch

        from medbudget.settings import check_number

        if self.device is not None and self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device {self.device}: allowed are cpu, cuda, cuda:1 …, mps")
        if self.threads is not None:
            check_number("--threads", self.threads, 1)
            torch.set_num_threads(self.threads)
        return self.device


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BaseOptions(Machine):
    """Which base, and where to compute.

    Args:
        base: tiny, sd20, sd15 … (medbudget base list), owner/name of the hub, a folder or a file
        fast: compile the U-Net first, a minute; default: on a GPU for 300 steps or images and more
    """

    base: Text = "tiny"
    fast: Annotated[bool | None, Parameter(negative="--no-fast")] = None

    def load(self) -> Any:
        """Load the base."""
        from medbudget.loading import load_base

        return load_base(self.base, device=self.prepare(), fast=bool(self.fast))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Drawing(BaseOptions):
    """How to draw.

    Args:
        adapter: FILE or FILE:WEIGHT of an adapter (LoRA); repeatable
        steps: default: 25 on tiny, else 100
        cfg_scale: classifier-free guidance; paper: 2
        seed: of the first image; the next ones have the next seeds
        overwrite: replace other images that are there
    """

    adapter: Words = None
    steps: int | None = None
    cfg_scale: float = 2.0
    seed: int = 0
    overwrite: bool = False

    def collect(self) -> dict[str, Any]:
        """Return these as options of the functions that draw."""
        return {
            "adapters": read_adapters(self.adapter), "steps": self.steps, "seed": self.seed,
            "cfg_scale": self.cfg_scale, "overwrite": self.overwrite,
        }  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training(BaseOptions):
    """How to train.

    Args:
        preset: tiny, colab or paper; default: the base's
        steps: paper: 50000
        lr: learning rate; paper: 0.005; of an adapter 1e-4, of all weights 5e-6
        batch_size: paper: 1
        init: "*" (A1111), mean, or the text trained on, e.g. "a scan"
        latents: once (A1111), mean or resample
        seed: the same seed gives the same result
        checkpoint: file to save the state in and to go on from; default: OUT.ckpt until OUT is
            saved
        checkpoint_every: steps between checkpoints
        samples: images on the sheet at the end, OUT with the ending .png; 0: no sheet
        overwrite: replace OUT, its sheet and its previews if they are there
    """

    preset: Text | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    init: Text | None = None
    latents: Text | None = None
    seed: int = 0
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    samples: int = 8
    overwrite: bool = False

    def make_settings(self, kind: Any, **more: Any) -> Any:
        """Return the settings that were given, completed by the preset if one was."""
        names = ("steps", "lr", "batch_size", "init", "latents", "checkpoint_every")
        given = {name: getattr(self, name) for name in names} | more | {"seed": self.seed or None}
        settings = kind(**{k: v for k, v in given.items() if v is not None})
        return settings.complete(self.preset) if self.preset else settings


def load_checked(
    base: BaseOptions, out: Path | None, prompt: str = "", *, words: Sequence[Any] = (),
    images: Sequence[Path] = (),
) -> Any:  # fmt: skip
    """Load a base, once it is sure that the other files are there, and that the output can be."""
    from medbudget.images import check_folder, find_images
    from medbudget.prompts import parse_prompt
    from medbudget.sampling.composition import read_end

    if out is not None:
        check_folder(out, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the files are used
        for path in images:
            find_images(path)
        tokens = [end.token for end in map(read_end, words)]
    if prompt:
        parse_prompt(prompt, tokens=tokens)
    return base.load()


RECORDED = (
    "phantoms", "invert", "tune", "sample", "interpolate", "inpaint", "evaluate", "classify", "prepare",
)  # fmt: skip
NOT_KEPT = ("out", "overwrite", "checkpoint", "key")  # differ in a next run
HEAD = "# medbudget"


def write_settings(
    app: App, arguments: Sequence[str], bound: BoundArguments, in_force: Mapping[str, Any]
) -> None:
    """Write the settings of a command beside its output, as --config reads them.

    They are ``settings.yaml`` in a folder, and ``x.settings.yaml`` beside a file ``x.pt``.
    """
    bound.apply_defaults()
    out, (chain, apps, _) = bound.arguments.get("out"), app.parse_commands(arguments)
    if not chain or chain[0] not in RECORDED or out is None:
        return
    import yaml

    from medbudget.files import write_text

    path = out / "settings.yaml" if out.is_dir() else out.with_suffix(".settings.yaml")
    if path.exists() and not path.read_text(encoding="utf-8").startswith(HEAD):
        print(f"note: {path} is not medbudget's: the settings are not written", file=sys.stderr)
        return
    values = dict(in_force)
    for key, value in bound.arguments.items():
        more = vars(value) if isinstance(value, Machine) else {key: value}
        values |= {k: v for k, v in more.items() if v is not None}
    options: dict[str, Any] = {}
    for argument in apps[-1].assemble_argument_collection():
        key, name = argument.field_info.name, argument.name
        if name.startswith("--") and key in values and key not in NOT_KEPT:
            options[name[2:]] = _write_value(values[key])
    again = shlex.join(["medbudget", *chain, *map(str, bound.args)])
    again += f" --config {path.name}" + " --out OUT" * (out not in bound.args)
    for word in reversed(chain):
        options = {word: options}
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    write_text(path, f"{HEAD} {__version__}, once more: {again}\n{text}")


def _write_value(value: Any) -> Any:
    """Return a value as an option takes it: numbers in one text, paths as text."""
    if isinstance(value, list | tuple):
        numbers = all(isinstance(one, int | float) for one in value)
        return ",".join(f"{one:g}" for one in value) if numbers else [str(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)
