"""Settings on the command line: `--section.key VALUE` words, checked and put into a recipe.

tyro reads the words by the types of `fledge.config.Recipe`; what it says of wrong ones is told in
our three parts. Called by `fledge.cli` and `fledge.cli_sweep`. Reads no files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from typing import Any

from fledge import config
from fledge.errors import UserError


def print_settings() -> None:
    """Every key of a recipe with what it means: the second half of `fledge run --help`."""
    _tyro(config.Recipe(), ["--help"])


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """(a verb's own words, the --section.key words with their values)."""
    sections = tuple(f"--{section}." for section in config.SECTIONS)
    own: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not re.match(r"--[a-z_]+\.", word):
            own.append(word)
            continue
        if not word.startswith(sections):
            section = word[2:].partition(".")[0]
            near = difflib.get_close_matches(section, [s[2:-1] for s in sections], n=1)
            raise UserError(
                f"unknown section in {word}",
                f"the sections are {', '.join(s[2:-1] for s in sections)}",
                f"did you mean --{near[0]}.{word.partition('.')[2]}?" if near else "see --help",
            )
        overrides.append(word)
        if "=" in word:
            continue
        many = _takes_many(word[2:])
        while position < len(words) and not words[position].startswith("--"):
            overrides.append(words[position])
            position += 1
            if not many:
                break
    return own, overrides


def _takes_many(key: str) -> bool:
    """Whether a key's value is several words: a list or a table."""
    section, _, name = key.replace("-", "_").partition(".")
    kinds = {f.name: str(f.type) for f in dataclasses.fields(config.SECTIONS[section])}
    return kinds.get(name, "").startswith(("tuple", "dict"))


def override(recipe: Any, words: list[str]) -> Any:
    """The recipe with `--section.key VALUE` words applied; UserError names what is wrong."""
    if not words:
        return recipe
    keys = [f"--{key}" for key in config.KEYS]
    for word in words:
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if word.startswith("--") and flag not in keys:
            near = difflib.get_close_matches(flag, keys, n=1)
            raise UserError(
                f"unknown setting {word}",
                "no recipe has such a key",
                f"did you mean {near[0]}?" if near else "see `fledge run --help`",
            )
    given = _tyro(_horizon(recipe, words), words)
    # through the TOML path once more: one place checks types and ranges
    return config.recipe_from_dict(config.recipe_to_dict(given), where="the command line")


def _horizon(recipe: Any, words: list[str]) -> Any:
    """The recipe without its own base.minutes, or tokens, where the command line gives the other.

    Only one of them can say how long base trains; what was typed last wins.
    """
    typed = {word.partition("=")[0].replace("-", "_").replace("__base", "base") for word in words}
    others = ("tokens", "tokens_per_param", "law")
    base = recipe.base
    if "base.minutes" not in typed and typed & {f"base.{name}" for name in others}:
        base = dataclasses.replace(base, minutes=None)
    elif "base.minutes" in typed:
        free = {name: None for name in others if f"base.{name}" not in typed}
        base = dataclasses.replace(base, **free)
    return dataclasses.replace(recipe, base=base)


def _tyro(default: Any, words: list[str]) -> Any:
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                type(default),
                default=default,
                args=words,
                prog="fledge run RECIPE",
                use_underscores=True,
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        text = re.sub("[\u2500-\u257f]+", " ", captured.getvalue())
        text = re.split(r"Argument helptext|For full helptext", text)[0]
        title, _, rest = " ".join(text.split()).partition(" " * 2)
        raise UserError(
            f"cannot read {' '.join(words)}", f"{title} {rest}".strip(), "see `fledge run --help`"
        ) from None
