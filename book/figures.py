"""Fetch the paper's published figures from their authors' repository: ``make figures``.

None of them is committed. They lie in ``book/authors``, which git ignores, each checked by its
SHA-256. The build puts them where a page names one; for a figure that is not there it draws a
placeholder that says what stands there and how to fetch it. The build itself fetches only if
MEDBUDGET_FIGURES is set, and goes on without a figure that it cannot get.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "authors"
REPOSITORY = "brambozz/medical-diffusion-on-a-budget"
COMMIT = "6acd4ab1475af1f18d7c381ecc9467280e5070ef"
URL = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/"
SWITCH = "MEDBUDGET_FIGURES"
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\](?P<link>\([^()]*\bauthors/(?P<name>\w+)\.png\))")


class AuthorsFile(NamedTuple):
    path: str  # in the authors' repository
    size: int  # bytes
    sha256: str
    shows: str  # what the repository says about it


FIGURES = {
    "words_alone": AuthorsFile(
        "presentation/media/vanilla_a_prostate_mri_scan.png",
        1_490_597,
        "0dd7c5428511c7a94cb715f7308b3f3a11dbbf479c1a4f0477ba8e0c0b0abb9f",
        "four images that Stable Diffusion draws for “a prostate MRI scan”: none is a prostate",
    ),
    "words_alone_t2": AuthorsFile(
        "presentation/media/vanilla_t2_weighted.png",
        1_403_466,
        "9fed380c44e46c928001c770e232a91511e6661411fa58a6a794b6aa52a0855b",
        "four images that Stable Diffusion draws for “a T2-weighted MRI scan of a prostate”",
    ),
    "settings": AuthorsFile(
        "presentation/media/ti_settings_overview.png",
        3_692_988,
        "6d16f6e0ef507f84f56c0929cec4858978144f18d0c13f6e2957b3c42af6c824",
        "synthetic prostates: words of 8, 16, 32 and 64 vectors; of 5, 10, 50 and 100 cases",
    ),
    "interpolation": AuthorsFile(
        "website/media/disease_interpolation.png",
        861_588,
        "d86ca07dc3c92a99d5fa1503392a07d2e1ef72b5ed1f3f57133d9557c4da1913",
        "a synthetic chest whose heart grows from 0 to 1 of the word for cardiomegaly",
    ),
    "composition": AuthorsFile(
        "website/media/chexpert_composition.png",
        751_840,
        "1f1210ffc090883ff2171707289224b50dac8eeccc5e15d1d59717d608d5f48e",
        "synthetic chests: healthy, with pleural effusion, with pneumonia too, with a large heart too",
    ),
    "inpainting": AuthorsFile(
        "website/media/prostate_inpainting.png",
        1_407_129,
        "3feaae2849689098778808d1f7e601577d68a90b9de6271d7fbd12329a6cc455",
        "a healthy prostate on T2, ADC and DWI, and a tumour painted into two places of it",
    ),
    "head_to_head": AuthorsFile(
        "presentation/media/head_to_head.png",
        611_548,
        "6c337583952889882a8e1419ebff75627526a086f36848d7fa3a7161643952e6",
        "a synthetic prostate of StyleGAN3, too dark, beside one of Stable Diffusion",
    ),
}
LICENCE = AuthorsFile(
    "LICENSE",
    1070,
    "7380242b4b003c68d22e8c574951c478d01e021799926ed8a3939403a0f72596",
    "the MIT licence, which goes wherever the figures go",
)


def is_whole(path: Path, file: AuthorsFile) -> bool:
    """Return whether a file is there and is the authors'."""
    from medbudget.files import hash_file

    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return hash_file(path) == file.sha256


