"""The scan's page: harmless whatever the names, true to the report, whole whatever is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from untrojan.cost import Cost
from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.scanning.linearity import ChannelHistogram, most_linear_channels
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
from untrojan.defenses.training.none import linearity_by_class
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.report.activations import activation_histogram
from untrojan.report.scan_page import ScanPage, assemble_scan, render_scan
from untrojan.scan import Scan, joint

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}\u202egnp", "")


def clean(names: tuple[str, ...] = HOSTILE) -> ImageSet:
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    return ImageSet(images, torch.arange(12) % len(names), names, numbered(12))


def model(classes: int = 4) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, classes))
    return Classifier(network, classes, torch.zeros(3), torch.ones(3))


def report(**changes: object) -> ScanReport:
    mask = torch.zeros(1, 8, 8)
    mask[0, 0, 0] = 0.04
    given: dict[str, object] = {
        "verdict": "poisoned",
        "targets": (1,),
        "statistics": {label: {"mask_size": 3.5 + label, "odd_thing": 7.0} for label in range(4)},
        "triggers": {1: InvertedTrigger(mask, torch.ones(3, 8, 8))},
        "failed": (2,),
        "reason": HOSTILE[0],
        "evidence": {"distances": [[None, 2, 3, None], [1, None, 2, 2], [9, 9, None, 9], [3, 1, 3, None]],
                     "suspicious_pairs": [(3, 1)]},
    }  # fmt: skip
    return ScanReport(**(given | changes))  # type: ignore[arg-type]


def page_of(reports: dict[str, ScanReport], linearity: tuple[ChannelHistogram, ...] = ()) -> str:
    found = Scan(reports, *joint(reports), linearity, {name: Cost(1.0) for name in reports})
    return render_scan(assemble_scan(found, model(), clean(), subject=HOSTILE[1]))


def test_hostile_names_stay_text() -> None:
    histogram = ChannelHistogram(HOSTILE[0], 0, 1, 2.0, (-1.0, 0.0, 1.0), (1, 2), (5, 0), 0.5, 1.3)
    html = page_of({HOSTILE[1]: report(), "abs": report()}, (histogram,))
    assert "<script" not in html
    assert "\u202e" not in html
    assert "{{ 7*7 }}" in html
    attributes: list[tuple[str, str | None]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: attributes.extend(attrs)  # type: ignore[method-assign]
    reader.feed(html)
    assert not [name for name, _ in attributes if name.startswith("on")]
    links = [value or "" for name, value in attributes if name in ("src", "href")]
    assert links
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)


def test_the_page_shows_what_the_report_says() -> None:
    html = page_of({"neural-cleanse": report()})
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "This model has a backdoor" in text
    assert "No working trigger was found for" in text
    assert "Trigger size, pixels" in text
    assert "odd thing" in text
    assert "4.50" in text
    # The mask is a twenty-fifth strong: shown as much stronger.
    assert "shown 25× as strong as it is" in text
    assert "Heat map of class distances" in html
    assert "no pattern found" in html
    assert html.count("with the trigger:") == 3
    assert "What each method says" not in text


def test_a_method_without_a_vote_raises_no_alarm_beside_others() -> None:
    quiet = report(verdict="clean", targets=(), triggers={}, evidence={})
    beside = page_of({"neural-cleanse": quiet, "natural": report()})
    assert "No backdoor was found" in beside
    assert "▲" not in beside
    assert beside.count("no vote<") == 1
    assert "▲ suspected" in page_of({"natural": report()}), "alone it decides"


@pytest.mark.parametrize(
    ("verdict", "headline"), [("clean", "No backdoor was found"), ("undecided", "could not")]
)
def test_bare_reports_have_pages(verdict: str, headline: str) -> None:
    html = page_of({"x": report(verdict=verdict, targets=(), triggers={}, failed=(), evidence={},
                                statistics={label: {} for label in range(4)})})  # fmt: skip
    assert headline in html
    with pytest.raises(UntrojanError, match="no verdict"):
        render_scan(ScanPage("guilty", "m", ("a",), 1))  # type: ignore[arg-type]


def test_malformed_distances_are_left_out() -> None:
    for rows in ([[1.0]], "no", [[1, 2, 3, 4]] * 3):
        assert "Heat map" not in page_of({"x": report(evidence={"distances": rows})})


def test_linearity_names_the_channel_that_only_one_class_excites() -> None:
    """Channel 1 answers to bright red alone; channels 0 and 2 to every image alike."""
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.copy_(torch.tensor([0.1, -0.5, 0.1]))
        network[0].weight[1, 0] = 1.0
        network[0].weight[0, 1] = network[0].weight[2, 2] = 1.0
        network[4].weight.copy_(torch.tensor([[0.0, 0, 0], [0, 60, 0]]))
        network[4].bias.copy_(torch.tensor([8.0, 0]))
    images = torch.randint(60, 80, (40, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()
    images[20:, 0] = 240
    data = ImageSet(images, torch.arange(40) // 20, ("dark", "red"), numbered(40))
    (found,) = most_linear_channels(Classifier(network, 2, torch.zeros(3), torch.ones(3)), data)
    assert (found.layer, found.channel, found.label) == ("network.0", 1, 1)
    assert (sum(found.strong), sum(found.weak)) == (20, 20)
    assert found.positive == 0.5
    # Of bright red and of dim images, which differ among themselves by a few levels.
    assert found.separation > 20
    assert found.edges[0] < 0 < found.edges[-1]
    assert found.strong[-1] == 20
    assert sum(found.weak[:20]) == 20
    assert "surely" in activation_histogram(found.edges, [("surely", found.strong), ("not", found.weak)])


def test_scores_of_a_class_are_its_peaks_above_the_others() -> None:
    random = torch.Generator().manual_seed(0)
    values, confidences = torch.randn(60, 5, generator=random), torch.rand(60, 4, generator=random)
    by_class = linearity_by_class(values, confidences)
    strong, weak = values[confidences[:, 2] > 0.9], values[confidences[:, 2] < 0.1]
    torch.testing.assert_close(by_class[2], strong.amax(0) - weak.mean(0) - 3 * weak.std(0))
