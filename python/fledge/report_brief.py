"""The report in brief: ten questions that everybody asks of a run, and what its words mean.

Called by `fledge.report_blocks`, which puts the table below the first paragraph and the glossary at
the end. Every answer is read from a file of the run; what a run does not tell (older ones lack the
command, say) is said to be unknown. It writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fledge import files
from fledge.config import STAGES, TRAINED_STAGES, builtin_recipes, expected_of, parse_recipe
from fledge.progress import format_count, format_seconds
from fledge.report_pages import Block, Heading, Listing, Paragraph, Table
from fledge.report_trouble import DAMAGED, troubles
from fledge.run import Run
from fledge.stats import format_interval

NOT_KEPT = "not known: this run was made by a version that did not keep it"


def brief_blocks(run: Run, facts: Mapping[str, Any]) -> list[Block]:
    """The ten questions and, where a recipe's header expects something, its words."""
    table = Table(["question", "answer"], answers(run, facts))
    return [Heading("In brief"), table, *expected_blocks(run)]


def answers(run: Run, facts: Mapping[str, Any]) -> list[list[str]]:
    """The ten questions, each with its answer."""
    return [
        ["What was trained?", trained_text(run, facts)],
        ["On what?", read_text(run, facts)],
        ["How many passes over it?", passes_text(run, facts)],
        ["How long did it take?", time_text(run, facts)],
        ["With which context length?", context_text(run)],
        ["How good is it?", good_text(facts)],
        ["Compared with what?", compared_text(run, facts)],
        ["What went wrong?", trouble_text(run, facts)],
        ["How was it started?", command_text(run)],
        ["From which source tree?", source_text(run)],
    ]


# -- what -----------------------------------------------------------------------------------------


def trained_text(run: Run, facts: Mapping[str, Any]) -> str:
    """The network and the stages that raised it."""
    model = run.model
    done = [stage for stage in TRAINED_STAGES if "tokens" in facts["stages"].get(stage, {})]
    tokens = ", ".join(
        f"{stage} {format_count(facts['stages'][stage]['tokens'])}" for stage in done
    )
    return (
        f"A language model of the {model.arch} shape from random weights: "
        f"{facts['model']['parameters']:,} parameters, {model.num_hidden_layers} layers of width "
        f"{model.hidden_size}, {model.vocab_size:,} different tokens. "
        + (f"Tokens by stage: {tokens}." if done else "Nothing was trained yet.")
    )


def corpus(run: Run) -> dict[str, Any]:
    """What base reads: corpus.json, or what stage.json of an older run tells of it."""
    if run.corpus_file.is_file():
        return files.read_json(run.corpus_file, fix=DAMAGED)
    told: dict[str, Any] = {}
    if (source := run.values["data.source"]) is not None:
        told["source"] = source
    else:
        told |= {"world": run.values["data.world"], "seed": run.values["data.seed"]}
    data = (run.read_stage("base") or {}).get("parts", {}).get("data", {})
    if source is None and "facts" in data.get("world", {}):
        told["facts"] = data["world"]["facts"]
    sizes = [row[1] for row in data.get("text", ()) if len(row) == 3 and isinstance(row[1], int)]
    return told | ({"files": len(sizes), "stored_bytes": sum(sizes)} if sizes else {})


def bytes_per_token(run: Run) -> float | None:
    """How much text a token covers, as the tokenizer stage measured it."""
    if not run.tokenizer_stats_file.is_file():
        return None
    stats = files.read_json(run.tokenizer_stats_file, fix=DAMAGED)
    return stats["bytes_per_token"] or None


def read_text(run: Run, facts: Mapping[str, Any]) -> str:
    """Name and size of the corpus, in bytes and tokens, and what the chat stages read."""
    known, per_token = corpus(run), bytes_per_token(run)
    if "source" in known:
        told = f"The text in {known['source']}: {_size_text(known, per_token)}."
    else:
        facts_known = f"{known['facts']:,} facts, " if "facts" in known else ""
        told = (
            f"The built-in world {known['world']} ({facts_known}seed {known['seed']}): text made "
            "anew from its facts, without end."
        )
    read = facts["stages"].get("base", {}).get("tokens")
    if read is not None:
        size = f", about {_bytes(read * per_token)} of text" if per_token else ""
        told += f" Base read {format_count(read)} tokens of it{size}."
    chats = [stage for stage in ("mid", "sft") if run.mixture_file(stage).is_file()]
    if chats:
        told += f" Then conversations: see what {' and '.join(chats)} read."
    return told


