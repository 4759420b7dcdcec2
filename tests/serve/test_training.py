"""Cards and the training panel: what a run's files become, and that nothing else is ever served."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fledge.report import gather
from fledge.run import Run
from fledge.serve import cards, training
from fledge.serve.settings import Settings
from tests.helpers_run import do_stage, finished_run, open_run, write_training
from tests.serve.browser import a_page, press, say, until
from tests.serve.fake import fake_server
from tests.serve.test_http import ask

CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 1024}


@pytest.fixture
def run(tmp_path) -> Run:
    """A finished run with a report."""
    made = finished_run(tmp_path / "runs" / "small")
    made.report_file("json").write_text(json.dumps(gather(made)))
    for stage in ("sft", "rl"):  # a real transcript carries how sure the model was
        path = made.task_samples_file(stage, "world_facts")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"logprobs": [-1 + i / 10]} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_a_card_tells_shape_sizes_scores_and_questions(run):
    card = cards.card_of(CONFIG, run, "rl")
    assert (card["stage"], card["num_hidden_layers"], card["run"]) == ("rl", 2, "tiny")
    assert card["model"]["training_tokens"] == 3 * 40 * 2048 + 40 * 2048
    assert card["scores"]["rl"]["world_facts"]["value"] == 0.8
    assert card["scores"]["sft"]["world_math"]["value"] == 0.6
    assert [s["exam"] for s in card["suggestions"]] == ["world_facts", "world_math"]
    assert cards.card_of(CONFIG, run, "base")["suggestions"] == []
    assert cards.card_of(CONFIG, None, None) == {"stage": None, **CONFIG}


def test_only_right_answers_become_suggestions(run):
    """The correct one of which the model was surest; wrong, long and broken rows never."""
    path = run.task_samples_file("rl", "world_facts")
    rows = [
        {"question": "wrong?", "correct": False, "logprobs": [-0.01]},
        {"question": "unsure?", "correct": True, "logprobs": [-0.01, -2.0]},
        {"question": "sure?", "correct": True, "logprobs": [-0.2, -0.3]},
        {"question": "long" * 99, "correct": True, "logprobs": [-0.01]},
        {"question": "two\nlines?", "correct": True, "logprobs": [-0.01]},
        {"question": 7, "correct": True, "logprobs": [-0.01]},
        {"question": "odd?", "correct": True, "logprobs": ["-0.01"]},
        {"question": "odder?", "correct": True, "logprobs": -0.01},
        ["no object"],
    ]
    path.write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert cards.suggestions(run, "rl")[0] == {"question": "sure?", "exam": "world_facts"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"model": {}, "stages": 3}'])
def test_a_broken_report_only_shortens_the_card(run, content):
    run.report_file("json").write_text(content)
    assert cards.card_of(CONFIG, run, "rl").get("scores") is None


def test_an_overview_of_a_finished_run(run):
    seen = training.overview(run)
    assert seen["running"] is False and seen["seconds_left"] is None
    assert {s["stage"]: (s["status"], s["step"]) for s in seen["stages"]} == {
        "tokenizer": ("done", None), "base": ("done", 40), "mid": ("done", 40),
        "sft": ("done", 40), "rl": ("done", 40), "evaluate": ("done", None),
    }  # fmt: skip


def test_a_run_at_work_tells_the_time_left(tmp_path):
    """The running stage by its own estimate, those to come by the plan at the pace so far."""
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")  # took 1.5 s
        run.begin_stage("base", run.stage_parts("base", data={}))
        write_training(run, "base", steps=30)  # 0.1 s each
        with run.metrics_file("base").open("a") as rows:
            rows.write('{"step": 31, "seconds": 0.1, "loss": 1.2, "eta": 6.9}\n{"step": 3')
        seen = training.overview(run)
        plan = run.resolved["estimates"]["stages"]
        pace = (1.5 + 3.1 + 6.9) / (plan["tokenizer"]["seconds"] + plan["base"]["seconds"])
        later = sum(plan[s]["seconds"] for s in ("mid", "sft", "rl", "evaluate") if s in plan)
        assert seen["running"] is True
        assert seen["seconds_left"] == pytest.approx(6.9 + later * pace, abs=0.1)
        base = next(s for s in seen["stages"] if s["stage"] == "base")
        assert (base["status"], base["step"], base["eta"]) == ("running", 31, 6.9)


def test_a_run_whose_process_died_is_not_running(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.begin_stage("base", run.stage_parts("base", data={}))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, check=True, text=True)  # fmt: skip
    (run.path / ".lock").write_text(gone.stdout)
    assert not run.is_worked_on() and training.overview(run)["running"] is False
    (run.path / ".lock").write_text(f"{os.getpid()}\n")
    assert run.is_worked_on()
    for broken in ("", "no pid", "9" * 40):
        (run.path / ".lock").write_text(broken)
        assert not run.is_worked_on()


def test_curves_are_thinned_and_keep_their_end(run):
    with run.metrics_file("sft").open("w") as rows:
        for step in range(1, 5001):
            rows.write(json.dumps({"step": step, "loss": 5000 - step, "bpb": None}) + "\n")
        rows.write('{"step": 5001, "loss": NaN}\n{"step": 5002, "loss": "high"}\ncut of')
    seen = training.detail(run, "sft")
    points = seen["curves"]["loss"]
    assert set(seen["curves"]) == {"loss"} and len(points) <= training.POINTS
    assert points[-1][0] == 5000 and points[0][1] > points[-1][1]
    assert training.detail(run, "base")["samples"].startswith("# What base writes")


def test_nothing_outside_the_run_is_read(run, tmp_path):
    """Links that lead out of the run are as good as missing files."""
    secret = tmp_path / "secret"
    secret.write_text('{"step": 1, "loss": 1.0, "question": "secret", "correct": true}\n')
    for path in (run.samples_file("sft"), run.metrics_file("sft"), run.report_file("json"),
                 run.task_samples_file("sft", "world_facts")):  # fmt: skip
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    assert training.detail(run, "sft") == {"stage": "sft", "curves": {}, "samples": ""}
    assert "secret" not in json.dumps(cards.card_of(CONFIG, run, "sft"))


@pytest.fixture
def served_run(toy, run):
    made = fake_server(toy, Settings())
    model = made.server.context.models.first
    model.run, model.card = run, cards.card_of(CONFIG, run, "rl")
    with made.server:
        yield made


def test_only_names_of_served_models_are_known(served_run):
    assert ask(served_run.url, "GET", "/runs/fake")[0] == 200
    assert ask(served_run.url, "GET", "/runs/fake/sft")[0] == 200
    for path in ("/runs/", "/runs/other", "/runs/tiny",
                 "/runs/..", "/runs/fake/..", "/runs/fake/../../secret",
                 "/runs/fake/sft/", "/runs/fake/evaluate", "/runs/fake/%2e%2e",
                 "/runs/fake/sft/log.txt",
                 "/runs//tiny", "/runs/fake/stage.json", "/runs/%2Fetc%2Fpasswd"):  # fmt: skip
        status, _, body = ask(served_run.url, "GET", path)
        assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_run"), path
    assert ask(served_run.url, "POST", "/runs/fake", {})[0] == 405


def test_a_broken_record_is_an_error_of_the_server(served_run, run):
    run.stage_file("sft").write_text("{")
    status, _, body = ask(served_run.url, "GET", "/runs/fake")
    assert (status, json.loads(body)["error"]["code"]) == (500, "run_unreadable")


@pytest.mark.browser
def test_the_card_and_the_tour_on_the_page(browser, served_run, run):
    with a_page(browser, served_run.url) as page:
        page.wait_for_selector("#tries small")
        offered = page.locator("#tries button").all_inner_texts()
        assert offered[0].splitlines() == [
            "What is 2 plus 2 | really?", "a fact it read; it gets 80 % of such questions right",
        ]  # fmt: skip
        assert "Do not rely on it" in page.inner_text("#honest")
        page.locator("#tries button").first.click()
        page.wait_for_selector("#next button")
        assert page.locator(".message.user .body").inner_text() == "What is 2 plus 2 | really?"
        assert "Next: What is 0 plus 2" in page.locator("#next").inner_text()
        page.wait_for_selector("#send:not([hidden])")
        press(page, "End the tour")
        press(page, "New")
        assert page.locator("#next").is_hidden()
        press(page, "About")
        card = page.inner_text("#cardbody")
        assert "Depth" in card and "Training tokens" in card and "327,680" in card
        assert "80 % (75\u201385)" in card
        press(page, "Close")


@pytest.mark.browser
def test_the_training_panel_follows_a_run(browser, toy, tmp_path):
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        run.begin_stage("base", run.stage_parts("base", data={}))
        write_training(run, "base", steps=30)
        made = fake_server(toy, Settings())
        model = made.server.context.models.first
        model.run, model.card = run, cards.card_of(CONFIG, run, "base")
        with made.server, a_page(browser, made.url) as page:
            press(page, "Training")
            page.wait_for_selector("#panelcurves polyline")
            assert "training now, about" in page.inner_text("#panelstate")
            assert "loss: 1.100 at step 30" in page.inner_text("#panelcurves")
            assert "No samples yet" in page.inner_text("#panelsamples")
            with run.metrics_file("base").open("a") as rows:
                rows.write('{"step": 31, "seconds": 0.1, "loss": 0.5, "eta": 60.0}\n')
            run.samples_file("base").write_text("# What base writes\n\n**The**\n\n> <b>cat</b>\n")
            until(
                page,
                "document.querySelector('#panelcurves').innerText.includes('0.500 at step 31')",
            )
            assert "<b>cat</b>" in page.inner_text("#panelsamples")
            say(page, "say still talking")
            page.set_viewport_size({"width": 320, "height": 600})
            until(page, "document.documentElement.scrollWidth <= window.innerWidth")
            page.focus("#panelclose")
            page.keyboard.press("Escape")
            assert page.locator("#panel").is_hidden()
