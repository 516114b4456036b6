"""Which language a text is in, as far as a reward needs it: its script, and for Latin letters its function words."""

import re
import unicodedata
from collections import Counter

MAX_READ = 4_000  # characters
_LEAST_WORDS = 2  # function words of a language before it is told from others
_WORD = re.compile(r"[^\W\d_]+")
_FUNCTION_WORDS = {
    "en": "the of and to is that it for on with as are this be by not you can how what do your i my we or have will",
    "es": "el la los las de que y en un una por con no se para es lo su al del como más pero sus puedo qué cómo usted",
    "fr": "le la les de des et en un une est que qui pour dans ne pas je vous ce il sur avec au du plus comme peux",
    "de": "der die das und ist nicht ein eine zu den mit von für auf ich sie es dem im wie kann sich auch des wir",
    "it": "il lo la gli di che e un una per non con sono del della in è si come posso questo al da più anche ma",
    "pt": "o a os as de que e em um uma para não com se por é do da no na como mais mas posso você isso dos das",
    "nl": "de het een en van is dat niet te in op voor met zijn ik je die er aan kan maar ook als dit wij hoe",
}
_WORDS = {language: frozenset(words.split()) for language, words in _FUNCTION_WORDS.items()}
_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "HANGUL", "HIRAGANA", "KATAKANA",
            "CJK", "BENGALI", "TAMIL", "TELUGU", "ARMENIAN", "GEORGIAN")  # fmt: skip


def script_of(text: str) -> str | None:
    """Return the script of most letters; None where there is no letter."""
    counts: Counter[str] = Counter()
    for each in text[:MAX_READ]:
        if each.isascii():
            if each.isalpha():
                counts["LATIN"] += 1
        elif each.isalpha():
            name = unicodedata.name(each, "").partition(" ")[0]
            counts[name if name in _SCRIPTS else "OTHER"] += 1
    if not counts:
        return None
    if counts["HIRAGANA"] or counts["KATAKANA"]:  # Japanese writes Chinese characters too
        counts["HIRAGANA"] += counts.pop("KATAKANA", 0) + counts.pop("CJK", 0)
    return counts.most_common(1)[0][0]


def latin_language_of(text: str) -> str | None:
    """Return a language by the function words of a text in Latin letters; None where they don't tell."""
    words = Counter(word.lower() for word in _WORD.findall(text[:MAX_READ]))
    hits = {language: sum(words[each] for each in known) for language, known in _WORDS.items()}
    (first, most), (_, second) = sorted(hits.items(), key=lambda pair: -pair[1])[:2]
    return first if most >= _LEAST_WORDS and most > second else None


def differ(one: str, other: str) -> bool:
    """Return whether two texts are in different languages; false where that can't be told."""
    scripts = script_of(one), script_of(other)
    if None in scripts:
        return False
    if scripts[0] != scripts[1]:
        return True
    if scripts[0] != "LATIN":
        return False
    languages = latin_language_of(one), latin_language_of(other)
    return None not in languages and languages[0] != languages[1]
