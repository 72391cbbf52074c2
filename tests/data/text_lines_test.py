from __future__ import annotations

import gzip

import fresh
import numpy as np
import pytest

from vixml_jax.data import text_lines
from vixml_jax.errors import UserError

(ENTROPY,) = fresh.seeds(1)


@pytest.mark.parametrize("piece_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize("seed", [0, ENTROPY])
def test_lines_do_not_depend_on_pieces(tmp_path, monkeypatch, seed, piece_bytes):
    monkeypatch.setattr(text_lines.pieces, "__defaults__", (piece_bytes,))
    rng = np.random.default_rng(seed)
    lines = ["".join(rng.choice(list("aé\u2028\x85 "), rng.integers(0, 6))) for _ in range(20)] + ["end"]
    data = "\n".join(lines).encode()
    (tmp_path / "f").write_bytes(text_lines.BOM + data)
    (tmp_path / "g").write_bytes(gzip.compress(data.replace(b"\n", b"\r\n") + b"\n"))
    for name in ("f", "g"):
        file = text_lines.scan(tmp_path / name)
        assert list(file.lines()) == list(enumerate(lines, 1))
        assert (file.encoding, file.num_lines) == ("utf-8", 21)
        assert file.num_filled == sum(1 for line in lines if line.strip(" "))


def test_scan_finds_the_first_line_that_is_not_utf_8(tmp_path):
    (tmp_path / "f").write_bytes("a\né\n".encode() + "é\nü".encode("latin-1"))
    file = text_lines.scan(tmp_path / "f")
    assert (file.encoding, file.not_utf8_line) == ("latin-1", 3)
    assert [text for _, text in file.lines()] == ["a", "Ã©", "é", "ü"]


def test_unreadable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        text_lines.scan(tmp_path / "none")
    with pytest.raises(UserError, match="directory"):
        text_lines.scan(tmp_path)
    (tmp_path / "cut").write_bytes(gzip.compress(b"x" * 1000)[:15])
    with pytest.raises(UserError, match="broken gzip"):
        text_lines.scan(tmp_path / "cut")
