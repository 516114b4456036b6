"""Secrets: detect names that hold one, and hide secrets in text."""

import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

HIDDEN = "***"
_WORDS = frozenset({
    "TOKEN", "TOKENS", "KEY", "KEYS", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "PASS",
    "PWD", "CREDENTIAL", "CREDENTIALS", "AUTHORIZATION", "COOKIE", "WEBHOOK", "DSN", "PAT",
})  # fmt: skip
_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "APIKEY", "ACCESSKEY")
# Such a variable names the place of a secret: HF_TOKEN_PATH, PGPASSFILE, SSH_KEY_DIR, ...
_PLACES = frozenset({"PATH", "FILE", "DIR", "HOME", "FOLDER"})
_SWITCHES = frozenset({"", "0", "1", "true", "false", "yes", "no", "on", "off"})
# Shorter values occur by chance in unrelated text.
_SHORTEST = 8

# scheme://user:password@host; in SQLAlchemy a password may contain `/` and `@`, so it ends at the last @ of the word.
# The pattern begins behind the scheme: with it, each letter of a long word would be tried as the scheme's first.
_USER_INFO = re.compile(r"""(://[^\s/:@"'<>]*):[^\s"'<>]*@""")
# https://token@host; in a database URL, a single name before @ is a user's name.
_BEARER = re.compile(r"""(https?://)[^\s/:@"'<>]+@""", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s]+)@")
_IN_QUERY = re.compile(
    r"""([?&;][\w.-]*(?:token|key|secret|passw|credential|signature|authorization)[\w.-]*=)[^\s&;"'<>]+""",
    re.IGNORECASE,
)


def names_secret(name: str) -> bool:
    """Return whether a setting or an environment variable with this name holds a secret, judged by the words in it.

    True for `HF_TOKEN`, `WANDB_API_KEY`, `dbPassword`; False for `TOKENIZERS_PARALLELISM` and for the path
    `HF_TOKEN_PATH`.
    """
    words = [word for word in re.split(r"[^A-Z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).upper()) if word]
    if not words or words[-1] in _PLACES or words == ["PWD"]:  # the working directory
        return False
    return any(word in _WORDS or word.endswith(_ENDINGS) for word in words)


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable holds a secret: by its name, unless it is only a switch, or because a URL has a password."""
    return without_passwords(value) != value or (names_secret(name) and value.strip().lower() not in _SWITCHES)


def without_passwords(text: str) -> str:
    """Return `text` with the passwords and tokens of all URLs hidden."""
    hidden = _BEARER.sub(rf"\1{HIDDEN}@", _USER_INFO.sub(rf"\1:{HIDDEN}@", text))
    return _IN_QUERY.sub(rf"\1{HIDDEN}", hidden)


def passwords_in(url: str) -> tuple[str, ...]:
    """Return a URL's password, quoted and unquoted, for `scrubbed`: an error may show only a part of the URL."""
    found = _PASSWORD.search(url)
    return () if found is None else (found[1], unquote(found[1]))


def known_secrets(environment: Mapping[str, str], names: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the secret values of an environment, longest first: those of `names`, and those that look like secrets."""
    wanted = set(names)
    found = {
        value.strip() for name, value in environment.items()
        if name in wanted or (names_secret(name) and holds_secret(name, value))
    }  # fmt: skip
    return tuple(sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True))


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with these secrets and the passwords of URLs hidden."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return without_passwords(text)
