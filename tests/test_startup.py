"""Starting is light: help and the bare import load no torch, no diffusers, no pandas."""

import os
import subprocess
import sys
import time

import pytest

import medbudget

HEAVY = {"torch", "diffusers", "transformers", "pandas", "matplotlib", "sklearn", "SimpleITK"}
HEAVY |= {"numpy", "scipy", "PIL", "pydicom", "huggingface_hub"}


def run(code, *arguments):
    """Run code in a new process; return its output without the last line, and the modules loaded."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
    code += "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    *said, modules = done.stdout.splitlines()
    return "\n".join(said), set(modules.split())


def test_help_loads_nothing_heavy():
    said, modules = run(
        "from medbudget.cli import main\n"
        "    for words in sys.argv[1:]:\n"
        "        try:\n            main(words.split())\n"
        "        except SystemExit as end:\n            assert not end.code",
        "--help", "-h", "sample --help", "--version", "prepare --help", "study --help",
    )  # fmt: skip
    assert said.count("Usage: medbudget") == 5 and not modules & HEAVY


def test_the_import_loads_nothing_heavy_and_telemetry_is_off_before_anything_could_report():
    said, modules = run("import medbudget, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])")
    assert said == "1" and "medbudget" in modules and not modules & HEAVY


def test_every_public_name_is_there_on_first_use():
    for name in medbudget.__all__:
        assert getattr(medbudget, name) is not None and name in dir(medbudget)
    assert medbudget.plots.show_images  # a module, without an import of its own
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = medbudget.smaple


def test_help_is_printed_where_the_terminal_knows_ascii_alone():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "medbudget", "prepare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "DICOM" in done.stdout and not done.stderr


def test_help_takes_half_a_second():
    def measure():
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "medbudget", "--help"], capture_output=True)
        return time.monotonic() - start

    assert any(measure() < 0.5 for _ in range(5))


def test_a_warning_is_a_note_without_a_line_of_python(tmp_path):
    code = (
        "import sys, warnings, medbudget.cli as cli\n"
        "cli._read_config = lambda a: warnings.warn('mind the gap') or ()\n"
        "cli.main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "note: mind the gap\n"
