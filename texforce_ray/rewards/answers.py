"""Reads scores and rankings from a model's prose; an ambiguous answer counts as none.

JSON takes precedence, and of nested JSON the outermost. In prose, a number counts only if it cannot
be the end of a scale, a maximum or a count of something. A wrong score would be trained on; after
None, the model is asked again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

_THOUGHTS = re.compile(r"<(think|thinking)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*\s*\n?(.*?)```", re.DOTALL)

_N = r"(?<![\w.,])[-+]?\d+(?:[.,]\d+)?(?![\w]|[.,]\d)"
# The ends of a scale: "0-10", "from 0 (nothing) to 10", "between 1 and 5".
_NOTE = r"(?:\s*\([^()\d]*\))?"
_RANGE = re.compile(
    rf"{_N}{_NOTE}\s*(?:-|–|—|\.{{2,3}}|…|\bto\b|\bthrough\b|\bor\b)\s*\d+(?:[.,]\d+)?(?!\w){_NOTE}"
    rf"|\bbetween\s+{_N}{_NOTE}\s+and\s+{_N}{_NOTE}",
    re.IGNORECASE,
)
_BEST = (
    r"(?:max(?:imum|\.)?|min(?:imum|\.)?|perfect|full|highest|lowest|best|worst|top|possible|total)"
)
_OF = r"(?:points?|scores?|marks?|value|rating)"
_MAXIMUM = re.compile(
    rf"\b{_BEST}(?:\s+possible)?(?:\s+{_OF})?(?:\s+(?:is|of|being|would be|=|:))*\s*:?\s*{_N}"
    rf"|(?<!\d)/\s*{_N}|\bout\s+of\s+(?:an?\s+|the\s+)?{_N}"
    rf"|\b(?:scale|range)\s+of\s+{_N}|{_N}[\s-]*(?:point|star)s?\s+scale\b"
    rf"|{_N}\s*(?:is|being|means|=|would be|for)\s+(?:the\s+|an?\s+)?"
    rf"(?:{_BEST}|nothing|everything|good|bad)\b"
    rf"|{_N}\s+(?:points?\s+)?{_BEST}\b",
    re.IGNORECASE,
)
_SCALE = "§"  # replaces a range
# A number and what it is out of: "7/10", "7 out of 10", "4 out of a maximum score of 10".
_OUT_OF = re.compile(
    rf"({_N})\s*(?:{_OF}\s*)?\(?(?:/|\bout\s+of\b)\s*(?:an?\s+|the\s+)?(?:{_BEST}\s+)*"
    rf"(?:{_OF}\s+of\s+)?({_N})(?:\s*{_OF}\b)?\)?",
    re.IGNORECASE,
)
_OTHER = (  # what makes the number before it a condition, a sum or one of several
    r"[%/+=<>×→]|->|percent\b|of\b|x\b|minus\b|plus\b|-?\s*\d|"
    r",?\s*(?:or|and|to|maybe|perhaps|possibly|means|is|are|was|were|would|could|should|might)\b"
)
_SHARE = rf"({_N})(?:/({_N}))?(?!\s*(?:{_OTHER}))"
_LABEL = r"\b(?:score|rating|grade|verdict)\b"
_ASIDE = r"(?:\s*[(\[][^()\[\]\d]*[)\]])?"
_ON = rf"(?:(?:\s*\b(?:from|between|on|in|of|out|an?|the|range|scale)\b)*\s*{_SCALE}[\s,.…]*)?"
_HOW = r"(?:\s*(?:[:=]|→|->|\s-\s|\bis\b|\bwas\b|\bof\b|\bwould be\b|\bwill be\b|\bat\b))*"
_LABELLED = re.compile(
    rf"(\b(?:final|overall|total)\s+)?{_LABEL}{_ASIDE}{_ON}{_ASIDE}{_HOW}\s*(?:an?\s+)?{_SHARE}",
    re.IGNORECASE,
)
_END = r"(?=\s*(?:$|[.,;:!?)\n]|\b(?:because|since|as|for|due|overall|points?|on|in|given)\b))"
_GIVEN = re.compile(
    r"\b(?:rate|rated|give|given|grade|assign|deserves?|earns?|gets?|receives?|merits?|score)\b"
    rf"[^\d.!?;:\n§]{{0,40}}?{_SHARE}{_END}",
    re.IGNORECASE,
)
_NOT_GIVEN = re.compile(
    r"\b(?:not|never|cannot|rather|instead|than|above|below|under|over|least|most|less|more|up|if|"
    r"unless|had|could|might|may|nearly|almost|deduct\w*|minus)\b|n['’]t\b",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"\W*?{_SHARE}\W*", re.IGNORECASE)


def parse_score(text: str, high: float | None = None) -> float | None:
    """The score of an answer, or None where there is none or more than one.

    JSON with "score" (outermost object), "Score: 7", "I give it 7 out of 10", or a bare number.
    "7,5" is 7.5. `high`: the scale's end; a score out of another maximum does not count.
    """
    text = _THOUGHTS.sub(" ", text)
    objects = [o for o in _objects(text) if _field(o, "score") is not _NOTHING]
    if len(objects) > 1 and (fenced := _fenced(text, "score")) is not None:
        objects = [fenced]
    if objects:
        return _agreed([_value(_field(o, "score"), high) for o in objects])
    return _from_prose(
        re.sub(r"[*_`#]|^[ \t]*>", "", _without_json(text), flags=re.MULTILINE), high
    )


def _from_prose(text: str, high: float | None) -> float | None:
    text = _OUT_OF.sub(r"\1/\2", text)
    if whole := _ALONE.fullmatch(text.strip()):
        return _share(whole.group(1), whole.group(2), high)
    plain = _MAXIMUM.sub(_SCALE, _RANGE.sub(_SCALE, text))
    found = list(_LABELLED.finditer(plain))
    final = [match for match in found if match.group(1)]
    pairs = [(m.group(2), m.group(3)) for m in final or found]
    if not final:
        pairs += [(m.group(1), m.group(2)) for m in _GIVEN.finditer(plain) if _meant(plain, m)]
    for line in plain.splitlines():
        whole = _ALONE.fullmatch(line.strip())
        if whole and whole.group(2):
            pairs.append((whole.group(1), whole.group(2)))
    return _agreed([_share(number, most, high) for number, most in pairs])


def _meant(text: str, given: re.Match[str]) -> bool:
    """Whether a sentence gives its score: "I would not give it 9", "if it had hands, 9" do not."""
    begin = max(text.rfind(mark, 0, given.start()) for mark in (". ", "!", "?", ";", "\n")) + 1
    return _NOT_GIVEN.search(text, begin, given.start(1)) is None


def _share(number: str, most: str | None, high: float | None) -> float | None:
    value, limit = _number(number), _number(most) if most else None
    if value is None or (limit is not None and (value > limit or high not in (None, limit))):
        return None
    return value


def _number(text: str) -> float | None:
    """Read 7.5 and 7,5, but not 1,000, which is ambiguous."""
    whole, comma, part = text.partition(",")
    if comma and len(part) > 2:
        return None
    value = float(f"{whole}.{part}") if comma else float(text)
    return value if math.isfinite(value) else None


def _value(value: Any, high: float | None) -> float | None:
    if isinstance(value, str):
        whole = _ALONE.fullmatch(_OUT_OF.sub(r"\1/\2", value.strip()))
        return _share(whole.group(1), whole.group(2), high) if whole else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _agreed(values: list[float | None]) -> float | None:
    """The value that all of them share; None if they differ."""
    return values[0] if values and all(value == values[0] for value in values) else None


def parse_ranking(text: str, count: int) -> list[int] | None:
    """Image indices from 0, best first, from an answer; None unless it names each image once."""
    text = _THOUGHTS.sub(" ", text)
    objects = _objects(text)
    named = [o for o in objects if _field(o, "ranking") is not _NOTHING]
    if len(named) > 1 and (fenced := _fenced(text, "ranking")) is not None:
        named = [fenced]
    if named:
        found = [_permutation(_field(o, "ranking"), count) for o in named]
    else:
        values = [value for o in objects for _, value in o]
        values += list(_values(text, "["))
        found = [p for value in values if (p := _permutation(value, count)) is not None]
    return found[0] if found and all(other == found[0] for other in found) else None


def _permutation(value: Any, count: int) -> list[int] | None:
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        return None
    places = [number - 1 for number in value]
    return places if sorted(places) == list(range(count)) else None


# ---- JSON in prose -------------------------------------------------------------------------------

_Pairs = list[tuple[str, Any]]
_NOTHING = object()  # no such field
_TWICE = object()  # a field that appears twice has no valid value


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a duplicate key is noticed."""


