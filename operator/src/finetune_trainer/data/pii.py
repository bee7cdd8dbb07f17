"""Personal data in a text: mail addresses, phone numbers, IBANs, card numbers and IP addresses. Pure.

Numbers count only when their check digits are right, addresses only when they could be somebody's: the names and ranges
that are reserved for examples do not.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

Span = tuple[int, int]


def find_pii(text: str, kinds: Sequence[str]) -> Iterator[tuple[str, Span]]:
    """Yield the first finding of each kind, as (kind, span)."""
    for kind in kinds:
        span = _FINDERS[kind](text)
        if span is not None:
            yield kind, span


_LOCAL_PART = re.compile(r"[\w.%+-]{1,64}\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_EXAMPLE_DOMAIN = re.compile(
    r"(?:.*\.)?(?:example(?:\.[a-z]+)?|test|invalid|localhost|[a-z]*(?:domain|company|email|mail)\.com)\Z",
    re.IGNORECASE,
)
_REAL_MAIL = re.compile(r"(?:gmail|hotmail|ymail|fastmail|protonmail)\.com\Z", re.IGNORECASE)


def _find_email(text: str) -> Span | None:
    # From each `@` outwards: a pattern that begins with the name would be tried at every letter of a long word.
    position = text.find("@")
    while position >= 0:
        name = _LOCAL_PART.search(text[max(0, position - 64) : position])
        domain = _DOMAIN.match(text, position + 1)
        if name is not None and domain is not None and not _is_example(domain[0]):
            return position - len(name[0]), domain.end()
        position = text.find("@", position + 1)
    return None


def _is_example(domain: str) -> bool:
    return _EXAMPLE_DOMAIN.match(domain) is not None and _REAL_MAIL.search(domain) is None


# Patterns look back after their first character, so that the engine can skip from candidate to candidate.
_PHONES = (
    re.compile(r"\+(?<![\w+.]\+)\d{1,3}(?:[ .\-/]?\(?\d{1,5}\)?){2,6}(?!\w)"),
    re.compile(r"\((?<![\w.\-]\()\d{3}\) ?\d{3}[-.]\d{4}(?![\w-]|\.\d)"),
    re.compile(r"\d(?<![\w.\-]\d)\d\d[-.]\d{3}[-.]\d{4}(?![\w-]|\.\d)"),
)


def _find_phone(text: str) -> Span | None:
    for match in itertools.chain.from_iterable(pattern.finditer(text) for pattern in _PHONES):
        digits = "".join(filter(str.isdigit, match[0]))
        is_fiction = digits[-7:-2] == "55501"
        if 9 <= len(digits) <= 15 and not is_fiction:
            return match.span()
    return None


_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI NL", 19: "SI", 20: "AT EE LT LU", 21: "CH HR LV", 22: "BG DE GB IE", 23: "AE IL",
        24: "CZ ES RO SA SE SK", 25: "PT", 26: "IS TR", 27: "FR GR IT", 28: "CY HU PL", 29: "BR", 31: "MT",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN_START = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?=[ A-Z0-9])")


def _find_iban(text: str) -> Span | None:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        found = length and re.compile(rf"[A-Z0-9](?: ?[A-Z0-9]){{{length - 1}}}(?!\w)").match(text, match.start())
        if found:
            compact = found[0].replace(" ", "")
            number = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
            if int(number) % 97 == 1:
                return found.span()
    return None


_CARD = re.compile(r"\d(?<![\w.\-]\d)(?:[ -]?\d){12,18}(?![\w-])")
_CARD_PREFIX = re.compile(r"4(?:\d{12}|\d{15}|\d{18})\Z|(?:5[1-5]|2[2-7]|35|65|60)\d{14}\Z|3[47]\d{13}\Z")


def _find_card(text: str) -> Span | None:
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        if _CARD_PREFIX.match(digits) and digits.isascii() and _passes_luhn(digits):
            return match.span()
    return None


def _passes_luhn(digits: str) -> bool:
    doubled = [int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(digits))]
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


_IPV4 = re.compile(r"\d(?<![\w.:]\d)\d{0,2}(?:\.\d{1,3}){3}(?![\w.]?\d)")
_IPV6 = re.compile(r"[0-9A-Fa-f](?<![\w.:][0-9A-Fa-f])[0-9A-Fa-f]{0,3}:[0-9A-Fa-f:]{4,34}(?![\w:])")
_VERSION = re.compile(r"(?:version|release|\bv)\s*\Z", re.IGNORECASE)
_PUBLIC_RESOLVERS = frozenset({"1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9"})


def _find_ip(text: str) -> Span | None:
    for match in itertools.chain(_IPV4.finditer(text), _IPV6.finditer(text) if text.count(":") > 1 else ()):
        if match[0] in _PUBLIC_RESOLVERS or _VERSION.search(text[max(0, match.start() - 10) : match.start()]):
            continue
        try:
            if ipaddress.ip_address(match[0]).is_global:
                return match.span()
        except ValueError:
            continue
    return None


_FINDERS: dict[str, Callable[[str], Span | None]] = {
    "email": _find_email,
    "phone": _find_phone,
    "iban": _find_iban,
    "credit-card": _find_card,
    "ip-address": _find_ip,
}
