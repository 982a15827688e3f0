"""Every chapter has the anatomy that the book promises, runs, and teaches what the library does."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from functools import cache
from heapq import heappop, heappush
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot
import pytest
import torch
import yaml

from medbudget.sampling.sampler import ancestral_step
from medbudget.studies import in_order

nbformat = pytest.importorskip("nbformat", reason="needs the `book` extra")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTS = re.compile(r"\b(show_images|show_rows|show_panels|plot_\w+)\(")
FENCE = re.compile(r"^(`{3,}|:{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
DROPDOWN = re.compile(r"^:{3,}\{dropdown\}.*?^:{3,}\s*$", re.DOTALL | re.MULTILINE)
MAX_LINES = {"equation": 20, "imports": 34}

# small enough for a test; every chapter has its own part of these
FEW = {
    "steps": 2, "hand_steps": 1, "n_cases": 8, "n_images": 4, "n_pairs": 4, "sampling_steps": 2,
    "size": 64, "n_patients": 16, "n_heldout": 8, "n_few": 2, "repeats": 20, "draws": 20,
}  # fmt: skip
MOST = 8  # phantoms of one call, where a chapter says no number among its parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@cache
def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def solutions(path: Path) -> list[str]:
    _, exercises = prose(path).split("\n## Exercises")
    found = []
    for dropdown in DROPDOWN.findall(exercises):
        found += re.findall(r"^```python\n(.*?)^```", dropdown, flags=re.DOTALL | re.MULTILINE)
    return found


def equation(name: str) -> Any:
    """Return a function that a chapter defines in a cell tagged `equation`."""
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            if "equation" in tags(cell) and f"def {name}(" in cell.source:
                namespace: dict[str, Any] = {
                    "torch": torch, "ancestral_step": ancestral_step, "heappop": heappop,
                    "heappush": heappush, "in_order": in_order, "islice": islice,
                }  # fmt: skip
                exec(compile(cell.source, f"{path.stem}:{cell.id}", "exec"), namespace)  # noqa: S102
                return namespace[name]
    raise LookupError(f"no chapter defines {name} in a cell tagged `equation`")


def test_is_valid_and_has_no_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    # VS Code chooses kernel and highlighting by these, and keeps the cells' ids from 4.5 on
    assert notebook.metadata.kernelspec.language == notebook.metadata.language_info.name == "python"
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in cells(path, "code"):
        assert cell.outputs == [] and cell.execution_count is None
        assert cell.source.strip(), "an empty code cell"


def test_name_is_two_digits_and_snake_case(path: Path) -> None:
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)


def section(path: Path, heading: str) -> str:
    """Return the text between a heading and the next one of its level."""
    _, _, text = prose(path).partition(f"\n## {heading}\n")
    return text.partition("\n## ")[0]


def test_opens_with_the_only_title_a_picture_a_summary_and_a_table(path: Path) -> None:
    titles = re.findall(r"^# .+", FENCE.sub("", prose(path)), flags=re.MULTILINE)
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert len(titles) == 1 and first.source.startswith(titles[0])
    table = first.source.lower()
    assert "|---" in table
    for row in ("paper", "cpu", "gpu", "download", "licence"):
        assert re.search(rf"^\|.*{row}", table, flags=re.MULTILINE), f"nothing on {row}"
    assert "**In one minute.**" in first.source
    carriers = [c for c in cells(path, "code") if "carries" in tags(c)]
    if "<!-- picture -->" in first.source:  # where the build puts the figure of that cell
        assert len(carriers) == 1 and PLOTS.search(carriers[0].source)
    else:
        assert "![" in first.source and not carriers


def test_findings_are_told_in_sentences(path: Path) -> None:
    text = prose(path)
    found = re.findall(r"^\*Finding:\* (.+)", text, flags=re.MULTILINE)
    assert len(found) >= 3 and "*What to see:*" not in text
    for sentence in found:
        assert not re.match(r"([Ww]hether|[Ww]hich|[Hh]ow|[Cc]ompare)\b", sentence), sentence
    assert len(re.findall(r"^- ", section(path, "Take-aways"), flags=re.MULTILINE)) == 3
    answers = re.findall(r"^:{3,}\{dropdown\} .+", section(path, "Quiz"), flags=re.MULTILINE)
    assert 3 <= len(answers) <= 5
    for kind in ("Predict", "Run", "Change", "Judge"):
        assert f"**{kind}.**" in section(path, "Exercises"), f"no exercise of the kind {kind}"


def test_code_is_not_cut_off_on_the_page(path: Path) -> None:
    lines = [line for cell in cells(path, "code") for line in cell.source.splitlines()]
    lines += [line for solution in solutions(path) for line in solution.splitlines()]
    assert not [line for line in lines if len(line) > 79]


def test_says_what_the_reader_will_do_in_three_bullets(path: Path) -> None:
    second = read(path).cells[1]
    assert second.cell_type == "markdown" and "You will" in second.source
    assert len(re.findall(r"^- ", second.source, flags=re.MULTILINE)) == 3


def test_sets_up_colab_only_on_colab(path: Path) -> None:
    (setup,) = [c for c in cells(path, "code") if "google.colab" in c.source]
    assert cells(path, "code")[0] is not None and cells(path, "code")[0].id == setup.id
    assert "hide-input" in tags(setup)
    lines = setup.source.splitlines()
    guard = next(i for i, line in enumerate(lines) if "google.colab" in line)
    assert all(i > guard for i, line in enumerate(lines) if "pip" in line)
    assert "torch.__version__" in setup.source and "base.device" not in setup.source


def test_parameters_are_typed_literals_with_comments(path: Path) -> None:
    (cell,) = [c for c in cells(path, "code") if "parameters" in tags(c)]
    lines = cell.source.splitlines()
    names = []
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        assert isinstance(ast.literal_eval(node.value), bool | int | float | str)
        assert "  # " in lines[node.lineno - 1], f"no comment: {lines[node.lineno - 1]}"
        names.append(node.targets[0].id)
    assert "preset" in names and "seed" in names
    later = "\n".join(c.source for c in cells(path, "code") if c.id != cell.id)
    for name in names:
        assert re.search(rf"\b{name}\b", later), f"parameter {name} is not used"


def test_code_cells_are_short_and_parse(path: Path) -> None:
    for cell in cells(path, "code"):
        if "hide-input" in tags(cell):
            continue
        limit = next(
            (MAX_LINES[tag] for tag in tags(cell) if tag in MAX_LINES),
            16,
        )
        assert len(cell.source.splitlines()) <= limit, cell.source
        ast.parse(cell.source)


def test_prose_stands_before_every_code_cell(path: Path) -> None:
    previous = None
    for cell in read(path).cells:
        if cell.cell_type == "code" and previous is not None and previous.cell_type == "code":
            special = {"hide-input", "parameters", "imports"}
            assert special & {*tags(cell), *tags(previous)}, cell.source
        previous = cell


def test_every_figure_has_alt_text_that_says_something(path: Path) -> None:
    for cell in cells(path, "code"):
        if PLOTS.search(cell.source):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 40, f"no alt text: {cell.source}"
            assert len(PLOTS.findall(cell.source)) == 1, "one figure a cell"


def test_has_no_machine_paths(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells)
    assert not re.search(r"(?<![\w.<])/(home|root|work|tmp|usr|opt|mnt|Users|content)/", text)
    assert not re.search(r"[A-Z]:\\", text)


def test_warns(path: Path) -> None:
    assert re.search(r"^(`{3,}|:{3,})\{warning\}", prose(path), flags=re.MULTILINE)
    assert "not for clinical use" in prose(path).lower()


def test_has_exercises_with_solutions_that_parse(path: Path) -> None:
    found = solutions(path)
    assert 2 <= len(found) <= 4
    assert prose(path).count("{dropdown} Solution") == len(found)
    for solution in found:
        ast.parse(solution)


def closing(path: Path) -> str:
    _, found, text = prose(path).partition("## Beside the paper")
    assert found, "no section on the paper"
    return text


def test_closes_with_the_papers_number_beside_this_runs(path: Path) -> None:
    assert "paper" in closing(path) and "{cite" in closing(path)


def test_every_chapter_leads_to_the_next() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [Path(c["file"]).name for part in contents["parts"][:-1] for c in part["chapters"]]
    chapters = [name for name in files if (ROOT / "notebooks" / f"{name}.ipynb").is_file()]
    appendices = {Path(c["file"]).name for c in contents["parts"][-1]["chapters"]}
    assert {p.stem for p in NOTEBOOKS} <= {*chapters, *appendices}
    for name, following in pairwise(chapters):
        _, _, end = closing(ROOT / "notebooks" / f"{name}.ipynb").partition("Next")
        assert f"]({following}." in end, f"{name} does not lead to {following}"


def test_no_two_figures_share_a_name() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS)
    names = re.findall(r'"name": "(fig-[\w-]+)"', text)
    assert len(names) > 40 and len(names) == len(set(names))


def test_links_carry_words(path: Path) -> None:
    """JupyterLab and Colab show nothing in the place of an empty one."""
    assert "[](" not in prose(path)


def test_a_chapter_that_trains_names_colab_and_takes_the_presets_steps(path: Path) -> None:
    code = "\n".join(cell.source for cell in cells(path, "code"))
    if not re.search(r"\b(invert|train_stylegan3|train_classifier|classify)\(", code):
        return
    (parameters,) = [cell.source for cell in cells(path, "code") if "parameters" in tags(cell)]
    if "preset = " in parameters:
        assert '"colab"' in parameters
        if re.search(r"^steps = ", parameters, flags=re.MULTILINE) and "invert(" in code:
            assert 'steps if preset == "tiny" else None' in code  # None: the preset's


def test_setup_is_the_same_in_every_chapter() -> None:
    assert len({cells(path, "code")[0].source for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize(
    ("importable", "named", "address", "uploaded", "source"),
    [
        (True, "x.whl", "medbudget @ git+https://a.org/b/c", {}, None),
        (False, "x.whl", "medbudget @ git+https://a.org/b/c", {}, "x.whl"),
        (False, "", "medbudget @ git+https://a.org/b/c", {}, "medbudget @ git+https://a.org/b/c"),
        (False, "", "", {"medbudget-1-py3-none-any.whl": b""}, "medbudget-1-py3-none-any.whl"),
        (False, "", "", {}, RuntimeError),  # the dialog was closed
    ],
)
def test_setup_on_colab_installs_what_is_named_or_uploaded(
    monkeypatch: pytest.MonkeyPatch, importable: bool, named: str, address: str,
    uploaded: dict[str, bytes], source: Any,
) -> None:  # fmt: skip
    """Never the bare name: nobody owns it in the package index."""
    colab: Any = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: uploaded)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: importable or None)
    monkeypatch.setenv("MEDBUDGET_SOURCE", named)
    runs: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: runs.append(command))
    text = cells(NOTEBOOKS[0], "code")[0].source
    text = re.sub(r'(MEDBUDGET_SOURCE"\) or) ".*?"', f'\\1 "{address}"', text)
    if source is RuntimeError:
        with pytest.raises(RuntimeError, match="choose medbudget's wheel, or set MEDBUDGET_SOURCE"):
            exec(text, {})  # noqa: S102
    else:
        exec(text, {})  # noqa: S102
    assert [command[-1] for command in runs] == ([source] if isinstance(source, str) else [])


# with `preset="paper"`: what stops a chapter that has no use for Stable Diffusion
STOPS = {"15_model_card": "unknown base 'paper': allowed are 'tiny'"}
WAYS_OUT = 'set MEDBUDGET_SD2 to|512-base-ema.ckpt|HF_HUB_OFFLINE|5.2 GB|`preset = "tiny"`|doctor'


def test_the_papers_preset_stops_before_any_download_and_says_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from medbudget.known import BaseError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MEDBUDGET_SD2", raising=False)
    if 'preset = "paper"' in "".join(cell.source for cell in cells(path, "code")):
        pytest.skip("plans for the paper's preset as it is, and runs so in the test below")
    namespace: dict[str, Any] = {}
    with mpl.rc_context():
        for cell in cells(path, "code"):
            try:
                exec(compile(cell.source, f"{path.stem}:{cell.id}", "exec"), namespace)  # noqa: S102
            except BaseError as error:
                stop = "the weights of Stable Diffusion 2.0"
                expected = (
                    [STOPS[path.stem]] if path.stem in STOPS else [stop, *WAYS_OUT.split("|")]
                )
                assert not [text for text in expected if text not in str(error)], str(error)
                return
            if "parameters" in tags(cell):
                namespace["preset"] = "paper"
                namespace |= {name: FEW[name] for name in namespace.keys() & FEW.keys()}
    raise AssertionError(f"{path.stem} does not stop under preset 'paper'")


# own images for the paper's preset; `paper_base` says what lies where
OWN: dict[str, dict[str, Any]] = {
    "00": {"folder": "images"}, "02": {"folder": "images"},
    "04": {"folder": "images", "embedding_file": "cache/embeddings/prostate_neg.pt"},
    "03": {"folder": "images", "embedding_file": "cache/embeddings/prostate_pos.pt"},
    "08": {"folder": "images", "n_cases": 6}, "09": {"folder": "images", "n_cases": 6},
    "14": {"folder": "images", "n_cases": 6},
    "07": {"folder": "data/prostate"}, "05": {"n_images": 3}, "06": {"image_folder": "images"},
    "10": {"folder": "images", "n_cases": 6, "n_heldout": 6, "n_few": 2, "draws": 1},
    "11": {"folder": "data/own/train", "learned": "tumour"},
}  # fmt: skip
REFUSED = "{} is for phantoms and the base tiny"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [p.stem[:2] for p in NOTEBOOKS if p.stem[:2] not in ("12", "15")]
)
def test_a_chapter_runs_to_its_end_under_the_papers_preset(
    number: str, paper: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Stable Diffusion 2.0 in small, from images of the reader's own, with counts cut."""
    from medbudget import hub, metrics, tiny
    from medbudget.classifier import ClassifierSettings
    from medbudget.sampling.sampler import Condition
    from medbudget.stylegan3 import StyleGAN3Settings
    from medbudget.training.inversion import InversionSettings
    from medbudget.training.lora import TuneSettings

    def refuse(name: str) -> Any:
        def call(*args: Any, **options: Any) -> None:
            raise AssertionError(REFUSED.format(name))

        return call

    for kind, few in (
        (InversionSettings, {"steps": 2}), (TuneSettings, {"steps": 2}),
        (ClassifierSettings, {"steps": 2, "batch_size": 8}), (StyleGAN3Settings, {"kimg": 0.008}),
    ):  # fmt: skip
        monkeypatch.setitem(kind.PRESETS, "paper", few)
    for module, name in (
        (hub, "load_trained"), (tiny, "load_trained"), (metrics, "disease_score"),
        (metrics, "disease_axis"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse(name))
    said: list[str] = []
    encode = Condition.encode

    def listen(base: Any, prompt: str, *rest: Any) -> Any:
        said.append(prompt)
        return encode(base, prompt, *rest)

    monkeypatch.setattr(Condition, "encode", listen)
    monkeypatch.chdir(tmp_path)
    if number == "06":  # its masks need a finer grid of latents
        finer = Path(shutil.copytree(paper.snapshot, tmp_path / "base"))
        config = finer / "unet" / "config.json"
        content = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**content, "sample_size": 16}), encoding="utf-8")
        monkeypatch.setenv("MEDBUDGET_SD2", str(finer))
    (path,) = (p for p in NOTEBOOKS if p.stem.startswith(number))
    own = OWN.get(number, {})
    places = {
        k: str(paper.hub.parent / v) for k, v in own.items() if k.endswith(("folder", "file"))
    }
    namespace: dict[str, Any] = {}
    with mpl.rc_context():
        for cell in cells(path, "code"):
            exec(compile(cell.source, f"{path.stem}:{cell.id}", "exec"), namespace)  # noqa: S102
            if "parameters" in tags(cell):
                namespace |= {name: FEW[name] for name in namespace.keys() & FEW.keys()}
                namespace |= {"preset": "paper", **own, **places}
        mpl.pyplot.close("all")
    assert not [prompt for prompt in said if " ground" in prompt]  # tiny's language
    if number == "02":
        assert {*hub.TEXT_PROMPTS} <= {*said}


