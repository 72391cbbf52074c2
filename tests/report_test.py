from __future__ import annotations

import dataclasses
import gzip
import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import scipy.sparse
import tiny

from vixml_jax import cli, data, metrics, recipes
from vixml_jax import config as config_lib
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare
from vixml_jax.report import CURVES, write_report
from vixml_jax.report_charts import Series, _tick, escape, line_chart
from vixml_jax.report_examples import EXAMPLES, FIRST, examples
from vixml_jax.report_published import published
from vixml_jax.report_runs import RunFiles

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;</title>$title \u202e${x} \x07"
VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A tiny prepared dataset in which the first label, every test query and a uid are hostile."""
    root = tmp_path_factory.mktemp("tiny")
    raw = tiny.write_raw(root / "raw", seed=0)
    for file in ("tst.json.gz", "lbl.json.gz"):
        with gzip.open(raw / file, "rt") as lines:
            records = [json.loads(line) for line in lines]
        for number, record in enumerate(records):
            if file == "tst.json.gz" or number == 0:
                record["title"] = f"{record['title']} {HOSTILE}"
        with gzip.open(raw / file, "wt") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)
    (raw / "filter_labels_tst.txt").write_text("".join(f"{row} 1\n" for row in range(24)))
    prepare(raw, root / "dataset", "tiny")
    return root / "dataset"


def fabricate(workdir, dataset, seed, images=0):
    """Writes what a run and its evaluation would have written."""
    ds, rng = data.load(dataset), np.random.default_rng(seed)
    workdir.mkdir(parents=True)
    config_lib.save(tiny.config(dataset, images), workdir / "config.json")
    scores = rng.random(ds.test_targets.shape) + 0.5 * ds.test_targets.toarray()
    scores[:, 1] = 9  # the filter pairs' label, which would be everybody's first
    predictions = scipy.sparse.csr_matrix(scores.astype(np.float32))
    scipy.sparse.save_npz(workdir / "predictions.npz", predictions)
    figures = metrics.evaluate(
        predictions, ds.test_targets, ds.train_targets, filter_pairs=ds.filter_pairs_test
    )
    (workdir / "metrics.json").write_text(json.dumps(figures))
    often = [name for name, _, _ in CURVES if not name.startswith("eval/")]
    records = [{"step": step} | {name: 1 / step for name in often} for step in range(1, 301)]
    records += [{"step": step, "eval/P@1": figures["P@1"] / 2} for step in (100, 200)]
    lines = [json.dumps(record) for record in sorted(records, key=lambda record: record["step"])]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30']))  # cut short by a kill
    (workdir / "embeddings").mkdir()
    for name, rows in (("test", len(ds.test)), ("labels", len(ds.labels))):
        values = rng.normal(size=(rows, 16)).astype(np.float32)
        np.save(workdir / "embeddings" / f"{name}.npy", values)
    return workdir


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [fabricate(root / "text", dataset, 0), fabricate(root / "vixml", dataset, 1, images=2)]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report.html"
    write_report(runs, out, HOSTILE)
    return out.read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """Checks that tags balance; collects tags with their attributes, and the cells of tables."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.missing: list[str] = []
        self.in_missing = False
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {self.get_starttag_text()}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.in_missing = dict(attrs).get("class") == "missing"
            self.missing += [""] * self.in_missing

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert "svg" in self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text
        elif self.in_missing and self.open[-1:] == ["p"]:
            self.missing[-1] += text


def test_it_needs_nothing_from_outside(page):
    reader = Reader(page)
    assert not re.search(r"https?://", page)
    assert "@import" not in page
    assert "url(" not in page
    for tag, attributes in reader.tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"}
    assert links <= set(ids)
    assert len(page.encode()) < 5_000_000


def test_hostile_titles_are_text(page):
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not [
        attributes for _, attributes in reader.tags if any(name.startswith("on") for name in attributes)
    ]
    assert "alert(1)" in page  # it is shown, but as text
    assert "<script>alert" not in page
    assert "\x07" not in page
    assert "$title ${x}" in page.replace("\u202e", "").replace("$title  ", "$title ")
    assert "&amp;amp;" in page
    assert not reader.missing


