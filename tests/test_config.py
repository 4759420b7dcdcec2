"""fledge.config: TOML in and out, and every mistake named with the nearest key."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge import config
from fledge.config import Recipe, parse_recipe, recipe_from_dict, recipe_to_dict, recipe_to_toml
from fledge.errors import UserError

_BY_TYPE = {
    int: st.integers(1, 10**6),
    float: st.floats(0.001, 1000, allow_nan=False),
    str: st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()),
    bool: st.booleans(),
    tuple[str, ...]: st.lists(st.sampled_from(["a", "b c", "d"])).map(tuple),
    dict[str, float]: st.dictionaries(st.sampled_from(["facts", "mc"]), st.floats(0.1, 9)),
}


def _strategy(hint: object) -> st.SearchStrategy:
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    inner = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):
        return st.none() | _strategy(inner[0])
    return _BY_TYPE[hint]  # type: ignore[index]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    sections = {}
    for name, kind in typing.get_type_hints(Recipe).items():
        hints = typing.get_type_hints(kind)
        chosen = {
            f.name: draw(_strategy(hints[f.name]))
            for f in dataclasses.fields(kind)
            if draw(st.booleans())
        }
        sections[name] = kind(**chosen)
    return Recipe(**sections)


@given(recipes())
@settings(max_examples=40, deadline=None)
def test_toml_round_trip(recipe: Recipe) -> None:
    assert parse_recipe(recipe_to_toml(recipe), where="test") == recipe
    assert recipe_from_dict(recipe_to_dict(recipe), where="test") == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\ndepht = 4", ["model.depht", "did you mean depth?"]),
        ("[modle]\ndepth = 4", ["[modle]", "did you mean model?"]),
        ("model = 4", ["is a section, not a value"]),
        ("[model]\ndepth = 4.5", ["model.depth", "a whole number"]),
        ("[model]\ndepth = true", ["model.depth", "a whole number"]),
        ('[base]\nmatrix_lr = "fast"', ["base.matrix_lr", "a number"]),
        ('[model]\narch = "gpt5"', ["model.arch", "qwen3"]),
        ("[evaluate]\nstages = [1]", ["evaluate.stages", "a list of strings"]),
        ('[mid]\nmixture = {facts = "x"}', ["mid.mixture", "a table of numbers"]),
        ("[model\ndepth = 4", ["not valid TOML"]),
    ],
)
def test_a_mistake_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, where="my.toml")
    for word in words:
        assert word in str(caught.value)
    assert "my.toml" in str(caught.value)


def test_whole_numbers_are_good_floats() -> None:
    value = parse_recipe("[base]\nmatrix_lr = 1", where="x").base.matrix_lr
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize("name", sorted(config.builtin_recipes()))
def test_builtin_recipes_load_and_have_a_header(name: str) -> None:
    assert config.load_recipe(name)[0] == name
    header = config.builtin_recipes()[name].split("\n[", 1)[0]
    for word in ("command", "hardware", "time", "cost", "expected"):
        assert f"#   {word}" in header
    assert "TBD" not in header and "TODO" not in header


def test_loading_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[model]\ndepth = 7\n")
    name, recipe = config.load_recipe(str(path))
    assert (name, recipe.model.depth) == ("mine", 7)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        config.load_recipe(str(path))
    with pytest.raises(UserError, match="did you mean quickstart"):
        config.load_recipe("quickstrat")


def test_every_key_is_explained() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(config))
    sections = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Section")
    ]
    assert len(sections) == 8
    for section in sections:
        body = section.body
        for place, node in enumerate(body):
            if isinstance(node, ast.AnnAssign):
                after = body[place + 1] if place + 1 < len(body) else None
                assert isinstance(after, ast.Expr), f"{section.name}.{ast.unparse(node.target)}"


def test_the_documentation_explains_every_key_in_the_same_words() -> None:
    import ast
    import inspect

    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    tree = ast.parse(inspect.getsource(config))
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    for section in dataclasses.fields(Recipe):
        body = classes[typing.get_type_hints(Recipe)[section.name].__name__]
        for place, node in enumerate(body):
            if isinstance(node, ast.AnnAssign) and section.name != "sft":
                docstring = body[place + 1]
                assert isinstance(docstring, ast.Expr)
                words = " ".join(ast.literal_eval(docstring.value).split())
                assert f"| `{section.name}.{ast.unparse(node.target)}` | {words} |" in text
    for name in config.builtin_recipes():
        assert f"| `{name}` |" in text
