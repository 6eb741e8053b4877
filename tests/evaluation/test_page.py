"""The page of an evaluation: what is on it, that it needs nothing else, and that a browser shows it."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.example_records import load_image, record
from PIL import Image

from diffadapt.evaluation.report import plots
from diffadapt.evaluation.report.contact_sheets import contact_sheets
from diffadapt.evaluation.report.page import MAX_SIDE, page, thumbnail, write_page
from diffadapt.evaluation.report.plots import (
    ParetoPoint,
    histogram,
    interval_plot,
    pareto_front,
    save_plot,
)

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Elements(HTMLParser):
    """Every opening tag of a page with its attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_holds_scores_plots_and_images_and_fetches_nothing():
    elements = Elements(page(record(), load_image))
    assert not elements.of("script")
    assert not elements.of("link")
    images = elements.of("img")
    assert all(image["src"].startswith("data:image/") for image in images)
    assert all(image["alt"] for image in images)
    plots = [image for image in images if "svg" in image["src"][:20]]
    assert len(plots) == 3  # the score, and two figures of the images
    assert len(images) - len(plots) == 2 * (12 + 12 + 12 + 2 * 8)
    for text in (
        "0.01 to 0.03",
        "kernel_distance[embedded:clip]",
        "JPEG against <PNG>",
        "30 images, needs 128",
    ):
        assert text in elements.text


def test_text_from_outside_is_escaped():
    html = page(record(("lora",), count=4), load_image)
    assert "<b>cat</b>" not in html
    assert "&lt;b&gt;cat&lt;/b&gt; &amp; number" in html
    assert "<PNG>" not in html


@pytest.mark.parametrize(
    ("options", "stamp"), [({}, "DEMO"), ({"smoke": True}, "NOT A SCORE"), ({"demo": False}, None)]
)
def test_the_stamp_stands_on_top_and_in_the_title(options, stamp):
    html = page(record(("lora",), count=4, **options), load_image)
    title = re.search("<title>(.*)</title>", html).group(1)
    assert ('class="stamp"' in html) == (stamp is not None)
    assert stamp is None or title.startswith(stamp)


def test_best_worst_and_nearest_images_are_those_of_their_figures():
    made = record(("lora",))
    best, worst, chosen, nearest = contact_sheets(made, "lora", count=5)
    assert [cell.images[0][1] for cell in best.cells] == [f"lora-{i:03d}.png" for i in (29, 28, 27, 26, 25)]
    assert [cell.images[0][1] for cell in worst.cells] == [f"lora-{i:03d}.png" for i in range(5)]
    assert len({cell.images for cell in chosen.cells}) == 5
    assert nearest.cells[0].images == (("lora", "lora-000.png"), ("reference", "real-0.png"))
    few = contact_sheets(record(("lora",), count=5), "lora")
    assert [len(sheet.cells) for sheet in few[:3]] == [2, 2, 5]


def test_images_without_figures_are_shown_at_random_only():
    made = record(("lora",))
    bare = replace(made, images=tuple(replace(row, values={}, nearest=None) for row in made.images))
    assert [sheet.heading for sheet in contact_sheets(bare, "lora")] == ["Random"]
    assert "Images of lora" in page(bare, load_image)