def test_figures_are_those_of_metrics_json(page, runs):
    reader = Reader(page)
    shown = {row[0]: row[1:] for row in reader.rows}
    text, vixml = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert {"P@1", "nDCG@3", "PSR@5", "hits@1", "MRR", "R@100"} <= shown.keys()
    for name, value in text.items():
        assert shown[name][:2] == [f"{value:.2f}", f"{vixml[name]:.2f}"]
        assert shown[name][2] == f"{vixml[name] - value:+.2f}"


def test_breakdowns_are_those_of_metrics(page, runs, dataset):
    ds = data.load(dataset)
    predictions = scipy.sparse.csr_matrix(scipy.sparse.load_npz(runs[1] / "predictions.npz"))
    shown = {row[0].strip(): row[1:] for row in Reader(page).rows}
    counts = ds.test.images.counts()
    expected = metrics.by_group(predictions, ds.test_targets, counts, filter_pairs=ds.filter_pairs_test)
    assert set(expected) == {0, 1}
    for count, figures in expected.items():
        assert shown[str(count)][0] == str(int(figures["rows"]))
        assert shown[str(count)][2] == f"{figures['P@1']:.2f}"
    frequencies = metrics.by_label_frequency(
        predictions, ds.test_targets, ds.train_targets, filter_pairs=ds.filter_pairs_test
    )
    tail = next(cells for name, cells in shown.items() if name.startswith("torso"))
    assert tail[3] == f"{frequencies['torso']['P@1']:.2f}"
    assert tail[5] == f"{frequencies['torso']['R@10']:.2f}"


def test_examples_are_the_best_labels_without_filter_pairs(runs, dataset):
    ds = data.load(dataset)
    runs = [RunFiles(path, path.name, number) for number, path in enumerate(runs)]
    shown = examples(runs)
    cards = shown.split("<article>")[1:]
    assert len(cards) == min(EXAMPLES, len(ds.test))
    assert shown.partition("<details>")[0].count("<article>") == FIRST
    assert len({re.findall(r"row (\d+)", card)[0] for card in cards}) == len(cards)
    filtered = escape(ds.labels.titles[1])
    for card in cards:
        row = int(re.findall(r"row (\d+)", card)[0])
        truth = ds.test_targets[row].indices
        for run, answer in zip(runs, card.split('<div class="answer ')[1:], strict=True):
            scores = run.predictions[row].toarray()[0]
            scores[1] = -1
            best = np.argsort(-scores, kind="stable")[:5]
            items = re.findall(r'<li class="(\w+)">.*?<bdi>(.*?)</bdi><span class="score">([\d.]+)', answer)
            assert items == [
                ("hit" if label in truth else "miss", escape(ds.labels.titles[label]), f"{scores[label]:.3f}")
                for label in best
            ]
            assert filtered not in [name for _, name, _ in items]
        assert card.count("data:image/jpeg") == len([image for image in ds.test.images[row] if image])


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("metrics.json", 1),
        ("metrics.jsonl", 1),
        ("predictions.npz", 2),
        ("embeddings/labels.npy", 1),
        ("config.json", 5),
    ],
)
def test_what_is_missing_is_said(runs, tmp_path, name, sections):
    alone = tmp_path / "alone"
    shutil.copytree(runs[1], alone)
    (alone / name).unlink()
    write_report([alone], tmp_path / "alone.html", "one")
    reader = Reader((tmp_path / "alone.html").read_text(encoding="utf-8"))
    assert len(reader.missing) == sections
    assert all(name in text for text in reader.missing)
    write_report([alone, runs[0]], tmp_path / "beside.html", "beside one that is whole")
    reader = Reader((tmp_path / "beside.html").read_text(encoding="utf-8"))
    # The page's own run has everything; only the sections that set both side by side miss the other's.
    assert len(reader.missing) == {"config.json": 3, "embeddings/labels.npy": 0}.get(name, sections)


