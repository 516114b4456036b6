"""The documentation is tested: generated pages, the strict build, links, and what its blocks have a person type."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contracts import docs_reference
from tests.contracts.doc_blocks import (
    LANGUAGES,
    ROOT,
    SHELL,
    SITE,
    TOP_LEVEL,
    Block,
    blocks_of,
    commands_in_prose,
    prose_of,
    shell_lines,
)
from tests.contracts.doc_data import Unaccepted, parsed, require_accepted
from tests.contracts.doc_python import asks, require_calls, require_imports, run
from tests.contracts.doc_shell import Unknown, require_command, require_file, require_known, require_parses, segments

PAGES = [*TOP_LEVEL, *SITE]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CHECKED = [block for block in BLOCKS if block.unchecked is None]


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in CHECKED if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


@pytest.mark.parametrize("name", docs_reference.MAKERS)
def test_generated_pages_are_up_to_date(name: str) -> None:
    written = (docs_reference.PAGES / name).read_text(encoding="utf-8")
    assert written == docs_reference.page(name), "run `python -m tests.contracts.docs_reference`"


# The site.


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    zensical = Path(sys.executable).with_name("zensical")
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        [zensical, "build", "--strict"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "docs"


def test_the_site_is_built_strict(site: Path) -> None:
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in SITE}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}


def test_the_site_asks_no_other_machine(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?((?:https?:)?//[^\s\">]+)"
        r"|<link\b[^>]*\brel=\"?(?:stylesheet|preconnect|preload|icon)\"?[^>]*\bhref=\"?((?:https?:)?//[^\s\">]+)"
        r"|(?:@import|url\()\s*[\"']?((?:https?:)?//[^\s\"')]+)"
    )
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not loaded.findall(path.read_text(encoding="utf-8")), path.relative_to(site)
    assert list(site.rglob("*.css")), "the site has its own style sheets"


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of two pages whose link is right."""
    folder = tmp_path_factory.mktemp("two_pages")
    (folder / "mkdocs.yml").write_text("site_name: x\nsite_dir: build/docs\nnav: [index.md, two.md]\n")
    (folder / "docs").mkdir()
    (folder / "docs" / "two.md").write_text("# Two\n")
    (folder / "docs" / "index.md").write_text("# One\n\n[two](two.md#two)\n")
    assert build(folder).returncode == 0
    return folder


@pytest.mark.parametrize("link", ["nowhere.md", "two.md#nowhere"])
def test_a_broken_link_ends_the_build(link: str, two_pages: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_pages, tmp_path / "site")
    (folder / "docs" / "index.md").write_text(f"# One\n\n[two]({link})\n")
    assert build(folder).returncode != 0


def test_the_navigation_names_every_page_once() -> None:
    def leaves(tree: Any) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        parts = tree.values() if isinstance(tree, dict) else tree
        return [leaf for part in parts for leaf in leaves(part)]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in SITE)


