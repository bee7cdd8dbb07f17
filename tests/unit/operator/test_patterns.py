"""Regular expressions of users: the same matches as Python's on one line, in bounded time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.patterns import PatternError, compile_pattern, is_pattern

PATTERNS = [
    "abc",
    "a|bc|",
    "^a",
    "c$",
    "a.c",
    "[a-b]+c",
    "[^ab]",
    "(?:ab)*c",
    "a{2,3}b",
    "a{2,}",
    "(?i)ABC",
    "(?i:A)b",
    r"\ba\b",
    r"\Bb",
    r"\d+ \w",
    r"\S\s\S",
    "a??b+?",
    "(a|b)(c|a)",
    "(?i)[^A]",
    "x*",
]


@given(st.text(alphabet="abcABC1 _-", max_size=12), st.sampled_from(PATTERNS))
def test_it_matches_what_python_matches(line, pattern):
    assert compile_pattern(pattern).matches(line) == bool(re.search(pattern, line))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(a|aa)+$", ".*.*.*.*.*.*.*.*x"])
def test_patterns_that_take_others_for_ever_come_to_an_end(pattern):
    compile_pattern(pattern).matches("a" * 2000 + "b")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(unclosed", "a**", "[b-a]", r"\p{L}", r"a\Z", "[[:alpha:]]", "(?=a)", "(?<!a)b", r"(a)\1", "a++", "(?>a)"),
        *("(?x)a b", "a{1001}", "(((a{9}){9}){9}){9}", "*"),
    ],
)
def test_what_is_no_pattern_or_may_take_too_long_is_refused(pattern):
    assert not is_pattern(pattern)
    with pytest.raises(PatternError, match="RE2"):
        compile_pattern(pattern)
