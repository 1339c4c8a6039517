"""The web pages: sound HTML that loads nothing from elsewhere, takes no string as markup, and is whole or not there."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from micronet_eval import evaluate, pages
from micronet_eval.comparing import Comparison, Result, rows
from micronet_eval.errors import InputError
from micronet_eval.pages.comparison import parallels
from micronet_eval.pages.plots import Axis, Point, front, path_plot, score_plot
from micronet_eval.ranking import Judged, as_json, boards, judged
from micronet_eval.scoring import Layer, Module
from micronet_eval.submission import Claims, Provenance, Step
from micronet_eval.task import METRICS

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "link", "input", "wbr"}


class Parsed(HTMLParser):
    """Checks that tags close in order; keeps them with their attributes, and the text of scripts with data."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.data, self.text = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.text.append(data)


def step(score, quality):
    return Step(stage=HOSTILE, parameters=10, nonzeros=5, mults=3, adds=2, score=score, quality=quality)


@pytest.fixture(scope="module")
def found(made):
    """A submission as it is, the same with hostile strings wherever one may stand, and one that is broken."""
    good = judged("small", made, evaluate(made))
    steps = [step(0.5, 0.9), step(0.2, 0.95), step(None, None)]
    hostile = good.manifest.model_copy(
        update={"name": HOSTILE, "authors": [HOSTILE], "provenance": Provenance(note=HOSTILE, steps=steps)}
    )
    layer = Layer(f"a.{HOSTILE}", "aten.convolution", 10, 10, 8, 8, 20.0, 80, 10)
    report = good.report.model_copy(
        update={"provenance": HOSTILE, "warnings": (HOSTILE,), "layers": (layer, *good.report.layers),
                "environment": {HOSTILE: HOSTILE}, "ruleset": HOSTILE}
    )  # fmt: skip
    return [
        good,
        Judged(HOSTILE, hostile, report, recipe=f"# </pre>{HOSTILE}"),
        Judged("broken", None, None, error=f"field {HOSTILE} is missing"),
    ]


