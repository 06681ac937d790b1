"""CaseOps: the transform against slow references written from the grammar, every decode error, the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossless_caps import (
    ALLCAPS,
    CAPNEXT,
    CASEOPS,
    CONTROLS,
    ESC,
    IDENTITY,
    TITLE,
    LosslessCapsError,
    decode_lossless_caps_v2,
    encode_lossless_caps_v2,
    get_text_inverse_transform,
    get_text_transform,
    get_text_transform_control_symbols,
    original_byte_offsets,
)

ROOT = Path(__file__).resolve().parent.parent
T, A, C, E = TITLE, ALLCAPS, CAPNEXT, ESC

# Short alphabets reach every state of the grammar within a few characters; st.text() brings the rest of Unicode.
grammar_text = st.text(alphabet=f"abzABZ .1\n'\u00e9\u00c9\ue000{T}{A}{C}{E}", max_size=12)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
words = st.sampled_from(
    ["the", "The", "THE", "iPhone", "A", "OK", "McDonald", "don't", "I", "eBAY", "\u00c9T\u00c9", "x2Y"]
)
sentences = st.lists(st.one_of(words, st.sampled_from([" ", "\n", "-", T, E]), any_text), max_size=20).map("".join)
texts = st.one_of(grammar_text, any_text, sentences)


def is_letter(char: str) -> bool:
    return "a" <= char <= "z" or "A" <= char <= "Z"


def reference_encode(text: str) -> str:
    """Word by word, from the table of word rules."""
    out, i = "", 0
    while i < len(text):
        end = i
        while end < len(text) and is_letter(text[end]):
            end += 1
        if end == i:
            out += (E if text[i] in CONTROLS else "") + text[i]
            i += 1
            continue
        word, i = text[i:end], end
        lower = word.lower()
        if word == lower:
            out += word
        elif len(word) >= 2 and word == word.upper():
            out += A + lower
        elif word == lower[0].upper() + lower[1:]:
            out += T + lower
        else:
            out += T if word[0] != lower[0] else ""
            out += lower[0] + "".join(
                low if char == low else C + low for char, low in zip(word[1:], lower[1:], strict=True)
            )
    return out


class Refused(Exception):
    pass


def refuse_if(condition: bool) -> None:
    if condition:
        raise Refused


def reference_decode(text: str) -> str:
    """The decode grammar as a plain state machine; raises Refused."""
    out, escape, mode, active, capnext, in_word = "", False, None, False, False, False
    for char in text:
        letter = is_letter(char)
        if escape:
            refuse_if(mode is not None and not letter)
            out += char
            escape, in_word = False, letter
            if not letter:
                active = False
        elif char == E:
            escape = True
        elif char in (T, A):
            refuse_if(mode is not None or in_word or capnext)
            mode = char
        elif char == C:
            refuse_if(capnext)
            capnext = True
        elif letter:
            refuse_if(in_word and mode is not None)
            if not in_word:
                active = mode == A
            out += char.upper() if active or capnext or mode == T else char
            mode, capnext, in_word = None, False, True
        else:
            refuse_if(mode is not None or capnext)
            out += char
            in_word = active = False
    refuse_if(escape or mode is not None or capnext)
    return out


@settings(max_examples=600, deadline=None)
@given(texts)
def test_round_trip_and_reference_encoder(text: str) -> None:
    encoded = encode_lossless_caps_v2(text)
    assert encoded == reference_encode(text)
    assert decode_lossless_caps_v2(encoded) == text
    assert not any("A" <= char <= "Z" for char in encoded)


@settings(max_examples=2000, deadline=None)
@given(grammar_text)
def test_decoder_accepts_and_refuses_what_the_grammar_says(stream: str) -> None:
    try:
        expected = reference_decode(stream)
    except Refused:
        with pytest.raises(LosslessCapsError):
            decode_lossless_caps_v2(stream)
    else:
        assert decode_lossless_caps_v2(stream) == expected


@settings(max_examples=300, deadline=None)
@given(texts)
def test_byte_offsets(text: str) -> None:
    encoded = encode_lossless_caps_v2(text)
    offsets = original_byte_offsets(encoded)
    assert len(offsets) == len(encoded) + 1
    assert offsets[0] == 0 and offsets[-1] == len(text.encode())
    # every prefix that is a valid stream by itself stands for as many bytes as it decodes to
    for i in range(len(encoded) + 1):
        try:
            decoded = reference_decode(encoded[:i])
        except Refused:
            continue
        assert offsets[i] == len(decoded.encode())


def test_example_of_the_format() -> None:
    expected = f"{T}hello i{C}phone {T}a {A}ok {T}mc{C}donald"
    assert encode_lossless_caps_v2("Hello iPhone A OK McDonald") == expected


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("", ""),
        ("iPHONE", f"i{C}p{C}h{C}o{C}n{C}e"),
        ("ABc", f"{T}a{C}bc"),
        ("\u00c9TUDE", f"\u00c9{A}tude"),  # an accented capital belongs to no word
        (f"{T}The{E}", f"{E}{T}{T}the{E}{E}"),
        ("\ue000", "\ue000"),
    ],
)
def test_encodings(text: str, encoded: str) -> None:
    assert encode_lossless_caps_v2(text) == encoded
    assert decode_lossless_caps_v2(encoded) == text


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (f"{E}", "ESC dangles at the end"),
        (f"a {T}", "TITLE dangles at the end"),
        (f"a {A}", "ALLCAPS dangles at the end"),
        (f"a{C}", "CAPNEXT dangles at the end"),
        (f"{T}{A}a", "ALLCAPS after TITLE"),
        (f"{C}{T}a", "TITLE after CAPNEXT"),
        (f"a{T}b", "TITLE inside a word"),
        (f"{A}ab{A}c", "ALLCAPS inside a word"),
        (f"{C}{C}a", "CAPNEXT after CAPNEXT"),
        (f"{T}1", "TITLE is followed by '1'"),
        (f"a{C} b", "CAPNEXT is followed by ' '"),
        (f"{T}{E}{T}", "TITLE is followed by an escaped character that is no letter"),
        (f"{A}{E}ab", "ALLCAPS is followed by an escaped letter"),
    ],
)
def test_every_decode_error(stream: str, message: str) -> None:
    with pytest.raises(LosslessCapsError, match=message):
        decode_lossless_caps_v2(stream)


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (f"{T}{C}ab", "Ab"),
        (f"{A}{C}ab", "AB"),
        (f"{A}a{C}bc", "ABC"),
        (f"{C}ab", "Ab"),
        (f"{E}ab", "ab"),
        (f"{E}1", "1"),
        ("ABC", "ABC"),
        (f"{C}{E}{T}a", f"{T}A"),  # CAPNEXT survives an escaped character
        (f"{A}a{E}bc", "AbC"),
    ],
)
def test_streams_the_encoder_never_writes(stream: str, text: str) -> None:
    assert decode_lossless_caps_v2(stream) == text


def test_error_names_the_character() -> None:
    with pytest.raises(ValueError, match=r"\(character 3\)"):
        decode_lossless_caps_v2(f"b {C}{C}a")


def test_registry() -> None:
    for name in (None, "", IDENTITY):
        assert get_text_transform(name)("The") == get_text_inverse_transform(name)("The") == "The"
        assert get_text_transform_control_symbols(name) == ()
    for name in (CASEOPS, "lossless_caps_v2"):
        assert get_text_transform(name) is encode_lossless_caps_v2
        assert get_text_inverse_transform(name) is decode_lossless_caps_v2
        assert get_text_transform_control_symbols(name) == ("\ue001", "\ue002", "\ue003", "\ue004")
    for lookup in (get_text_transform, get_text_inverse_transform, get_text_transform_control_symbols):
        with pytest.raises(ValueError, match="unsupported text_transform='lossless_caps_v7'; supported: identity"):
            lookup("lossless_caps_v7")


def test_lone_surrogates_have_no_byte_offsets() -> None:
    with pytest.raises(UnicodeEncodeError):
        original_byte_offsets("a\ud800")
