"""The table of a mixture, passes instead of weights, and rows shown as they are trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fledge import cli
from fledge.config import parse_recipe
from fledge.errors import UserError
from fledge.plan.planner import resolve
from fledge.stages import mixture
from fledge.stages.material import open_material
from fledge.stages.own_files import stage_manifest
from tests.helpers_model import tiny_tokenizer
from tests.helpers_run import TWO_CORES, open_run

TOKENIZER = tiny_tokenizer()


def recipe_with(tmp_path: Path, more: str = ""):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}]}
        for i in range(30)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(f'[sft]\nfiles = ["{path}"]\n{more.format(path=path)}', where="test"), path


def test_the_table_says_tokens_and_passes(tmp_path):
    recipe, path = recipe_with(
        tmp_path, 'mixture = {{ facts = 0.5, prose = 0.25, "{path}" = 0.25 }}'
    )
    documents, shares = open_material(recipe).chats("sft", "train", TOKENIZER, max_tokens=256)
    table = mixture.measure(documents, shares, 100_000)
    assert list(table) == ["facts", "prose", str(path)]
    own = table[str(path)]
    assert own.rows == 30 and own.epochs == pytest.approx(own.conversations / 30)
    assert own.trained == 2.0, "a letter and the end token"
    assert table["facts"].rows is None and table["facts"].epochs is None
    assert table["prose"].trained == table["prose"].tokens
    assert sum(row.token_share for row in table.values()) == pytest.approx(1.0)
    tokens = sum(row.conversations * row.tokens for row in table.values())
    assert tokens == pytest.approx(100_000, rel=0.01)
    lines = mixture.lines(table)
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "endless" in lines[1]


def test_passes_give_weights(tmp_path):
    recipe, path = recipe_with(tmp_path, 'epochs = {{ "{path}" = 2 }}')
    _, shares = open_material(recipe).chats("sft", "train", TOKENIZER, max_tokens=256)
    assert shares == {str(path): 1.0}
    recipe, _ = recipe_with(tmp_path, "epochs = {{ facts = 2 }}")
    with pytest.raises(UserError, match="epochs of facts"):
        open_material(recipe).chats("sft", "train", TOKENIZER, max_tokens=256)
    recipe, _ = recipe_with(tmp_path, "epochs = {{ fact = 2 }}")
    with pytest.raises(UserError, match=r"sft\.epochs names"):
        open_material(recipe)
    recipe, _ = recipe_with(tmp_path, "epochs = {{ facts = 2 }}\nmixture = {{ facts = 1 }}")
    with pytest.raises(UserError, match="both say how much"):
        resolve(recipe, TWO_CORES)


def test_rows_are_shown_with_what_is_learnt(tmp_path, capsys):
    run = open_run(tmp_path / "run")
    TOKENIZER.save(run.tokenizer_dir)
    run.close()
    assert cli.main(["data", "show", str(run.path), "--rows", "3", "--colour", "marks"]) == 0
    shown = capsys.readouterr().out
    rows = re.split(r"^row \d: .*\n", shown, flags=re.MULTILINE)[1:]
    assert len(rows) == 3
    learnt = re.findall(r"\[\+(.*?)\+\]", shown, flags=re.DOTALL)
    chats = [text for text in learnt if not text.startswith("<|bos|>")]  # the others are prose
    assert chats and all("user_start" not in text for text in chats)
    assert any(text.endswith("<|assistant_end|>") for text in chats)
    plain = shown.replace("[+", "").replace("+]", "")
    assert cli.main(["data", "show", str(run.path), "--rows", "3", "--colour", "ansi"]) == 0
    assert re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out) == plain
    assert cli.main(["data", "show", str(run.path), "--rows", "1", "--colour", "html"]) == 0
    assert "&lt;|assistant_end|&gt;</b>" in capsys.readouterr().out
    assert cli.main(["data", "show", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err


def test_a_persona_takes_the_place_of_identity(tmp_path):
    recipe = parse_recipe('[sft]\npersona = "terse"', where="test")
    material = open_material(recipe)
    documents, shares = material.chats("sft", "train", TOKENIZER, max_tokens=256)
    assert "identity" not in shares and shares["persona"] == pytest.approx(0.1 / 1.1)
    told = {stage: stage_manifest(recipe, stage) for stage in ("base", "mid", "sft", "rl")}
    assert [name for name, table in told.items() if table] == ["sft"]
    other = parse_recipe('[sft]\npersona = "warm"', where="test")
    assert stage_manifest(other, "sft").keys() == told["sft"].keys()
    assert stage_manifest(other, "sft") != told["sft"]
    assert material.talks("sft", 2).persona == material.talks("rl", 2).persona
    assert material.talks("mid", 2).persona is None
    held, _ = material.chats("sft", "val", TOKENIZER, max_tokens=256)
    at = list(shares).index("persona")
    pieces = [d.sources[at].piece(0)[0].tolist() for d in (documents, held)]  # type: ignore[attr-defined]
    assert pieces[0] != pieces[1]
    # beside passes over kinds, and where identity was all there was
    more = 'persona = "terse"\n'
    for text in ('epochs = {{ "{path}" = 2 }}', "mixture = {{ identity = 1 }}"):
        recipe, _ = recipe_with(tmp_path, more + text)
        _, shares = open_material(recipe).chats("sft", "train", TOKENIZER, max_tokens=256)
        assert shares["persona"] > 0 and "identity" not in shares
    with pytest.raises(UserError, match="there is no persona"):
        open_material(parse_recipe('[mid]\npersona = "nobody"', where="test"))
