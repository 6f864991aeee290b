"""The report in headless Chromium, where one is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PHONE = 390  # pixels wide; Chromium's own windows are wider, so the page is shown in a frame
# The report is untouched. What only a browser knows is written into the page around it.
AROUND = """<!DOCTYPE html>
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<iframe width="{width}" height="844" style="border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const style = (element) => getComputedStyle(element);
  const merged = page.querySelector(".overlay .merged");
  const before = style(merged).display;
  page.querySelector("#show-merged").click();
  document.body.setAttribute("data-probe", JSON.stringify({{
    images: [...page.images].map((image) => image.naturalWidth),
    width: page.documentElement.scrollWidth,
    background: style(page.body).backgroundColor,
    merged: [before, style(merged).display],
    text: Math.min(...[...page.querySelectorAll(".chart text")]
      .map((text) => [parseFloat(style(text).fontSize), text.getScreenCTM()])
      .map(([size, scale]) => size * Math.hypot(scale.a, scale.b))),
  }}));
}});
</script>"""
BACKGROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_on_a_phone(report, tmp_path, scheme):
    path = tmp_path / "around.html"
    path.write_text(AROUND.format(width=PHONE, page=html.escape(report())), encoding="utf-8")
    options = (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"),
        "--hide-scrollbars",
        *(f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom"),
    )
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert "CONSOLE" not in done.stderr
    probe = json.loads(html.unescape(re.search(r'data-probe="([^"]+)"', done.stdout)[1]))
    assert probe["images"] == [60] * 12
    assert probe["width"] == PHONE  # nothing but tables scrolls sideways
    assert probe["background"] == BACKGROUND[scheme]
    assert probe["merged"] == ["inline", "none"]  # the switch works without a script
    assert probe["text"] >= 12  # px