def run_script(script: Path, said: Path) -> None:
    """Run a script in its folder, as a new process that has the imports already."""
    import medbudget

    draw = medbudget.make_phantoms

    def draw_few(kind: str, label: Any, n: int, **options: Any) -> Any:
        return draw(kind, label, min(n, MOST), **options)

    medbudget.make_phantoms = draw_few
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    os.chdir(script.parent)
    for number, path in ((1, os.devnull), (2, said)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_chapter_and_solutions_run_in_small_and_in_silence(
    path: Path, tmp_path: Path, forkserver: Any
) -> None:
    code = []
    for cell in cells(path, "code"):
        code.append(cell.source)
        if "parameters" in tags(cell):
            names = re.findall(r"^(\w+) =", cell.source, flags=re.MULTILINE)
            code += [
                f"{name} = min({name}, {value})" for name, value in FEW.items() if name in names
            ]
    code += solutions(path)
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    said = tmp_path.with_suffix(".err")
    process = forkserver.Process(target=run_script, args=(script, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text("utf-8")
    assert not said.read_text("utf-8"), "a chapter that writes to stderr fails the book's build"
    assert list(tmp_path.iterdir()) == [script], "a chapter left files behind"


def test_training_step_is_the_librarys(tiny) -> None:
    from medbudget import InversionSettings, invert, make_phantoms
    from medbudget.training.inversion import make_init
    from medbudget.training.loop import draw_batch

    training_step = equation("training_step")
    settings = InversionSettings(
        n_vectors=4, steps=4, lr=0.01, batch_size=3, latents="mean", schedule="constant"
    )
    images = make_phantoms("chest", "cardiomegaly", 6).images
    taken = []
    theirs = invert(
        tiny, images, token="<x>", settings=settings, callback=lambda s: taken.append(s["loss"])
    )
    z = tiny.encode(images)
    vectors = make_init(tiny, settings).requires_grad_(True)
    optimizer = torch.optim.AdamW([vectors], lr=0.01, weight_decay=0)
    for step, loss in enumerate(taken):
        pick, t, noise, _ = draw_batch(settings, step, len(images), z.shape[1:])
        ours = training_step(tiny, vectors, optimizer, z[pick], t, noise)
        assert ours == pytest.approx(loss, rel=1e-5)
    assert not torch.equal(vectors, make_init(tiny, settings))
    torch.testing.assert_close(vectors.detach(), theirs.vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.5])
def test_guidance_is_the_librarys(scale: float) -> None:
    from medbudget.sampling import sampler as sampling

    guide = equation("guide")
    d_u, d_c = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(d_u, d_c, scale), sampling.guide(d_u, [d_c], [1.0], scale))
    assert guide(torch.tensor(1.0), torch.tensor(3.0), 2.0) == 5


@pytest.mark.parametrize("steps", [2, 7])
def test_euler_ancestral_is_the_librarys(tiny, steps: int) -> None:
    from medbudget.sampling import sampler as sampling

    euler_ancestral, denoised = equation("euler_ancestral"), equation("denoised")
    told, shape = tiny.text("red ellipse"), tiny.latent_shape()
    sigmas, times = sampling.make_sigmas(tiny.alphas_cumprod, steps)
    condition = sampling.Condition.encode(tiny, "red ellipse", (), "", 1.0)
    ours, theirs = (sampling.draw_noises([3, 4], shape) for _ in range(2))
    want = sampling.denoise(tiny, next(theirs) * sigmas[0], sigmas, times, condition, theirs)
    with torch.inference_mode():
        x = euler_ancestral(
            next(ours) * sigmas[0],
            sigmas,
            times,
            lambda x, sigma, t: denoised(tiny, x, sigma, t, told),
            ours,
        )
    torch.testing.assert_close(x, want, rtol=0, atol=1e-5)


def test_frechet_distance_is_the_librarys() -> None:
    from medbudget import frechet_distance

    frechet = equation("frechet")
    generator = torch.Generator().manual_seed(0)
    for n, m, d in ((20, 30, 50), (60, 40, 7)):
        x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
        y = 1.3 * y + 0.2
        assert float(frechet(x, y)) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_change_of_low_rank_is_the_librarys() -> None:
    from medbudget.adapters import compute_change

    add_low_rank = equation("add_low_rank")
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(s, generator=generator) for s in ((6, 5), (2, 5), (6, 2)))
    change = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0)}
    want = weight + compute_change(change)["weight"]
    torch.testing.assert_close(add_low_rank(weight, down, up, 4.0), want)
    one = torch.ones(1, 1)
    assert add_low_rank(one, 2 * one, 3 * one, 1.0).item() == 1 + 2 * 3


