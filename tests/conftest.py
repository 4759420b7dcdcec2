"""What all tests share: no network, no touching of the user's cache, one small tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: the test processes share few cores, and nothing may reach the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile(
    "fledge",
    deadline=None,  # a busy machine is not a bug
    max_examples=60,
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fledge")


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    """FLEDGE_HOME is a folder of this test session, never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_HOME", str(tmp_path_factory.mktemp("fledge_home")))
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data (FLEDGE_DATA or ../shared/data); skips where there is none."""
    root = Path(os.environ.get("FLEDGE_DATA") or ROOT.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"needs the data folder {root}")
    return root


TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, and they'll say 'hello'!\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 23456))  # 23457\n",
    "Wie hei\u00dft du? \u00c7a va? \u00bfQu\u00e9 tal? \u041f\u0440\u0438\u0432\u0435\u0442! "
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "e\u0301 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\U0001f468\u200d\U0001f469\u200d"
    "\U0001f467 \U0001f1eb\U0001f1f7 \t\t tabs\r\n\r\n  and   spaces   ",
    "'\u017f x'S WE'LL \u2014 \u201cquoted\u201d \u00bd \u2167 \u0664\u0665 \x00\x1c\x85\u3000.",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short texts in many scripts, with code, emoji, marks and odd white space."""
    return TEXTS


@pytest.fixture(scope="session")
def tok():
    """A tokenizer of 768 ids, trained on `texts`."""
    from fledge.tokenizer import Tokenizer

    return Tokenizer.train(TEXTS * 3, vocab_size=768)