def _size_text(known: Mapping[str, Any], per_token: float | None) -> str:
    if "bytes" in known:
        tokens = known["bytes"] / per_token + known["documents"] if per_token else None
        about = f", about {format_count(tokens)} tokens" if tokens else ""
        return f"{_bytes(known['bytes'])} of text in {known['documents']:,} documents{about}"
    stored = known.get("stored_bytes")
    parts = [f"{known[key]:,} {key}" for key in ("shards", "files") if key in known]
    if stored is None:
        return ", ".join(parts) or "its size is not kept"
    return f"{_bytes(stored)} in {parts[0]} as they are stored (often compressed)"


def _bytes(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def passes_text(run: Run, facts: Mapping[str, Any]) -> str:
    """How often base's corpus was gone through, and the most that a chat stage repeats."""
    known, per_token = corpus(run), bytes_per_token(run)
    read = facts["stages"].get("base", {}).get("tokens")
    if "source" not in known:
        told = "Base: none, for the text has no end and no document comes twice; its facts do."
    elif "passes" in known:
        told = f"Base: {known['passes']:.2f} ({known['documents_read']:,} documents)."
    elif "bytes" in known and per_token and read is not None:
        whole = known["bytes"] / per_token + known["documents"]
        told = f"Base: about {read / whole:.2f}."
    else:
        told = "Base: not known, for the text was not counted."
    for stage in ("mid", "sft"):
        if not run.mixture_file(stage).is_file():
            continue
        kinds = files.read_json(run.mixture_file(stage), fix=DAMAGED)
        passes = {k: row["epochs"] for k, row in kinds.items() if isinstance(row, dict)}
        finite = {k: value for k, value in passes.items() if value is not None}
        if finite:
            most = max(finite, key=lambda kind: finite[kind])
            told += f" {stage}: at most {finite[most]:.2f}, of {most}."
        elif passes:
            told += f" {stage}: none, for all its conversations are made anew."
        else:
            told += f" {stage}: not kept by the version that made this run."
    return told


def time_text(run: Run, facts: Mapping[str, Any]) -> str:
    """Actual and planned time of the whole run, and when it began."""
    seconds = sum(stage["seconds"] for stage in facts["stages"].values())
    planned, machine = run.resolved["estimates"]["seconds"], run.resolved["hardware"]["name"]
    unfinished = any(s["status"] != "done" for s in facts["stages"].values())
    left_out = {"rl"} if run.values["rl.steps"] == 0 else set()
    unfinished |= any(stage not in facts["stages"] and stage not in left_out for stage in STAGES)
    so_far = " so far" if unfinished else ""
    began = datetime.fromtimestamp(run.resolved["created"], UTC)
    text = (
        f"{format_seconds(seconds)}{so_far} on {machine}, of {format_seconds(planned)} planned"
        + (f" ({seconds / planned:.2f} times the plan)" if planned and not unfinished else "")
        + f"; begun {began:%Y-%m-%d %H:%M} UTC."
    )
    price = run.resolved["hardware"].get("dollars_per_hour")
    return text + (
        f" At {price:.2f} dollars an hour: {seconds / 3600 * price:.2f}." if price else ""
    )


def context_text(run: Run) -> str:
    """How far the model looks back."""
    context, per_token = run.model.max_position_embeddings, bytes_per_token(run)
    size = f", about {_bytes(context * per_token)} of text" if per_token else ""
    return f"{context:,} tokens{size}."


# -- how good, and compared with what -------------------------------------------------------------


def exams(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that are shares of right answers."""
    scores = stage.get("scores", {})
    return {
        task: s
        for task, s in scores.items()
        if s.get("unit") == "accuracy" and s.get("n") and not task.startswith("core/")
    }


def last_examined(facts: Mapping[str, Any]) -> str | None:
    """The furthest stage whose model took exams."""
    order = reversed(TRAINED_STAGES)
    return next((s for s in order if exams(facts["stages"].get(s, {}))), None)


def good_text(facts: Mapping[str, Any]) -> str:
    """The scores of the last examined model, with their intervals."""
    told, stages = [], facts["stages"]
    if (last := last_examined(facts)) is not None:
        scores = stages[last]["scores"]
        each = [
            f"{task} {format_interval(s['value'], s['low'], s['high'])}"
            for task, s in exams(stages[last]).items()
        ]
        told.append(f"After {last}, right answers: {', '.join(each)}.")
        if (composite := scores.get("chatcore")) and composite.get("low") is not None:
            value = format_interval(
                *(composite[k] for k in ("value", "low", "high")), percent=False
            )
            told.append(f"ChatCORE {value}.")
    for name in ("core_v1", "core_v1_partial"):
        found = [(s, t["scores"][name]) for s, t in stages.items() if name in t.get("scores", {})]
        for stage, s in found[-1:]:
            value = format_interval(s["value"], s["low"], s["high"], percent=False)
            told.append(f"CORE of {stage} {value}.")
    bpb = stages.get("base", {}).get("scores", {}).get("bpb")
    if bpb is not None:
        told.append(
            f"Base: {bpb['value']:.3f} bits per byte of unseen text (no interval, see Scores)."
        )
    return " ".join(told) or "Not examined yet."


def compared_text(run: Run, facts: Mapping[str, Any]) -> str:
    """Guessing, and for bits per byte what knowing nothing would cost."""
    told, stages = [], facts["stages"]
    if (last := last_examined(facts)) is not None:
        found = exams(stages[last])
        above = [task for task, s in found.items() if s["low"] > s["chance"]]
        below = [task for task in found if task not in above]
        told.append(
            f"Guessing (the column chance): {len(above)} of {len(found)} exams of {last} lie above "
            "it with their whole interval" + (f"; not {', '.join(below)}." if below else ".")
        )
    bpb, per_token = stages.get("base", {}).get("scores", {}).get("bpb"), bytes_per_token(run)
    if bpb is not None and per_token:
        nothing = math.log2(run.model.vocab_size) / per_token
        told.append(
            f"Bits per byte: {nothing:.2f} if every token were equally likely"
            + (f", {bpb['bound']:.3f} at best." if "bound" in bpb else ".")
        )
    expected, changed = expected_of_recipe(run)
    if expected is not None:
        told.append("What the recipe expects stands below.")
        if changed:
            told.append(f"This run changed {', '.join(changed)}, so it need not compare.")
    told.append("With another run: `fledge report RUN RUN2`.")
    return " ".join(told)


def expected_of_recipe(run: Run) -> tuple[str | None, list[str]]:
    """(what the header of the recipe expects, the settings that this run changed).

    An older run did not keep it: then this version's recipe of that name, if the run asked for
    exactly what it says.
    """
    origin = run.resolved.get("origin")
    if origin:
        return origin.get("expected"), origin.get("overrides", [])
    text = builtin_recipes().get(run.name)
    if text is None or parse_recipe(text, where=run.name) != run.asked:
        return None, []
    return expected_of(text), []


def expected_blocks(run: Run) -> list[Block]:
    """The words of the recipe's header, as they stand there."""
    expected, changed = expected_of_recipe(run)
    if expected is None:
        return []
    told = f"What the recipe {run.name} says is to be expected"
    if changed:
        told += f" (of the recipe as it is; this run changed {', '.join(changed)})"
    return [Paragraph(told + ":"), Listing(expected)]


# -- how it came about ----------------------------------------------------------------------------


def trouble_text(run: Run, facts: Mapping[str, Any]) -> str:
    """All that went wrong, or that nothing did."""
    told = [trouble.text for trouble in troubles(run, facts)]
    return (
        " ".join(told) or "Nothing: no failure, no interruption, no skipped batch, no missing task."
    )


def command_text(run: Run) -> str:
    """The command line that made the run."""
    command = run.resolved.get("origin", {}).get("command")
    return f"`{command}`" if command else f"The command is {NOT_KEPT}. Its recipe stands below."


def source_text(run: Run) -> str:
    """Revision of the code, and whether files of it were changed."""
    git, version = run.resolved.get("git"), run.resolved["versions"].get("fledge")
    if not git:
        return f"fledge {version} as it was installed, not a clone: no revision is known."
    state = "with uncommitted changes" if git["changed"] else "clean: no uncommitted change"
    return f"fledge {version}, git revision {git['revision'][:12]}, {state}."


# -- what the words mean --------------------------------------------------------------------------

WORDS = (
    ("tokenizer", "the first stage: learns which pieces of text become one number (token)"),
    ("base", "pretraining: the model learns to guess the next token of raw text"),
    ("mid", "midtraining: it learns the shape of conversations, multiple choice and tool calls"),
    ("sft", "supervised fine-tuning: a shorter polish on conversations; only answers are learnt"),
    ("rl", "reinforcement: it answers problems itself and learns from those that were right"),
    ("evaluate", "the exams, taken of the last checkpoint of each stage"),
    ("token, context", "a piece of text, and how many of them the model sees at once"),
    ("step", "one change of the weights, after one batch of tokens"),
    ("loss", "mean surprise at the token that came, in nats; less is better"),
    ("bpb", "bits per byte: the same surprise by byte of text, so that tokenizers compare"),
    ("MFU", "model FLOPs utilisation: useful arithmetic as a share of what the machine could do"),
    (
        "CORE",
        "mean of 22 tasks for base models, centred: 0 is guessing, 1 is all right (v1 and v2 "
        "differ in three baselines)",
    ),
    ("ChatCORE", "the same mean over the exams for chat models; its list stands beside it"),
    ("chance", "what guessing scores"),
    (
        "95 % interval",
        "where the score would lie with other questions of the same kind, 19 times of 20; another "
        "training run adds noise of its own",
    ),
)


def glossary_blocks() -> list[Block]:
    """The words of the report, one line each."""
    return [Heading("What the words mean"), Table(["word", "meaning"], [list(w) for w in WORDS])]
