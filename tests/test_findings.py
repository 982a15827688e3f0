"""Every number in the book's prose comes from a recorded result, or is stated here with its source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
findings = load_script(BOOK / "findings.py")
NOT_PROSE = re.compile(
    r"^---\n.*?^---\n|^```.*?^```$|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)|\{\w+:?\w*\}`[^`]*`|^\s*\d+\.\s|"
    r"^:+(?:gutter|:*\{grid\}).*$|\$[^$]*\$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])\.?\d[\d,.]*\d|(?<![\w.,])\d(?![\w.])")
STATED = {  # and where each comes from
    "intro": {
        "the paper": "100 4 8 64 2070 2023 262 65,536 2.0 512",
        "how many images and cases the recorded trials had": "200 400 20 5 10 32",
        "guidance": "1 2",
    },
    "reliability": {"gray levels": "256", "limits of the trial": "10 100,000", "a format": "2000"},
    "timings": {"names": "2.0 512", "batches": "1 4", "a card": "8"},
    "ethics": {"the paper": "100 36 50", "cases": "5 20", "licences and names": "4.0 2.0"},
}


def prose(page: str) -> str:
    return NOT_PROSE.sub(" ", (BOOK / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", STATED)
def test_a_page_states_no_number_that_nothing_recorded(page: str) -> None:
    text = findings.MARK.sub(" ", prose(page))
    stated = " ".join(STATED[page].values()).split()
    unknown = [n for n in NUMBER.findall(text) if n.rstrip(".,") not in stated]
    assert not unknown, f"write {{{{ name }}}} of book/findings.py for {unknown}"


def test_every_number_named_is_recorded_and_every_one_read_is_used() -> None:
    numbers = findings.read_numbers()
    pages = [*BOOK.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named |= set(findings.MARK.findall(text))
        assert "{{" not in findings.fill_numbers(text, numbers, page.name) or page.suffix != ".md"
    assert named and all(numbers[name].strip() for name in named)


def test_an_unknown_name_is_refused_with_the_page() -> None:
    with pytest.raises(ValueError, match=r"intro\.md names tiny\.typo.* it has: tiny\.met"):
        findings.fill_numbers("{{ tiny.typo }} of {{ tiny.met }}", {"tiny.met": "1"}, "intro.md")


def test_a_verdict_follows_its_test(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    path = tmp_path / "results" / "table1_tiny.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    row = next(r for r in record["values"]["rows"] if (r["setting"], r["value"]) == ("cases", 10))
    folders = (tmp_path / "results",)
    for difference, p, want in (
        (-13.0, 0.001, "nearer (p = .001)"),
        (13.0, 0.02, "further away (p = .020)"),
        (-13.0, 0.2, "not told apart (p = .20)"),
    ):
        row["compare"] = {"difference": difference, "p_value": p}
        path.write_text(json.dumps(record), encoding="utf-8")
        assert findings.table1(folders)["table1.cases.10"] == want


def test_the_first_page_was_drawn_with_this_base(tiny: object) -> None:
    text = (BOOK / "first_page.html").read_text(encoding="utf-8")
    assert f"<!-- base {tiny.hash} -->" in text, "run python book/first_page.py"  # type: ignore[attr-defined]
    assert len(re.findall(r'<img [^>]*alt="[^"]{12,}"', text)) == text.count("<img ") == 17
