"""The `llm` command and LiteLLM against a live server; each skips where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest


@pytest.mark.skipif(importlib.util.find_spec("llm") is None, reason="llm is not installed")
@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_llm(fake, tmp_path, flags):
    """Its stream asks for usage, and it stores the three token counts."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: fake\n  api_base: {fake.url}/v1\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "ours", "say from the llm command", *flags],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "from the llm command"
    logged = subprocess.run(
        [sys.executable, "-m", "llm", "logs", "--json"],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert '"input_tokens": ' in logged.stdout and '"input_tokens": null' not in logged.stdout


@pytest.mark.filterwarnings("default")
def test_litellm(fake):
    """It tells our errors apart by their words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed")
    asked = {"model": "openai/fake", "api_base": f"{fake.url}/v1", "api_key": "x", "num_retries": 0}

    def user(text: str) -> list:
        return [{"role": "user", "content": text}]

    reply = litellm.completion(messages=user("say through it"), **asked)
    assert reply.choices[0].message.content == "through it"
    assert reply.choices[0].finish_reason == "stop"
    text = ""
    for chunk in litellm.completion(messages=user("count 9"), stream=True, **asked):
        text += chunk.choices[0].delta.content or ""
    assert text == "1 2 3 4 5 6 7 8 9"
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=user("x y " * 4000), **asked)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=user("x"), **{**asked, "model": "openai/absent"})
