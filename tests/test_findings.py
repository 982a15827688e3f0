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
STATED = Path(__file__).parent / "stated"  # a file for each page: where its own numbers come from
NOT_PROSE = re.compile(
    r"^---\n.*?^---\n|^```.*?^```$|`[^`\n]*`|\]\([^)]*\)|\{\w+:?\w*\}`[^`]*`|^\s*\d+\.\s|"
    r"<!--.*?-->|<[^<>]*>|^\*Published by the authors[^\n]*\*$|^:+(?:gutter|:*\{grid\}).*$|\$[^$]*\$|"
    r"\b(?:Figures?|Sections?|Tables?|Algorithms?|[Cc]hapters?|Exercises?|Equations?) \d[\d.]*"
    r"(?:(?:, | and | to |–)\d[\d.]*)*|\*\*\d\.\*\*",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])\.?\d[\d,.]*\d|(?<![\w.,])\d(?![\w.])")


def prose(page: str) -> str:
    path = BOOK / f"{page}.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        notebook = json.loads((ROOT / "notebooks" / f"{page}.ipynb").read_text(encoding="utf-8"))
        cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell) for cell in cells)
    return NOT_PROSE.sub(" ", findings.MARK.sub(" ", text))


@pytest.mark.parametrize("path", sorted(STATED.glob("*.json")), ids=lambda p: p.stem)
def test_a_page_states_no_number_that_nothing_recorded(path: Path) -> None:
    sources = json.loads(path.read_text(encoding="utf-8"))
    stated = " ".join(sources.values()).split()
    unknown = [n for n in NUMBER.findall(prose(path.stem)) if n.rstrip(".,") not in stated]
    assert not unknown, f"write {{{{ name }}}} of book/findings.py for {unknown}"


def test_every_number_named_is_recorded_and_every_one_read_is_used() -> None:
    numbers = findings.read_numbers()
    pages = [*BOOK.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named |= findings.find_names(text)
        filled = findings.fill_numbers(text, numbers, page.name, keep=page.suffix == ".ipynb")
        assert page.suffix == ".md" or filled == text, "run python book/findings.py --write"
    assert named and all(numbers[name].strip() for name in named)


def test_marks_are_filled_and_an_unknown_name_is_refused_with_the_page() -> None:
    chapter = "AUC {{ a.b }}, <!-- picture --> <!-- a.b -->.5 of <!-- / --> and <!-- x -->"
    kept = findings.fill_numbers(chapter, {"a.b": '"1"'}, "x.ipynb", keep=True)
    mark = r"<!-- a.b -->\"1\"<!-- / -->"
    assert kept == f"AUC {mark}, <!-- picture --> {mark} and <!-- x -->"
    assert findings.fill_numbers(kept, {"a.b": "1"}, "x.md").startswith("AUC 1, <!-- picture --> 1")
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


def test_a_claim_has_evidence_only_where_its_test_shows_some() -> None:
    judge = findings.table2.__globals__["judge"]
    up, down = ({"difference": d, "p_value": 0.01} for d in (0.1, -0.1))
    assert "agrees" in judge(up) and "opposite" in judge(up, -1)
    assert "opposite" in judge(down) and "agrees" in judge(down, -1)
    assert "no evidence" in judge({"difference": 0.1, "p_value": 0.06})


def test_titles_of_what_it_can_do_follow_their_records() -> None:
    numbers = findings.read_numbers()
    moves = {k: int(v) for k, v in numbers.items() if re.fullmatch(r"table1\.\w+\.\d+\.by", k)}
    assert len(moves) == 12 and max(moves, key=moves.__getitem__) == "table1.guidance.1.by"
    assert not any(v.startswith("nearer") for k, v in numbers.items() if k.startswith("table1."))
    for setting in ("vectors.8", "vectors.16", "vectors.32", "cases.5", "cases.10", "guidance.5"):
        assert "agrees" in numbers[f"table1.{setting}.badge"]
    assert numbers["table1.holm.opposite"] == "1", "guidance 1 alone"
    assert numbers["mixing.higher"] == "all" and numbers["mixing.2.fall"] == "0"
    assert numbers["painting.apart"] == "do not overlap"


def test_the_title_on_what_is_enough_follows_its_record() -> None:
    """With a hundred X-rays, tuning hardly beats a word; with few it does, and leaks."""
    numbers = findings.read_numbers()
    assert numbers["budget.last.nearer"] == "none"
    assert numbers["budget.closest"] == "full tuning" and numbers["budget.full.nearer"] == "2 of 3"
    assert numbers["budget.gains.better"] == "5" and numbers["budget.gains.holm"] == "5"
    for kind in ("prostate", "chest", "histology"):
        assert numbers[f"budget.{kind}.last.nearer"] == "none"
    assert numbers["budget.apart.20"] == "do not overlap"
    assert numbers["budget.full.5.copied.p"] == "p < .001"


def test_the_title_on_classifiers_follows_its_record() -> None:
    """Chests gain, prostates before correction, all rows beside phantoms rise, ten cases fail."""
    numbers = findings.read_numbers()
    assert all("agrees" in numbers[f"{k}.higher"] for k in ("table2", "chest"))
    assert "no evidence" in numbers["histology.higher"] and numbers["table2.holm"] == "2"
    assert "agrees" in numbers["table2.ten.lower"] and numbers["table2.worse"] == "1"
    rows = findings.table2.__globals__["read_values"]("table2_tiny")["rows"]
    assert all(r["compare"]["difference"] > 0 for r in rows if r["value"].startswith("200 real +"))


def test_holms_correction_stops_at_the_first_that_fails() -> None:
    pass_holm = findings.table1.__globals__["pass_holm"]
    assert pass_holm({"a": 0.02, "b": 0.001, "c": 0.03, "d": 0.9}) == ["b"]  # .02 > .05 / 3
    assert pass_holm({"a": 0.04, "b": 0.01}) == ["b", "a"] and pass_holm({"a": 0.06}) == []


def test_intervals_of_shares_are_wilsons() -> None:
    from statistics import NormalDist

    wilson = load_script(BOOK / "abilities.py").wilson
    z = NormalDist().inv_cdf(0.975)
    for k, n in ((0, 8), (36, 50), (5.5, 8)):  # the ends solve (p - k/n)^2 = z^2 p (1 - p) / n
        for p in wilson(k, n):
            assert (p - k / n) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, rel=1e-3, abs=1e-9)


def test_the_first_page_was_drawn_with_this_base(tiny: object) -> None:
    text = (BOOK / "first_page.html").read_text(encoding="utf-8")
    assert f"<!-- base {tiny.hash} -->" in text, "run python book/first_page.py"  # type: ignore[attr-defined]
    assert len(re.findall(r'<img [^>]*alt="[^"]{12,}"', text)) == text.count("<img ") == 17
