"""Detecting and hiding secrets."""

import time

import pytest

from llama_stack_provider_moe.ground.redaction import (
    holds_secret,
    known_secrets,
    names_secret,
    scrubbed,
    without_passwords,
)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True), ("dbPassword", True),
        ("PGPASSWORD", True), ("MYSQL_PWD", True), ("SLACK_WEBHOOK_URL", True), ("MLFLOW_TRACKING_PASSWORD", True),
        ("APIKEY", True), ("hf-token", True), ("SENTRY_DSN", True), ("GITHUB_PAT", True),
        ("TOKENIZERS_PARALLELISM", False), ("HF_TOKEN_PATH", False), ("PGPASSFILE", False), ("SSH_KEY_DIR", False),
        ("PWD", False), ("PATH", False), ("NCCL_IB_PKEY", False), ("HF_HOME", False), ("PYTORCH_ALLOC_CONF", False),
        ("COMPASS", False), ("", False),
    ],
)  # fmt: skip
def test_names_that_say_so(name: str, secret: bool) -> None:
    assert names_secret(name) is secret


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1", False), ("HF_TOKEN", "hf_abc", True), ("X_TOKEN", "", False),
        ("MLFLOW_TRACKING_URI", "https://ann:pw@mlflow.internal", True), ("HTTPS_PROXY", "http://u:p@proxy:3128", True),
        ("MLFLOW_TRACKING_URI", "https://mlflow.internal:5000", False),
    ],
)  # fmt: skip
def test_values_that_are_secret(name: str, value: str, secret: bool) -> None:
    assert holds_secret(name, value) is secret


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql+psycopg://moe:pw@db/x", "postgresql+psycopg://moe:***@db/x"),
        ("postgresql://moe:p@s/s:w@db/x", "postgresql://moe:***@db/x"),
        ("at 'http://u:pw@host:80/a', then", "at 'http://u:***@host:80/a', then"),
        ("https://hf_token@hub/x", "https://***@hub/x"),
        ("GET https://s3/x?X-Amz-Signature=abc&part=1", "GET https://s3/x?X-Amz-Signature=***&part=1"),
        ("redis://:pw@host", "redis://:***@host"),
        ("http://127.0.0.1:8265/ of me@x.org", "http://127.0.0.1:8265/ of me@x.org"),
        ('{"url":"http://a:80","owner":"a@b"}', '{"url":"http://a:80","owner":"a@b"}'),
        ("postgresql://moe@db/x, step 3: loss 0.1", "postgresql://moe@db/x, step 3: loss 0.1"),
    ],
)
def test_urls_lose_their_passwords(text: str, hidden: str) -> None:
    assert without_passwords(text) == hidden


def test_known_values_are_hidden_wherever_they_stand() -> None:
    secrets = known_secrets(
        {"HF_TOKEN": "hf_0123456789", "LONG_TOKEN": "hf_0123456789abc", "CUSTOM": "planted-value", "A_KEY": "short",
         "HOME": "/root/home-folder"}, ["CUSTOM"],
    )  # fmt: skip
    text = "401 for hf_0123456789abc, hf_0123456789 and planted-value in /root/home-folder, short"
    assert scrubbed(text, secrets) == "401 for ***, *** and *** in /root/home-folder, short"


@pytest.mark.parametrize("text", ["x" * 200_000, "a.b-" * 50_000, "see " * 50_000], ids=["word", "parts", "words"])
def test_a_long_text_takes_no_longer_by_the_letter(text: str) -> None:
    """Every event of a job is scrubbed, and rows of a user may be in it: 30 s were needed for such a word."""
    start = time.process_time()
    assert scrubbed(text + " postgresql://moe:pass@host", ()) == text + " postgresql://moe:***@host"
    assert time.process_time() - start < 3
