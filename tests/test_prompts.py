import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbudget.prompts import PromptError, parse_prompt, plain_text, unused_tokens


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [("", 1.0)]),
        ("a photo", [("a photo", 1.0)]),
        ("<a>:0.25 AND <b>:0.75", [("<a>", 0.25), ("<b>", 0.75)]),
        ("<a>\nAND <b> : -1e-1", [("<a>", 1.0), ("<b>", -0.1)]),
        ("0.25*<a> AND .75 * <b>", [("<a>", 0.25), ("<b>", 0.75)]),
        ("sand AND band and hand", [("sand", 1.0), ("band and hand", 1.0)]),
        ("<a>AND<b>", [("<a>", 1.0), ("<b>", 1.0)]),  # A1111 splits at the borders of a word
        ("<a>:0.5AND<b>", None),
        ("<a>:0.5 AND<b>:2", [("<a>", 0.5), ("<b>", 2.0)]),
        ("<a-AND-b>:2 AND <c:0.5>", [("<a-AND-b>", 2.0), ("<c:0.5>", 1.0)]),  # tokens stay whole
        (r"a\: \(b\) \[c\] \< d:2", [("a: (b) [c] < d", 2.0)]),
        ("25 cells", [("25 cells", 1.0)]),
    ],
)
def test_grammar(text, parts):
    if parts is None:
        with pytest.raises(PromptError, match="finite number"):
            parse_prompt(text)
    else:
        assert parse_prompt(text) == parts


@pytest.mark.parametrize(
    ("text", "caret", "problem"),
    [
        ("a AND b:x", 8, "finite number"),
        ("a:nan", 2, "finite number"),
        ("a:1e999", 2, "finite number"),
        ("a AND ", 2, "one side of AND"),
        (":0.5", 0, "no text"),
        ("0.5 *", 0, "no text"),
        ("AND a", 0, "one side of AND"),
        ("a AND AND b", 2, "one side of AND"),
        ("a AND 0.5*b:2", 12, "two weights"),
        ("0.5 <a> AND 0.5 <b>", 0, "stands behind its part"),
        ("<a>:0.5 AND 0.5 <b>", 12, "stands behind its part"),
        ("0.25 healthy AND 0.75 cardiomegaly", 0, "stands behind its part"),
        ("30% <a>", 0, "stands behind its part"),
        ("<a> 0.5", 0, "stands behind its part"),
        ("<a>*0.5", 0, "stands behind its part"),
        ("a photo: red", 9, r"a colon in the text is written \\:"),
        ("a photo: red ground", 9, "finite number"),
        ("(word:1.3)", 0, r"brackets are emphasis in A1111.*\\\("),
        ("a [word]", 2, "brackets are emphasis"),
        ("a < b", 2, "a token is written <name>"),
        ("<a/b>", 0, "a token is written <name>"),
        ("< a >", 0, "a token is written <name>"),
    ],
)
def test_errors_mark_the_place(text, caret, problem):
    with pytest.raises(PromptError, match=problem) as raised:
        parse_prompt(text)
    assert raised.value.args[0].splitlines()[-1].index("^") == caret + 2


@pytest.mark.parametrize(("text", "caret"), [("<b>", 0), ("<a> AND 2*<B>:1", 10)])
def test_an_unknown_token_is_marked_and_the_loaded_ones_are_listed(text, caret):
    with pytest.raises(
        PromptError, match=r"unknown token <[bB]>.*loaded are: <a>, <c>\."
    ) as raised:
        parse_prompt(text, tokens=["<c>", "<a>"])
    assert raised.value.args[0].splitlines()[-1].index("^") == caret + 2
    with pytest.raises(PromptError, match="loaded are: none"):
        parse_prompt("<a>", tokens=[])
    assert parse_prompt("<a> AND b", tokens=["<a>"]) == [("<a>", 1.0), ("b", 1.0)]


# strings of what the grammar is made of reach its corners, which arbitrary text seldom does
_pieces = st.sampled_from(["AND", " ", "\n", ":", "*", ".5", "2", "-", "1e999", "<a>", "a", "and"])
_texts = st.one_of(st.text(), st.lists(_pieces, max_size=12).map("".join))


@given(_texts)
def test_any_string_parses_or_raises_a_prompt_error(text):
    try:
        parts = parse_prompt(text)
    except PromptError as error:
        assert str(error).splitlines()[-1].strip() == "^"
        return
    assert parts and all(math.isfinite(weight) for _, weight in parts)


_words = st.from_regex(r"[a-z]+( [a-z():<>\[\]\\]+)?", fullmatch=True)
_weights = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(_words, _weights), min_size=1, max_size=5))
def test_what_is_escaped_comes_back(parts):
    def write(words):
        return re.sub(r"([():<>\[\]\\])", r"\\\1", words)

    prompt = " AND ".join(f"{write(words)}:{weight!r}" for words, weight in parts)
    assert parse_prompt(prompt) == parts
    assert plain_text(write(parts[0][0])) == parts[0][0]


@pytest.mark.parametrize("text", ["<a> AND <b>", "red:0.5", "<a>:0.5 AND <b>:0.5", "red : -1"])
def test_a_negative_prompt_with_parts_or_weights_is_refused(text):
    with pytest.raises(PromptError, match="a negative prompt has no parts and weights"):
        plain_text(text)
    assert plain_text("a scan: chest and heart\\:1") == "a scan: chest and heart:1"


def test_tokens_that_no_prompt_uses_are_named_where_their_bare_name_stands():
    assert unused_tokens(["<a>", "<b>", "<c>"], "<a> AND x", "<b>") == [
        "the prompt does not use <c>, which is loaded"
    ]
    (note,) = unused_tokens(["<mine>"], "red mine", "")
    assert note.splitlines()[0].endswith("<mine>, which is loaded: write it with its brackets")
    assert note.splitlines()[-1].index("^") == 2 + 4
