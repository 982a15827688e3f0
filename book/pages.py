"""What the build does to the pages of the book: numbers, pictures on top, buttons, redirects."""

from __future__ import annotations

import base64
from pathlib import Path

PICTURE = "<!-- picture -->"  # in a chapter's first cell
# pages that have moved: an old address leads to the new one
MOVED = {
    "00_quickstart": "00_ten_pictures", "01_data_preparation": "11_your_data",
    "02_textual_inversion": "02_a_word", "03_parameter_study": "04_settings",
    "04_fid_reliability": "03_measuring", "05_stylegan3_comparison": "08_score_and_eye",
    "06_synthetic_augmentation": "07_classifier", "07_composition": "05_mixing",
    "08_inpainting": "06_painting", "09_privacy": "10_what_a_word_gives_away",
    "10_your_own_data": "11_your_data", "11_scaling_out": "12_gpu_and_cluster",
    "11_data_preparation": "11_your_data", "12_your_own_data": "11_your_data",
    "13_scaling_out": "12_gpu_and_cluster",
    "12_model_card": "15_model_card", "13_diffusion": "01_diffusion",
}  # fmt: skip
REDIRECT = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>This page has moved</title>'
    '<meta http-equiv="refresh" content="0; url={new}.html"></head>'
    '<body><p>This page has moved: <a href="{new}.html">{new}</a></p></body></html>\n'
)


def put_numbers(stage: Path, folders: tuple[Path, ...]) -> None:
    """Put the recorded numbers into the sentences of the staged pages and chapters."""
    from findings import MARK, fill_numbers, read_numbers

    pages = [*(stage / "book").glob("*.md"), *(stage / "notebooks").glob("*.ipynb")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    marked = {page: text for page, text in texts.items() if MARK.search(text)}
    numbers = read_numbers(folders) if marked else {}
    for page, text in marked.items():
        page.write_text(fill_numbers(text, numbers, page.name), encoding="utf-8")


def set_buttons(stage: Path, root: Path) -> None:
    """Give the staged book the buttons that need the repository's address, if one is known."""
    import yaml
    from address import read_address, remove_badge, turn_on_buttons

    if not (root / "pyproject.toml").is_file():
        return
    address = read_address(root)
    if not address:
        print(
            "note: no buttons to the repository, to edit or to launch a page: fill in `Repository` "
            "under [project.urls] in pyproject.toml for them",
            flush=True,
        )
        return
    path = stage / "_config.yml"
    config = turn_on_buttons(yaml.safe_load(path.read_text(encoding="utf-8")), address)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    for notebook in (stage / "notebooks").glob("*.ipynb"):  # the page has a button in its place
        text = remove_badge(notebook.read_text(encoding="utf-8"))
        notebook.write_text(text, encoding="utf-8")


def lead_with_picture(path: Path) -> None:
    """Put the figure of the cell tagged `carries` where the chapter's first cell has the mark.

    Raises
    ------
    ValueError
        The chapter has the mark, and no such cell or no figure of it.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    if PICTURE not in notebook.cells[0].source:
        return
    for cell in notebook.cells:
        if "carries" not in cell.metadata.get("tags", []):
            continue
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                target = path.parent / "pictures" / f"{path.stem}.png"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(base64.b64decode(png))
                alt = cell.metadata["mystnb"]["image"]["alt"]
                shown = f"![{alt}](pictures/{target.name})"
                first = notebook.cells[0]
                first.source = first.source.replace(PICTURE, shown)
                nbformat.write(notebook, path)
                return
    raise ValueError(f"{path.stem} has no figure from a cell tagged `carries` to put on its top")


def redirect_pages(site: Path) -> None:
    """Write a page at each old address that leads to the new one."""
    for old, new in MOVED.items():
        page = site / "notebooks" / f"{old}.html"
        if (page.parent / f"{new}.html").is_file() and not page.exists():
            page.write_text(REDIRECT.format(new=new), encoding="utf-8")
