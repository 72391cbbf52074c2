"""The script of claims: its settings are told apart, its gains are paired by seed, its table has a place."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import scipy.stats
from flax.traverse_util import flatten_dict as flatten

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def claims():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("claims", BENCHMARKS / "claims.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "claims", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def test_settings_that_differ_have_folders_of_their_own(claims):
    settings = {setting for claim in claims.CLAIMS for setting in (claim.better, claim.worse)}
    assert len({setting.slug for setting in settings}) == len(settings)
    for claim in claims.CLAIMS:  # one thing differs
        assert claim.better.dataset == claim.worse.dataset
        assert claim.better.decoder == claim.worse.decoder
        assert (claim.better.args != claim.worse.args) + (claim.better.flags != claim.worse.flags) == 1


def test_losses_without_prototypes_differ_in_the_loss_alone(claims):
    """The config's own loss has PRIME's prototypes beside it, which DEXML does not know."""
    compared = [claim for claim in claims.CLAIMS if claim.text == "DEXML beats the in-batch softmax"]
    assert {claim.better.dataset for claim in compared} == {"picto", "tate"}
    for claim in compared:
        config = {"picto": "picto_tags", "tate": "tate_subjects"}[claim.better.dataset]
        module = runpy.run_path(str(BENCHMARKS.parent / "configs" / f"{config}.py"))
        better, worse = (
            flatten(module["get_config"](setting.args).to_dict()) for setting in (claim.better, claim.worse)
        )
        assert [name for name in better if better[name] != worse[name]] == [("loss", "name")]
        assert not claim.better.flags + claim.worse.flags


def test_gains_are_taken_seed_by_seed(claims):
    claim = claims.CLAIMS[0]
    # Apart from each other by less than the seeds are: only pairs show that the better one is better.
    measured = {
        setting.slug: {
            str(seed): dict.fromkeys(claims.METRICS, base + gain * (1 + 0.1 * seed))
            for seed, base in enumerate((20.0, 30.0, 40.0))
        }
        for setting, gain in ((claim.better, 1.0), (claim.worse, 0.0))
    }
    measured[claim.worse.slug]["7"] = dict.fromkeys(claims.METRICS, 90.0)  # has no counterpart
    found = {setting: claims.by_metric(measured, setting) for setting in (claim.better, claim.worse)}
    (line,) = list(claims.claim_table([claim], found))[2:]
    assert "+1.10 ± 0.10" in line
    assert line.endswith("| holds |")
    assert "31.10 ± 10.10" in list(claims.setting_table(found))[-2]


def test_the_verdict_is_that_of_a_t_test(claims):
    for gains in ([1.0, 1.1, 0.8], [0.3, -0.2, 0.4], [-1.0, -1.2, -0.9]):
        p = scipy.stats.ttest_1samp(gains, 0, alternative="greater").pvalue
        expected = "holds" if p < 0.05 else "reversed" if p > 0.95 else "not decided"
        assert claims.verdict(gains) == expected
    assert claims.verdict([1.0]) == "too few runs"


def test_what_is_measured_is_not_run_again(claims, monkeypatch, tmp_path, capsys):
    claim, figures = claims.CLAIMS[0], tmp_path / "figures.json"
    settings = (claim.better, claim.worse)
    known = {setting.slug: {"0": dict.fromkeys(claims.METRICS, 50.0)} for setting in settings}
    figures.write_text(json.dumps(known))
    trained = []

    def train(setting, seed, _):
        trained.append((setting, seed))
        return dict.fromkeys(claims.METRICS, 51.0)

    monkeypatch.setattr(claims, "train", train)
    arguments = [f"--figures={figures}", f"--only={claim.text}", "--seeds=2"]
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
    claims.main()
    assert trained == [(setting, 1) for setting in settings]
    assert json.loads(figures.read_text())[claim.better.slug]["1"]["P@1"] == 51.0
    assert "50.50 ± 0.71" in capsys.readouterr().out
    claims.main()
    assert len(trained) == 2


def test_a_quick_run_is_not_kept_as_a_figure(claims, monkeypatch, tmp_path):
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    figures.write_text("{}")
    page.write_text(f"{claims.START}\n{claims.END}\n")
    workdirs = []

    def train(setting, seed, options):
        workdirs.append(options.out)
        return dict.fromkeys(claims.METRICS, 3.0)

    monkeypatch.setattr(claims, "train", train)
    arguments = [f"--figures={figures}", f"--out={tmp_path / 'out'}", f"--write={page}", "--seeds=1"]
    monkeypatch.setattr(sys, "argv", ["claims.py", "--quick", *arguments])
    claims.main()
    assert figures.read_text() == "{}"
    assert page.read_text() == f"{claims.START}\n{claims.END}\n"
    assert set(workdirs) == {tmp_path / "out" / "quick"}


def test_the_documentation_has_a_place_for_the_table_and_that_is_seen_first(claims, monkeypatch, tmp_path):
    results = BENCHMARKS.parent / "docs" / "results.md"
    assert f"--write={results.relative_to(BENCHMARKS.parent)}" in claims.__doc__
    assert all(claims.split_at_place(results))
    page = tmp_path / "page.md"
    page.write_text("no place")
    monkeypatch.setattr(claims, "train", lambda *_: pytest.fail("trained all the same"))
    monkeypatch.setattr(sys, "argv", ["claims.py", f"--figures={tmp_path / 'none'}", f"--write={page}"])
    with pytest.raises(SystemExit, match="no place between"):
        claims.main()


def test_the_table_is_put_in_its_place(claims, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.START}\nold\n{claims.END}\nafter\n")
    claims.write_between(page, "new")
    assert page.read_text() == f"before\n{claims.START}\nnew\n{claims.END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place between"):
        claims.write_between(page, "new")
    assert page.read_text() == "no place"
