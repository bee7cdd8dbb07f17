"""Whether an answer's words are what the question asked for: a translated, reworded or ordered refusal refuses nothing.

Pure; used by the filter for answers in which it found something.
"""

from __future__ import annotations

import re

_REWORDING = re.compile(
    r"\b(?:translat\w+|rephras\w+|reword\w*|re-?writ\w+|paraphras\w+|proofread\w*|transcrib\w+|punctuat\w+"
    r"|(?:more|less|sound|too) (?:polite\w*|formal\w*|friendly|kind\w*|rude\w*|casual\w*|professional\w*)"
    r"|politer|correct the"
    r"|tradu[czi]\w*|traduis\w*|reformul\w+|parafras\w+|reescrib\w+|reescrev\w+|corrig\w+|\u00fcbersetz\w*|umformulier\w*"
    r"|formulier\w*|korrigier\w*)|\u7ffb\u8bd1|\u7ffb\u8b6f|\u8bd1\u6210|\u6539\u5199|\u6539\u5beb|\u6da6\u8272|\u8a33\u3057|\u7ffb\u8a33|\u8a00\u3044\u63db\u3048|\u66f8\u304d\u63db\u3048"
)
_ORDER = re.compile(
    r"\b(?:writ\w+|draft|compose|word|phrase|suggest|how (?:do|can|could|should) i|escrib\w+|redact\w+"
    r"|\u00e9cri\w+|r\u00e9dig\w+|schreib\w*|escrev\w+)"
    r"\b[^.?!\n]{0,80}\b(?:refusal|rejection|declin\w+|turn(?:ing)? down|say(?:ing)? no\b"
    r"|rechaz\w+|refus\w+|absag\w*|ablehn\w*|recus\w+)"
)
_LONGER = 3
"""An answer that is so many times as long as the request says more than what it was given."""
_FREE_CHARACTERS = 120


def is_rewording(request: str, answer: str) -> bool:
    """Whether a folded request asks for its own words in another form; what they say is the caller's to check."""
    return _REWORDING.search(request) is not None and len(answer) <= _LONGER * len(request) + _FREE_CHARACTERS


def orders_refusal(request: str) -> bool:
    """Whether a folded request asks for a text that declines something."""
    return _ORDER.search(request) is not None
