"""Tables of symbols: characters and LaTeX commands that mean the same, and the one spelling they are given."""

from __future__ import annotations


def word_set(words: str) -> frozenset[str]:
    """The words of a text, for membership tests."""
    return frozenset(words.split())


def _pairs(text: str) -> dict[str, str]:
    """``"a b  c d"`` as {a: b, c: d}."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


_DIGITS = "0123456789"
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", _DIGITS + "+-()n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", _DIGITS, strict=True))

_VULGAR = """
½ 1/2 ⅓ 1/3 ⅔ 2/3 ¼ 1/4 ¾ 3/4 ⅕ 1/5 ⅖ 2/5 ⅗ 3/5 ⅘ 4/5 ⅙ 1/6 ⅚ 5/6 ⅐ 1/7 ⅛ 1/8 ⅜ 3/8 ⅝ 5/8 ⅞ 7/8 ⅑ 1/9 ⅒ 1/10
"""
_SAME = """
⁄ / ∕ / ∶ : ∛ \\sqrt[3] ∜ \\sqrt[4] º ° ˚ ° ⋅ · ∙ · • · ∗ * ✕ × ⨯ × ⩽ ≤ ⩾ ≥ ≦ ≤ ≧ ≥ ∣ | Ø ∅ ⌀ ∅ “ " ” " ‘ ' ’ ' ′ ' ″ ''
𝜋 π ϕ φ ｰ - 、 , ， , 。 . ٫ . ٬ , ٪ %
"""
_GREEK = """
α alpha β beta γ gamma δ delta ζ zeta η eta θ theta κ kappa λ lambda μ mu µ mu ν nu ξ xi ρ rho σ sigma τ tau υ upsilon
χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega
"""
_UNIFORM: dict[str, str | int | None] = {
    **{chr(0xFF01 + n): chr(0x21 + n) for n in range(94)},  # full-width forms
    **dict.fromkeys("−–‒﹣‐‑⁃➖", "-"),
    **dict.fromkeys("\t\r\n\u00a0\u202f\u205f\u3000", " "),
    **{chr(space): " " for space in range(0x2000, 0x200B)},
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **{
        chr(mark): "" for mark in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },  # directions
    **dict.fromkeys("€£¥₹₩₽₪฿₱₫₴₦₺元円圓", ""),
    **dict.fromkeys("✅✓✔☑\ufe0f", ""),
    **{letter: f"\\mathbb{{{plain}}}" for letter, plain in _pairs("ℝ R ℤ Z ℕ N ℚ Q ℂ C").items()},
    "∠": "\\angle ",
    "∡": "\\angle ",
    "∨": "\\text{or}",
    "∧": "\\text{and}",
    **{sign: "\\frac{{{}}}{{{}}}".format(*quotient.split("/")) for sign, quotient in _pairs(_VULGAR).items()},
    **_pairs(_SAME),
    **{letter: f"\\{name} " for letter, name in _pairs(_GREEK).items()},
}
CHARACTERS = str.maketrans(_UNIFORM)
"""For ``str.translate``: minus signs, full-width forms, blanks, vulgar fractions and the like."""

COMMANDS = _pairs("""
dfrac \\frac tfrac \\frac cfrac \\frac dbinom \\binom tbinom \\binom arcsin \\asin arccos \\acos arctan \\atan lg \\log
le ≤ leq ≤ leqslant ≤ leqq ≤ ge ≥ geq ≥ geqslant ≥ geqq ≥ lt < gt > ne ≠ neq ≠ approx ≈ simeq ≈ sim ≈
thickapprox ≈ equiv ≡ in ∈ cup ∪ cap ∩ setminus ∖ backslash ∖ emptyset ∅ varnothing ∅ infty ∞ infin ∞ pm ± mp ∓
times × cdot · ast · bullet · div ÷ pi π mid | vert | lvert | rvert | colon : circ ° degree °
lbrace \\{ rbrace \\} lbrack [ rbrack ] langle ( rangle )
cents \\text{cents} percent % land \\text{and} wedge \\text{and} lor \\text{or} vee \\text{or} prime ' varphi φ phi φ
measuredangle \\angle sphericalangle \\angle textdegree °
varepsilon ε epsilon ε ldots … dots … cdots … dotsc … imath i
""")
"""LaTeX commands with another spelling."""

SILENT = word_set("""
left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle
limits nolimits rm bf it large Large LARGE huge Huge small footnotesize scriptsize tiny
normalsize mathstrut noindent hfill centering
pounds euro yen textdollar checkmark
""")
"""LaTeX commands that do not matter."""

SPACES = word_set("quad qquad thinspace enspace medspace thickspace space hspace")
"""LaTeX commands that are a blank."""

FUNCTION_WORDS = word_set("""
sin cos tan cot sec csc asin acos atan sinh cosh tanh log ln exp max min gcd lcm deg sgn sqrt
""")
"""Function names that stand in a text font."""

UNIT_FUNCTIONS = word_set("min sec deg")
"""Those of them that are units after a number."""
