"""The report in a real Chromium."""

from __future__ import annotations

import pytest
from report_test import dataset, page, runs  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wrong_on_the_page(browser, page, tmp_path, width, scheme):  # noqa: F811
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("console", lambda line: wrong.append(line.text))
    shown.on("request", lambda request: wrong.append(request.url))
    shown.goto(path.as_uri())
    assert [url for url in wrong if not url.startswith("data:")] == [path.as_uri()]

    # Nothing is wider than the screen; what is, a table, scrolls for itself.
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    for summary in shown.locator("summary").all():
        summary.click()
    assert shown.evaluate("document.documentElement.scrollWidth") <= width

    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(",")))
    assert (brightness > 380) == (scheme == "light")

    dot = shown.locator("#map circle.query").first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    said = shown.locator("#pointed").inner_text()
    assert said.startswith(("Query: ", "Label: "))
    assert shown.locator("#map circle.on").count() == 1
    shown.close()
