"""The documents name only what exists: links, files, verbs, flags, and the core path in order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fledge import cli, cli_data, cli_tok, config, report

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "fledge"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./-]+\.(?:py|md|toml|lock|jinja|rs)")
# names of what the design plans or of what a run writes, which no clone holds
NOT_IN_THE_TREE = {"report.md", "samples.md", "resolved.json"}
NOT_IN_THE_TREE |= {"mine.toml", "recipe.toml", "modeling_fledge.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path):
    for target in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_named_in_code_exist(document: Path):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for code in CODE.findall(text):
        if not FILE.fullmatch(code) or code in NOT_IN_THE_TREE:
            continue
        found = any((root / code).exists() for root in (ROOT, PACKAGE, document.parent))
        # a bare name in a table of one folder's files
        assert found or ("/" not in code and list(PACKAGE.rglob(code))), code


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_are_plain_ascii(document: Path):
    text = document.read_text(encoding="utf-8")
    assert text.isascii(), sorted({c for c in text if not c.isascii()})


def test_the_readme_maps_every_folder():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and not folder.name.startswith("__"):
            assert f"python/fledge/{folder.name}/" in readme, folder.name


def commands(text: str) -> list[list[str]]:
    """Every `fledge ...` in code, as its words, without comments."""
    lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    lines += CODE.findall(FENCE.sub("", text))
    starts = ("fledge ", ".venv/bin/fledge ", "python -m fledge ")
    found = []
    for line in lines:
        words = line.partition(" #")[0].strip()
        if words.startswith(starts) and not words.startswith("fledge: "):
            found.append(words.split("fledge", 1)[1].split())
    return found


def flags_in(words: list[str]) -> list[str]:
    flags = (word.partition("=")[0].strip("[]`.,;:") for word in words)
    return [flag for flag in flags if re.match(r"-{1,2}[a-z]", flag)]


def settings() -> set[str]:
    """Every --section.key."""
    import dataclasses

    recipe = config.Recipe()
    return {
        f"--{section.name}.{key.name}"
        for section in dataclasses.fields(recipe)
        for key in dataclasses.fields(getattr(recipe, section.name))
    }


SUB_VERBS = {
    "data": ("list", "download", "make", "check", "show", "overlap", "stats"),
    "tok": ("train", "eval", "encode", "decode", "bench"),
}


@pytest.fixture(scope="module")
def help_of():
    """The flags that `fledge VERB [SUB] --help` lists, asked once each."""
    known: dict[tuple[str, ...], set[str]] = {}

    def ask(*verb: str) -> set[str]:
        if verb not in known:
            done = subprocess.run(
                [sys.executable, "-m", "fledge", *verb, "--help"],
                cwd=ROOT,
                env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert done.returncode == 0, done.stderr
            known[verb] = set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w.-]*", done.stdout))
        return known[verb]

    return ask


def test_sub_verbs_are_those_of_the_program():
    for verb, subs in SUB_VERBS.items():
        for sub in subs:
            assert re.search(rf"\b{sub}\b", cli.VERBS[verb].usage), (verb, sub)
            module = {"data": cli_data, "tok": cli_tok}[verb]
            assert hasattr(module, f"_{sub}"), sub


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_use_verbs_and_flags_that_exist(document: Path, help_of):
    for words in commands(document.read_text(encoding="utf-8")):
        if words[0] in ("VERB", "--help", "--version"):
            continue
        assert words[0] in cli.VERBS, " ".join(words)
        verb = words[:1]
        if words[0] in SUB_VERBS and words[1:]:
            assert words[1] in SUB_VERBS[words[0]] or not words[1][0].isalpha(), words
            verb = words[:2]
        for flag in flags_in(words):
            if "." in flag:
                assert flag in settings() and words[0] in ("run", "plan"), " ".join(words)
            elif flag != "--help":
                assert flag in help_of(*verb), f"{flag} in: fledge {' '.join(words)}"


def test_flags_that_the_readme_names_alone_exist(help_of):
    readme = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    anywhere = settings() | {"--section.key"}
    for verb in cli.VERBS:
        anywhere |= help_of(verb)
    for code in CODE.findall(readme):
        if code.startswith("-"):
            assert code.split()[0] in anywhere, code


def test_recipes_named_exist():
    for document in DOCUMENTS:
        for words in commands(document.read_text(encoding="utf-8")):
            named = words[1:2] if words[0] in ("run", "plan") else []
            if named and named[0].isalpha() and named[0].islower():
                assert named[0] in config.builtin_recipes(), " ".join(words)


def test_the_readme_lists_every_verb():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in cli.VERBS:
        assert f"| `fledge {verb} " in readme or f"| `fledge {verb}`" in readme, verb


def test_the_tour_reads_the_core_path_in_order():
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    read = re.findall(r"^\d+\. `([^`]+)`", tour, re.MULTILINE)
    assert read == list(report.CORE_PATH), "docs/tour.md and report.CORE_PATH must name the same"
