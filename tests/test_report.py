"""The audit's page: harmless whatever the names, complete whatever is missing, its figures true."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.errors import UntrojanError
from untrojan.report import text
from untrojan.report.assemble import Truth, assemble
from untrojan.report.audit_page import (
    AuditPage,
    BeforeAfter,
    Check,
    FlaggedImages,
    PairStatistics,
    ProbeCheck,
    RunFacts,
    Score,
    StageCost,
    TargetFinding,
    render_audit,
)
from untrojan.report.curves import curves
from untrojan.report.heat_map import heat_map
from untrojan.report.histogram import reciprocal_histogram
from untrojan.report.images import amplification_for, pattern_image, pattern_png, png, reduced_pattern
from untrojan.report.table_page import TablePage, render_table_page

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onload='alert(1)",
    "\u202egnp.exe\u0000\n\x1b[31m",
    "{{ 7*7 }}{% raw %}]]>-->",
    "https://example.com/a.png",
    "x" * 5000,
    "\udc80lone",
    "",
)


class Reader(HTMLParser):
    """Elements as a browser would see them, with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, css: str | None = None) -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.elements if name == tag]
        return [a for a in found if css is None or css in (a.get("class") or "").split()]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def norms_of(count: int, pairs: tuple[tuple[int, int], ...] = (), small: float = 0.2) -> Tensor:
    norms = 1 + torch.rand(count, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for source, target in pairs:
        norms[source, target] = small
    return norms.fill_diagonal_(torch.nan)


def full_page(names: tuple[str, ...], shape: tuple[int, int, int] = (3, 8, 8), targets: int = 1) -> AuditPage:
    """A page with every part; hostile or not, ``names`` stand wherever an owner's text can."""
    any_name = names[0]
    pattern = torch.randn(shape, generator=torch.Generator().manual_seed(2)) / 255
    finding = TargetFinding(
        1, (0, 2), 1e-8, None, pattern, pattern * 2, 30, 100, {0: 20, 2: 10},
        noise(5, *shape), noise(5, *shape, seed=1), names[:5], (0, 0, 2, 0, 2),
    )  # fmt: skip
    labels = tuple(i % len(names) for i in range(48))
    return AuditPage(
        verdict="poisoned",
        subject=any_name,
        class_names=names,
        images=1000,
        image_shape=shape,
        reason=" ".join(names),
        p_value=1e-8,
        flagged_total=30,
        targets=(finding,) * targets,
        pairs=PairStatistics(norms_of(len(names), ((0, 1), (2, 1))), (9.0, 0.0, 0.06)),
        flagged=FlaggedImages(
            noise(48, *shape), tuple(names[i] for i in labels), labels, labels, (True, False) * 24, 99,
            any_name,
        ),
        comparison=BeforeAfter((Score(any_name, 0.914, 0.962), Score("after", 0.911, None)), 0.942, 0.043),
        probe=ProbeCheck(
            any_name, tuple(Check(name, name, False, name) for name in names),
            (0.5, 0.9), (0.4, 0.7), (2.0, 0.3), any_name,
        ),
        run=RunFacts(
            any_name, any_name, any_name, 7, any_name, dict.fromkeys(names, any_name), {any_name: any_name},
            {any_name: any_name}, (StageCost(any_name, 12.0, 3, 4, 5, 6.0),),
        ),
        notes=names,
    )  # fmt: skip


NAMES = tuple(f"class-{letter}" for letter in "abcdefgh")


@pytest.mark.parametrize("verdict", ["clean", "poisoned", "undecided"])
def test_hostile_names_neither_open_elements_nor_attributes(verdict: str) -> None:
    tame = Reader(render_audit(replace(full_page(NAMES), verdict=verdict)))
    wild_html = render_audit(replace(full_page(HOSTILE), verdict=verdict))
    wild = Reader(wild_html)

    def skeleton(page: Reader) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(sorted(attrs))) for tag, attrs in page.elements]

    # The same elements with the same attributes as on a page of harmless names: nothing got out of its place.
    assert skeleton(wild) == skeleton(tame)
    assert "<script" not in wild_html
    assert "<script>alert(1)</script>" in wild.text
    assert not [a for _, attrs in wild.elements for a in attrs if a.startswith("on")]
    assert "49" not in wild.text.replace("{{ 7*7 }}", "").split()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f\ud800-\udfff]", wild_html)
    wild_html.encode("utf-8")