# Links of the pages at the top level, which no site has: the build checks the others.


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings: as GitHub makes them at the top level, as the site does in docs/."""
    found: dict[str, int] = {}
    is_site = page.is_relative_to(ROOT / "docs")
    for heading in re.findall(r"^#+ +(.+?)(?: +#+)?$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).lower()
        kept = re.sub(r"[^\w\s-]", "", plain).strip()
        slug = re.sub(r"[\s-]+", "-", kept) if is_site else kept.replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}{'_' if is_site else '-'}{found[slug]}"] = 0
    return set(found)


def test_anchors_are_made_as_github_and_the_site_make_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A & B: `c_d`\n\n## A & B: `c_d`\n\n```sh\n# no heading\n```\n")
    assert slugs(page) == {"a--b-c_d", "a--b-c_d-1"}


@pytest.mark.parametrize("page", TOP_LEVEL, ids=lambda page: page.name)
def test_links_of_the_top_level_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(file), f"{page.name}: {target}"


# Blocks.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_fences_have_a_language_that_is_known(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@of("json", "jsonl", "yaml")
def test_data_is_accepted_by_our_models(block: Block) -> None:
    values = parsed(block.text, block.language)
    assert values
    for value in values:
        require_accepted(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}}', "job"),
        ('"adapter": {"rank": 8},\n"moe": {"train_router": true}', "part of a job"),
        ('"adapter": null', "part of a job"),
        ('"recipe": "dpo",\n"beta": 0.2', "part of a job"),
        ('{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user", "content": "a"}, '
         '{"role": "assistant", "content": "b"}]}', "row"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "row"),
        ('{"prompt": "a", "answer": "b", "refusal": false}', "row"),
        ('{"error": {"message": "no"}}', "error"),
        ('{"gguf": ["q8_0"]}', "export"),
        ('{"supervisor": {"stall_s": 60}}', "server configuration"),
    ],
)  # fmt: skip
def test_kinds_are_told_apart(text: str, kind: str) -> None:
    assert {require_accepted(value) for value in parsed(text, "json")} == {kind}


@pytest.mark.parametrize(
    "text",
    [
        '{"recipe": "sft", "model": "m"}',
        '{"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}, "training": {"n_epoch": 1}}',
        '"adapter": {"rank": 0}',
        '"recipe": "sft", "beta": 0.2',
        '{"prompt": "a", "chosen": "b", "rejected": "b"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"supervisor": {"stall": 60}}',
        '{"strange": 1}',
        '{"training_config": {"n_epochs": -1}}',
        "neither",
        "[]x",
    ],
)
def test_what_is_wrong_is_noticed(text: str) -> None:
    with pytest.raises(Unaccepted):
        list(map(require_accepted, parsed(text, "json")))


@of(*SHELL)
def test_shell_blocks_name_what_exists(block: Block) -> None:
    for line in shell_lines(block):
        for words in segments(line):
            require_known(words)
            if words[0] == "moe-train":
                require_parses(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_prose_exist(page: Path) -> None:
    for command in commands_in_prose(page):
        words = command.split()
        require_known(words) if words[0] == "make" else require_command(words[1:])


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_exist(page: Path) -> None:
    for word in re.findall(r"`([\w./-]+)`", prose_of(page)):
        require_file(word)


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_no_modules_of_the_package(page: Path) -> None:
    # Modules move; a reader needs none of them but the client, except an operator who looks for processes of an older
    # version.
    if page.name == "upgrades.md":
        return
    assert not re.findall(r"llama_stack_provider_moe[./](?!client\b)\w+", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "moe-train submti job.json",
        "moe-train submit job.json --folow",
        "moe-train ls | moe-train statsu x",
        "X=1 make demonstration",
        "python -m benchmarks.no_such",
        "cat job_templates/no_such.json",
        "moe-train status",
        "moe-train ls one two",
    ],
)
def test_what_does_not_exist_is_noticed(line: str) -> None:
    def check() -> None:
        for words in segments(line):
            require_known(words)
            require_parses(words[1:])

    with pytest.raises(Unknown):
        check()


def test_what_exists_is_let_pass() -> None:
    for line in (
        "moe-train submit job.json --set model=tiny --follow   # a comment",
        "MOE_TRAIN_URL=http://x:1 moe-train ls --limit 5 && make test",
        "moe-train export JOB --gguf q8_0 --wait",
        "python -m benchmarks.job_store > out.txt",
    ):
        for words in segments(line):
            require_known(words)


@of("python")
def test_python_compiles_and_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text, str(block))
    require_imports(tree, str(block))
    require_calls(tree, str(block))


def test_calls_that_a_client_lacks_are_noticed() -> None:
    good = ast.parse("client.beta.datasets.register(dataset_id='a', purpose='b', source={})")
    assert require_calls(good, "here") == 1
    for bad in ("client.beta.datasets.registr()", "client.beta.datasets.register(data_set='a')"):
        with pytest.raises(AssertionError):
            require_calls(ast.parse(bad), "here")
    with pytest.raises(ModuleNotFoundError):
        require_imports(ast.parse("import no_such_module"), "here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_runs_where_no_server_is_asked(page: Path, tmp_path: Path) -> None:
    chosen = [block for block in CHECKED if block.page == page and block.language == "python"]
    quiet: list[Block] = []
    for block in chosen:
        if asks(block):
            break
        quiet.append(block)
    if quiet:
        run(quiet, tmp_path)


def test_blocks_are_read_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    excused = "a\n\n<!-- unchecked: because -->\n\n```json\n{}\n```\n"
    page.write_text(excused + "\n- b\n\n    ```sh\n    $ x \\\n      y\n    out\n    ```\n")
    one, two = blocks_of(page)
    assert (one.language, one.text, one.unchecked, one.line) == ("json", "{}", "because", 5)
    assert (two.language, two.unchecked, list(shell_lines(two))) == ("sh", None, ["x    y"])
