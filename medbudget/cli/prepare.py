"""medbudget prepare: the functions of `medbudget.data`, with their own options."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

app = App(
    name="prepare", help="Turn data sets, or your own images, into image sets split by patient."
)
COMMANDS = {  # name: the function, and a line of help
    "picai": ("medbudget.data.picai", "Prostate MRI: one axial slice a case, with its masks."),
    "chexpert": ("medbudget.data.chexpert", "Chest X-rays: AP views with exactly one finding."),
    "pcam": ("medbudget.data.pcam", "Histology: random patches of the training split."),
    "folder": ("medbudget.data.folder", "Your own images: DICOM, NIfTI, MHA, NRRD, PNG, JPEG …"),
}
HELP = {
    "allow_broken": "exit 0 although cases were broken and left out",
    "allow_fewer": "take what there is where a class has fewer",
    "disjoint": "keep every patient of the splits out of the reference set",
    "file_column": "name of the table's column of files",
    "geometry": "physical: one grid in the patient; paper: as the released prostate words saw images",
    "images": "folder of <patient>/<patient>_<study>_t2w.mha …",
    "label_column": "name of the table's column of classes",
    "out": "folder for images and manifest; goes on there",
    "per_class": "patients of each class in each split; paper: 100",
    "reference": "also write that many healthy cases, or of each class, for distances",
    "root": "the data set's folder; of your own images: one folder for each class, or --labels",
    "seed": "the same seed gives the same result",
    "size": "pixels of an edge; paper: 512, base tiny: 64 or 128",
    "split": "proportions of train,val,test; or 1: all in train",
    "window": "how gray values are chosen",
    "workers": "processes; default: one for each core",
}


def _numbers(type_: Any, tokens: Any) -> list[float]:
    try:
        return [float(value) for value in tokens[0].value.split(",")]
    except ValueError:
        raise ValueError("write numbers with commas, such as 0.6,0.2,0.2") from None


def _annotate(parameter: inspect.Parameter) -> inspect.Parameter:
    """Give a function's parameter the name, the type and the help of an option."""
    name, annotation = parameter.name, parameter.annotation
    options: dict[str, Any] = {"help": HELP[name]} if name in HELP else {}  # else the docstring's
    if name == "proportions":
        annotation = list[float]
        more = {"name": "--split", "converter": _numbers, "n_tokens": 1, "metavar": "TEXT"}
        options = {"help": HELP["split"], **more}
    elif annotation in (str, str | None):
        options["metavar"] = "TEXT"
    elif "PathLike" in str(annotation):
        annotation = Path | None if parameter.default is None else Path
    elif name == "workers":
        parameter, annotation = parameter.replace(default=None), int | None
    elif name == "disjoint":
        options["negative"] = "--overlap"
    kind = parameter.kind
    if parameter.default is parameter.empty:
        kind = parameter.KEYWORD_ONLY if name == "out" else parameter.POSITIONAL_ONLY
    return parameter.replace(annotation=Annotated[annotation, Parameter(**options)], kind=kind)


def _command(module: str, name: str) -> Callable[..., int]:
    """Return a command that runs a preparation and prints what it did."""
    function = getattr(importlib.import_module(module), name)

    @functools.wraps(function)
    def run(
        *folders: Path, workers: int | None = None, allow_broken: bool = False, **more: Any
    ) -> int:
        from medbudget.results import count_cores

        report = function(*folders, workers=count_cores() if workers is None else workers, **more)
        print(report)
        if (sheet := report.out / "contact_sheet.png").exists():
            print(f"look at {sheet}")
        return 1 if report.broken and not allow_broken else 0

    given = inspect.signature(function, eval_str=True).parameters.values()
    extra = inspect.Parameter("allow_broken", inspect.Parameter.KEYWORD_ONLY, default=False,
                              annotation=bool)  # fmt: skip
    parameters = [_annotate(parameter) for parameter in (*given, extra)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def __getattr__(name: str) -> Callable[..., int]:
    if name not in COMMANDS:
        raise AttributeError(name)
    return _command(COMMANDS[name][0], f"prepare_{name}")


for _name, (_, _help) in COMMANDS.items():
    app.command(f"{__name__}:{_name}", name=_name, help=_help)
