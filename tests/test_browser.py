"""The widgets in a real browser: a built page without a kernel, and JupyterLab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from webdriver import (
    ARROW_RIGHT,
    Browser,
    free_port,
    needs_browser,
    open_browser,
    until,
)

nbformat = pytest.importorskip("nbformat", reason="needs the `book` extra")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page built by the book's own configuration, with a slider in a notebook's output."""
    pytest.importorskip("jupyter_book", reason="needs the `book` extra")
    from medbudget.widgets import show_frames

    folder = tmp_path_factory.mktemp("site")
    stage = folder / "stage"
    shutil.copytree(ROOT / "book" / "_static", stage / "book" / "_static")
    for name in ("_config.yml", "book/logo.png", "book/references.bib"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, stage / name)
    frames = {str(v): torch.full((1, 3, 8, 8), v, dtype=torch.uint8) for v in (0, 100, 200)}
    shown = show_frames(frames, label="gray", alt="A gray square.", caption="Synthetic.")
    output = nbformat.v4.new_output("execute_result", {"text/html": shown.data}, execution_count=1)
    cells = [
        nbformat.v4.new_markdown_cell("# A page"),
        nbformat.v4.new_code_cell("frames", outputs=[output], execution_count=1),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, stage / "page.ipynb")
    (stage / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    start = "from jupyter_book.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, "build", stage, "--path-output", folder, "--quiet"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return folder / "_build" / "html" / "page.html"


def test_the_slider_of_a_built_page_changes_the_image(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    shown = (
        "return [...document.querySelectorAll('.medbudget-frames [data-frame]')]"
        ".filter(e => e.offsetHeight > 0).map(e => e.querySelector('img').alt)"
    )
    assert browser.run(shown) == ["A gray square. gray: 100."]  # it starts in the middle
    pixel = (
        "const img = document.querySelector('.medbudget-frames [data-frame]:not([hidden]) img');"
        "const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;"
        "const to = canvas.getContext('2d'); to.drawImage(img, 0, 0);"
        "return to.getImageData(0, 0, 1, 1).data[0]"
    )
    assert browser.run(pixel) == 100
    browser.type(".medbudget-frames input", ARROW_RIGHT)
    assert browser.run(shown) == ["A gray square. gray: 200."]
    assert browser.run(pixel) == 200
    asked = "return performance.getEntriesByType('resource').map(e => e.name)"
    scripts = [
        name for name in browser.run(asked) if "jupyter-widgets" in name or "require" in name
    ]
    assert scripts == [], "the page asks for widget scripts that it does not need"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab server in an empty folder: its address and the folder."""
    pytest.importorskip("jupyterlab", reason="needs the `book` extra")
    tmp_path = tmp_path_factory.mktemp("lab")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password="]
    command += [
        "--LabApp.expose_app_in_browser=True",
        "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    home = tmp_path / ".home"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    with open(tmp_path / ".log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=tmp_path)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/api") as a:
            return bool(a.status == 200)

    try:
        until(answers, "JupyterLab does not start")
        yield url, tmp_path
    finally:
        server.terminate()
        server.wait()


def run_all(browser: Browser, lab: tuple[str, Path], notebook: Any, *, done: str) -> None:
    """Open a notebook in JupyterLab, run all its cells, wait until the script `done` is true."""
    url, folder = lab
    name = f"page{len([*folder.glob('*.ipynb')])}"  # in a workspace that has nothing open
    nbformat.write(notebook, folder / f"{name}.ipynb")
    browser.open(f"{url}/lab/workspaces/{name}/tree/{name}.ipynb")
    browser.wait_for(
        "return document.querySelector('.jp-NotebookPanel') && window.jupyterapp.commands"
        ".isEnabled('notebook:run-all-cells')",
        "the notebook does not open",
    )
    browser.wait_for(
        "return document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'",
        "the kernel does not start",
    )
    browser.wait_for(  # JupyterLab may ask which kernel to take, and forget the run, or half of it
        "const ask = document.querySelector('.jp-Dialog .jp-mod-accept');"
        "const cells = window.jupyterapp.shell.currentWidget.content.widgets"
        "  .filter(cell => cell.model.type == 'code');"
        "const waits = cells.some(cell => cell.promptNode?.innerText.trim() == '[*]:');"
        "const kernel = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;"
        "if (ask) ask.click();"
        "else if (!waits && kernel == 'idle' && cells.some(cell => !cell.model.executionCount))"
        " window.jupyterapp.commands.execute('notebook:run-all-cells');"
        f"{done}",
        "the notebook does not come to its end",
    )


def test_the_quickstart_runs_top_to_bottom_in_jupyterlab(
    browser: Browser, lab: tuple[str, Path]
) -> None:
    for chance in (2, 1, 0):  # JupyterLab itself loses a message now and then on a busy machine
        try:
            run_quickstart(browser, lab)
            return
        except AssertionError:
            if not chance:
                raise


def run_quickstart(browser: Browser, lab: tuple[str, Path]) -> None:
    """Run the first chapter in JupyterLab and look at all that it shows."""
    notebook = nbformat.read(ROOT / "notebooks" / "00_ten_pictures.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    small = "n_cases, n_vectors, steps, n_images, sampling_steps = 8, 4, 3, 4, 2"
    cell.source += f"\n{small}\nimport os\nos.environ['TQDM_DISABLE'] = '0'  # a bar is a widget"
    last = "return kernel == 'idle' && cells.every(cell => cell.model.executionCount)"
    run_all(browser, lab, notebook, done=last)
    read = (
        "return window.jupyterapp.shell.currentWidget.content.widgets"
        ".filter(cell => cell.model.type == 'code').flatMap(cell => cell.model.outputs.toJSON())"
    )
    outputs = browser.run(read)
    assert [out for out in outputs if out["output_type"] == "error"] == []
    kinds = [kind for out in outputs for kind in out.get("data", {})]
    assert kinds.count("image/png") == 9, "ten pictures, of which the last is a page"
    assert "application/vnd.jupyter.widget-view+json" in kinds
    browser.wait_for(  # JupyterLab draws what is in sight
        "const notebook = window.jupyterapp.shell.currentWidget.content;"
        "const at = notebook.widgets.findIndex(cell => cell.model.type == 'code' && "
        "  JSON.stringify(cell.model.outputs.toJSON()).includes('widget-view+json'));"
        "notebook.activeCellIndex = at;"
        "notebook.widgets[at].node.scrollIntoView();"
        "return document.querySelectorAll('.widget-hprogress').length > 0",
        "progress does not show",
    )
    text = "".join(out.get("text", "") for out in outputs)
    assert "mine.safetensors: " in text and "<mine>, 4 vectors, base tiny" in text


@pytest.fixture(scope="module")
def widgets(browser: Browser, lab: tuple[str, Path]) -> Path:
    """Both widgets under one cell in JupyterLab; the folder that the kernel works in."""
    lines = [
        "import json, torch",
        "from pathlib import Path",
        "from IPython.display import display",
        "from medbudget import load_base",
        "from medbudget.tiny import load_trained",
        "from medbudget.widgets import MaskPainter, PromptMixer",
        "def save():",
        "    m = painter.mask",
        "    Path('mask.json').write_text(json.dumps([len(painter.strokes), m.nonzero().tolist()]))",
        "painter = MaskPainter(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), changed=save)",
        "base = load_base('tiny', device='cpu')",
        "words = [load_trained('chest', label, base) for label in ('healthy', 'pneumonia')]",
        "display(painter, PromptMixer(base, words, n=1, steps=3, delay=1))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    last = ".medbudget-mixer .noUi-handle"
    run_all(browser, lab, notebook, done=f"return document.querySelector('{last}') !== null")
    return lab[1]


def test_a_mask_drawn_in_jupyterlab_arrives_in_python(browser: Browser, widgets: Path) -> None:
    place = (
        "const img = document.querySelector('.medbudget-painter img');"
        "img.scrollIntoView({block: 'center'}); const box = img.getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]"
    )
    left, top, wide, high = browser.run(place)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * wide, top + y * high

    def arrived(strokes: int) -> Any:
        file = widgets / "mask.json"
        found = (
            json.loads(file.read_text(encoding="utf-8") or "[-1, []]")
            if file.exists()
            else [-1, []]
        )
        return found if found[0] == strokes else None

    browser.drag(at(0.25, 0.5), at(0.5, 0.5), at(0.75, 0.5))
    _, cells = until(lambda: arrived(1), "the stroke does not arrive")
    rows, columns = {row for row, _ in cells}, {column for _, column in cells}
    assert min(columns) in range(9, 14) and max(columns) in range(50, 55)
    assert min(rows) in range(25, 30) and max(rows) in range(34, 39)
    browser.drag(at(0.5, 0.2), at(0.5, 0.25))
    until(lambda: arrived(2), "the second stroke does not arrive")
    click = "document.querySelectorAll('.medbudget-painter button')[0].click()"
    browser.run(click)
    until(lambda: arrived(1), "undo does not arrive")


def test_a_weight_slider_in_jupyterlab_draws_and_stops(browser: Browser, widgets: Path) -> None:
    status = (
        "const said = document.querySelector('.medbudget-mixer .widget-hbox .widget-label').innerText;"
        "const image = document.querySelector('.medbudget-mixer img');"
    )
    browser.type(".medbudget-mixer .noUi-handle", ARROW_RIGHT)
    browser.wait_for(
        f"{status} return said.startsWith('done · <healthy>:0.55 AND') && image.naturalWidth > 60",
        "moving the slider draws nothing",
    )
    first = browser.run(f"{status} return image.src")
    browser.type(".medbudget-mixer .noUi-handle", ARROW_RIGHT * 4)
    browser.wait_for(
        f"{status} return said.startsWith('done · <healthy>:0.75 AND') && image.src !== '{first}'",
        "moving the slider further draws nothing",
    )
    for weight in ("0.80", "0.85", "0.90", "0.95"):  # a slider's message may come after a click's
        before = browser.run(f"{status} return image.src")
        browser.run(  # in one go: the request must still wait when Stop comes
            "const handle = document.querySelector('.medbudget-mixer .noUi-handle');"
            "handle.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
            "document.querySelector('.medbudget-mixer button').click()"
        )
        ended = browser.wait_for(
            f"{status} return said.includes('<healthy>:{weight} AND') && said.match(/^(stopped|done)/)?.[0]",
            "neither stopped nor drawn",
        )
        if ended == "stopped":
            break
    assert ended == "stopped", "Stop does not stop"
    time.sleep(2)
    assert browser.run(f"{status} return image.src") == before
