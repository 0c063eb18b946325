"""The report in a real browser: text of the data stays text, nothing is fetched, and it fits phones and screens."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from fsdpsft.testing import save_tiny_model
from fsdpsft.tools.check import main

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason="no /usr/bin/chromium")
ATTACK = (
    "<script>document.title='pwned';document.body.id='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "</pre><style>body{display:none}</style><a href='http://example.com/'>a</a> \" ' &amp; \u202e"
)
# Measures the page, as a phone or screen of that width lays it out, and writes what it found into the title.
MEASURE = """<!doctype html><title>waiting</title><style>body{margin:0}</style><iframe width="%d" height="800"
 style="border:0" srcdoc="%s"></iframe><script>onload = () => {
  const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
  const at = (name) => page.querySelector(name), look = (name) => getComputedStyle(at(name));
  document.title = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, scripts: page.scripts.length, images: page.images.length,
    links: page.links.length, styles: page.querySelectorAll('style').length, id: page.body.id,
    heading: at('h1').getBoundingClientRect().height, sections: page.querySelectorAll('section').length,
    bars: page.querySelectorAll('rect').length, curve: at('polyline').getBoundingClientRect().width,
    trained: [...page.querySelectorAll('.tokens .t')].map((t) => t.textContent).join(''),
    ids: at('.tokens span').dataset.id, paper: look('html').backgroundColor, ink: look('html').color,
    tint: look('.tokens .t').backgroundColor, smallest: Math.min(...[...page.querySelectorAll('body *')]
      .filter((e) => e.textContent.trim()).map((e) => parseFloat(getComputedStyle(e).fontSize))),
  });
};</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    model = save_tiny_model(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"{i} {ATTACK}"}, {"role": "assistant", "content": f"fine {ATTACK}"}]}
        for i in range(6)
    ]
    rows.append({"messages": [{"role": ATTACK, "content": "x"}]})
    data = folder / "a_rather_long_name_of_a_file_to_see_where_it_breaks_<script>.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"data.train_files='{data}'", f"model.partial_pretrain={model}", f"data.cache_dir={folder / 'cache'}"]
    page = folder / "report.html"
    assert main([*arguments, "data.train_batch_size=2", "data.num_workers=1", f"check.html={page}"]) == 1
    return page


def chromium(page: Path, *options: str) -> str:
    profile = page.parent / "profile"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--hide-scrollbars", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measure(report: Path, width: int, dark: bool) -> dict[str, object]:
    text = report.read_text().replace("&", "&amp;").replace('"', "&quot;")
    wrapper = report.parent / f"measure-{width}-{dark}.html"
    wrapper.write_text(MEASURE % (width, text))
    dom = chromium(wrapper, "--dump-dom", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(title[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [380, 1400])
def test_it_fits_and_nothing_of_the_data_runs(report: Path, width: int) -> None:
    found = measure(report, width, dark=False)
    assert found["overflow"] == 0
    assert (found["scripts"], found["images"], found["links"], found["styles"], found["id"]) == (0, 0, 0, 1, "")
    assert found["heading"] > 20 and found["curve"] > 0.7 * min(width, 900)  # type: ignore[operator]
    assert found["sections"] == 7
    assert found["smallest"] >= 11  # type: ignore[operator]
    shown = ATTACK.replace("\u202e", "\\u202e")
    assert found["trained"] == f"fine {shown}<|im_end|>" * 3
    assert found["ids"] == "1"


def test_light_and_dark_follow_the_system(report: Path) -> None:
    light, dark = (measure(report, 900, dark=dark) for dark in (False, True))
    assert (light["paper"], dark["paper"]) == ("rgb(251, 250, 247)", "rgb(22, 24, 27)")
    assert light["ink"] != dark["ink"] and light["tint"] != dark["tint"]


def test_the_page_itself_stays_whole_and_fetches_nothing(report: Path) -> None:
    dom = chromium(report, "--dump-dom")
    assert "<title>failed: fsdpsft check</title>" in dom
    assert 'id="pwned"' not in dom
    text = report.read_text()
    assert "default-src 'none'" in text
    tags = re.findall(r"<[a-zA-Z][^>]*>", text)
    assert not [
        tag for tag in tags if re.search(r"\s(src|href|on\w+)\s*=", tag) or tag.startswith(("<script", "<link"))
    ]
    assert not re.search(r"@import|url\(", text)


def test_a_screenshot_has_paper_ink_and_colour(report: Path) -> None:
    image = report.parent / "shot.png"
    chromium(report, f"--screenshot={image}", "--window-size=900,1600")
    assert image.stat().st_size > 40_000  # an empty page is a tenth of that
