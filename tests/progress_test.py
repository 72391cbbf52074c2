from __future__ import annotations

import pytest

from vixml_jax import progress
from vixml_jax.progress import Progress, announced


def test_plain_lines_with_and_without_a_total(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with Progress(10, "embed", "items") as shown:
        shown.update(4, loss=0.25)
    assert "embed: 4/10 items" in (lines := capsys.readouterr().err.splitlines())[0]
    assert "left" in lines[0]
    assert "loss 0.25" in lines[1]
    with Progress(None, "predict", "queries") as shown:
        shown.update(3)
    first, last = capsys.readouterr().err.splitlines()
    assert "predict: 3 queries" in first
    assert "so far" in first
    assert "predict: 3/3 queries" in last


def test_no_title_shows_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with Progress(10, None) as shown:
        shown.update(4)
    assert shown.done == 4
    assert capsys.readouterr().err == ""


def test_no_closing_line_after_an_error(capsys):
    try:
        with Progress(10, "embed"):
            raise KeyError
    except KeyError:
        pass
    assert capsys.readouterr().err == ""


def test_what_is_long_is_announced(capsys, monkeypatch):
    with announced("build"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "ANNOUNCED_SECONDS", 0.0)
    with announced("build"):
        pass
    assert capsys.readouterr().err == "build: 0:00\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with announced("build"):
        assert capsys.readouterr().err == "build ..."
    assert capsys.readouterr().err == "\r\033[Kbuild: 0:00\n"
    with pytest.raises(KeyError), announced("build"):
        raise KeyError
    assert capsys.readouterr().err == "build ...\r\033[K"
