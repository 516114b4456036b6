"""A job on a file of 2 GB behind S3: what reading it costs the server, from the submission to the first step.

Serves `run_configs/ogx.yaml` by `ogx run`, from the environment that `make hosts` makes, with the host's files in a
small S3 server on this machine's disk. A file is uploaded to the host; then its object in S3 becomes a file of 2 GB. A
job of one step trains a tiny Mixture-of-Experts model on it: the host's S3 client reads the file, the server checks
each row and writes it to the job's folder, and the training process tokenises them all. A row of 20 KB has 2 KB of
prompt and completion; the rest is a column that no job reads. Meanwhile the server's memory is sampled, and another
client asks for its health. S3 server, host and training share the machine.

    python -m benchmarks.s3_file [--bytes N] [--out FILE]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.bring_data import WORDS, Watch, rows
from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.control.cli.hosts import HostName
from llama_stack_provider_moe.jobdir.events import now
from tests.support import host_results, tiny_models
from tests.support.host_harness import Server
from tests.support.other_hosts import ALL, serving_on, upload

PIECE_BYTES = 1 << 20
SAME_ROWS = 1000
UNREAD_BYTES = 18_000
LIMIT_S = 3600.0
AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1"}


class _Bucket(BaseHTTPRequestHandler):
    """As much of S3 as the host's provider of files asks for: objects are files of `folder`."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def _path(self) -> Path:
        return self.folder / Path(urlsplit(self.path).path).name

    def _begin(self, status: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"0"')
        self.end_headers()

    def do_PUT(self) -> None:
        self._path().write_bytes(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self._begin(200, 0)

    def do_HEAD(self) -> None:
        path = self._path()
        self._begin(200, path.stat().st_size if path.is_file() else 0)

    def do_GET(self) -> None:
        path = self._path()
        if not path.is_file():
            self._begin(404, 0)
            return
        self._begin(200, path.stat().st_size)
        with path.open("rb") as file:
            shutil.copyfileobj(file, self.wfile, PIECE_BYTES)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """The address of an S3 server whose one bucket is a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bucket", (_Bucket,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def model(folder: Path) -> None:
    """A tiny model whose tokenizer splits at spaces, so that 2 GB are tokenised in minutes."""
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    tiny_models.build("granitemoe", folder)
    known = ["<|pad|>", "<|im_end|>", "<|unknown|>", *WORDS]
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<|unknown|>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=tiny_models.CHATML
    ).save_pretrained(folder)


def write(path: Path, size: int) -> int:
    """Write JSON Lines of about `size` bytes; returns the number of rows."""
    source = " ".join(WORDS * (UNREAD_BYTES // len(" ".join(WORDS))))
    block = [json.dumps({**row, "source": source}).encode() + b"\n" for row in rows(SAME_ROWS)]
    repeats = max(1, size // sum(map(len, block)))
    with path.open("wb") as file:
        for _ in range(repeats):
            file.writelines(block)
    return SAME_ROWS * repeats


def train(server: Server, file_id: str, count: int) -> dict[str, Any]:
    """Submit a job of one step, wait for its end, and return the figures."""
    body = {
        "recipe": "sft", "model": "tiny", "job_uuid": "large", "data": {"dataset_id": file_id},
        "training": {"n_epochs": 1, "batch_size": 8, "max_steps_per_epoch": 1, "max_validation_steps": 1},
        "adapter": {"rank": 2}, "options": {"max_length": 512, "validation_split": 0.001},
    }  # fmt: skip
    with server.http(timeout_s=LIMIT_S) as http, Watch(server) as watch:
        began = time.perf_counter()
        answer = http.post("/jobs", json=body)
        submitted_s = time.perf_counter() - began
        assert answer.status_code == 200, answer.text
        while True:
            job = http.get("/jobs/large").json()
            if job["completed_at"]:
                break
            assert time.perf_counter() - began < LIMIT_S, "the job does not end"
            time.sleep(1)
        ended_s = time.perf_counter() - began
        losses = http.get("/jobs/large/metrics").json()["metrics"]["loss"]
    assert job["status"] == "completed", job.get("reason")
    assert job["sources"]["train"]["rows"] == count
    assert len(losses) == 1
    return {"rows": count, "seconds_to_accept": round(submitted_s, 1), "seconds_to_complete": round(ended_s, 1),
            "loss": losses[0], **watch.figures()}  # fmt: skip


def measure(folder: Path, size: int) -> dict[str, Any]:
    """Train on a file of `size` bytes."""
    host = next(each for each in ALL if each.name is HostName.OGX)
    bucket = folder / "bucket"
    bucket.mkdir()
    with s3(bucket) as address:
        config = {
            "bucket_name": "bucket", "region": "us-east-1", "endpoint_url": address, "aws_access_key_id": "key",
            "aws_secret_access_key": "secret", "metadata_store": {"table_name": "s3_files", "backend": "sql_default"},
        }  # fmt: skip
        stack = {"providers": {"files": [{"provider_id": "s3", "provider_type": "remote::s3", "config": config}]}}
        provider = {
            "training_python": sys.executable,
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"poll_s": 0.5},
        }
        with serving_on(host, folder, provider, stack, env=AWS) as server:
            model(server.state_dir / "models" / "tiny")
            first = b"".join(json.dumps(row).encode() + b"\n" for row in rows(100))
            file_id = upload(server, host, first)
            with server.http() as http:  # loads what the first read of a file loads
                body = {"recipe": "sft", "model": "tiny", "data": {"dataset_id": file_id}}
                http.post("/jobs/validate", json=body).raise_for_status()
            count = write(bucket / file_id, size)
            stored = (bucket / file_id).stat().st_size
            return {"bytes": stored, **train(server, file_id, count), "host": host_results.versions(host)}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2 * 10**9, help="size of the file (default: 2 GB)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"s3_file_{now():%Y-%m-%d}.json", help="result file")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.bytes)
    print(json.dumps(figures, indent=1))
    result = {
        "what": f"a job of one step on a file of {figures['bytes']:,} bytes ({figures['rows']:,} rows) in S3, on "
        "ogx run run_configs/ogx.yaml",
        "time": now().isoformat(timespec="seconds"),
        "figures": figures,
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions("llama-stack-provider-moe", "torch", "transformers", "tokenizers"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
