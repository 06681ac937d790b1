"""CaseOps: move letter case out of the words, losslessly.

    "Hello iPhone A OK McDonald"  ->  T hello  i C phone  T a  A ok  T mc C donald

(blanks around operators only for reading). A word is a maximal run of ASCII letters. The encoder writes every word in
lower case and puts the case into four private-use operators, so that a tokenizer needs one piece for "the", "The" and
"THE". Every other character, including accented capitals, digits and apostrophes, passes through and ends a word. An
operator character that occurs in the text itself is escaped, so encoding is an exact bijection onto its image.

    operator            meaning                                          written when
    TITLE    U+E001     next letter upper, rest of the word as it is     first letter upper (and not all of them)
    ALLCAPS  U+E002     whole word upper                                 two letters or more, all upper
    CAPNEXT  U+E003     next letter upper                                before each later upper letter of a mixed word
    ESC      U+E004     next character is literal                        before U+E001 .. U+E004 of the text itself

Contents: operators and patterns, encode, decode (fast path and state machine), original byte offsets, registry.
The format is that of `lossless_caps_caseops_v1` (also called v2) of the public parameter-golf records.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# Operators and patterns

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
CONTROLS = (TITLE, ALLCAPS, CAPNEXT, ESC)

_ANY_CONTROL = re.compile("[\ue001-\ue004]")
_CAPITALISED_WORD = re.compile("([A-Z][A-Za-z]*)")
# What encoding turns an inner capital into before it is corrected: "iPhone" -> i T phone. In an encoding no word
# mode follows a letter. The look-behind stands after the operator so that the search runs on a one-character prefix.
_WORD_MODE_IN_WORD = re.compile("[\ue001\ue002](?<=[a-z].)[a-z\ue003]*")
# The forms the encoder writes. ALLCAPS must not be followed by CAPNEXT (legal, but for the state machine).
_ENCODED = re.compile(
    "([\ue001\ue002](?<![A-Za-z][\ue001\ue002])(?:(?<=\ue001)[A-Za-z]|(?<=\ue002)[A-Za-z]+(?![A-Za-z\ue003]))"
    "|\ue003[A-Za-z]"
    "|\ue004[^A-Za-z])",
    re.DOTALL,
)


class LosslessCapsError(ValueError):
    """The text is not a valid CaseOps stream; the message says what is wrong and at which character."""


# ----------------------------------------------------------------------------------------------------------------------
# Encode


# 2**15 words: the cache stays below about 10 MB and serves over 95 % of the capitalised words of English text.
@lru_cache(maxsize=1 << 15)
def _encode_word(word: str) -> str:
    """Encode a word (ASCII letters) whose first letter is upper case."""
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    rest = "".join(CAPNEXT + c.lower() if c <= "Z" else c for c in word[1:])
    return TITLE + word[0].lower() + rest


def _correct_word_mode(match: re.Match[str]) -> str:
    """Rewrite the tail of a word that starts in lower case: every capital of it is marked by CAPNEXT."""
    mode, letters = match[0][0], match[0][1:]
    return CAPNEXT + letters if mode == TITLE else "".join(CAPNEXT + c for c in letters)


def encode_lossless_caps_v2(text: str) -> str:
    """Return the CaseOps form of `text`.

    Never fails, keeps the number of characters apart from the added operators, and never changes the UTF-8 length of a
    character, because only ASCII letters are lowered. `decode_lossless_caps_v2` is its exact inverse. O(len(text)).
    """
    if any(control in text for control in CONTROLS):
        text = _ANY_CONTROL.sub(lambda m: ESC + m[0], text)
    parts = _CAPITALISED_WORD.split(text)
    if len(parts) == 1:
        return text
    parts[1::2] = map(_encode_word, parts[1::2])
    return _WORD_MODE_IN_WORD.sub(_correct_word_mode, "".join(parts))


# ----------------------------------------------------------------------------------------------------------------------
# Decode


def _decode_form(form: str) -> str:
    """Decode one match of `_ENCODED`: an operator and what it acts on."""
    return form[1:].upper() if form[0] != ESC else form[1:]


def decode_lossless_caps_v2(text: str) -> str:
    """Return the text whose CaseOps form is `text`.

    Accepts every output of the encoder and, as the public decoder does, some streams that it never writes (TITLE or
    ALLCAPS with CAPNEXT, ESC before an ordinary character, capitals in the stream), so it is not injective.

    Raises LosslessCapsError for an operator in a place where it cannot act or one that dangles at the end.
    """
    parts = _ENCODED.split(text)
    # Each form above is complete in itself. If no operator is left outside of them, they decode independently.
    if _ANY_CONTROL.search("".join(parts[0::2])):
        return _Decoder().run(text)
    parts[1::2] = map(_decode_form, parts[1::2])
    return "".join(parts)


def _is_letter(char: str) -> bool:
    return char.isascii() and char.isalpha()


class _Decoder:
    """The whole decode grammar, one character at a time: the slow path and the source of every error."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.escape = False  # the next character is literal
        self.mode = ""  # TITLE or ALLCAPS that waits for its first letter
        self.allcaps = False  # inside a word that ALLCAPS opened
        self.capnext = False
        self.in_word = False

    def run(self, text: str) -> str:
        """Decode `text`; raises LosslessCapsError with the index of the offending character."""
        for index, char in enumerate(text):
            problem = self._step(char)
            if problem:
                raise LosslessCapsError(f"{problem} (character {index})")
        self._finish(len(text))
        return "".join(self.out)

    def _step(self, char: str) -> str:
        """Take one character in; return what is wrong with it, or an empty string."""
        if self.escape:
            return self._literal(char)
        if char == ESC:
            self.escape = True
            return ""
        if char in (TITLE, ALLCAPS):
            return self._word_mode(char)
        if char == CAPNEXT:
            problem = "CAPNEXT after CAPNEXT" if self.capnext else ""
            self.capnext = True
            return problem
        return self._letter(char) if _is_letter(char) else self._other(char)

    def _literal(self, char: str) -> str:
        if self.mode and not _is_letter(char):
            return f"{_NAMES[self.mode]} is followed by an escaped character that is no letter"
        self.out.append(char)
        self.escape = False
        self.in_word = _is_letter(char)
        self.allcaps = self.allcaps and self.in_word
        return ""

    def _word_mode(self, char: str) -> str:
        if self.mode:
            return f"{_NAMES[char]} after {_NAMES[self.mode]}"
        if self.capnext:
            return f"{_NAMES[char]} after CAPNEXT"
        if self.in_word:
            return f"{_NAMES[char]} inside a word"
        self.mode = char
        return ""

    def _letter(self, char: str) -> str:
        if self.in_word and self.mode:
            # only an escaped letter opens a word without using up the mode
            return f"{_NAMES[self.mode]} is followed by an escaped letter"
        self.allcaps = self.allcaps if self.in_word else self.mode == ALLCAPS
        upper = self.allcaps or self.capnext or bool(self.mode)
        self.out.append(char.upper() if upper else char)
        self.mode, self.capnext, self.in_word = "", False, True
        return ""

    def _other(self, char: str) -> str:
        if self.mode or self.capnext:
            return f"{_NAMES[self.mode or CAPNEXT]} is followed by {char!r}, which is no ASCII letter"
        self.out.append(char)
        self.in_word = self.allcaps = False
        return ""

    def _finish(self, length: int) -> None:
        """Refuse an operator that still waits for its letter."""
        waiting = ESC if self.escape else self.mode or (CAPNEXT if self.capnext else "")
        if waiting:
            raise LosslessCapsError(f"{_NAMES[waiting]} dangles at the end of the text (character {length})")


