"""The file of API keys, and who may be served without one."""

from __future__ import annotations

import pytest

from fledge.errors import UserError
from fledge.serve.keys import ENVIRONMENT, load_keys
from fledge.serve.server import check_exposure

LONG = "0123456789abcdef"


def test_a_file_of_keys(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# mine\n\n{LONG}1\ncarol {LONG}2 # hers\n")
    monkeypatch.setenv(ENVIRONMENT, f"dave {LONG}3")
    keys = load_keys(path)
    assert len(keys) == 3
    assert keys.name_of(LONG + "1") == "key-3"
    assert keys.name_of(LONG + "2") == "carol"
    assert keys.name_of(LONG + "3") == "dave"
    assert keys.name_of(LONG) is None and keys.name_of("") is None
    assert keys.name_of("\ud800") is None
    assert LONG not in repr(vars(keys))


@pytest.mark.parametrize(
    "text",
    ["short\n", f"{LONG} {LONG} {LONG}\n", f"a {LONG}\na {LONG}x\n", "# nothing\n", "",
     f"na/me {LONG}\n", "sha256:123\n"],
)  # fmt: skip
def test_bad_files(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError):
        load_keys(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError):
        load_keys(tmp_path / "absent")


def test_exposure(tmp_path):
    path = tmp_path / "keys"
    path.write_text(LONG)
    keys, none = load_keys(path), load_keys(None)
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(host, none, insecure=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UserError):
            check_exposure(host, none, insecure=False)
        check_exposure(host, keys, insecure=False)
        check_exposure(host, none, insecure=True)
