"""The start page in a real Chromium: `apt install chromium`, `pip install playwright`."""

from __future__ import annotations

import pytest
import tiny
from serve_test import model, png, running  # noqa: F401

from vixml_jax.serving.limits import Limits

pytestmark = pytest.mark.slow


def opened(browser, port, width=1280, scheme="light"):
    """A page, and what went wrong on it: errors of its console, and requests to elsewhere."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # A label without a picture is a 404 that the page expects, and that browsers note.
    page.on(
        "console",
        lambda line: wrong.append(line.text) if line.type == "error" and "404" not in line.text else None,
    )
    own = f"http://127.0.0.1:{port}/"
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((own, "blob:", "data:")) else wrong.append(request.url)
        ),
    )
    page.goto(own)
    return page, wrong


def expect(page, selector, count):
    """Waits until there are so many."""
    from playwright import sync_api

    sync_api.expect(page.locator(selector)).to_have_count(count, timeout=30_000)


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
)
def test_titles_and_pictures_show_labels(browser, model, width, scheme, tmp_path):  # noqa: F811
    # The limits that users have: the page shrinks a large picture to what they take.
    with tiny.only_devices(1), running(model, Limits()) as port:
        page, wrong = opened(browser, port, width, scheme)
        page.get_by_label("Title").fill("kettle number 3")
        page.locator("#labels li").first.wait_for()
        assert page.locator("#labels li").count() == 10
        before = page.locator(".title").all_inner_texts()
        page.locator("#file").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": png((1500, 900))}
        )
        page.locator("#given img").wait_for()
        expect(page, "#labels.stale", 0)
        page.locator("#k").select_option("20")
        expect(page, "#labels li", 20)
        assert before
        page.locator("#labels .picture img").first.wait_for()
        # Nothing is wider than the screen, and scores fall.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        scores = [float(text) for text in page.locator(".about span:last-child").all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 10_000
        page.locator("#given button").click()
        expect(page, "#given img", 0)
        assert wrong == []
        page.close()


def test_markup_in_a_title_stays_text(browser, model):  # noqa: F811
    with tiny.only_devices(1), running(model) as port:
        page, wrong = opened(browser, port)
        page.locator("#k").select_option("20")
        page.get_by_label("Title").fill("tea <b>pot</b>")
        page.locator("#labels li").first.wait_for()
        assert page.locator("#labels b").count() == 0
        page.get_by_label("Title").fill("")
        expect(page, "#labels li", 0)
        page.locator(".chip").first.click()
        page.locator("#labels li").first.wait_for()
        assert wrong == []


def test_a_token_is_asked_for(browser, model):  # noqa: F811
    with tiny.only_devices(1), running(model, token="s3cret") as port:
        page, _ = opened(browser, port)
        field = page.get_by_label("This service asks for a token")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_text("Not the token of this service.").wait_for()
        field.fill("s3cret")
        field.press("Enter")
        page.get_by_label("Title").fill("kettle")
        page.locator("#labels li").first.wait_for()
        page.locator("#labels .picture img").first.wait_for()
