"""The report's page: one file that shows what report.json says, whatever the data's texts hold."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies

from finetune_trainer.data.plots import draw_bars, draw_histograms, escape, format_share, shorten
from finetune_trainer.data.report_page import build_page

HOSTILE = (
    "<script>alert(1)</script>",
    "</mark></body><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "</title></style><script>",
    "<!-- ",
    "]]><svg onload=alert(1)>",
    "&#60;script&#62; &amp;",
    "\u202eevil\u2066",
    "NUL\x00 bell\x07 escape\x1b \x85",
    "http://example.com/x.png",
)


class Reader(html.parser.HTMLParser):
    """Collects what a browser would make of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def prepare_hostile_rows(run_command, folder: pathlib.Path) -> pathlib.Path:
    """Prepare rows whose every text, and the name of whose file, wants to break out of the page."""
    source = folder / "<b onload='x'>.jsonl"
    rows = [
        {"instruction": text, "output": f"{text} I'm sorry, but I can't help with that. {text}"} for text in HOSTILE
    ]
    rows += [{"instruction": text, "output": text} for text in HOSTILE]
    lines = [json.dumps(row) for row in rows] + ["<script>not json</script>"]
    source.write_text("\n".join(lines))
    phrases = folder / "phrases.txt"
    phrases.write_text("".join(f"{text}\n" for text in (*HOSTILE[:4], HOSTILE[8])) + "I'm sorry")
    outcome = run_command(
        "prepare", "--source", str(source), "--rules", "legacy", "--phrases", str(phrases), "--max-bad-rows", "1",
        "--out", str(folder / "out"),
    )  # fmt: skip
    assert outcome.code == 0
    return folder / "out"


@pytest.fixture
def page(run_command, tmp_path) -> str:
    return (prepare_hostile_rows(run_command, tmp_path) / "report.html").read_text()


def test_texts_of_the_data_cannot_break_out_of_the_page(page):
    reader = read_page(page)
    assert not {"script", "img", "b onload", "iframe", "link", "object", "a"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    shown = "".join(reader.text)
    for text in HOSTILE[:6]:
        assert text in shown
    assert "\u202e" not in page
    assert "\\u202eevil" in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_the_page_needs_nothing_from_elsewhere(page):
    reader = read_page(page)
    assert not [name for name, _ in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_shows_the_numbers_of_the_report(run_command, instructions, tmp_path):
    run_command("prepare", "--source", str(instructions / "alpaca.json"), "--out", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    shown = "\n".join(read_page((tmp_path / "report.html").read_text()).text)
    for number in (report["rowsRead"], report["rowsKept"], report["rowsRemoved"], report["rowsTrain"]):
        assert re.search(rf"^{number:,}$", shown, re.MULTILINE)
    for text in (*report["removedPerRule"], *report["removedPerCategory"], report["digest"]):
        assert text in shown
    assert report["sources"][0]["files"][0]["sha256"] in shown
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == report["rowsRemoved"]
    for sample in samples:
        assert sample["found"] in shown


def test_the_page_of_a_stored_report_is_the_one_beside_it(run_command, instructions, tmp_path):
    source = str(instructions / "legacy-rows.json")
    run_command("prepare", "--source", source, "--rules", "legacy", "--format", "alpaca", "--out", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert build_page(report, samples) == (tmp_path / "report.html").read_text()


def test_the_report_holds_no_text_of_the_data(run_command, tmp_path):
    """It travels with a published model; the texts stay beside it."""
    source = tmp_path / "rows.json"
    rows = [{"instruction": "zebra", "output": "I'm sorry, but I can't help with that, zebra."}]
    source.write_text(json.dumps([*rows, {"instruction": "zebra", "output": "zebra"}]))
    run_command("prepare", "--source", str(source), "--out", str(tmp_path))
    assert "zebra" in (tmp_path / "samples.jsonl").read_text()
    assert "zebra" not in (tmp_path / "report.json").read_text()


def test_a_data_set_of_which_nothing_is_left_has_a_report_that_says_why(run_command, tmp_path):
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"instruction": "x", "output": "I can't help with that."}] * 3))
    outcome = run_command("prepare", "--source", str(source), "--out", str(tmp_path / "out"))
    assert outcome.code == 65
    assert str(tmp_path / "out" / "report.html") in outcome.report["hint"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["removedPerCategory"] == {"refusal": 3}
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800"])
def test_escaped_text_is_one_text_in_an_element_and_in_an_attribute(text):
    reader = read_page(f'<p class="{escape(text)}" id="{escape(text)}">{escape(text)}</p>')
    assert reader.tags == ["p"]
    assert [name for name, _ in reader.attributes] == ["class", "id"]
    escape(text).encode()


def test_a_label_fits_its_room_in_any_script():
    assert shorten("short", 20) == "short"
    assert len(shorten("x" * 100, 20)) == 20
    assert len(shorten("抱歉" * 20, 20)) <= 11
    assert "\n" not in shorten("a\nb", 20)


def test_bars_are_as_long_as_their_numbers():
    widths = [
        float(width)
        for width in re.findall(
            r'class="bar \w+"[^>]* width="([\d.]+)"', draw_bars({"a": 200, "b": 50}, 1000, "removed", "")
        )
    ]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({0: 1}, {}),
        ({1: 5}, {1: 5}),
        ({8: 3, 1 << 30: 1}, {8: 2}),
        ({first: first for first in (1, 2, 4)}, {}),
    ],
)
def test_a_histogram_stays_within_its_picture(before, after):
    picture = draw_histograms(before, after, "tokens", "Answers")
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
    for x, y, right, bottom in re.findall(r'x="(-?[\d.]+)" y="(-?[\d.]+)" width="([\d.]+)" height="([\d.]+)"', picture):
        assert float(x) >= 0
        assert float(y) >= 0
        assert float(x) + float(right) <= width
        assert float(y) + float(bottom) <= height
    assert len(re.findall('class="number"', picture)) >= 2


def test_a_small_share_is_not_shown_as_nothing():
    assert [format_share(*pair) for pair in ((0, 10), (1, 100_000), (1, 1000), (5, 10), (1, 0)) ] == [
        "0.0%", "<0.1%", "0.1%", "50.0%", "",
    ]  # fmt: skip


@hypothesis.given(strategies.text(max_size=60))
def test_any_text_is_shown_as_one_text(text):
    page = f'<p title="{escape(text)}">{escape(text)}</p>'
    page.encode()
    reader = read_page(page)
    assert reader.tags == ["p"]
    assert reader.attributes == [("title", "".join(reader.text))]
    if text.isprintable():
        assert "".join(reader.text) == text