def test_attack_is_the_librarys() -> None:
    from medbudget.metrics import membership_inference

    attack = equation("attack_auc")
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(15, generator=generator)
    others = torch.cat([torch.randn(20, generator=generator) + 1, members[:2]])  # with ties
    want = membership_inference(members, others).value
    assert want > 0.6 and float(attack(members, others)) == pytest.approx(want, abs=1e-6)


def test_binomial_test_is_the_librarys() -> None:
    from medbudget.reader import compute_preference

    two_sided_p = equation("two_sided_p")
    for k, n in ((36, 50), (25, 50), (0, 5), (7, 9)):
        assert two_sided_p(k, n) == pytest.approx(compute_preference(k, n).p_value, rel=1e-9)


def test_gan_losses_are_the_librarys() -> None:
    from medbudget.stylegan3.losses import discriminator_loss, generator_loss

    gan_losses = equation("gan_losses")
    real, fake = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    generator, discriminator = gan_losses(real, fake)
    torch.testing.assert_close(generator, generator_loss(fake))
    torch.testing.assert_close(discriminator, discriminator_loss(real, fake))
    assert not torch.isclose(generator, discriminator)


def test_resampled_gains_are_the_librarys() -> None:
    from medbudget.metrics import bootstrap_auc

    resampled_gain = equation("resampled_gain")
    generator = torch.Generator().manual_seed(0)
    case = torch.randn(60, generator=generator) + (torch.arange(60) < 25)  # 25 positive cases
    a, b = (case + 0.7 * torch.randn(4, 60, generator=generator) for _ in range(2))
    labels = (torch.arange(60) < 25).long()
    want = bootstrap_auc(labels.numpy(), a.numpy(), b.numpy(), repeats=2000)
    both = torch.stack([a, b])
    gains = torch.stack(
        [resampled_gain(both[:, :, :25], both[:, :, 25:], generator) for _ in range(2000)]
    )
    assert float(gains.std()) == pytest.approx(want.se, rel=0.06)
    assert float(gains.mean()) == pytest.approx(want.value, abs=0.1 * want.se)