@pytest.fixture(scope="module")
def site(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "site"
    pages.write(found, folder)
    return folder


@pytest.fixture(scope="module")
def parsed(site):
    return {path: Parsed(path.read_text()) for path in sorted(site.rglob("*.html"))}


def test_there_is_a_page_for_each_submission(site):
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    slugs = ["small", "script-alert-x-script", "broken"]
    assert names == {"index.html", "index.json", "style.css", "site.js"} | {
        f"submissions/{slug}.{kind}" for slug in slugs for kind in ("html", "json")
    }
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 5_000_000


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(parsed):
    for path, page in parsed.items():
        ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
        assert not ids or max(ids.values()) == 1
        for tag, attributes in page.tags:
            for name in ("href", "src"):
                target = attributes.get(name)
                if target is None or target == "data:,":
                    continue
                if tag == "a" and target.startswith("https://github.com/"):
                    continue  # followed by a click only
                if target.startswith("#"):
                    assert target[1:] in ids
                else:
                    assert (path.parent / target).is_file(), f"{path.name}: {target}"
    style = (next(iter(parsed)).parent / "style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_strings_of_a_submission_are_never_markup(parsed):
    for page in parsed.values():
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert [s for s in scripts if s.get("type") != "application/json"] == [
            s for s in scripts if s.get("src", "").endswith("site.js")
        ]
        assert len(scripts) <= 2
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    hostile = next(page for path, page in parsed.items() if "script" in path.name)
    text = "".join(hostile.text)
    assert text.count(HOSTILE) >= 9  # title, heading, name, author, note, warning, layer, steps, recipe
    assert HOSTILE not in hostile.data and HOSTILE in str(json.loads(hostile.data))


def test_the_data_beside_a_page_is_the_report(site, found):
    good, hostile, _ = found
    read = {path.stem: json.loads(path.read_text()) for path in site.rglob("*.json")}
    assert read["small"] == json.loads(good.report.to_json())
    assert read["script-alert-x-script"] == json.loads(hostile.report.to_json())
    assert read["broken"] == {"submission": "broken", "error": f"field {HOSTILE} is missing"}
    assert read["index"] == json.loads(json.dumps(as_json(boards(found))))


def test_a_page_shows_the_figures_of_its_report(parsed, found):
    page = next(page for path, page in parsed.items() if path.stem == "small")
    report, text = found[0].report, " ".join(page.text)
    assert f"{report.score.total:.5f}" in text and f"{report.storage.bits:,} bits are stored" in text
    broken = next(page for path, page in parsed.items() if path.stem == "broken")
    assert "Not ranked: field" in "".join(broken.text)


def test_the_tree_adds_up(found):
    report = found[0].report

    def leaves(node):
        return [node] if not node[3] else [leaf for child in node[3] for leaf in leaves(child)]

    whole = pages.tree(report)
    assert whole[1] == report.storage.bits == sum(leaf[1] for leaf in leaves(whole))
    assert whole[2] == pytest.approx(report.math.ops32) == sum(leaf[2] for leaf in leaves(whole))


def test_a_tree_by_hand(found):
    layers = [("a.b.c", 10.0, 8), ("a.b.d", 5.0, 4), ("a.b", 1.0, 0), ("e", 2.0, 2)]
    made = tuple(Layer(module, "aten.mul", 1, 0, 8, 8, ops32, bits) for module, ops32, bits in layers)
    report = found[0].report.model_copy(update={"layers": made, "free_layers": ()})
    inside = [["c", 8, 10.0, []], ["d", 4, 5.0, []], ["(itself)", 0, 1.0, []]]
    assert pages.tree(report) == ["total", 14, 18.0, [["a.b", 12, 16.0, inside], ["e", 2, 2.0, []]]]


def test_sparsity_is_what_zero_weights_save(found):
    layer = Layer("a", "aten.convolution", 30, 20, 6, 5, 40.0, 99, 30)
    module = Module("a", dense_ops=200, sparse_ops=50, ops32=40.0, dense_bits=0, sparse_bits=0, bits=0)
    unweighted = Layer("b", "aten.relu", 30, 0, 6, 0, 6.0, 0)
    report = found[0].report.model_copy(update={"layers": (layer, unweighted), "modules": (module,)})
    (row,) = pages.weighted(report)
    assert (row.op, row.weight_bits, row.input_bits, row.sparsity) == ("conv", 5, 6, 0.75)


def test_the_bits_of_accumulators_where_products_are_summed(found, tmp_path):
    summed = Layer("a", "aten.convolution", 30, 20, 6, 5, 40.0, 99, 30, 11)
    scaled = Layer("b", "micronet.scale", 30, 0, 32, 32, 30.0, 32)
    report = found[0].report.model_copy(update={"layers": (summed, scaled)})
    assert [row.accumulator_bits for row in pages.weighted(report)] == [11, None]
    pages.write([replace(found[0], report=report)], tmp_path / "site")
    (page,) = (tmp_path / "site" / "submissions").glob("*.html")
    cells = re.findall(r'data-value="(\d*)">(?:(\d+) bit)?</td>', page.read_text())
    assert ("11", "11") in cells
    assert "None bit" not in page.read_text()


def test_pages_are_replaced_and_other_folders_are_left_alone(found, tmp_path):
    folder = tmp_path / "site"
    pages.write(found, folder)
    pages.write(found[:1], folder)
    assert [path.stem for path in folder.glob("submissions/*.html")] == ["small"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    with pytest.raises(InputError, match="holds no pages of this program"):
        pages.write(found, tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"site", "mine"}


def test_what_fails_halfway_leaves_the_pages_that_were_there(found, tmp_path, monkeypatch):
    pages.write(found[:1], tmp_path / "site")
    before = {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()}

    def fail(judged):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "_json", fail)
    with pytest.raises(InputError, match="No space left on device"):
        pages.write(found, tmp_path / "site")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("html", [".", "..", "file/x", "/proc/nowhere/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(run, tmp_path, monkeypatch, html):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if html.startswith(".") else tmp_path)
    status, out, err = run("evaluate", "nowhere", "--html", html)
    assert (status, out) == (2, "")
    assert "name another folder by --html" in err and "nowhere is no folder" not in err


def test_a_link_to_pages_stays(found, tmp_path):
    pages.write(found[:1], tmp_path / "site")
    (tmp_path / "link").symlink_to("site")
    pages.write(found, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "site" / "submissions" / "broken.html").is_file()


def test_what_was_measured_is_printed_although_its_pages_cannot_be_written(run, submission, tmp_path, monkeypatch):
    def full(found, html):
        raise InputError("the disk is full")

    monkeypatch.setattr(pages, "write", full)
    for command in ("evaluate", "leaderboard"):
        status, out, err = run(command, submission, "--html", tmp_path / "site")
        assert status == 2 and "the disk is full" in err
        assert "small" in out


def test_the_commands_write_pages(run, submission, tmp_path):
    status, out, err = run("leaderboard", submission, "--format", "json", "--html", tmp_path / "one")
    assert status == 0 and json.loads(out) == json.loads((tmp_path / "one" / "index.json").read_text())
    assert "wrote" in err
    assert run("evaluate", submission, "--html", tmp_path / "two")[0] == 1  # its quality misses
    assert (tmp_path / "two" / "submissions" / "small.html").is_file()
    assert run("leaderboard", submission, "--html", submission)[0] == 2


def test_submissions_of_one_name_have_their_own_figures(found, tmp_path):
    good = found[0].report
    report = good.model_copy(update={"quality": good.quality.model_copy(update={"measured": 1.0, "passed": True})})
    worse = report.model_copy(update={"score": replace(report.score, total=1.5)})
    pages.write([replace(found[0], report=one) for one in (worse, report)], tmp_path / "site")
    shown = [(tmp_path / "site" / "submissions" / f"{slug}.html").read_text() for slug in ("small", "small-2")]
    assert [f"<dd>{score.total:.5f}" in text for text in shown for score in (worse.score, report.score)] == [
        True, False, False, True
    ]  # fmt: skip


def test_submissions_of_one_name_are_told_apart(run, submission, tmp_path):
    other = shutil.copytree(submission, tmp_path / "other" / submission.name)
    _, out, _ = run(other, submission, "--html", tmp_path / "site", "--format", "csv")
    assert [line.partition(",")[0] for line in out.splitlines()[1:]] == [str(other), str(submission)]
    assert str(other) in (tmp_path / "site" / "index.html").read_text()


# --- a comparison -----------------------------------------------------------------------------------------------------


def compared():
    """Three rows of two seeds, one of which is beaten by another, one that failed, and one of another task."""
    results = [
        Result(name, seed, "digits", 100, 1000, score / 2, score / 2, score, quality, True, seconds)
        for name, score, quality, seconds in [
            ("small:a=1,b=2", 0.1, 0.8, 9),
            ("good", 0.4, 0.99, 3),
            ("worse", 0.5, 0.9, 3),
        ]
        for seed in (0, 1)
    ]
    results += [Result(HOSTILE, 0, error=HOSTILE), Result("text", 0, "wikitext103", 1, 1, 0.1, 0.1, 0.2, 34.0, True, 1)]
    return Comparison(tuple(rows(results)), tuple(results))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "site"
    pages.write_comparison(compared(), folder)
    return folder


def test_a_comparison_is_a_page_with_its_data(comparison):
    page = Parsed((comparison / "index.html").read_text())
    assert "".join(page.text).count(HOSTILE) == 2  # its name, and why it failed
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert json.loads((comparison / "index.json").read_text()) == compared().to_list()
    assert sum(path.stat().st_size for path in comparison.iterdir()) < 100_000


def test_parallel_axes_have_the_better_value_above():
    digits, text = parallels(compared().rows)
    assert [scale.name for scale in digits.scales] == ["storage", "math", "score", "quality", "time"]
    ends = {way.row.name: [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", way.path)] for way in digits.ways}
    small, good, worse = (ends[name] for name in ("small:a=1,b=2", "good", "worse"))
    assert small[2] < good[2] < worse[2]  # pixels of the score: lower ones are above
    assert good[3] < worse[3] < small[3]
    assert good[4] == worse[4] < small[4]
    assert all(digits.top <= y <= digits.bottom for y in (*small, *good, *worse))
    assert [way.row.best for way in digits.ways] == [False, True, True] and len(text.ways) == 1


# --- plots ------------------------------------------------------------------------------------------------------------


def test_ticks_are_round():
    assert Axis(0.79, 0.81, 0, 100).ticks() == pytest.approx([0.79, 0.795, 0.80, 0.805, 0.81])
    assert Axis(0.004, 0.9, 0, 100, logarithmic=True).ticks() == [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]


def test_one_tick_alone_tells_no_scale():
    assert Axis(0.00068, 0.00916, 0, 100).ticks() == pytest.approx([0.002, 0.004, 0.006, 0.008])


def test_pixels():
    assert Axis(0, 10, 100, 300).at(2.5) == 150
    assert Axis(0.01, 1, 0, 100, logarithmic=True).at(0.1) == 50


def test_the_front_is_what_no_other_point_beats():
    points = [Point(score, quality, name, "", True) for name, score, quality in
              [("a", 1, 0.7), ("b", 2, 0.9), ("c", 3, 0.8), ("d", 4, 0.95), ("e", 1, 0.6)]]  # fmt: skip
    assert [p.label for p in front(points, lower_is_better=False)] == ["a", "b", "d"]
    assert [p.label for p in front(points, lower_is_better=True)] == ["e"]


@pytest.mark.parametrize("metric, better, worse", [("top-1", 0.9, 0.8), ("perplexity", 30.0, 34.0)])
def test_the_better_quality_is_above(metric, better, worse):
    points = [Point(0.1, better, "a", "", True), Point(0.2, worse, "b", "", True)]
    a, b = score_plot(points, METRICS[metric]).spots
    assert a.y < b.y and a.x < b.x


def test_one_point_alone_can_be_drawn():
    (spot,) = path_plot([Point(0.0, 1.0, "a", "", True)], METRICS["top-1"]).spots
    assert 0 <= spot.x <= 460 and 0 <= spot.y <= 300


def test_what_could_not_be_evaluated_is_in_no_plot(found):
    claims = Claims(score="0.01", quality="0.9955")
    broken = Judged("broken", found[0].manifest.model_copy(update={"claims": claims}), None, error="why")
    (board,) = boards([found[0], broken])
    plot = pages._score_plot(board, board.entries, ["a", "b"])
    assert [spot.point.label for spot in plot.spots] == ["small"]


@pytest.mark.parametrize("qualities", [(99.5,), (-0.5,), (0.9, 99.5), (1.5, 1.5), (-2.0, 0.5)])
def test_steps_whose_quality_is_no_share_can_be_drawn(qualities):
    """Their authors write them, and nothing else depends on them; percentages are such, and perplexities."""
    plot = path_plot([Point(0.1, quality, "a", "", True) for quality in qualities], METRICS["top-1"])
    assert all(plot.top <= spot.y <= plot.bottom for spot in plot.spots)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page 400 pixels wide; ends with an error where anything was logged, or asked for outside the folder."""
    tab, seen = browser.new_page(viewport={"width": 400, "height": 800}), []
    tab.on("console", lambda message: seen.append(message.text))
    tab.on("pageerror", lambda error: seen.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or seen.append(request.url))
    yield tab
    tab.close()
    assert seen == []


def test_no_page_is_wider_than_the_screen(tab, parsed, comparison):
    for path in [*parsed, comparison / "index.html"]:
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_sorting_and_filtering(tab, site):
    tab.goto((site / "index.html").as_uri())
    names = tab.locator("table").first.locator("tbody th")
    head = tab.get_by_role("button", name="submission", exact=True)
    head.press("Enter")
    rising = names.all_inner_texts()
    head.press("Enter")
    assert names.all_inner_texts() == rising[::-1] and set(rising) == {"broken", "small", HOSTILE}
    tab.select_option("#task", "unknown")
    assert [row.inner_text() for row in names.all() if row.is_visible()] == ["broken"]


def test_drilling_down_with_the_keyboard(tab, site, found):
    tab.goto((site / "submissions" / "small.html").as_uri())
    whole = pages.tree(found[0].report)
    first = max((child for child in whole[3] if child[3]), key=lambda child: child[1])
    tab.locator(".boxes button.more").first.press("Enter")
    assert tab.locator(".crumbs").inner_text().split() == ["total", first[0]]
    tab.get_by_role("button", name="math").press("Enter")
    assert re.search(rf"^{re.escape(first[0])}: {first[2]:,.0f} operations", tab.locator(".told").inner_text())
    tab.get_by_role("button", name="total").press("Enter")
    boxes = tab.locator(".boxes button").count()
    assert boxes == sum(child[2] > 0 for child in whole[3])


def test_choosing_in_a_comparison(tab, comparison):
    tab.goto((comparison / "index.html").as_uri())
    visible = lambda: [row.inner_text() for row in tab.locator("tbody th button").all() if row.is_visible()]  # noqa: E731
    lines = lambda: tab.locator('section:not([hidden]) .way:not([style*="none"])').count()  # noqa: E731
    assert (len(visible()), lines()) == (5, 4)
    tab.select_option("#task", "digits")
    assert (len(visible()), lines()) == (3, 3)
    tab.fill("#named", "O")
    assert visible() == ["good", "worse"] and tab.locator("#left").inner_text() == "2 of 5"
    tab.check("#best")
    assert visible() == ["good"] and lines() == 1
    tab.fill("#named", "")
    assert visible() == ["small:a=1,b=2", "good"]


def test_a_row_that_failed_is_last_in_every_order(tab, comparison):
    tab.goto((comparison / "index.html").as_uri())
    names = tab.locator("tbody th button")
    for column, best in (("score", "small:a=1,b=2"), ("quality", "small:a=1,b=2"), ("time", "text")):
        head = tab.get_by_role("button", name=column, exact=True)
        for _ in range(2):
            head.press("Enter")
            assert names.all_inner_texts()[-1] == HOSTILE
        head.press("Enter")
        assert names.first.inner_text() == best


def test_a_row_and_its_line_light_up_together(tab, comparison):
    tab.goto((comparison / "index.html").as_uri())
    row, line = tab.locator('tr[data-row="1"]'), tab.locator('path[data-row="1"]')
    tab.get_by_role("button", name="good", exact=True).focus()
    assert "lit" in line.get_attribute("class") and "lit" in row.get_attribute("class")
    tab.get_by_role("button", name="worse", exact=True).focus()
    assert "lit" not in line.get_attribute("class")
    tab.get_by_role("button", name="good", exact=True).press("Enter")
    tab.get_by_role("button", name="worse", exact=True).focus()
    assert "lit" in line.get_attribute("class")  # for as long as it is pressed