def test_the_page_refers_to_nothing_outside_itself() -> None:
    for page in (full_page(NAMES), full_page(HOSTILE), full_page(tuple(f"c{i}" for i in range(40)))):
        html = render_audit(page)
        for tag, attrs in Reader(html).elements:
            assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
            for name in ("src", "href", "srcset", "poster", "action", "xlink:href", "data"):
                value = attrs.get(name) or ""
                assert not value or value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
        style = html[html.index("<style>") : html.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("clean", "No backdoor was found"),
        ("poisoned", "carries a backdoor"),
        ("undecided", "could not decide"),
    ],
)
def test_the_verdict_is_said_in_the_title_the_stamp_and_the_only_main_heading(
    verdict: str, headline: str
) -> None:
    html = render_audit(AuditPage(verdict, "set", NAMES, 10))
    page = Reader(html)
    assert len(page.all("h1")) == 1
    assert headline in html[html.index("<h1>") : html.index("</h1>")]
    assert len(page.all("div", verdict)) == 1
    assert f"<title>{verdict.capitalize()}" in html


def test_the_three_verdicts_differ_in_icon_not_in_colour_alone() -> None:
    icons = set()
    for verdict in ("clean", "poisoned", "undecided"):
        html = render_audit(AuditPage(verdict, "set", NAMES, 10))
        icons.add(html[html.index("<svg") : html.index("</svg>")])
    assert len(icons) == 3


def test_an_unknown_verdict_is_refused() -> None:
    with pytest.raises(UntrojanError, match="no verdict 'fine'"):
        render_audit(AuditPage("fine", "set", NAMES, 10))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["targets", "pairs", "flagged", "comparison", "probe", "run"])
def test_any_part_may_be_missing(part: str) -> None:
    whole = full_page(NAMES)
    empty = () if part == "targets" else None
    html = render_audit(replace(whole, **{part: empty}))
    section = {"targets": "patterns"}.get(part, part)
    assert f'<section id="{section}">' in render_audit(whole)
    assert f'<section id="{section}">' not in html


def test_a_bare_poisoned_page_renders() -> None:
    bare = AuditPage("poisoned", "set", NAMES, 0, targets=(TargetFinding(3),), flagged_total=2)
    page = Reader(render_audit(bare))
    assert "class-d (class 3)" in page.text
    assert not page.all("img")


def test_the_same_page_gives_the_same_bytes() -> None:
    assert render_audit(full_page(NAMES)) == render_audit(full_page(NAMES))


@pytest.mark.parametrize(("shape", "classes", "targets"), [((3, 224, 224), 100, 9), ((3, 300, 60), 250, 2)])
def test_the_page_stays_under_two_megabytes_with_incompressible_images(
    shape: tuple[int, int, int], classes: int, targets: int
) -> None:
    names = tuple(f"a rather long name of class number {i}" for i in range(classes))
    assert len(render_audit(full_page(names, shape, targets)).encode()) < 2_000_000


def test_every_image_and_drawing_has_words_in_its_place() -> None:
    page = Reader(render_audit(full_page(NAMES)))
    assert page.all("img")
    assert all(attrs.get("alt") for attrs in page.all("img"))
    for attrs in page.all("svg"):
        assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"


def test_the_ground_truth_footer_appears_only_with_ground_truth() -> None:
    page = full_page(NAMES)
    blind = replace(page, comparison=None, targets=(replace(page.targets[0], true_pattern=None),))
    assert "ground truth" in Reader(render_audit(page)).text
    assert "ground truth" not in Reader(render_audit(blind)).text


def test_flagged_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(UntrojanError, match="2 flagged images but 1 labels"):
        FlaggedImages(noise(2, 1, 4, 4), ("a", "b"), (0,))


