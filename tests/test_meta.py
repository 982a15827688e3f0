"""Every page of the site has a description and a picture for those who link to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
LONG = "A sentence of the page that says what was found here, with a number. "
PAGE = """<!doctype html><html><head><title>4. What a &lt;word&gt; is — Book</title></head><body>
<article class="bd-article"><h1>x</h1><p>short</p><p><strong>In one minute.</strong> {text}</p>
</article></body></html>"""


def read_meta(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8")
    assert text.count("</head>") == 1
    return dict(re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]*)"', text))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "a.html").write_text(PAGE.format(text=LONG * 5), encoding="utf-8")
    (tmp_path / "index.html").write_text('<meta http-equiv="Refresh" content="0; url=a.html" />')
    return tmp_path


def test_a_page_gets_its_first_sentences_and_the_picture(site: Path) -> None:
    meta = load_script(ROOT / "book" / "meta.py")
    meta.describe_site(site, "")
    found = read_meta(site / "notebooks" / "a.html")
    assert found["description"] == found["og:description"] == (LONG * 2).strip()
    assert found["og:title"] == "What a &lt;word&gt; is" and "og:url" not in found
    assert found["og:image"] == "../_static/link.png"
    index = read_meta(site / "index.html")
    assert index["og:image"] == "_static/link.png" and index["description"] == meta.GENERAL
    assert '<meta http-equiv="Refresh"' in (site / "index.html").read_text(encoding="utf-8")


def test_addresses_are_absolute_once_that_of_the_repository_is_known(site: Path) -> None:
    meta = load_script(ROOT / "book" / "meta.py")
    meta.describe_site(site, "https://github.com/Owner/name")
    found = read_meta(site / "notebooks" / "a.html")
    assert found["og:image"] == "https://owner.github.io/name/_static/link.png"
    assert found["og:url"] == "https://owner.github.io/name/notebooks/a.html"
    assert meta.find_root("https://gitlab.com/a/b") == ""


def test_a_page_keeps_its_own_description(site: Path) -> None:
    meta = load_script(ROOT / "book" / "meta.py")
    page = site / "notebooks" / "a.html"
    own = '<meta content="Its &quot;own&quot;." name="description" />'
    page.write_text(page.read_text(encoding="utf-8").replace("<title>", f"{own}<title>"))
    meta.describe_site(site, "")
    assert read_meta(page)["og:description"] == "Its &quot;own&quot;."
    assert page.read_text(encoding="utf-8").count('name="description"') == 1


def test_the_picture_of_links_was_drawn_with_this_base(tiny: object) -> None:
    with Image.open(ROOT / "book" / "_static" / "link.png") as image:
        assert image.size == (1200, 630)
        assert image.info["base_hash"] == tiny.hash, "run python book/overview.py"  # type: ignore[attr-defined]
