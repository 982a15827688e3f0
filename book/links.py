"""Ask every address outside of the book whether it is still there: ``make links``.

Not part of the checks, since the answer depends on other people's servers. Chapters are not run.
Exits with 1 if an address is broken, with 0 if all are there or if there is no internet to ask.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import build

BUILD = build.BUILD / "links"
OTHERS = ("README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml")
LINK = re.compile(r"^(?!#).*?\b(https://[^\s)>\"]+)", re.MULTILINE)
NO_NETWORK = re.compile(
    "resolve|resolution|Network is unreachable|Connection refused|Max retries|Proxy|timed out"
)


def summarise(links: list[dict[str, Any]]) -> tuple[str, int]:
    """Return what was found in Sphinx's list of links, in words, and the exit code."""
    outside = [link for link in links if link["uri"].startswith("http")]
    counts = Counter(link["status"] for link in outside)
    bad = [link for link in outside if link["status"] in ("broken", "timeout")]
    found = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none"
    lines = [f"{len(outside)} links to other sites: {found}"]
    if bad and len(bad) == len(outside) and all(NO_NETWORK.search(b["info"]) for b in bad):
        return f"{lines[0]}\nno internet here: nothing could be asked, so nothing is shown", 0
    for link in bad:
        lines.append(f"{link['filename']}:{link['lineno']}: {link['uri']}: {link['info'][:120]}")
    for link in outside:
        if link["status"] == "redirected":
            lines.append(f"note: {link['filename']}: {link['uri']} has moved to {link['info']}")
    return "\n".join(lines), int(bool(bad))


def add_page(stage: Path) -> None:
    """Put what stands outside of the book's pages, in README and metadata, on a page of its own."""
    texts = [(build.ROOT / name).read_text(encoding="utf-8") for name in OTHERS]
    links = sorted({link for text in texts for link in LINK.findall(text)})
    page = "# Links\n\n" + "".join(f"- <{link}>\n" for link in links)
    (stage / "links.md").write_text(page, encoding="utf-8")
    toc = stage / "_toc.yml"
    toc.write_text(toc.read_text(encoding="utf-8").rstrip() + "\n      - file: links\n", "utf-8")


def read_links(folder: Path) -> list[dict[str, Any]]:
    """Return Sphinx's list of links: a line of JSON for each."""
    lines = (folder / "output.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> int:
    build.set_environment()
    build.stage()
    add_page(build.STAGE)
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", os.fspath(build.STAGE), "--quiet"]
    command += ["--path-output", os.fspath(BUILD), "--builder", "custom"]
    command += ["--custom-builder", "linkcheck"]
    done = subprocess.run(command, capture_output=True, text=True)
    folder = BUILD / "_build" / "linkcheck"
    if not (folder / "output.json").is_file():
        print(done.stdout, done.stderr, "the book could not be read", sep="\n")
        return 1
    text, code = summarise(read_links(folder))
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
