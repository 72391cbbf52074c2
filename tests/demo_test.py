"""The demo, from nothing to its table and report."""

import json

import pytest

from vixml_jax import cli, config_rules, demo
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare_demo


def test_the_demo_ends_in_one_table_of_both_runs(one_device, tmp_path, capsys):
    assert not cli.run(["demo", "--smoke", f"--workdir={tmp_path}"])
    out = capsys.readouterr().out
    table = [
        line.split() for line in out.splitlines() if line.split()[:1] in (["percent"], ["text"], ["vixml"])
    ]
    assert [row[0] for row in table] == ["percent", "text", "vixml"]
    root = tmp_path / "smoke"
    for row in table[1:]:
        figures = json.loads((root / row[0] / "metrics.json").read_text())
        assert [float(cell) for cell in row[1:]] == [round(figures[name], 2) for name in table[0][1:]]
    assert str(root / "report.html") in out
    assert (root / "report.html").stat().st_size < 5_000_000
    with pytest.raises(UserError, match="200 training queries"):
        prepare_demo(root / "dataset", 300)


def test_its_configs_differ_in_pictures_alone():
    text, pictures = (demo.get_config(images=images) for images in (0, 3))
    config_rules.validate(text)
    text.vision.images = 3
    assert text.to_json() == pictures.to_json()
