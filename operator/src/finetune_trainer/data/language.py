"""Which language a text is in, when that is clear: by script, and in Latin letters by common words. Pure.

It errs to silence: code, names, lists and short texts have no language here. It tells twelve languages apart and takes
every other one in Cyrillic or Arabic letters for Russian or Arabic; what it reaches is in operator/docs/data.md.
"""

from __future__ import annotations

import re

LANGUAGES = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "nl", "pt", "ru", "zh")

_COMMON_WORDS = {
    "de": "der die das und ist nicht ein eine einen einem zu den mit sich auf für von dem des auch es an er sie ich "
    "wir werden wird aus bei nach im am wie oder aber wenn kann sind war über noch nur durch man ihr mir mich dir zum",
    "en": "the of and to in is that it for was on are with as be this have from or by not but at which you they his "
    "her an a i no am me were been their has would there what can will your we my if when who more its than so do she "
    "he them about into how just any",
    "es": "el la los las de que y en un una es se por con para no su al lo del como más pero sus le ya este esta son "
    "también fue muy hay cuando está entre sin sobre ser tiene si porque todo era yo mi puede él ella desde o",
    "fr": "le la les de des du et en un une est que qui dans pour par sur pas plus ne se ce il elle au aux avec sont "
    "son sa ses ou mais nous vous je cette ces être été comme on leur tout même deux si aussi entre dont fait à d l c",
    "it": "il lo la i gli le di del della dei delle che e è un una in per con non si da sono al alla nel nella come "
    "più ma anche questo questa ha dal o se suo sua ci essere cui ho mi quando tra loro molto fra fare poi già",
    "nl": "de het een en van is dat in op te zijn voor met niet die aan er maar om ook als bij dan nog naar heeft "
    "door uit wel wordt zo geen over ze je ik hij was worden kan deze dit werd meer hun wat of omdat",
    "pt": "o a os as de do da dos das que e em um uma é para com não se por no na nos nas mais como mas ao ele ela "
    "seu sua ou quando muito já está eu também só pelo pela até isso entre era depois sem mesmo aos ter seus são foi",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _COMMON_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
_SCRIPTS = {
    "kana": re.compile("[\u3041-\u30fa\u30fc]+"),
    "han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+"),
    "ko": re.compile("[\uac00-\ud7af\u1100-\u11ff]+"),
    "ru": re.compile("[\u0400-\u04ff]+"),
    "ar": re.compile("[\u0600-\u06ff\u0750-\u077f]+"),
}
_LATIN_WORD = re.compile("[a-z\u00df-\u00f6\u00f8-\u017f]+")
_IGNORED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|@[\w.]+|<[^<>]{1,200}>", re.DOTALL)
_SAMPLE_CHARACTERS = 3000

MIN_WORDS = 12
MIN_HITS = 4
MIN_SHARE = 0.2
"""Share of common words that a text in a language has at least; ordinary prose has 0.35 to 0.55."""
MARGIN = 1.35
"""How many times as many common words the language has as the next."""
MIN_LETTERS = 12
"""For other scripts than Latin."""


def detect_language(text: str) -> str:
    """Return the two-letter code, or nothing when it is unclear."""
    text = _IGNORED.sub(" ", text[:_SAMPLE_CHARACTERS]).lower()
    words = _LATIN_WORD.findall(text)
    latin = sum(map(len, words))
    if not text.isascii():
        sizes = {name: sum(map(len, pattern.findall(text))) for name, pattern in _SCRIPTS.items()}
        language, letters = _choose_script(sizes)
        # A Chinese character says as much as three letters.
        if letters >= MIN_LETTERS and letters * (3 if language in ("zh", "ja", "ko") else 1) > 2 * latin:
            return language
        if 2 * letters > latin:
            return ""
    return _detect_latin(words)


def _choose_script(sizes: dict[str, int]) -> tuple[str, int]:
    """Return the language of the most common script but Latin, and its letters."""
    kana, han = sizes.pop("kana"), sizes.pop("han")
    sizes["ja" if 10 * kana > kana + han else "zh"] = kana + han
    return max(sizes.items(), key=lambda item: item[1])


def _detect_latin(words: list[str]) -> str:
    if len(words) < MIN_WORDS:
        return ""
    hits = dict.fromkeys(_COMMON_WORDS, 0)
    for word in words:
        for language in _LANGUAGES_OF.get(word, ()):
            hits[language] += 1
    best, second, *_ = sorted(hits, key=lambda language: -hits[language])
    is_clear = hits[best] >= max(MIN_HITS, MIN_SHARE * len(words)) and hits[best] >= MARGIN * hits[second]
    return best if is_clear else ""
