"""Pages in headless Chromium, where one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
NEEDS_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
PHONE = 390  # pixels wide; Chromium's own windows are wider, so the page is shown in a frame
BACKGROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
# The page is untouched. What only a browser knows is written into the page around it.
_AROUND = """<!DOCTYPE html>
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<iframe width="{width}" height="844" style="border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const style = (element) => getComputedStyle(element);
  {before}
  document.body.setAttribute("data-probe", JSON.stringify({{
    images: [...page.images].map((image) => image.naturalWidth),
    width: page.documentElement.scrollWidth,
    background: style(page.body).backgroundColor,
    {probe}
  }}));
}});
</script>"""


def look_at(page: str, folder: Path, scheme: str, before: str = "", probe: str = "") -> dict:
    """Show a page on a phone; nothing may appear on the console.

    Args:
        scheme: "light" or "dark".
        before, probe: more JavaScript, and more entries of what is returned.

    Returns:
        "images" (widths, 0 of one that cannot be shown), "width" and "background" of the page.
    """
    path = folder / "around.html"
    around = _AROUND.format(width=PHONE, page=html.escape(page), before=before, probe=probe)
    path.write_text(around, encoding="utf-8")
    options = (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"),
        "--hide-scrollbars",
        *(f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom"),
    )
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(re.search(r'data-probe="([^"]+)"', done.stdout)[1]))
