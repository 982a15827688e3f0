"""Bring README, CITATION.cff and chapters in line with the repository's address.

It stands in one place, ``Repository`` under ``[project.urls]`` in pyproject.toml. After it has been
filled in or changed, ``python book/address.py`` writes it to wherever a reader needs it: badges that
open a chapter in Colab, what a chapter installs there, the command that clones. The book's build
reads it too, for its buttons. Without an address, none of these are there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10; a dependency of Sphinx brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
COLAB, BINDER = "https://colab.research.google.com", "https://mybinder.org"
BADGE = re.compile(r"^\[!\[Open in Colab\]\(.*\n\n", re.MULTILINE)
TABLE = re.compile(r"^\|", re.MULTILINE)  # where a chapter's first one begins
CLONE = re.compile(r"^git clone .*\n", re.MULTILINE)
CODE = re.compile(r"^repository-code: .*\n", re.MULTILINE)
SOURCE = re.compile(r'(MEDBUDGET_SOURCE"\) or) ".*?"')


def read_address(root: Path = ROOT) -> str:
    """Return the address without a slash or ``.git`` at its end; empty if none is filled in.

    Raises
    ------
    ValueError
        Not of the form ``https://HOST/OWNER/NAME``.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = str(project.get("urls", {}).get("Repository", "")).rstrip("/").removesuffix(".git")
    if address and not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", address):
        raise ValueError(
            f"Repository in pyproject.toml is {address!r}; it must be like https://HOST/OWNER/NAME"
        )
    return address


def make_badge(address: str, notebook: str) -> str:
    """Return the Markdown of a badge that opens a notebook in Colab, which knows GitHub only."""
    host, _, name = address.removeprefix("https://").partition("/")
    if host != "github.com":
        return ""
    link = f"{COLAB}/github/{name}/blob/{BRANCH}/notebooks/{notebook}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})\n\n"


def turn_on_buttons(config: dict[str, Any], address: str) -> dict[str, Any]:
    """Return the book's configuration with the buttons that need an address."""
    launch = {**config["launch_buttons"], "binderhub_url": BINDER}
    if make_badge(address, ""):
        launch["colab_url"] = COLAB
    use = ("use_issues_button", "use_repository_button", "use_edit_page_button")
    return {
        **config,
        "repository": {"url": address, "branch": BRANCH},
        "launch_buttons": launch,
        "html": {**config["html"], **dict.fromkeys(use, True)},
    }


def _put(cell: dict[str, Any], text: str) -> None:
    lines = isinstance(cell["source"], list)  # nbformat allows both
    cell["source"] = text.splitlines(keepends=True) if lines else text


def _set_badge(notebook: dict[str, Any], badge: str) -> None:
    first = notebook["cells"][0]
    text = BADGE.sub("", "".join(first["source"]))
    _put(first, TABLE.sub(lambda table: badge + table[0], text, count=1))


def remove_badge(text: str) -> str:
    """Return a notebook's text without the badge of its first cell."""
    notebook = json.loads(text)
    _set_badge(notebook, "")
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _change_notebook(text: str, address: str, name: str) -> str:
    notebook = json.loads(text)
    _set_badge(notebook, make_badge(address, name))
    source = f"medbudget @ git+{address}" if address else ""
    setup = next(c for c in notebook["cells"] if "google.colab" in "".join(c["source"]))
    _put(setup, SOURCE.sub(f'\\1 "{source}"', "".join(setup["source"])))
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def apply_address(root: Path = ROOT) -> dict[Path, str]:
    """Return the new text of every file that is not in line with the address."""
    address = read_address(root)
    texts = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        texts[path] = _change_notebook(path.read_text(encoding="utf-8"), address, path.name)
    readme = BADGE.sub("", CLONE.sub("", (root / "README.md").read_text(encoding="utf-8")))
    citation = CODE.sub("", (root / "CITATION.cff").read_text(encoding="utf-8"))
    if address:
        title, rest = readme.split("\n\n", 1)
        clone = f"git clone {address} && cd {address.rpartition('/')[2]}\n"
        readme = f"{title}\n\n{make_badge(address, '00_ten_pictures.ipynb')}{rest}"
        readme = readme.replace("```bash\nmake book", f"```bash\n{clone}make book", 1)
        citation = citation.replace("\nlicense:", f'\nrepository-code: "{address}"\nlicense:', 1)
    texts |= {root / "README.md": readme, root / "CITATION.cff": citation}
    return {path: text for path, text in texts.items() if path.read_text("utf-8") != text}


def main() -> int:
    changed = apply_address()
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    print(f"address: {read_address() or 'none'}; {len(changed)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