# Figures


def cells(html: str) -> list[tuple[float, str]]:
    """(opacity, title) of the heat map's cells."""
    found = re.findall(r'class="heat"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)<', html)
    return [(float(opacity), title) for opacity, title in found]


def test_the_heat_maps_fullest_cell_is_the_smallest_norm() -> None:
    html = str(heat_map(norms_of(8, ((5, 3),), small=0.1), NAMES, [(5, 3)]))
    assert len(cells(html)) == 56
    opacity, title = max(cells(html))
    assert (opacity, title) == (1.0, "class-f → class-d: norm 0.100")
    # Ink is proportional to the reciprocal: a norm ten times the smallest gets a tenth of the ink.
    ten = norms_of(8, ((5, 3),), small=0.1)
    ten[0, 1] = 1.0
    inks = {title: opacity for opacity, title in cells(str(heat_map(ten, NAMES)))}
    assert inks["class-a → class-b: norm 1.00"] == pytest.approx(0.03 + 0.97 / 10, abs=1e-3)


def test_a_map_without_outliers_stays_pale() -> None:
    assert max(opacity for opacity, _ in cells(str(heat_map(norms_of(8), NAMES)))) < 0.5


def test_a_failed_pair_is_shown_as_failed_never_as_a_norm() -> None:
    norms = norms_of(8)
    norms[2, 6] = torch.inf
    norms[4, 1] = torch.nan
    html = str(heat_map(norms, NAMES))
    assert html.count('class="failed"') == 2
    assert "class-c → class-g: no pattern found" in html
    assert len(cells(html)) == 54


