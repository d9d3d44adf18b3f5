"""The page in a real Chromium: opens offline and quietly, its links work, it fits a phone. `make test-report`."""

import shutil

import pytest
import torch

from pipeline.validate.report import page
from support import planted
from support.reports import recipe_of, report_of

pytestmark = pytest.mark.browser

PLOTS = (
    "plot-error-target",
    "plot-layers-target",
    "plot-gap-target",
    "plot-acceptance-2",
    "plot-lengths-2",
    "plot-latency",
    "plot-map",
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of a page that passed and one that failed."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("pages")
    recipe = recipe_of("llama", 4, "bfloat16", ("greedy", "stochastic"))
    found = {"good": report_of(work, recipe), "bad": report_of(work, recipe, planted.mask_sees_one_more)}
    for name, one in found.items():
        (work / f"{name}.html").write_text(page.render(one))
    return work


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, pages):
    """Opens a page and collects what it complains about and asks for."""
    contexts = []

    def go(name, viewport=DESKTOP, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.complaints, tab.requests = [], []
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.goto((pages / f"{name}.html").as_uri())
        return tab

    yield go
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["good", "bad"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_opens_quietly_and_fits(visit, pages, name, viewport):
    tab = visit(name, viewport)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    verdict = tab.locator("#verdict").bounding_box()
    assert verdict["y"] + 60 < viewport["height"], "the verdict is seen without scrolling"
    tab.screenshot(path=pages / f"{name}-{viewport['width']}.png", full_page=True)


def test_page_shows_every_plot(visit):
    tab = visit("good")
    for plot in PLOTS:
        assert tab.locator(f"#{plot}").is_visible(), plot
        assert tab.locator(f"#{plot} .bar, #{plot} .line, #{plot} td").count() > 0, plot


def test_page_colours_follow_the_scheme(visit):
    colour = "getComputedStyle(document.body).backgroundColor"
    assert visit("good", scheme="light").evaluate(colour) != visit("good", scheme="dark").evaluate(colour)


def test_dot_leads_to_its_token(visit):
    tab = visit("good")
    link = tab.locator("#plot-error-target a").last
    target = link.get_attribute("href").removeprefix("#")
    assert not tab.locator(f"#{target}").is_visible()
    link.click()
    tab.wait_for_function(f"document.getElementById('{target}').closest('details').open")
    assert tab.locator(f"#{target}").is_visible()
    assert tab.evaluate("document.activeElement.id") == target


def test_page_works_from_the_keyboard(visit):
    tab = visit("good")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#parity"
    tab.locator("#plot-error-target a").first.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash").startswith("#t-")
