"""The built book in a browser with the network off: nothing missing, readable, fit for a phone.

Looks at the pages in ``_build/html`` (`make book`), or in the folder that MEDBUDGET_SITE names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from webdriver import Browser, needs_browser, open_browser

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("MEDBUDGET_SITE", ROOT / "_build" / "html"))
PAGES = sorted(p.relative_to(SITE) for p in SITE.rglob("*.html") if "_static" not in p.parts)
AXE = find_spec("axe_core_python")

pytestmark = [
    *needs_browser,
    pytest.mark.skipif(AXE is None, reason="needs axe-core-python, of the `dev` extra"),
]

# every figure in the text: what it says to those who do not see it, and what dark mode does to it
IMAGES = """
return [...document.querySelectorAll('.bd-content img, .bd-article img')].map(image => {
  let plain = true;
  for (let part = image; part; part = part.parentElement) {
    const style = getComputedStyle(part);
    if (style.filter != 'none' || style.opacity != '1' || style.mixBlendMode != 'normal')
      plain = false;
  }
  return {source: image.src.slice(-60), alt: image.alt, whole: image.naturalWidth > 0, plain};
})
"""
TOO_WIDE = """
const page = document.documentElement, wide = page.clientWidth;
if (page.scrollWidth <= wide) return [];
return [...document.body.querySelectorAll('*')].filter(part => {
  if (part.getBoundingClientRect().right <= wide + 1) return false;
  for (let up = part; up != document.body; up = up.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX)) return false;
  return true;
}).slice(0, 3).map(part => part.outerHTML.slice(0, 120))
  .concat(`${page.scrollWidth} pixels wide`)
"""
# colours between two themes are nobody's to judge
STILL = """
document.head.appendChild(document.createElement('style')).textContent =
  '*, *::before, *::after {transition: none !important; animation: none !important}'
"""
AXE_RUN = """
return axe.run(document, {runOnly: ['color-contrast', 'image-alt', 'label', 'link-name',
  'button-name', 'frame-title', 'html-has-lang', 'document-title', 'duplicate-id-aria'],
  iframes: false})
  .then(found => found.violations.flatMap(rule => rule.nodes.map(
    node => `${rule.id}: ${node.html.slice(0, 160)} ${node.failureSummary.slice(0, 200)}`)))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser("--host-resolver-rules=MAP * ~NOTFOUND") as made:
        yield made


@pytest.fixture(scope="module")
def axe() -> str:
    assert AXE is not None and AXE.origin is not None
    return (Path(AXE.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def find_problems(browser: Browser, axe: str, url: str) -> list[str]:
    """Open a page and return all that a reader would stumble over."""
    browser.resize(1280, 900)
    browser.read_console()  # what the page before left
    browser.open(url)
    browser.wait_for("return document.readyState === 'complete'", "the page does not load")
    problems = browser.read_console()
    for image in browser.run(IMAGES):
        if not image["whole"]:
            problems.append(f"{image['source']} does not show")
        if not image["alt"].strip():
            problems.append(f"{image['source']} has no alt text")
    browser.run(axe)
    browser.run(STILL)
    for theme in ("light", "dark"):
        browser.run(f"document.documentElement.dataset.theme = '{theme}'")
        problems += [f"{theme}: {found}" for found in browser.run(AXE_RUN)]
    problems += [
        f"dark mode alters {image['source']}" for image in browser.run(IMAGES) if not image["plain"]
    ]
    browser.resize(390, 844)
    problems += [f"too wide for a phone: {part}" for part in browser.run(TOO_WIDE)]
    return problems


@pytest.mark.skipif(not PAGES, reason=f"no site in {SITE}: run make book first")
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_is_whole_readable_and_fits(browser: Browser, axe: str, page: Path) -> None:
    problems = find_problems(browser, axe, (SITE / page).as_uri())
    assert not problems, "\n".join(problems)


BROKEN = """<!doctype html><html lang="en"><head><title>x</title>
<meta name="viewport" content="width=device-width">
<style>[data-theme=dark] .dim {filter: brightness(0.8)} [data-theme=dark] .pale {color: #ddd}
body {background: #fff; color: #000}</style>
<script src="https://example.invalid/x.js"></script></head>
<body><main class="bd-content"><p class="pale">words</p>
<img src="data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=">
<div class="dim"><img alt="a" src="gone.png"></div>
<div style="width: 600px">wide</div><script>nonsense</script></main></body></html>"""


def test_these_tests_find_what_is_broken(browser: Browser, axe: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(BROKEN, encoding="utf-8")
    found = "\n".join(find_problems(browser, axe, (tmp_path / "page.html").as_uri()))
    for problem in (
        "ERR_NAME_NOT_RESOLVED",
        "nonsense is not defined",
        "gone.png does not show",
        "R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs= has no alt text",
        "light: image-alt",
        "dark: color-contrast",
        "gone.png - Failed to load resource",
        "dark mode alters",
        "too wide for a phone: 608 pixels wide",
    ):
        assert problem in found, f"{problem}: not in\n{found}"
    assert "light: color-contrast" not in found
