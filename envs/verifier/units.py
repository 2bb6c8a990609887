"""Unit words after a number: dropped, as 12 apples is 12. Hedges, numbers and arithmetic in words and words that
multiply (12 dozen is 144, three fifths are no three) are not units."""

from __future__ import annotations

import re

from envs.verifier.symbols import word_set

MAX_WORDS = 8
_LATIN = ("m", "b", "tr", "quadr", "quint", "sext", "sept", "oct", "non", "dec")
SCALES = {
    **{"dozen": 12, "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "crore": 10**7},
    **{f"{stem}illion": 10 ** (3 * n) for n, stem in enumerate(_LATIN, 2)},
}
"""The words that multiply the number before them."""
_TOKEN = re.compile(
    r"\s+|°\s?[CFK](?![A-Za-z])|\\text\{([^{}]*)\}|[ap]\.\s?m\.?|([A-Za-z]+)(?:'s(?![A-Za-z]))?\.?|[/·°¢]|\^\s*\{?\s*-?[123]\s*\}?"
    r"|\^?\{?\s*'\s?'?\s*\}?|\(([A-Za-z ]+)\)"
)
_POWER = re.compile(r"\^\s*\{?\s*-?[123]\s*\}?")
_QUOTED = re.compile(r"[A-Za-z .,'/°^\-()¢]*[0-9²³]?")
_WORD = r"(?:(?:\\text\{[^{}]*\}(?:\s?\^\s?\{?\s?-?[123]\s?\}?)?\s?·?\s?)+|[A-Za-z]{2,})"
_RATE = re.compile(rf"\\frac\s*\{{\s*({_WORD})\s*\}}\s*\{{\s*({_WORD})\s*\}}")
_MEASURED = re.compile(r"(?P<head>.*[0-9)}π])\s*(?P<unit>[A-Za-z][A-Za-z0-9./°^{}\- ]{1,40})", re.DOTALL)
_TRAILING = re.compile(
    r"(?P<head>.*?[0-9A-Za-z)}π])\s*(?P<unit>(?:\\frac\s*\{\s*)?\\text\{[^{}]*\}[^=]{0,60}|(?:\s+[A-Za-z]{4,}\.?)+)",
    re.DOTALL,
)
_OPERAND = re.compile(r"([0-9]\.?)((?:\s*\\text\{[^{}]*\}|\s+[A-Za-z]+)+)")
_ANNOUNCE = r"(?:(?:so|thus|therefore|the|final|answer|result|total|is|equals?|to|about|approximately)\b[\s,:=]*){1,6}"
_LEAD = re.compile(rf"(?:\\text\{{\s*{_ANNOUNCE}\}}\s*:?|{_ANNOUNCE})\s*(?=[-+.0-9\\$(])", re.IGNORECASE)
_NAME = r"[A-Za-z]'{0,3}(?:_\{?[A-Za-z0-9]\}?)?(?:\([A-Za-z0-9, ]{1,12}\))?"
_LABEL = re.compile(
    rf"\\text\{{(?P<first>[^{{}}\\0-9]*)\}}\s*(?:{_NAME}\s*\\text\{{(?P<second>[^{{}}\\0-9]*)\}}\s*)?"
    r"(?P<colon>:?)\s*(?=[-+.0-9(\[π]|\\(?!text))"
)
_LABEL_END = re.compile(r"(?::|=|\b(?:is|are|was|equals|be))[:,]?\s*")
_ABBREVIATIONS = word_set("""
mm cm dm km in ft yd mi mg kg lb lbs oz ml mL cl dl sec secs min mins hr hrs ms kJ
kW Hz kHz MHz Pa kPa eV mol rad deg sq cu mph kph am pm AM PM usd USD eur EUR pt pts gal
qt ha AU pc ly yr yrs KB MB GB TB dB ppm psi rpm
""")
_LINKS = word_set("of a an on at by")
_LETTERS = word_set("m s g h t l L N J W V A K C F T")
_PREFIX = r"(?:da|[YZEPTGMkhdcmunpfazy]|\\mu\s*)?"
_SYMBOL = (
    r"(?:mol|cal|rad|lm|lx|Hz|Pa|eV|bar|Torr|atm|min|day|yr|pc|ly|AU|Wh|sr|Bq|Gy|Sv|erg|dyn|lb|ft|mi|in|ha|ppm"
    r"|[MLR]_\{?\\odot\}?|\\Omega|\\AA|Å|°\s?[CFK]|[gmsNJWVAKCFTHlLhdGSu])"
)
_FACTOR = rf"{_PREFIX}{_SYMBOL}(?![A-Za-z])(?: ?\^ ?\{{? ?-?[1-9] ?\}}?)?"
_FACTOR_ALONE = re.compile(rf"{_PREFIX}{_SYMBOL}")
_PRODUCT = rf"{_FACTOR}(?:(?: ?· ?| |(?<=\}})){_FACTOR})*"
_SYMBOLS = re.compile(
    rf"(?P<head>.*?[0-9}}])(?P<unit> ?{_PRODUCT}(?: ?/ ?(?:\( ?{_PRODUCT} ?\)|{_PRODUCT}))?)", re.DOTALL
)
_QUOTIENT = re.compile(rf"\\frac ?\{{ ?({_PRODUCT}) ?\}} ?\{{ ?({_PRODUCT}) ?\}}")
_FONT = re.compile(r"\\(?:text|mathrm|operatorname|mathsf|unit)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ALONE = frozenset((" m", " s", " g", " h", " L", "L"))
MAX_UNIT = 120
_PHYSICAL = re.compile(
    r"m\s*\^\s*\{?[23]\}?|(?:k?m|[cm]m|k?g|[JNCL])\s*/\s*(?:h|s|min|k?g|[cm]?m|L)(?:\s*\^\s*\{?[23]\}?)?"
)
_ORDINALS = word_set("""
third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth
seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth
""") | {scale + "th" for scale in SCALES}
_POWER_WORDS = word_set("squared cubed")
_NUMBERS = word_set("""
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety
""")
_NOT_UNITS = (
    frozenset(SCALES)
    | _NUMBERS
    | {word + "s" for word in {*SCALES, *_ORDINALS}}
    | word_set("""
or and to not than if but either neither nor plus minus times over mod choose because so since however maybe perhaps
else infinity undefined percent pct point half quarter both between
wrong incorrect false alternatively otherwise unless versus vs possibly most least halves
through until without except more less sqrt pi log ln sin cos tan exp factorial where with for when
gross score scores myriad googol mil mill bil doubled tripled quadrupled halved twice thrice inverse reciprocal modulo
below beneath under zero negative recurring repeating repeated
divided multiplied subtracted added deducted take taken itself themselves too many few fewer greater larger smaller
bigger
alpha beta gamma delta theta phi omega lambda sigma
""")
)
_IN_LABELS = word_set("least most and to for with where when point score scores percent both")
_NO_LABEL = (_NOT_UNITS - _IN_LABELS) | word_set("""
no none non never any anything every everything besides excluding exclude beyond up increased decreased reduced raised
opposite complement approximately about around almost nearly close bound bounds squared cubed double triple twofold
other third unlike far
""")
"""Words that no label has: they compare, deny or calculate."""
_NO_PHRASE = re.compile(
    r"\bat (?:least|most)\b|n't\b|\b(?:square|cube|power) of\b|\broot\b|\ban? (?:multiple|factor|divisor)\b"
    r"|(?<!common )\b(?:multiple|factor|divisor) of\b"
    r"|\bof (?:(?:the|my|our|this|that|an?) )?(?:answer|result|solution|it)\b",
    re.IGNORECASE,
)
_ENDINGS = _ORDINALS | _LINKS | word_set("short shy")
"""Words that end no unit."""
_COMPOUND = re.compile(
    rf"\b(?:{'|'.join(sorted(_NUMBERS))})-(?!(?:{'|'.join(sorted(_NUMBERS))})\b)([a-z])"
    r"|(?<=\b(?:in|of|on) )one(?= [a-z])|(?<=\bper )one(?= [a-z])"
)
"""A number that is part of what is counted: one-dollar bills, pages in one day."""


def is_unit(text: str) -> bool:
    """Whether ``text``, which follows a number, is a unit or the thing counted."""
    if _PHYSICAL.fullmatch(text):
        return True
    if "\\frac" in text:
        text = _RATE.sub(r"\1/\2", text)
    if "-" in text or "one " in text:
        text = _COMPOUND.sub(lambda m: m[1] or "a", text)
    position, count, last = 0, 0, ""
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position or (count == 0 and _POWER.fullmatch(match[0])):
            return False  # a power needs a unit before it
        quoted, bare, bracketed = match.groups()
        words = re.findall(r"[A-Za-z]+", quoted or bracketed or bare or "")
        if words:
            if count == 0 and words[0].lower() in _POWER_WORDS:
                return False
            last = words[-1]
        count += len(words)
        if count > MAX_WORDS or any(word.lower() in _NOT_UNITS for word in words):
            return False
        if quoted and (
            not _QUOTED.fullmatch(quoted) or (len(quoted.strip()) == 1 and words and words[0] not in _LETTERS)
        ):
            return False
        if bare and not _is_word(bare):
            return False
        position = match.end()
    return last.lower() not in _ENDINGS  # a fifth is no one, but 12 fifth graders are 12


def _is_word(bare: str) -> bool:
    """A bare run of letters reads as a word rather than as a product of variables."""
    return bare in _ABBREVIATIONS or bare in _LINKS or (len(bare) >= 3 and bool(re.search(r"[aeiouyAEIOUY]", bare)))


def is_symbol(text: str) -> bool:
    """Whether letters are the symbol of a unit: km, mol, s."""
    return text in _ABBREVIATIONS or _FACTOR_ALONE.fullmatch(text) is not None


def without_symbols(text: str) -> str:
    """A number without the symbols of a unit at its end: 12 for ``12 m``, 3.2 for ``3.2 m s^{-1}``. Only where a number
    is expected: elsewhere a single letter is a variable, as most are here that stand alone (5h, 12 K)."""
    if len(text) > MAX_UNIT:
        return text
    bare = " ".join(_QUOTIENT.sub(r" \1/(\2)", " ".join(_FONT.sub(r" \1 ", text).split())).split())
    match = _SYMBOLS.fullmatch(bare)
    if match is None or (len(match["unit"].strip()) == 1 and match["unit"] not in _ALONE):
        return text
    return match["head"].strip()


def without_units(text: str) -> str:
    """A calculation without the unit words after its numbers: 3 + 4 for ``3 eggs + 4 \\text{ eggs}``."""
    return _OPERAND.sub(lambda m: m[1] if is_unit(m[2].strip()) else m[0], text)


def without_lead(text: str) -> str:
    """An answer without the words that announce it: 42 for ``\\text{The answer is } 42`` or ``\\text{Sum: } 42``."""
    match = _LEAD.match(text) or _label(text)
    return text[match.end() :] if match and match.end() < len(text) else text


def _label(text: str) -> re.Match[str] | None:
    """The words in a text font that say what the value after them is, and end with a colon or "is"; none that compare,
    deny or calculate."""
    match = _LABEL.match(text) if text.startswith("\\text{") else None
    if match is None:
        return None
    said = f"{match['first']} {match['second'] or ''}".rstrip()
    ended = match["colon"] or _LABEL_END.search(said[-8:])
    known = {word.lower() for word in re.findall(r"[A-Za-z]+", said)}
    sound = not known & _NO_LABEL and _NO_PHRASE.search(said) is None
    return match if ended and sound and max(map(len, known), default=0) > 1 else None


def without_unit(text: str) -> str:
    """An expression without the unit words at its end: 12π for ``12π \\text{ cm}^2``."""
    match = _TRAILING.fullmatch(text)
    if match and not match["head"].endswith("\\text") and is_unit(match["unit"].strip()):
        return match["head"].removesuffix("\\mu").strip()
    return text


def without_measure(text: str) -> str:
    """A number without the unit at its end, abbreviations in plain letters included: 12π for ``12π cm^2``. Only where
    the number has no variables: elsewhere cm is c times m."""
    match = _MEASURED.fullmatch(text) if len(text) <= MAX_UNIT else None
    return match["head"] if match and is_unit(match["unit"].strip()) else text