def _objects(text: str) -> list[_Pairs]:
    return list(_values(text, "{"))


def _field(pairs: _Pairs, name: str) -> Any:
    values = [value for key, value in pairs if key.strip().lower() == name]
    if len(values) > 1:
        return _TWICE
    return values[0] if values else _NOTHING


def _fenced(text: str, name: str) -> _Pairs | None:
    """The object with this field if code blocks hold exactly one: models may think aloud first."""
    found = [o for block in _FENCE.findall(text) for o in _objects(block)]
    named = [o for o in found if _field(o, name) is not _NOTHING]
    return named[0] if len(named) == 1 else None


def _values(text: str, opening: str) -> Iterator[Any]:
    """Outermost JSON values that begin with `opening`; values inside others are ignored.

    Anything that begins with a brace but is not JSON hides its content too: the first inner object
    of a truncated one must not pass for the answer.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_Object)
    for start, end in _regions(text, opening):
        try:
            value, _ = decoder.raw_decode(text[start:end])
        except (ValueError, RecursionError):
            continue
        if text[start] == opening:
            yield value


def _regions(text: str, opening: str) -> Iterator[tuple[int, int]]:
    """Start and end of each outermost bracketed region; an unclosed one extends to the end."""
    # An object hides lists inside it; a list hides objects only when looking for lists.
    starts = "{[" if opening == "[" else "{"
    place = 0
    while (start := min((p for b in starts if (p := text.find(b, place)) >= 0), default=-1)) >= 0:
        depth, quoted, end = 0, False, start
        while end < len(text):
            letter = text[end]
            if quoted:
                end += letter == "\\"
                quoted = letter != '"'
            elif letter == '"':
                quoted = True
            else:
                depth += (letter in "{[") - (letter in "}]")
            end += 1
            if not depth:
                break
        yield start, end
        place = end


def _without_json(text: str) -> str:
    """The prose alone, so that no number in a broken object is taken for the answer."""
    parts, place = [], 0
    for start, end in _regions(text, "{"):
        parts.append(text[place:start])
        place = end
    return " ".join([*parts, text[place:]])
