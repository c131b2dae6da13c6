"""Pages on a phone and in the dark: what can be told of their HTML and CSS without a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorica.reporting.comparison import ComparedRun
from lorica.reporting.html import write_comparison, write_report
from lorica.reporting.style import points

WIDE = {"svg", "table"}
VOID = {"meta", "br", "hr"}


class Parents(HTMLParser):
    """Of each wide element, the classes and attributes of the elements around it."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in WIDE:
            self.found.append((tag, [dict(attributes) for _, attributes in self.open]))
        if tag not in VOID:
            self.open.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag


DRAWN: list[str] = []


@pytest.fixture
def pages(make_run, tmp_path):
    """A report and a comparison, drawn once."""
    if DRAWN:
        return DRAWN
    report = write_report(make_run())
    metrics = [{"round": number, "score": 0.5 + number / 10, "metric": "accuracy"} for number in range(3)]
    comparison = write_comparison(tmp_path / "compared", [ComparedRun("as-lora", 0, metrics, True)])
    DRAWN.extend(Path(path).read_text() for path in (report, comparison))
    return DRAWN


def test_what_is_wide_scrolls_by_itself_and_can_be_reached_by_keyboard(pages):
    for page in pages:
        found = Parents(page).found
        assert {tag for tag, _ in found} == WIDE
        for tag, around in found:
            [scroll] = [attributes for attributes in around if attributes.get("class") == "scroll"]
            assert scroll["tabindex"] == "0"
            assert tag == "svg" or scroll["aria-label"].startswith("Table of ")
        style = re.search(r"<style>(.*?)</style>", page, flags=re.S)[1]
        assert re.search(r"\.scroll \{ overflow-x: auto; background:[^}]*var\(--shadow\)", style)
        # At 390 px a figure of 9 inches would be drawn at less than half its size, with letters of 5 px.
        least = float(re.search(r"figure svg \{[^}]*min-width: (\d+)rem", style)[1]) * 16
        assert least / (9 * 96) * 9.5 * 96 / 72 > 9
        assert "@media (max-width: 40rem)" in style


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_light_and_in_dark(pages):
    """4.5:1 or more (WCAG 2.1, success criterion 1.4.3)."""
    for page in pages:
        light, dark = (
            dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", page)
        )
        assert set(light) == set(dark)
        assert luminance(light["paper"]) > 0.9 > 0.1 > luminance(dark["paper"])
        for colours in (light, dark):
            for text in ("ink", "muted", "warn"):
                assert contrast(colours[text], colours["paper"]) >= 4.5
            assert contrast(colours["ink"], colours["wash"]) >= 4.5
            assert contrast(colours["warn"], colours["warn-wash"]) >= 4.5
        # Paper stays white.
        assert "@media screen and (prefers-color-scheme: dark)" in page
        # No other colour is written out, but for figures.
        body = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
        rules = re.sub(r":root \{[^}]*\}", "", re.search(r"<style>(.*?)</style>", body, flags=re.S)[1])
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b", rules)


def test_figures_are_drawn_on_whatever_page_there_is(pages):
    for page in pages:
        for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
            patch = re.search(r'id="\w+-patch_1">\s*<path[^>]*style="([^"]*)"', svg)[1]
            assert "fill: none" in patch or "fill-opacity: 0" in patch or "opacity: 0" in patch


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (0.164, "+16.4 points"),
        (-0.0321, "−3.2 points"),
        (-0.0004, "±0.0 points"),
        (0.0, "±0.0 points"),
        (0.0004, "±0.0 points"),
    ],
)
def test_a_difference_that_rounds_to_nothing_has_no_sign(difference, text):
    assert points(difference) == text
