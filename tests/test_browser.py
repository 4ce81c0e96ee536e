"""The pages in a real browser: they render, overflow nowhere, link where they say, and want nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import sample_reports as sample
from detr_conformance import comparing
from detr_conformance.report import page

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine to render pages with")

# both widths in one frame each, since a window cannot be as narrow as a telephone
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
{frames}
<script>
window.onload = () => {{
  const told = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, all = [...page.body.querySelectorAll("*")];
    const shown = all.filter(e => e.getClientRects().length && [...e.childNodes].some(
      n => n.nodeType === 3 && n.data.trim()));
    return {{
      width: frame.clientWidth,
      needs: page.documentElement.scrollWidth,
      smallest: Math.min(...shown.filter(e => !e.closest("svg")).map(
        e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize))),
      out: shown.filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > frame.clientWidth + 1).length,
      dead: [...page.querySelectorAll("a[href^='#']")].filter(
        a => !page.getElementById(decodeURIComponent(a.hash.slice(1)))).length,
      pictures: [...page.querySelectorAll("figure svg")].map(
        s => Math.round(Math.min(s.getBoundingClientRect().width, s.getBoundingClientRect().height))),
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      resources: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
    }};
  }});
  document.body.textContent = "TOLD" + JSON.stringify(told) + "DLOT";
}};
</script>
"""


def chromium(tmp_path, url, *more):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        *more, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def rendered(tmp_path, text, *more):
    frames = "\n".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(text)}"></iframe>' for w in (400, 1400))
    file = tmp_path / "harness.html"
    file.write_text(HARNESS.format(frames=frames), "utf-8")
    done = chromium(tmp_path, file.as_uri(), "--dump-dom", *more)
    found = re.search("TOLD(.*)DLOT", done.stdout, re.S)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), done.stderr


PAGES = {
    "report": lambda: page.html([sample.report(), sample.right], "2026-01-01T00:00:00+00:00"),
    "hostile": lambda: page.html([sample.report(candidate=sample.HOSTILE.replace("\ud800", "") * 20)], ""),
    "matrix": lambda: page.matrix(comparing.matrix([("a", sample.report()), ("b", sample.right)] * 3)),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_renders_at_the_width_of_a_telephone_and_of_a_screen(tmp_path, name):
    frames, log = rendered(tmp_path, PAGES[name]())
    assert "CONSOLE" not in log, log  # where script errors and blocked requests are told
    for frame in frames:
        assert frame["needs"] <= frame["width"]
        assert frame["out"] == 0
        assert frame["smallest"] >= 11
        assert frame["dead"] == 0
        assert frame["resources"] == []
        assert all(side > 20 for side in frame["pictures"])
    assert bool(frames[0]["pictures"]) == (name != "matrix")


def test_a_page_is_dark_where_that_is_preferred(tmp_path):
    (light, *_), _ = rendered(tmp_path, PAGES["report"]())
    (dark, *_), _ = rendered(tmp_path, PAGES["report"](), "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(20, 23, 28)"


def test_a_page_prints(tmp_path):
    file, out = tmp_path / "report.html", tmp_path / "report.pdf"
    file.write_text(PAGES["report"](), "utf-8")
    chromium(tmp_path, file.as_uri(), f"--print-to-pdf={out}")
    assert out.read_bytes().startswith(b"%PDF")
    assert out.stat().st_size > 10_000