def test_simulated_ends_are_those_worked_out_by_hand() -> None:
    from medbudget.studies import Task

    simulate = equation("simulate")
    word = Task("embedding", {"n": 0})
    blocks = [Task("block", {"i": i}, (word,)) for i in range(5)]
    score = Task("score", {}, tuple(blocks))
    lengths = {"embedding": 10.0, "block": 2.0, "score": 1.0}
    for workers, end in ((1, 21), (2, 10 + 6 + 1), (5, 13), (100, 13)):
        assert simulate([score], lambda t: lengths[t.kind], workers) == end
    two = [Task("embedding", {"n": 1}), Task("embedding", {"n": 2})]
    assert simulate(two, lambda t: float(t.settings["n"]), 2) == 2


@pytest.mark.parametrize(("weights", "scale"), [([1.0], 2.0), ([0.5] * 3, 3.0), ([-0.5, 1.5], 1.0)])
def test_composition_is_the_librarys(weights: list[float], scale: float) -> None:
    from medbudget.sampling import sampler as sampling

    compose = equation("compose")
    d_u, *predictions = torch.randn(
        1 + len(weights), 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    ours = compose(d_u, predictions, weights, scale)
    torch.testing.assert_close(ours, sampling.guide(d_u, predictions, weights, scale))


def test_repainting_is_the_librarys(tiny) -> None:
    from medbudget import ellipse, inpaint, make_phantoms
    from medbudget.sampling.inpainting import start_step
    from medbudget.sampling.masks import blur_masks, check_masks, latent_masks
    from medbudget.sampling.sampler import make_sigmas

    repaint = equation("repaint")
    image, mask, prompt = (
        make_phantoms("chest", "healthy", 1).images,
        ellipse((0.4, 0.5), (0.2, 0.2)),
        "red",
    )
    ends = []
    options = {"steps": 5, "strength": 0.6, "cfg_scale": 1.0, "seed": 3}
    inpaint(tiny, image, mask, prompt, callback=lambda s: ends.append(s["x"]), **options)
    m = latent_masks(blur_masks(check_masks(mask, 64), 4), tiny.latent_shape()[1:])
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(1, *tiny.latent_shape(), generator=generator) for _ in range(6)]
    mean, std = tiny.encode_posterior(image)
    sigmas, times = (part[start_step(5, 0.6) :] for part in make_sigmas(tiny.alphas_cumprod, 5))
    with torch.no_grad():
        x = repaint(tiny, mean + std * draws[0], m, tiny.text(prompt), sigmas, times, draws[1:])
    torch.testing.assert_close(x, ends[-1], rtol=0, atol=1e-3)
    assert len(ends) == 4
