"""How webhooks are signed: as Standard Webhooks says, and OpenAI does.

The signature is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`. With several secrets a message has
several signatures, so that a receiver can change to a new secret while both are in use.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"
EXPECTED = f"{PREFIX} and base64 of 24 to 64 bytes"
_SECRET_BYTES = range(24, 65)


def secrets_in(text: str) -> list[bytes]:
    """Return the secrets in a text, separated by spaces.

    Raises:
        ValueError: There is none, or one has another form. The error does not repeat it.
    """
    found = []
    for each in text.split():
        try:
            found.append(base64.b64decode(each.removeprefix(PREFIX), validate=True))
        except binascii.Error:
            raise ValueError("has something that is not base64") from None
    if not found:
        raise ValueError("is not set")
    if any(len(each) not in _SECRET_BYTES for each in found):
        raise ValueError("has a secret that is too short or too long")
    return found


def signed_headers(message_id: str, sent_at: int, body: bytes, secrets: Sequence[bytes]) -> dict[str, str]:
    """Return the headers that let a receiver check a message.

    Args:
        message_id: Id of the message.
        sent_at: Seconds since 1970.
        body: What is sent.
        secrets: Each signs the message once.
    """
    content = f"{message_id}.{sent_at}.".encode() + body
    marks = [base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode() for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(sent_at),
        "webhook-signature": " ".join(f"v1,{mark}" for mark in marks),
    }
