"""Give every page of the built site a description and a picture, for search and for links to it.

A page that has no description of its own gets its first sentences. The addresses of the picture
are absolute where the repository's address, and with it that of GitHub Pages, is known, and
relative otherwise: most sites that show links follow only absolute ones.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

PICTURE = "_static/link.png"  # 1200 x 630, as link previews are; drawn by overview.py
ALT = (
    "Words alone draw shapes; one learned word draws chests with a large heart; a lesion is "
    "painted into a prostate."
)
SITE = "Medical diffusion on a budget"
GENERAL = (
    "A book and a small library on Textual Inversion for medical images, after the paper by de "
    "Wilde et al., MIDL 2024."
)
LONGEST = 200  # letters that a search engine shows
TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
DESCRIPTION = re.compile(
    r'<meta (?:content="([^"]*)" name="description"|name="description" content="([^"]*)")'
)
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)


def describe_page(text: str) -> str:
    """Return the first sentences of a page's article, in at most `LONGEST` letters."""
    _, _, article = text.partition('<article class="bd-article"')
    for match in PARAGRAPH.finditer(article.partition("</article>")[0]):
        words = html.unescape(re.sub(r"<[^>]+>", "", match[1]))
        words = " ".join(words.removeprefix("In one minute.").split())
        if len(words) < 60 or "\\(" in words:  # a credit, a label, a formula
            continue
        if len(words) <= LONGEST:
            return words
        cut = words[: LONGEST - 1]
        end = max(cut.rfind(". "), cut.rfind(": "))
        return cut[: end + 1] if end > 80 else f"{cut.rpartition(' ')[0]} …"
    return GENERAL


def find_root(address: str) -> str:
    """Return where GitHub Pages shows a repository's site; empty for other hosts and for none."""
    host, _, name = address.removeprefix("https://").partition("/")
    owner, _, repository = name.partition("/")
    return f"https://{owner.lower()}.github.io/{repository}/" if host == "github.com" else ""


def write_meta(page: Path, site: Path, root: str) -> None:
    """Put the description, the title and the picture into a page's head."""
    text = page.read_text(encoding="utf-8")
    place = page.relative_to(site)
    own = DESCRIPTION.search(text)
    about = html.unescape((own[1] or own[2]) if own else describe_page(text))
    title = TITLE.search(text)
    name = html.unescape(title[1]).partition(" — ")[0] if title else SITE
    name = re.sub(r"^\d+\. ", "", name)  # a chapter's number
    picture = f"{root or '../' * (len(place.parts) - 1)}{PICTURE}"
    say = html.escape
    lines = [] if own else [f'<meta name="description" content="{say(about)}">']
    lines += [
        f'<meta property="og:{key}" content="{say(value)}">'
        for key, value in {
            "type": "article" if "notebooks" in place.parts else "website",
            "site_name": SITE,
            "title": name,
            "description": about,
            "image": picture,
            "image:alt": ALT,
            **({"url": root + place.as_posix()} if root else {}),
        }.items()
    ]
    lines.append('<meta name="twitter:card" content="summary_large_image">')
    head = "\n".join(lines)
    if "</head>" in text:
        text = text.replace("</head>", f"{head}\n</head>", 1)
    else:  # the page at the root, which leads to the first one
        start = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        text = f"{start}<title>{SITE}</title>\n{head}\n{text}</head><body></body></html>\n"
    page.write_text(text, encoding="utf-8")


def describe_site(site: Path, address: str) -> None:
    """Write the head of every page, but for those that only lead to another one."""
    for page in sorted(site.rglob("*.html")):
        inside = "_static" in page.parts or "_sources" in page.parts
        if not inside and "<title>This page has moved" not in page.read_text(encoding="utf-8"):
            write_meta(page, site, find_root(address))
