"""The report in headless Chromium."""

import pytest
from browser import BACKGROUND, NEEDS_CHROMIUM, PHONE, look_at

pytestmark = NEEDS_CHROMIUM

CLICK = """
  const merged = page.querySelector(".overlay .merged");
  const shown = style(merged).display;
  page.querySelector("#show-merged").click();
"""
PROBE = """
    merged: [shown, style(merged).display],
    text: Math.min(...[...page.querySelectorAll(".chart text")]
      .map((text) => [parseFloat(style(text).fontSize), text.getScreenCTM()])
      .map(([size, scale]) => size * Math.hypot(scale.a, scale.b))),
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_on_a_phone(report, tmp_path, scheme):
    seen = look_at(report(), tmp_path, scheme, CLICK, PROBE)
    assert seen["images"] == [60] * 12
    assert seen["width"] == PHONE  # nothing but tables scrolls sideways
    assert seen["background"] == BACKGROUND[scheme]
    assert seen["merged"] == ["inline", "none"]  # the switch works without a script
    assert seen["text"] >= 12  # px