def test_large_images_become_small_and_small_ones_keep_their_pixels():
    small = load_image("lora", "x")
    uri, is_small = thumbnail(small)
    stored = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert is_small
    assert stored.tobytes() == small.tobytes()
    uri, is_small = thumbnail(Image.new("RGB", (900, 450)))
    stored = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert not is_small
    assert stored.size == (MAX_SIDE, MAX_SIDE // 2)


def test_a_page_without_images_or_scores_is_still_a_page():
    empty = replace(record(), images=(), scores=())
    assert "Images of" not in page(empty, load_image)
    assert "How it was made" in page(empty, load_image)


def test_images_of_which_only_features_are_at_hand_are_left_out():
    def generated_only(label, name):
        if label == "reference":
            raise KeyError(name)
        return load_image(label, name)

    html = page(record(("lora",), count=6), generated_only)
    assert html.count('alt="lora: ') == 3 + 3 + 6 + 6  # best, worst, random, and the pairs' left halves
    assert 'alt="reference' not in html

    def nothing(label, name):
        raise KeyError(name)

    assert "Images of" not in page(record(("lora",), count=6), nothing)


def test_an_image_that_cannot_be_read_costs_itself_and_is_named(tmp_path):
    def broken(label, name):
        if name == "lora-002.png":
            raise ValueError("damaged")
        return load_image(label, name)

    problems = write_page(record(("lora",), count=4), tmp_path / "page.html", broken)
    assert problems == ["the page lacks the image lora-002.png of lora: damaged"]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'alt="lora: lora-002.png"' not in html
    assert 'alt="lora: lora-001.png"' in html


def test_a_plot_that_fails_costs_itself_and_a_page_that_fails_is_told(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no bins")

    monkeypatch.setattr(plots, "histogram", fails)
    problems = write_page(record(("lora",), count=4), tmp_path / "page.html", load_image)
    assert "plot of realism of each image: RuntimeError: no bins" in problems[0]
    elements = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "could not be made" in elements.text
    assert len([image for image in elements.of("img") if "svg" in image["src"][:20]]) == 1
    (tmp_path / "file").write_text("", encoding="utf-8")
    (problem,) = write_page(record(("lora",), count=4), tmp_path / "file" / "page.html", load_image)[1:][-1:]
    assert "could not be made" in problem
    assert list(tmp_path.glob("*/*")) == []


def test_the_page_links_to_the_files_beside_it_and_to_the_papers_and_is_open_in_print(tmp_path):
    write_page(record(("lora",), count=4), tmp_path / "my scores.html", load_image)
    elements = Elements((tmp_path / "my scores.html").read_text(encoding="utf-8"))
    links = [link["href"] for link in elements.of("a")]
    assert links[:3] == ["my%20scores.json", "my%20scores.md", "my%20scores.csv"]
    assert "https://arxiv.org/abs/1801.01401" in links
    assert all("open" in details for details in elements.of("details"))


def test_the_front_holds_the_points_no_other_beats():
    costs_and_scores = {"a": (1, 5), "b": (2, 3), "c": (3, 4), "d": (4, 1), "e": (1, 6)}
    points = [ParetoPoint(label, cost, score) for label, (cost, score) in costs_and_scores.items()]
    assert [point.label for point in pareto_front(points, better="lower")] == ["a", "b", "d"]
    assert [point.label for point in pareto_front(points, better="higher")] == ["e"]


def test_a_plot_is_the_same_bytes_every_time_and_accepts_equal_values(tmp_path):
    for name in ("one.svg", "two.svg"):
        save_plot(interval_plot(record().scores), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    save_plot(histogram({"a": [1.0, 1.0, 1.0]}, "realism"), tmp_path / "equal.png")
    copies = histogram({"a": [*[0.1 * i for i in range(20)], 1e9]}, "realism").axes[0]
    assert copies.get_title("left") == "realism of each image (1 beyond)"
    assert copies.get_xlim()[1] < 3
    infinite = histogram({"a": [*[0.1 * i for i in range(20)], math.inf, math.nan]}, "realism").axes[0]
    assert infinite.get_title("left") == "realism of each image (2 beyond)"
    assert infinite.get_xlim()[1] < 3
    assert Image.open(tmp_path / "equal.png").width > 100


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 1 + 1e-16, 1 - 2e-16],
        [1e9, 1e9 + 1e-7],
        [0.0, 0.0],
        [math.inf],
        [math.nan, math.inf],
        [0.0, 1e-300],
    ],
)
def test_a_histogram_of_equal_values_has_room_for_its_bins(values, tmp_path):
    save_plot(histogram({"a": values}, "nearest_similarity"), tmp_path / "plot.png")


def open_in_browser(path, home, *options):
    """What Chromium makes of a page, and what it says on its console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={home / 'profile'}", "--enable-logging=stderr", *options, "--dump-dom"]
    return subprocess.run(
        [*command, f"file://{path}"],
        capture_output=True, text=True, encoding="utf-8", timeout=120, env={**os.environ, "HOME": str(home)},
    )  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    """The page as it is written: nothing in it offends its own rule to fetch nothing and run nothing."""
    write_page(record(count=3), tmp_path / "page.html", load_image)
    done = open_in_browser(tmp_path / "page.html", tmp_path)
    assert "Content-Security-Policy" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    (tmp_path / "rude.html").write_text(
        (tmp_path / "page.html")
        .read_text(encoding="utf-8")
        .replace("</main>", '<img src="https://nowhere.invalid/a.png"></main>'),
        encoding="utf-8",
    )
    assert "CONSOLE" in open_in_browser(tmp_path / "rude.html", tmp_path).stderr  # so it would have been seen


PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images], box = document.documentElement;
  const seen = images.filter(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width >= 30);
  const out = {images: images.length, seen: seen.length, wide: box.scrollWidth, inner: innerWidth};
  document.title = JSON.stringify(out);
  document.body.setAttribute("data-probe", JSON.stringify(out));
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.slow
def test_a_browser_shows_every_image_at_a_desks_and_a_phones_width(tmp_path, width):
    """The frame around the page gives it the width, which a browser's window cannot go below 500 pixels."""
    html = page(record(count=14), load_image)
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # for the probe alone
    (tmp_path / "page.html").write_text(html.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    frame = f'<iframe id="f" src="page.html" style="width:{width}px;height:3000px;border:0"></iframe>'
    read = """<script>f.onload = () => setTimeout(() => {
      document.body.dataset.probe = f.contentDocument.body.dataset.probe; }, 300);</script>"""
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}{read}</body>", encoding="utf-8")
    options = ["--allow-file-access-from-files", "--window-size=1400,3000", "--virtual-time-budget=5000"]
    done = open_in_browser(tmp_path / "frame.html", tmp_path, *options)
    assert "CONSOLE" not in done.stderr, done.stderr
    probe = re.search('<body data-probe="([^"]*)"', done.stdout)
    assert probe, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(probe.group(1).replace("&quot;", '"'))
    assert seen["inner"] == width
    assert seen["images"] == seen["seen"] > 50
    assert seen["wide"] <= width  # nothing to scroll sideways