def test_what_was_published_stands_beside_runs_on_the_papers_data(runs, page, monkeypatch):
    """Only where the name and all sizes are those of a dataset of the paper."""
    assert "Beside what was published" not in page
    read = [RunFiles(path, path.name, number) for number, path in enumerate(runs)]
    ds = read[1].dataset
    sizes = (len(ds.train), len(ds.test), len(ds.labels))
    for run in read:
        run.dataset = dataclasses.replace(run.dataset, name="LF-AmazonTitles-131K")
    assert not published(read)  # of that name, but of other sizes
    small = dataclasses.replace(
        recipes.DATASETS["lf_amazontitles_131k"], **dict(zip(("train", "test", "labels"), sizes, strict=True))
    )
    monkeypatch.setitem(recipes.DATASETS, "lf_amazontitles_131k", small)
    rows = Reader(published(read)).rows
    for row, run in zip(rows[1:3], runs, strict=True):
        figures = json.loads((run / "metrics.json").read_text())
        assert row == [run.name, *(f"{figures[name]:.2f}" for name in rows[0][1:])]
    assert ["DistilBERT Table 1", "44.86", "21.45", "39.62", "68.05"] in rows
    assert ["DistilBERT Table 3", "49.55", "23.73", "43.78", "76.73"] in rows


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, b"\x00\xff broken") for name in ("predictions.npz", "embeddings/test.npy")),
        *(("metrics.json", data) for data in (b"\x00\xff broken", b"[]", b'{"P@1": null}', b'{"P@1": [1]}')),
        *(("config.json", data) for data in (b"\x00\xff broken", b"[]", b"3")),
    ],
)
def test_what_is_broken_is_said(runs, tmp_path, name, data):
    broken = tmp_path / "broken"
    shutil.copytree(runs[1], broken)
    (broken / name).write_bytes(data)
    write_report([broken], tmp_path / "out.html", "one")
    missing = Reader((tmp_path / "out.html").read_text(encoding="utf-8")).missing
    assert missing
    assert all(name in text for text in missing)


def test_a_run_on_other_data_is_not_compared(runs, dataset, tmp_path):
    prepare(tiny.write_raw(tmp_path / "raw", seed=5), tmp_path / "dataset", "other")
    other = fabricate(tmp_path / "other", dataset, 3)
    config_lib.save(tiny.config(tmp_path / "dataset"), other / "config.json")
    write_report([other, runs[0]], tmp_path / "out.html", "two")
    missing = Reader((tmp_path / "out.html").read_text(encoding="utf-8")).missing
    assert missing == ["other was evaluated on another test split than text"] * 2


def test_the_same_runs_give_the_same_bytes(runs, page, tmp_path):
    write_report(runs, tmp_path / "again.html", HOSTILE)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "a" / "run")
    shutil.copytree(runs[1], tmp_path / "b" / "run")
    write_report([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "out.html", "two")
    head = next(row for row in Reader((tmp_path / "out.html").read_text(encoding="utf-8")).rows)
    assert head[1:3] == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_command(runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.run(["report", f"--workdir={runs[1]}", f"--compare={runs[0]}", f"--out={out}"]) == 0
    reader = Reader(out.read_text(encoding="utf-8"))
    assert reader.rows[0] == ["percent", "text", "vixml", "difference"]
    capsys.readouterr()
    assert cli.run(["report", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="not a run's directory"):
        write_report([tmp_path / "nowhere"], out, "none")


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, -3.5), (9, 1e6)], [(i, i % 7) for i in range(1000)]]
)
def test_charts_stay_inside_their_frame(points):
    drawn = line_chart([Series("run", 0, np.array(points, float))], "loss", "step", 2)
    assert "nan" not in drawn
    line = re.findall(r'polyline class="[^"]*" points="([^"]*)"', drawn)[0]
    places = np.array([place.split(",") for place in line.split()], float)
    assert len(places) == min(len(points), 120)
    assert (places >= 0).all()
    assert (places[:, 0] <= 460).all()
    assert (places[:, 1] <= 270).all()
    Reader(drawn)


def test_small_ticks_are_short():
    ticks = [0.0, 5e-5, 1e-4, 1.5e-4]
    assert [_tick(tick, ticks) for tick in ticks] == ["0", "5e-5", "1e-4", "1.5e-4"]
    assert [_tick(tick, [0.995, 0.996]) for tick in (0.995, 1.0)] == ["0.995", "1.000"]
