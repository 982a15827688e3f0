"""Command line: one line of help and one call of the library for each command."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnusedCliTokensError,
    convert,
)
from cyclopts.config import Yaml

from medbudget._version import __version__
from medbudget.cli import bases, embeddings, generate, readers, score, studies, training
from medbudget.cli.options import write_settings
from medbudget.cli.prepare import app as prepare_app

STOPPED = "stopped: the same command goes on from here"
GOES_ON = ("classify", "inpaint", "interpolate", "invert", "prepare", "sample", "study", "tune")


def _show_default(value: Any) -> str | None:
    return None if value in (None, True, False, "") else str(value)


def _convert(type_: Any, tokens: Any) -> Any:
    """Convert as cyclopts does, which rounds ``--seed 1.5`` to 2: refuse that."""
    if type_ in (int, int | None) and "." in tokens[0].value:
        raise ValueError(f"{tokens[0].value} is no whole number")
    return convert(type_, tokens)


app = App(
    name="medbudget",
    help="Textual Inversion for medical images on a budget. Not for clinical use.",
    version=f"medbudget {__version__}",
    help_format="plaintext",
    help_epilogue="Every command takes --config FILE: options in YAML, such as sample: {n: 40}. "
    "Those in force are written beside what a command makes, as settings.yaml.",
    default_parameter=Parameter(negative=(), show_default=_show_default, converter=_convert),
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(add_to_startup=False)
for _command in (
    bases.doctor, bases.cache, generate.phantoms, training.invert, training.tune, generate.sample,
    generate.interpolate, generate.inpaint, generate.describe, score.evaluate,
    score.membership, score.classify, prepare_app, embeddings.app, embeddings.released_app, bases.app,
    studies.app, readers.app,
):  # fmt: skip
    app.command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; expected errors become one message.

    Exit codes: 1 for an error, 2 for wrong use, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "…" ends no command
    received = [signal.SIGINT]

    def stop(number: int, frame: Any) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    show, warnings.showwarning = warnings.showwarning, _note
    try:
        app.config = _read_config(arguments)
        run, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        code = run(*bound.args, **bound.kwargs)
        write_settings(app, arguments, bound, code if isinstance(code, dict) else {})
    except CycloptsError as error:
        command = " ".join(["medbudget", *(error.command_chain or ()), "--help"])
        code = _report(f"{_explain(error)} ({command})", 2)
    except KeyboardInterrupt as stopped:
        message = STOPPED if arguments[:1] and arguments[0] in GOES_ON else "stopped"
        print(str(stopped) or message, file=sys.stderr)
        code = 128 + getattr(stopped, "number", received[0])
    except MemoryError as error:
        code = _report(f"out of memory {error}: fewer or smaller images need less", 1)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        code = _report(error, 1)
    finally:
        warnings.showwarning = show
        signal.signal(signal.SIGTERM, before)
    sys.exit(code if isinstance(code, int) else 0)


def _read_config(arguments: list[str]) -> tuple[Yaml, ...]:
    """Take ``--config FILE`` out of the arguments; return what fills in the options not given."""
    if "--config" not in arguments:
        return ()
    place = arguments.index("--config")
    _, *file = arguments[place : place + 2]
    del arguments[place : place + 2]
    if not file or not Path(file[0]).is_file():
        raise FileNotFoundError(f"--config: no such file {' '.join(file)}".rstrip())
    return (Yaml(file[0], must_exist=True, search_parents=False),)


def _explain(error: CycloptsError) -> str:
    """Say what is wrong with a command line."""
    if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens:
        missing = "needs a value" if error.keyword else "is missing"
        return f"{error.argument.name} {missing}"
    if isinstance(error, UnusedCliTokensError):
        return f"too many arguments: {' '.join(error.unused_tokens or ())}"
    return str(error).rstrip(".")


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning without the line of Python that it comes from."""
    print(f"note: {message}", file=sys.stderr)


def _report(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
