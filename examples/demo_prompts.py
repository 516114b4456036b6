"""Prompts of the ablation demo: French, and English prompts of the same forms; and which answers are in French.

The two sets that are measured say the same things in two languages, so that their difference is the language. The
prompts that test the result have other forms and other subjects.
"""

import re

Row = dict[str, str]

_SUBJECTS = (
    ("le chat", "the cat"), ("la guerre", "war"), ("un ordinateur", "a computer"), ("le soleil", "the sun"),
    ("l'hiver", "winter"), ("une banque", "a bank"), ("la musique", "music"), ("un vélo", "a bicycle"),
    ("le sommeil", "sleep"), ("la forêt", "the forest"), ("une montagne", "a mountain"), ("le football", "football"),
    ("un avion", "a plane"), ("la peinture", "painting"), ("le travail", "work"), ("un jardin", "a garden"),
)  # fmt: skip
_FORMS = (
    ("Parle-moi de {}.", "Tell me about {}."),
    ("Qu'est-ce que {} ?", "What is {}?"),
    ("Donne un conseil sur {}.", "Give some advice about {}."),
    ("Écris deux phrases sur {}.", "Write two sentences about {}."),
)
# The plan is chosen on the first list, and its result is measured on the second.
CHOOSING = (
    "Quelle est la capitale du Japon ?",
    "Comment fonctionne un moteur ?",
    "Pourquoi le ciel est-il bleu ?",
    "Que faire un dimanche de pluie à Lyon ?",
    "Raconte l'histoire d'un petit garçon.",
    "Où habitent les ours polaires ?",
)
HELD_OUT = (
    "Combien de jours y a-t-il dans une année ?",
    "Comment écrire une lettre à ma grand-mère ?",
    "À quoi sert un dictionnaire ?",
    "Comment apprendre une langue étrangère ?",
    "Quel est le plus grand fleuve de France ?",
    "Pourquoi les feuilles tombent-elles en automne ?",
    "Décris la maison de tes rêves.",
    "Que mange un lapin ?",
    "Qui a inventé le téléphone ?",
    "Comment aller de Paris à Marseille ?",
    "Il fait froid ce matin, comment m'habiller ?",
    "Explique ce qu'est la photosynthèse.",
)
ENGLISH_HELD_OUT = ("Which planets have rings?", "What can I do with old newspapers?")
_FRENCH = re.compile(
    r"\b(le|la|les|un|une|des|du|de|et|est|en|que|qui|pour|dans|sur|pas|vous|nous|je|il|elle|ce|cette|ces|avec|au|aux|"
    r"plus|sont|être|son|sa|ses|mon|ma|mes|à|l|d|c|n|s|j|qu|y|ou|où|ne|se)\b",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"\b(the|a|an|of|and|is|in|that|for|on|not|you|we|i|it|this|these|with|to|are|be|his|her|my|your|at|or|as|by|from|"
    r"was|can|have|has)\b",
    re.IGNORECASE,
)


def contrast() -> tuple[list[Row], list[Row]]:
    """Return the prompts that show the concept, and the others: 64 each, sentence by sentence the same."""
    pairs = [(form, subject) for subject in _SUBJECTS for form in _FORMS]
    target, baseline = ([{"prompt": form[at].format(subject[at])} for form, subject in pairs] for at in (0, 1))
    return target, baseline


def is_french(answer: str) -> bool:
    """Return whether more words of an answer are frequent French words than are frequent English ones."""
    return len(_FRENCH.findall(answer)) > len(_ENGLISH.findall(answer))


def rate(answers: list[str]) -> float:
    """Return the share of answers that are in French."""
    return sum(map(is_french, answers)) / len(answers)
