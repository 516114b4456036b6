"""Names that look alike: `read_file` in Latin letters, and with a Cyrillic `е`, or with an invisible character in it.

The skeleton of a name is what a reader sees: compatibility forms (NFKC), case, accents and invisible characters are
taken away, and letters of other scripts that look like Latin ones become these. The idea is that of Unicode's report
39 (confusables); the table has the letters that occur in names of tools, not all of that report's.
"""

import unicodedata

MAX_CHARACTERS = 256  # longer names are no names of tools
_INVISIBLE = ("Cf", "Cc", "Mn", "Me", "Zs", "Zl", "Zp")
_LATIN = {
    # Cyrillic
    "а": "a", "в": "b", "с": "c", "ԁ": "d", "е": "e", "ё": "e", "һ": "h", "і": "i", "ї": "i", "ј": "j", "к": "k",
    "ӏ": "l", "м": "m", "п": "n", "о": "o", "р": "p", "ԛ": "q", "г": "r", "ѕ": "s", "т": "t", "ц": "u", "ѵ": "v",
    "ԝ": "w", "х": "x", "у": "y",
    # Greek
    "α": "a", "β": "b", "ϲ": "c", "ε": "e", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ο": "o", "ρ": "p", "σ": "o",
    "τ": "t", "υ": "u", "χ": "x", "γ": "y", "ω": "w",
    # Armenian, and Latin letters of other alphabets
    "օ": "o", "ո": "n", "ս": "u", "հ": "h", "ց": "g", "ɑ": "a", "ɡ": "g", "ı": "i", "ɩ": "i", "ʟ": "l", "ɴ": "n",
    # digits and signs
    "0": "o", "1": "l", "i": "l", "|": "l", "-": "_", "‐": "_", "‑": "_", "–": "_", "—": "_", "−": "_", ".": "_",
}  # fmt: skip


def skeleton(name: str) -> str:
    """Return what a reader sees of a name; two names with the same skeleton look alike."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name[:MAX_CHARACTERS]).casefold())
    seen = [_LATIN.get(each, each) for each in plain if unicodedata.category(each) not in _INVISIBLE]
    # `i` has become `l`, and a letter of another script may have become `i`.
    return "".join("l" if each == "i" else each for each in seen) + name[MAX_CHARACTERS:]