def fetch(path: Path, file: AuthorsFile) -> None:
    """Fetch one file, unless it is there, and give it its name once it is checked.

    Raises
    ------
    OSError
        The file cannot be fetched, or is not the one that was pinned.
    """
    from medbudget.files import write_bytes

    if is_whole(path, file):
        return
    with urllib.request.urlopen(URL + file.path, timeout=60) as answer:  # a fixed https address
        content = answer.read(file.size + 1)
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise OSError(f"{URL}{file.path} has SHA-256 {found[:12]}…, not {file.sha256[:12]}…")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def fetch_all(folder: Path = FOLDER) -> list[str]:
    """Fetch every figure and the licence; return what could not be fetched, and why."""
    problems = []
    wanted = {f"{name}.png": file for name, file in FIGURES.items()} | {"LICENSE": LICENCE}
    for name, file in wanted.items():
        try:
            fetch(folder / name, file)
        except OSError as error:
            problems.append(f"{name}: {error}")
    return problems


def draw_placeholder(name: str, path: Path) -> None:
    """Draw what stands in the place of a figure that has not been fetched."""
    figure = Figure(figsize=(10, 3.2), dpi=120, facecolor="#f2f2f2")
    shows = "\n".join(textwrap.wrap(f"It shows {FIGURES[name].shows}.", 62))
    lines = (
        (0.84, "A figure that the paper’s authors published", 17, "bold", "#222222"),
        (0.5, shows, 16, "normal", "#222222"),
        (0.16, "make figures", 17, "bold", "#005b8f"),
        (0.05, f"fetches it from github.com/{REPOSITORY} (MIT licence)", 12, "normal", "#444444"),
    )
    for height, text, size, weight, color in lines:
        figure.text(0.5, height, text, size=size, weight=weight, color=color, ha="center")
    figure.savefig(path, metadata={"Software": None})


def read_pages(stage: Path) -> dict[Path, str]:
    """Return the text of every staged page that names one of the figures.

    Raises
    ------
    ValueError
        A page names a figure that is not known.
    """
    pages = [*(stage / "book").glob("*.md"), *(stage / "notebooks").glob("*.ipynb")]
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(pages)}
    texts = {page: text for page, text in texts.items() if IMAGE.search(text)}
    for page, text in texts.items():
        names = {match["name"] for match in IMAGE.finditer(text)}
        if unknown := sorted(names - set(FIGURES)):
            raise ValueError(
                f"{page.name} names authors/{unknown[0]}.png; book/figures.py has: "
                f"{', '.join(FIGURES)}"
            )
    return texts


def place_figures(stage: Path, folder: Path = FOLDER) -> None:
    """Put the figures that pages name where the pages expect them, or placeholders.

    The alt text of a placeholder says that it is one.
    """
    texts = read_pages(stage)
    if texts and os.environ.get(SWITCH):
        for problem in fetch_all(folder):
            print(f"note: {problem}", flush=True)
    licensed = is_whole(folder / "LICENSE", LICENCE)
    missing = set()
    named = {match["name"] for text in texts.values() for match in IMAGE.finditer(text)}
    for name in sorted(named):
        source, target = folder / f"{name}.png", stage / "book" / "authors" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        if licensed and is_whole(source, FIGURES[name]):
            shutil.copyfile(source, target)
            shutil.copyfile(folder / "LICENSE", stage / "book" / "_static" / "authors_licence.txt")
        else:
            draw_placeholder(name, target)
            missing.add(name)
    if missing:
        print(
            f"note: placeholders for {len(missing)} of the authors' figures; `make figures` "
            "fetches them",
            flush=True,
        )
    for page, text in texts.items():
        page.write_text(IMAGE.sub(lambda match: _label(match, missing), text), encoding="utf-8")


def _label(match: re.Match[str], missing: set[str]) -> str:
    if match["name"] not in missing:
        return match[0]
    return f"![A placeholder; make figures fetches the figure: {match['alt']}]{match['link']}"


def main() -> int:
    problems = fetch_all()
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(FIGURES) + 1 - len(problems)} of {len(FIGURES) + 1} files are in {FOLDER}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
