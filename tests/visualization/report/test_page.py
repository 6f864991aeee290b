import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

import nuclei_d2.visualization.report as report_package

VOID = {"meta", "link", "img", "input", "br", "wbr"}
STYLE = Path(report_package.__file__).with_name("style.css").read_text()


class Page(HTMLParser):
    """Every element as (tag, attributes, text directly in it)."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def all(self, *tags):
        return [element for element in self.elements if element[0] in tags]

    def texts(self, tag):
        return [" ".join(text.split()) for _, _, text in self.all(tag)]


@pytest.fixture(scope="session")
def html(report):
    efficiency = {"model": {"parameters": 1234567, "flops": None}, "training": {"data_s": 0.012345}}
    return report(results=[{"efficiency": efficiency}, {}])


@pytest.fixture(scope="session")
def page(html):
    return Page(html)


def test_it_answers_first(page):
    questions = dict(zip(page.texts("h2")[:3], page.texts("strong")[:3], strict=True))
    assert questions["Which is better?"] == "careful"
    assert questions["Which merges more nuclei?"] == "hasty"
    assert questions["Which splits more nuclei?"] == "No difference"
    answers = [text for text in page.texts("p") if "merges" in text]
    assert answers[0].startswith("5 merges (")
    assert answers[0].endswith(") against 0 of careful.")
    minus = [text for text in page.texts("p") if text.startswith("hasty minus careful: ")]
    assert len(minus) == 2
    assert minus[0].startswith("hasty minus careful: \N{MINUS SIGN}0.")
    assert minus[1].startswith("hasty minus careful: +5 (")
    clear = "On other images like these careful would be ahead, too: the interval excludes 0."
    assert all(text.endswith(clear) for text in minus)


def test_an_answer_has_the_colour_of_its_method(page, report):
    def edges(page):
        styles = [attributes.get("style", "") for _, attributes, _ in page.all("div")]
        return [style for style in styles if "--edge" in style]

    first, second, neither = (f"--edge: var(--{name})" for name in ("series-0", "series-1", "line"))
    assert edges(page) == [first, second, neither]
    assert edges(Page(report(["careful"]))) == [first] * 3
    assert "var(--edge" in STYLE


def test_a_difference_names_whom_it_favours(html, page):
    small = page.texts("small")
    assert small.count("in favour of careful") > 5
    assert "in favour of hasty" not in small
    assert "some may do so by chance" in html
    assert html.count("careful would be ahead, too") == 2  # the answers with a difference


def test_few_images_favour_nobody(few_images):
    page = Page(few_images())
    assert page.texts("strong")[:2] == ["Too few images to tell"] * 2
    text = " ".join(element[2] for element in page.elements)
    assert "9 images cannot settle it" in text
    assert "So few images cannot settle which method is better" in text
    assert "clearly" not in text.lower()
    assert "in favour of" not in text


def test_its_words_are_defined_before_they_are_used_again(html, page):
    assert page.texts("dfn") == ["merge", "split", "missed", "spurious", "IoU"]
    first, table = html.index("<dfn>"), html.index("<table>")
    assert html.index('class="answers"') < first < table
    text = " ".join(html[first:table].split())
    assert "covers several nuclei (IoU above 0.1 with each)" in text
    assert "a nucleus without a prediction of IoU above 0.7" in text


def test_what_counts_is_said_where_it_is_shown(html):
    text = " ".join(html.split())
    places = [
        text.index(words)
        for words in (
            'id="numbers"',
            "only those of 0.5 and more count here and below (<code>--score-threshold</code>)",
            'id="errors"',
            "judged at IoU 0.7",
            "<figcaption>Merges by size",
            "Each chart has a scale of its own",
            'id="precision-recall"',
            "A curve ends where all predictions of the method are used",
            "Cap: ",
            "Can the confidences (scores) be trusted?</h2>",
            "Points of fewer than 20 predictions are left out",
            'id="images"',
        )
    ]
    assert places == sorted(places)


def test_what_is_compared_is_called_a_method(report):
    page = Page(report())
    assert "Method" in page.texts("th")
    visible = [text for tag, _, text in page.elements if tag != "style"]
    assert not re.search(r"\bsets?\b", " ".join(visible), re.IGNORECASE)


def test_it_loads_nothing(html, page):
    """Neither by a URL nor by a script, and the browser is told to allow neither."""
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("script", "iframe", "object", "embed")
    assert not re.search(r"url\((?!#)|@import", html)
    policies = [a["content"] for _, a, _ in page.all("meta") if "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_names_of_files_are_text(html):
    assert "<script" not in html
    assert "<img src=x>" not in html
    assert "&lt;script&gt;alert(" in html


def test_names_of_sets_are_text(report):
    html = report(["<b>bold</b>", "a&b\"'_c"])
    assert "<b>bold" not in html
    page = Page(html)
    assert "<b>bold</b>" in page.texts("strong")
    assert [a["aria-label"] for _, a, _ in page.all("svg") if "<b>bold</b>:" in str(a)]


def test_pictures_decode_and_are_described(page):
    images = page.all("img")
    assert len(images) == 2 * (4 + 2)  # sets x (worst + median)
    for _, attributes, _ in images:
        assert re.search(r"with the outlines of \w+: \d+ merged, \d+ split", attributes["alt"])
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert image.size == (int(attributes["width"]), int(attributes["height"])) == (60, 40)


def test_a_page_for_everyone(page):
    assert page.all("html")[0][1]["lang"] == "en"
    metas = {a.get("name"): a.get("content") for _, a, _ in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for _, a, _ in page.all("a")]
    assert set(links) <= set(ids)
    assert page.all("a")[0][1]["class"] == "skip"
    references = [
        part for _, a, _ in page.elements for part in a.get("aria-labelledby", "").split()
    ]
    assert set(references) <= set(ids)
    fills = [a["fill"] for _, a, _ in page.elements if "url(" in a.get("fill", "")]
    assert fills
    assert {fill[5:-1] for fill in fills} <= set(ids)


def test_headings_skip_no_level(page):
    levels = [int(tag[1]) for tag, _, _ in page.all("h1", "h2", "h3", "h4", "h5")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_charts_and_switches_have_names(page):
    assert len(page.all("table")) == len(page.all("caption")) > 5
    assert all("scope" in attributes for _, attributes, _ in page.all("th"))
    for _, attributes, _ in page.all("div"):
        if attributes.get("class") == "wide":  # scrolls, so it has to be reached by keyboard
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    for _, attributes, _ in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes["aria-label"]
    assert len(page.all("input")) == len(page.all("label")) == 5


def test_costs_are_shown_as_measured(html, page, report):
    assert {"model: parameters", "model: flops", "training: data s"} <= set(page.texts("th"))
    cells = page.texts("td")
    place = cells.index("1,234,567")
    assert cells[place : place + 6] == ["1,234,567", "", "", "", "0.01235", ""]
    assert "name these files" not in html
    assert "name these files" in report()
    assert "have no <code>efficiency</code> entry" in report(results=[{}, {}])


def test_one_set_alone(report):
    page = Page(report(["careful"]))
    questions = ["How good is it?", "How often does it merge nuclei?"]
    assert page.texts("h2")[:2] == questions
    assert not [text for text in page.texts("p") if "difference" in text]  # nothing to compare
    assert "minus" not in " ".join(page.texts("th"))
    assert "clear" not in " ".join(page.texts("caption"))
    assert len(page.all("img")) == 6


def test_the_same_input_gives_the_same_page(report):
    assert report() == report()


def luminance(color):
    channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    """WCAG 2.1, contrast ratio."""
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for colors in (light, dark):
        for name in colors.keys() - {"page", "card", "line"}:
            for ground in ("page", "card"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
