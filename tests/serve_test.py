"""The service as clients meet it: a real uvicorn in a thread, with a tiny trained run."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import random
import shutil
import socket
import threading
import time

import pytest
import tiny
import uvicorn
from PIL import Image

from vixml_jax import XmcModel, cli, serve
from vixml_jax.errors import UserError
from vixml_jax.serving.app import Service
from vixml_jax.serving.limits import Limits

LIMITS = Limits(
    body_bytes=200_000, held_bytes=1_000_000, image_pixels=100_000, images=3, k=40, queue=64, batch=8,
    body_seconds=1.0,
)  # fmt: skip
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def running(model, limits=LIMITS, token=None):
    """Yields the port of a service that runs."""
    listening = serve.listen("127.0.0.1", 0)
    config = uvicorn.Config(Service(model, limits, token).app, log_level="warning", lifespan="on", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def model(tiny_run, tmp_path_factory):
    """A run to which a label with a picture was added."""
    workdir = tmp_path_factory.mktemp("serve") / "shop"
    shutil.copytree(tiny_run / "run", workdir)
    labels = workdir / "new.jsonl"
    picture = str(tiny_run / "raw" / "images" / "trn1.png")
    labels.write_text(json.dumps({"uid": "pot", "title": "tea <b>pot</b>", "images": [picture]}) + "\n")
    with tiny.only_devices(1):
        assert not cli.run(["index", f"--workdir={workdir}", f"--add={labels}"])
        return XmcModel.load(workdir)


@pytest.fixture(scope="module")
def port(model):
    with tiny.only_devices(1), running(model) as port:
        yield port


def call(port, method, path, body=None, headers=None):
    """Returns (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def predict(port, record, headers=JSON):
    status, _, body = call(port, "POST", "/predict", json.dumps(record).encode(), headers)
    return status, json.loads(body)


def png(size=(16, 16), colour=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def text64(data):
    return base64.b64encode(data).decode()


def form(parts, boundary="XX"):
    """A multipart body of (name, file name or None, bytes)."""
    lines = []
    for name, file, content in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
        lines += [f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode(), content, b"\r\n"]
    return b"".join([*lines, f"--{boundary}--\r\n".encode()]), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def test_json_and_forms_give_what_the_model_gives(port, model):
    wanted, scores = model.predict(["kettle"], [[png()]], k=4, progress=False)
    picture = text64(png())
    answers = [
        predict(port, {"title": "kettle", "image": picture, "k": 4}),
        predict(port, {"text": "  kettle\n", "images": [f"data:image/png;base64,{picture}"], "k": 4}),
    ]
    body, headers = form([("title", None, b"kettle"), ("k", None, b"4"), ("image", "a.png", png())])
    status, _, content = call(port, "POST", "/predict", body, headers)
    answers.append((status, json.loads(content)))
    names = model.label_names(wanted[0])
    for status, answer in answers:
        assert status == 200, answer
        assert [label["index"] for label in answer["labels"]] == wanted[0].tolist()
        assert [(label["uid"], label["title"]) for label in answer["labels"]] == names
        assert [label["score"] for label in answer["labels"]] == pytest.approx(scores[0].tolist(), abs=1e-4)
    status, answer = predict(port, {"title": "kettle"})
    assert (status, len(answer["labels"])) == (200, 10)
    assert any(label["uid"] == "pot" for label in predict(port, {"title": "tea", "k": 31})[1]["labels"])


WRONG = [
    ({}, 400, "neither a text nor a picture"),
    ({"title": " \0 "}, 400, "neither a text nor a picture"),
    ({"title": 3}, 400, '"title" is not a text'),
    ({"title": "a", "colour": "red"}, 400, "unknown field 'colour'"),
    ({"title": "a", "text": "b"}, 400, "not both"),
    ({"title": "a", "k": 0}, 400, "from 1 to 40"),
    ({"title": "a", "k": 41}, 400, "from 1 to 40"),
    ({"title": "a", "k": True}, 400, "from 1 to 40"),
    ({"title": "a", "k": 1e400}, 400, "from 1 to 40"),
    ({"title": "a", "images": "x"}, 400, "not a list"),
    ({"title": "a", "image": 7}, 400, "not a base64 text"),
    ({"title": "a", "image": "ab$d"}, 400, "not valid base64"),
    ({"title": "a", "image": text64(b"no picture")}, 400, "picture 1 cannot be read"),
    ({"title": "a", "image": text64(png()[:60])}, 400, "picture 1 cannot be read"),
    ({"title": "a", "images": [text64(png())] * 4}, 400, "at most 3"),
    ({"title": "a", "image": text64(png((400, 300)))}, 413, "100,000 pixels"),
    ({"title": "a" * 30_000}, 413, "20,000 characters"),
    ({"title": "a" * 200_000}, 413, "200,000 bytes"),
    ([1], 400, "JSON object"),
]


@pytest.mark.parametrize(("record", "status", "problem"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_told(port, record, status, problem):
    given, answer = predict(port, record)
    assert given == status, answer
    assert problem in answer["error"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"title": ' * 20_000, b'{"title": "\\ud800"', b"9" * 50_000],
    ids=["empty", "open", "no-utf8", "deep", "deep-objects", "half-a-character", "digits"],
)
def test_bodies_that_are_no_json(port, body):
    assert call(port, "POST", "/predict", body, JSON)[0] == 400


def test_half_characters_are_replaced(port):
    assert call(port, "POST", "/predict", b'{"title": "\\ud800 kettle \\udfff"}', JSON)[0] == 200


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([("title", None, b"a"), ("title", None, b"b")], "given twice"),
        ([("k", None, b"4"), ("colour", None, b"b")], "unknown field"),
        ([("title", None, b"a"), ("k", None, "٣".encode())], "not a whole number"),
        ([("title", None, b"a"), ("k", None, b"9" * 5000)], "not a whole number"),
        ([("title", None, b"a"), ("image", None, b"text")], "not a file"),
        ([("title", "a.txt", b"a")], "pictures are in 'image'"),
        ([("image", "a.png", b"zzz")], "picture 1 cannot be read"),
        ([("image", f"{i}.png", png()) for i in range(9)], "Too many files"),
        ([(f"f{i}", None, b"") for i in range(99)], "Too many fields"),
    ],
)
def test_wrong_forms(port, parts, problem):
    body, headers = form(parts)
    status, _, content = call(port, "POST", "/predict", body, headers)
    assert status == 400
    assert problem in json.loads(content)["error"]


@pytest.mark.parametrize("boundary", ["", "; boundary=YY", "; boundary=", "; boundary=\xe9"])
def test_forms_without_their_boundary(port, boundary):
    body, _ = form([("title", None, b"a")])
    kind = {"Content-Type": f"multipart/form-data{boundary}"}
    assert call(port, "POST", "/predict", body, kind)[0] == 400


def test_other_kinds_paths_and_methods(port):
    assert call(port, "POST", "/predict", b"title=a", {"Content-Type": "text/plain"})[0] == 415
    assert call(port, "POST", "/predict", b"{}")[0] == 415
    assert call(port, "GET", "/predict")[0] == 405
    assert call(port, "GET", "/nowhere")[0] == 404
    assert call(port, "GET", "/labels/-1/picture")[0] == 404
    assert call(port, "GET", "/labels/99999999999999999999/picture")[0] == 404
    assert call(port, "GET", "/../../etc/passwd")[0] == 404


def raw(port, data, wait=10.0):
    """Sends bytes as they are; returns the first line that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        try:
            return connection.recv(4096).split(b"\r\n")[0]
        except TimeoutError:
            return b"nothing"


def test_hostile_connections_and_the_service_lives(port):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert b"413" in raw(port, head + b"Content-Length: 99999999999\r\n\r\n")
    assert b"400" in raw(port, head + b"Content-Length: -5\r\n\r\n{}")
    assert b"400" in raw(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
    assert b"408" in raw(port, head + b"Content-Length: 10\r\n\r\n{")  # the rest never comes
    chunk = b"fff0\r\n" + b" " * 0xFFF0 + b"\r\n"
    assert b"413" in raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5)
    raw(port, head + b"Content-Length: 100\r\n\r\n{", wait=0.01)  # leaves while the body is read
    for _ in range(50):
        size = random.randrange(1, 400)
        raw(port, random.randbytes(size), wait=0.01)
    assert predict(port, {"title": "kettle"})[0] == 200


def test_concurrent_clients_share_batches_and_get_their_own_answers(port, model):
    titles = [f"{thing} number {number}" for number in range(8) for thing in tiny.THINGS]
    alone = {title: model.predict([title], [[]], 3, progress=False)[0][0].tolist() for title in titles[:6]}
    with concurrent.futures.ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda title: predict(port, {"title": title, "k": 3}), titles * 3))
    assert [status for status, _ in answers] == [200] * len(answers)
    for title, (_, answer) in zip(titles * 3, answers, strict=True):
        if title in alone:
            assert [label["index"] for label in answer["labels"]] == alone[title]
    metrics = call(port, "GET", "/metrics")[2].decode()
    figures = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    queries, batches = (float(figures[f"vixml_batch_size_{name}"]) for name in ("sum", "count"))
    assert batches < queries
    assert float(figures['vixml_requests_total{path="/predict",status="200"}']) >= len(answers)
    assert float(figures["vixml_queue_length"]) == 0


def test_page_health_and_information(port, model):
    status, headers, body = call(port, "GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">' in body.decode()
    assert nonce not in call(port, "GET", "/")[2].decode()
    assert "default-src 'none'" in policy
    assert b"http://" not in body
    assert b"https://" not in body
    assert json.loads(call(port, "GET", "/healthz")[2])["status"] == "ok"
    about = json.loads(call(port, "GET", "/info")[2])
    assert (about["run"], about["labels"], about["images"], about["max_k"]) == ("shop", 31, 3, 40)
    assert about["examples"]


def test_labels_show_their_picture_or_that_of_a_training_query(port):
    for number in (0, 30):  # a query's; the label's own
        status, headers, body = call(port, "GET", f"/labels/{number}/picture")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert max(Image.open(io.BytesIO(body)).size) <= 240
    assert call(port, "GET", "/labels/31/picture")[0] == 404


def test_a_token_guards_all_but_the_page_and_its_health(model):
    with tiny.only_devices(1), running(model, token="s3cret") as port:
        for path in ("/", "/healthz"):
            assert call(port, "GET", path)[0] == 200
        for path in ("/metrics", "/info", "/labels/0/picture"):
            status, headers, _ = call(port, "GET", path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        for given in ("s3cret", "Bearer", "Bearer s3cre", "Bearer s3cret5", "Basic s3cret", "Bearer s\xe9"):
            assert predict(port, {"title": "a"}, {**JSON, "Authorization": given})[0] == 401
        assert predict(port, {"title": "a"}, {**JSON, "Authorization": "bearer s3cret"})[0] == 200


def test_a_full_service_says_come_back(model):
    """Also while bodies in memory are too many."""
    limits = dataclasses.replace(LIMITS, queue=1, batch=1)
    with tiny.only_devices(1), running(model, limits) as port:
        with concurrent.futures.ThreadPoolExecutor(24) as clients:
            calls = [
                clients.submit(call, port, "POST", "/predict", b'{"title": "kettle"}', JSON)
                for _ in range(72)
            ]
            answers = [future.result() for future in calls]
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503}
        assert all(headers["retry-after"] == "1" for status, headers, _ in answers if status == 503)
        assert predict(port, {"title": "kettle"})[0] == 200
    with tiny.only_devices(1), running(model, dataclasses.replace(LIMITS, held_bytes=1000)) as port:
        status, answer = predict(port, {"title": "a" * 2000})
        assert (status, answer["error"]) == (503, "too many large requests at a time")
        assert predict(port, {"title": "kettle"})[0] == 200


def test_a_bug_is_a_500_without_its_details(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret path")

    with tiny.only_devices(1), running(model) as port:
        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", broken)
            status, _, body = call(port, "POST", "/predict", b'{"title": "kettle"}', JSON)
        assert status == 500
        assert b"secret" not in body
        assert predict(port, {"title": "kettle"})[0] == 200


def test_tokens_and_addresses(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    assert serve.read_token(None) is None
    monkeypatch.setenv(serve.TOKEN, " from-environment\n")
    assert serve.read_token(None) == "from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert serve.read_token(str(tmp_path / "token")) == "from-file"
    for wrong in ("", " \n", "tokén", "a\tb"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(UserError, match="empty or not plain"):
            serve.read_token(str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(b"tok\xff\xfen")
    with pytest.raises(UserError, match="empty or not plain"):
        serve.read_token(str(tmp_path / "token"))
    with pytest.raises(UserError, match="no such file"):
        serve.read_token(str(tmp_path / "nowhere"))
    with (
        serve.listen("127.0.0.1", 0) as taken,
        pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.*in use"),
    ):
        serve.listen("127.0.0.1", taken.getsockname()[1])
    for host in ("no.such.host.invalid", "a..b", "a" * 70):
        with pytest.raises(UserError, match=f"cannot listen on {host}:0"):
            serve.listen(host, 0)


def test_the_command_warms_up_serves_and_ends(model, capsys, monkeypatch):
    """As `vixml serve` does, but for the wait for a signal."""
    ended = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: ended.append(sockets))
    monkeypatch.setattr(XmcModel, "load", classmethod(lambda cls, workdir: model))
    with tiny.only_devices(1):
        assert not cli.run(["serve", "--workdir=shop", "--port=0", "--max-batch=2"])
    assert ended
    assert "serving shop at http://127.0.0.1:" in capsys.readouterr().out
    assert cli.run(["serve"]) == 2
    assert "--workdir" in capsys.readouterr().err
