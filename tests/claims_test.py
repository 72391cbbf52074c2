"""The script of claims: its settings are told apart, its gains are paired by seed, its table has a place."""

import importlib.util
import sys
from pathlib import Path

import pytest
import scipy.stats

from vixml_jax import files

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


def test_gains_are_taken_seed_by_seed(claims, tmp_path):
    claim = claims.CLAIMS[0]
    # Apart from each other by less than the seeds are: only pairs show that the better one is better.
    for seed, base in enumerate((20.0, 30.0, 40.0)):
        for setting, gain in ((claim.better, 1.0 + 0.1 * seed), (claim.worse, 0.0)):
            workdir = claims.workdir(tmp_path, setting, seed)
            workdir.mkdir(parents=True)
            files.write_json(workdir / "metrics.json", dict.fromkeys(claims.METRICS, base + gain))
    found = {setting: claims.figures(tmp_path, setting) for setting in (claim.better, claim.worse)}
    (line,) = list(claims.claim_table([claim], found))[2:]
    assert "+1.10 ± 0.10" in line
    assert line.endswith("| holds |")
    assert "30.00 ± 10.00" in list(claims.setting_table(found))[-1]


def test_the_verdict_is_that_of_a_t_test(claims):
    for gains in ([1.0, 1.1, 0.8], [0.3, -0.2, 0.4], [-1.0, -1.2, -0.9]):
        p = scipy.stats.ttest_1samp(gains, 0, alternative="greater").pvalue
        expected = "holds" if p < 0.05 else "reversed" if p > 0.95 else "not decided"
        assert claims.verdict(gains) == expected
    assert claims.verdict([1.0]) == "too few runs"


def test_the_table_is_put_in_its_place(claims, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.START}\nold\n{claims.END}\nafter\n")
    claims.write_between(page, "new")
    assert page.read_text() == f"before\n{claims.START}\nnew\n{claims.END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place between"):
        claims.write_between(page, "new")
    assert page.read_text() == "no place"
