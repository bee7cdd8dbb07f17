"""Rows that were there before: exact duplicates by digest, near ones by MinHash, found with an index on disk.

Workers make fingerprints, which is pure; the parent alone asks the index, row after row, so that the first of several
duplicates stays whatever the number of workers. Memory does not grow with the number of rows.

A near fingerprint is the signature of the row's word triples: of each of 64 hash functions the smallest value, one byte
of it. Two rows agree in a byte about as often as their triples overlap (Jaccard similarity). The signature is cut into
bands; rows that agree in all bytes of one band are compared byte by byte. An exact fingerprint is a digest, one band.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.data.folding import fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune_contract.run_config import QualityConfig
    from finetune_trainer.data.formats import Conversation

Fingerprint = bytes

NUM_HASHES = 64
DIGEST_BYTES = 16
SHINGLE_WORDS = 3
RECALL = 0.95
"""Share of the pairs of just the wanted similarity that have to agree in some band."""
_BATCH = 4096
"""Triples hashed at once, so that a long row takes no more memory than a short one."""

_ASCII_WORD = re.compile(r"\w+")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclasses.dataclass(frozen=True)
class Banding:
    """How fingerprints are cut and compared."""

    bands: int
    width: int
    """Bytes of a band."""
    size: int
    """Bytes of a fingerprint."""
    similarity: float

    def is_duplicate(self, one: Fingerprint, other: Fingerprint) -> bool:
        """Whether two fingerprints that agree in a band are similar enough."""
        if one == other or self.bands == 1:
            return one == other
        equal = sum(map(int.__eq__, one, other)) / self.size
        # Unequal values agree in a byte by chance once in 256 times.
        return (equal - 1 / 256) / (1 - 1 / 256) >= self.similarity


def choose_banding(similarity: float) -> Banding:
    """Return the widest bands that still find RECALL of the pairs of this similarity."""
    if similarity >= 1:
        return Banding(1, DIGEST_BYTES, DIGEST_BYTES, 1.0)
    for width in range(12, 1, -1):
        bands = NUM_HASHES // width
        if 1 - (1 - similarity**width) ** bands >= RECALL:
            return Banding(bands, width, NUM_HASHES, similarity)
    return Banding(NUM_HASHES, 1, NUM_HASHES, similarity)


def fingerprint(conversation: Conversation, config: QualityConfig) -> Fingerprint:
    """Return the row's digest or signature: equal for rows that differ in case, quotes and spaces only. Pure."""
    parts = [f"{turn.role}\n{turn.content}\n{turn.input}" for turn in conversation.turns]
    text = fold("\n".join(parts))
    if config.similarity >= 1:
        return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=DIGEST_BYTES).digest()
    return _sign(text)


class _WordHashes(dict[str, int]):
    """Hashes of words, remembered: the same in every process, as the interpreter's own are not."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 17:
            self.clear()
        data = word.encode()
        value = zlib.crc32(data) << 32 | zlib.crc32(data, 0x9E3779B9)
        self[word] = value
        return value


_word_hashes = _WordHashes()
_SEEDS = np.frombuffer(hashlib.shake_256(b"MinHash").digest(2 * 8 * NUM_HASHES), "<u8").reshape(2, NUM_HASHES, 1)
_FACTORS, _OFFSETS = _SEEDS[0] | np.uint64(1), _SEEDS[1]
_MIXERS = tuple(np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def list_words(folded: str) -> list[str]:
    """Return the words of a folded text; in Chinese, Japanese and Korean every character is one."""
    return (_ASCII_WORD if folded.isascii() else _WORD).findall(folded)


def find_words(folded: str) -> Iterator[re.Match[str]]:
    """Yield the words with their places."""
    return _WORD.finditer(folded)


def hash_words(words: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a hash of 64 bits for each word, the same in every process."""
    return np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))


def _sign(text: str) -> bytes:
    hashes = hash_words(list_words(text))
    if len(hashes) < SHINGLE_WORDS:
        hashes = np.pad(hashes, (0, SHINGLE_WORDS - len(hashes)))
    count = len(hashes) - SHINGLE_WORDS + 1
    triples = np.zeros(count, np.uint64)
    for offset, mixer in enumerate(_MIXERS):
        triples = (triples ^ hashes[offset : offset + count]) * mixer
        triples ^= triples >> np.uint64(29)
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, count, _BATCH):
        values = triples[start : start + _BATCH] * _FACTORS + _OFFSETS
        np.minimum(smallest, values.min(axis=1), out=smallest)
    return (smallest >> np.uint64(24)).astype(np.uint8).tobytes()