_NAMES = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC"}


# ----------------------------------------------------------------------------------------------------------------------
# Original byte offsets


def original_byte_offsets(transformed: str) -> np.ndarray:
    """Return B, int64 of shape (len(transformed) + 1,): the original UTF-8 bytes before each character.

    `transformed` is an output of the encoder. Operators stand for no byte; the character after ESC is literal and keeps
    its own bytes. B[-1] is the UTF-8 length of the original text, since CaseOps lowers only one-byte letters.

    Raises UnicodeEncodeError for lone surrogates.
    """
    codes = np.frombuffer(transformed.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    widths[(codes >= ord(TITLE)) & (codes <= ord(ESC))] = 0
    if ESC in transformed:
        for match in re.finditer("\ue004(.)", transformed, re.DOTALL):
            widths[match.start(1)] = len(match[1].encode())
    offsets = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum(widths, out=offsets[1:])
    return offsets


# ----------------------------------------------------------------------------------------------------------------------
# Registry


def _identity(text: str) -> str:
    return text


IDENTITY = "identity"
CASEOPS = "lossless_caps_caseops_v1"
_Transform = Callable[[str], str]
_TRANSFORMS: dict[str, tuple[_Transform, _Transform, tuple[str, ...]]] = {
    IDENTITY: (_identity, _identity, ()),
    CASEOPS: (encode_lossless_caps_v2, decode_lossless_caps_v2, CONTROLS),
    "lossless_caps_v2": (encode_lossless_caps_v2, decode_lossless_caps_v2, CONTROLS),
}


def _lookup(name: str | None) -> tuple[_Transform, _Transform, tuple[str, ...]]:
    row = _TRANSFORMS.get(name or IDENTITY)
    if row is None:
        raise ValueError(f"unsupported text_transform={name!r}; supported: {', '.join(_TRANSFORMS)}")
    return row


def get_text_transform(name: str | None) -> _Transform:
    """Return the encoder called `name`; None and "" mean identity. Unknown names raise ValueError."""
    return _lookup(name)[0]


def get_text_inverse_transform(name: str | None) -> _Transform:
    """Return the decoder called `name`; None and "" mean identity. Unknown names raise ValueError."""
    return _lookup(name)[1]


def get_text_transform_control_symbols(name: str | None) -> tuple[str, ...]:
    """Return the operators of `name`: the symbols its tokenizer must keep as pieces. Unknown names raise ValueError."""
    return _lookup(name)[2]