@pytest.mark.parametrize("count", [31, 100, 450])
def test_many_classes_become_one_bitmap_whose_brightest_pixel_is_the_smallest_norm(count: int) -> None:
    norms = norms_of(count, ((count - 1, 3),), small=0.01)
    norms[7, 9] = torch.nan
    html = str(heat_map(norms, [f"c{i}" for i in range(count)]))
    assert not cells(html)
    encoded = re.search(r'href="data:image/png;base64,([^"]+)"', html)
    assert encoded
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))
    block = -(-count // 200)
    assert len(pixels) == -(-count // block)
    alpha = pixels[..., 3].astype(int)
    assert np.argwhere(alpha == 255).tolist() == [[(count - 1) // block, 3 // block]]
    if block == 1:
        assert pixels[7, 9, :3].tolist() == [128, 128, 128]
    assert len(html) < 100_000 + count * 300


def test_zero_norms_and_empty_maps_draw() -> None:
    assert cells(str(heat_map(norms_of(8, ((1, 2),), small=0.0), NAMES)))
    assert "class pairs" in str(heat_map(torch.full((3, 3), torch.nan), NAMES[:3]))


def bars(html: str, css: str) -> list[float]:
    found = re.findall(rf'<rect class="{css}" [^>]*height="([\d.]+)"', html)
    return [float(height) for height in found if height != "10"]


def test_the_null_curve_peaks_where_the_gamma_does_and_holds_its_count() -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(9, 0.06, 4000))
    html = str(reciprocal_histogram(values, (9.0, 0.0, 0.06)))
    points = re.search(r'class="null" d="M([\d. L]+)"', html)
    assert points
    curve = np.array([[float(v) for v in point.split()] for point in points[1].split("L")])
    base = curve[:, 1].max()
    high = 1.06 * float(values.max())
    mode = (curve[curve[:, 1].argmin(), 0] - 46) / 570 * high
    assert mode == pytest.approx(8 * 0.06, abs=0.03)
    # Bars and curve are in one unit: the areas agree to sampling error and rounding.
    wide = 570 / 60
    area = float(((base - curve[:, 1]) * 570 / 240).sum())
    assert sum(bars(html, "inside")) * wide == pytest.approx(area, rel=0.03)


def test_outliers_are_marked_once_each_and_turn_the_axis_logarithmic() -> None:
    values = torch.cat([torch.full((90,), 0.5), torch.tensor([30.0, 40.0])])
    html = str(reciprocal_histogram(values, None, {"→ <b>": [30.0, 40.0]}, values[:90]))
    assert html.count('class="outlier"') == 2
    assert "logarithmic" in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    plain = str(reciprocal_histogram(values[:90]))
    assert "logarithmic" not in plain
    assert 'class="outlier"' not in plain


def test_figures_without_a_finite_number_are_left_out() -> None:
    assert reciprocal_histogram(torch.full((3, 3), torch.nan)) == ""
    assert curves({"loss": [float("nan")]}, "loss") == ""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_curves_draw_whatever_a_run_left_behind(values: list[float]) -> None:
    drawn = str(curves({"a": values, "b": values[:1]}, "loss"))
    assert not re.search(r'(?:\bd|c[xy]|[xy])="[^"]*(?:nan|inf)', drawn)


# Pattern images


def test_a_faint_chessboard_becomes_visible_around_mid_grey() -> None:
    pattern = torch.zeros(3, 6, 6)
    pattern[:, ::2, ::2] = 2 / 255
    pattern[:, 1, 1] = -1 / 255
    factor = amplification_for(pattern)
    assert factor == 60
    image = pattern_image(pattern)
    assert image[0, 0, 1] == 128
    assert abs(int(image[0, 0, 0]) - 247.5) <= 0.5
    assert abs(int(image[0, 1, 1]) - 67.5) <= 0.5


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 1.0))
def test_the_amplified_peak_uses_the_range_without_clipping(peak: float) -> None:
    pattern = torch.tensor([[[peak, -peak]]])
    factor = amplification_for(pattern)
    assert factor >= 1
    assert peak * factor <= 0.5 + 1e-5 or factor == 1
    assert peak * factor > 0.2 or factor >= 1000


def test_a_reduced_chessboard_keeps_its_strength() -> None:
    pattern = torch.zeros(1, 64, 64)
    pattern[:, ::2, ::2], pattern[:, 1::2, 1::2] = 2 / 255, -2 / 255
    small = reduced_pattern(pattern, 16)
    assert small.shape == (1, 16, 16)
    assert torch.allclose(small.abs(), torch.tensor(2 / 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pattern_file_enlarges_each_pixel_to_a_square(channels: int) -> None:
    pattern = torch.linspace(-0.5, 0.5, channels * 100).view(channels, 10, 10)
    pixels = np.asarray(Image.open(io.BytesIO(pattern_png(pattern, 1)))).reshape(260, 260, channels)
    expected = pattern_image(pattern, 1).movedim(0, -1).numpy()
    assert np.array_equal(pixels[13::26, 13::26], expected)
    assert np.array_equal(pixels[::26, ::26], expected)


def test_png_is_exact() -> None:
    image = noise(3, 5, 7)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image.movedim(0, -1).numpy())


# Text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=300), st.integers(3, 60))
def test_shown_text_is_one_bounded_printable_line(raw: str, limit: int) -> None:
    line = text.shown(raw, limit)
    assert 0 < len(line) <= max(limit, len("(no name)"))
    assert line.isprintable()
    line.encode("utf-8")


def test_shown_text_leaves_ordinary_names_alone_and_keeps_both_ends_of_long_ones() -> None:
    for name in ("cat", "lawn mower", "čeština", "日本語", "train/cat/0001.png"):
        assert text.shown(name) == name
    assert text.shown("train/" + "x" * 100 + "/0001.png", 20) == "train/xxx…x/0001.png"
    assert text.shown("a\u202eb") == "a⟨U+202E⟩b"
    assert text.shown("e" + "\u0301" * 40) == "e" + "\u0301" * 2


@pytest.mark.parametrize(
    ("value", "log10", "expected"),
    [
        (0.43, None, "0.43"),
        (6e-42, None, "6 × 10⁻⁴²"),
        (0.0, -1500.0, "10⁻¹⁵⁰⁰"),
        (0.0, -400.5, "3.2 × 10⁻⁴⁰¹"),
        (9.96e-5, None, "10⁻⁴"),
        (None, None, "–"),
    ],
)
def test_p_values_are_written_from_their_logarithm_where_they_underflow(
    value: float | None, log10: float | None, expected: str
) -> None:
    assert text.p_value(value, log10) == expected


def test_numbers_durations_and_rarity() -> None:
    numbers = [text.number(value) for value in (0.1594, 12.34, 1234.0, 0.0, float("nan"))]
    assert numbers == ["0.159", "12.3", "1,234", "0", "–"]
    assert [text.duration(s) for s in (0.42, 38, 192, 7500)] == ["0.42 s", "38 s", "3 min 12 s", "2 h 05 min"]
    assert [text.rarity(p) for p in (0.2, 0.05, 1e-7, 0.0)] == [
        "", "about 1 in 20", "fewer than 1 in a million", "fewer than 1 in a million million",
    ]  # fmt: skip
    assert text.percent(0.9416) == "94.2\N{NO-BREAK SPACE}%"


# Assembly


def audited() -> tuple[ImageSet, CleansingReport, Tensor]:
    """40 images of 4 classes; images 1, 5 and 9 of class 1 flagged, 9 the most suspicious."""
    train = ImageSet(noise(40, 1, 6, 6), torch.arange(40) % 4, NAMES[:4], numbered(40, "img/"))
    flagged = torch.zeros(40, dtype=torch.bool)
    flagged[[1, 5, 9]] = True
    scores = torch.zeros(40)
    scores[[1, 5, 9]] = torch.tensor([0.7, 0.8, 0.9])
    pattern = torch.full((1, 6, 6), 10 / 255)
    evidence = {
        "p_value": 0.001,
        "log10_p_value": -3.0,
        "norms": norms_of(4, ((2, 1),)).tolist(),
        "null": {"shape": 5.0, "location": 0.0, "scale": 0.1},
        "patterns": {1: pattern},
    }
    report = CleansingReport("poisoned", flagged, scores, (1,), ((2,),), "because", evidence)
    predicted = torch.full((40,), 2)
    predicted[5] = 3
    return train, report, predicted


def test_assembly_orders_by_suspicion_and_removes_the_pattern() -> None:
    train, report, predicted = audited()
    truth = Truth(torch.arange(40) == 9, {1: report.evidence["patterns"][1]})
    page = assemble(train, report, subject="set", predicted=predicted, truth=truth, listing="flagged.csv")
    found, flagged = page.targets[0], page.flagged
    assert flagged is not None
    assert flagged.ids == ("img/9", "img/5", "img/1")
    assert flagged.truly_poisoned == (True, False, False)
    assert (found.flagged, found.class_size, found.reads_as) == (3, 10, {2: 2, 3: 1})
    assert found.read_after == (2, 3, 2)
    assert found.before is not None
    assert found.after is not None
    given = train.images[[9, 5, 1]]
    assert torch.equal(found.before, given)
    assert torch.equal(found.after, (given.int() - 10).clamp_min(0).to(torch.uint8))
    words = Reader(render_audit(page)).text
    assert "about 1 in 1,000" in words
    assert "class-b (class 1) hold a hidden pattern and most probably come from class-c (class 2)" in words


def test_assembly_of_a_clean_report_flags_nothing() -> None:
    train, report, _ = audited()
    nothing = torch.zeros(40, dtype=torch.bool)
    clean = CleansingReport("clean", nothing, torch.zeros(40), evidence={**report.evidence, "patterns": {}})
    page = assemble(train, clean, subject="set")
    assert page.flagged is None
    assert page.targets == ()
    assert (
        "backdoored"
        not in render_audit(page)[render_audit(page).index('id="pairs"') :].split("</section>")[0]
    )


def test_the_table_page_escapes_its_cells() -> None:
    html = render_table_page(TablePage("t", ("a", "<i>"), (("<b>x", 1), ("y", HOSTILE[1]))))
    page = Reader(html)
    assert not page.all("b", "x")
    assert not page.all("img")
    assert len(page.all("td")) == 2
    assert "<b>x" in page.text
