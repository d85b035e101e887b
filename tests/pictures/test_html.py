"""What notebooks show: well-formed, escaped, with the numbers in it."""

import base64
import io
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from helpers import Affine
from PIL import Image

import fastdiff
from fastdiff import EDMSchedule, FlowSchedule, NoiseSchedule, Plan, State, samplers
from fastdiff.pictures.grid import make_grid
from fastdiff.pictures.html import of_report, sparkline, table


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<body>{text.replace('&ensp;', ' ')}</body>")


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m"])
def test_a_plan_is_its_table_and_the_curve_of_sigma(name: str) -> None:
    plan = samplers.SAMPLERS[name](NoiseSchedule.cosine(), 6)
    shown = parsed(plan._repr_html_())
    heading, _, rows = str(plan).partition("\n\n")
    assert heading in text_of(shown)
    assert rows in text_of(shown)
    assert len(shown.findall(".//polyline")) == 1
    assert repr(plan) == f"Plan(name={name!r}, rows={len(plan)})"


def test_names_are_escaped() -> None:
    plan = Plan(samplers.ddim(NoiseSchedule.cosine(), 2).rows, name="<script>alert(1)</script>")
    assert "<script" not in plan._repr_html_()
    assert "&lt;script&gt;" in of_report("<script>", [("<b>", 1)])
    assert "<b>" not in table(["<b>"], [["<b>"]])


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.cosine(3), EDMSchedule(), FlowSchedule(2)])
def test_a_schedule_is_its_repr_and_its_curves(schedule: fastdiff.schedules.level.Schedule) -> None:
    shown = parsed(schedule._repr_html_())
    assert repr(schedule) in text_of(shown)
    assert len(shown.findall(".//polyline")) == (2 if isinstance(schedule, NoiseSchedule) else 0)


def test_a_state_is_short_and_shows_its_images() -> None:
    states = list(fastdiff.sample_iter(Affine(), (2, 3, 8, 8), sampler="dpmpp_2m", steps=3))
    assert repr(states[0]) == "State(row=0, t=999, x=[2, 3, 8, 8] on cpu, no x0, slot 0)"
    assert repr(states[2]) == "State(row=2, t=332, x=[2, 3, 8, 8] on cpu, x0, slot 0)"
    assert repr(states[3]) == "State(row=3, x=[2, 3, 8, 8] on cpu, x0, slot 0)"
    for state, count in ((states[0], 1), (states[2], 2)):
        found = parsed(state._repr_html_()).findall(".//img")
        assert len(found) == count
        data = base64.b64decode(found[0].attrib["src"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.tobytes() == make_grid(state.x).tobytes()


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 8, 8), (0, 3, 8, 8)])
def test_a_state_without_images_shows_its_words(shape: tuple[int, ...]) -> None:
    state = State(torch.zeros(shape), None, None, (None,) * 4, 3)
    assert "<img" not in state._repr_html_()
    assert f"State(row=3, x={list(shape)}" in text_of(parsed(state._repr_html_()))


def test_a_state_that_is_not_finite_is_shown() -> None:
    state = State(torch.full((1, 1, 4, 4), math.nan), None, torch.zeros(1), (None, torch.zeros(1), None, None), 1)
    assert "<img" in state._repr_html_()
    assert repr(state) == "State(row=1, x=[1, 1, 4, 4] on cpu, no x0, anchor, slot 1)"


def test_of_large_images_a_state_shows_few() -> None:
    state = State(torch.zeros(64, 1, 512, 512), None, None, (None,) * 4, 3)
    data = parsed(state._repr_html_()).findall(".//img")[0].attrib["src"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == make_grid(state.x[:2]).size


def test_a_report_is_a_table_of_what_it_prints() -> None:
    model = fastdiff.models.UNet(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    ).eval()  # fmt: skip
    report = fastdiff.accelerate(model, dtype=torch.float32)
    shown = parsed(report._repr_html_())
    assert repr(report) == str(report)
    assert "fastdiff.UNet, computing in float32, channels_last" in text_of(shown)
    lines = [" ".join(text_of(cell) for cell in row) for row in shown.findall(".//tr")]
    assert lines == [" ".join(line.split()) for line in str(report).splitlines()[1:]]


def test_a_model_prints_in_one_line() -> None:
    told = repr(fastdiff.models.digits())
    assert told.startswith("TrainedModel(UNet of 702,753 parameters, images [1, 8, 8], 10 classes, guidance_scale=1.15")
    assert "sampler='ddim', steps=50" in told
    assert len(told) < 400


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ([0.0, 1.0, 2.0], "1.0,23.0", "119.0,1.0"),
        ([5.0, 5.0], "1.0,23.0", "119.0,23.0"),
        ([1e-3, 1.0, 1e3], "1.0,23.0", "119.0,1.0"),
        ([math.inf, 1.0, math.nan, 2.0], "1.0,23.0", "119.0,1.0"),
    ],
)
def test_a_sparkline_goes_from_corner_to_corner(values: list[float], first: str, last: str) -> None:
    points = ElementTree.fromstring(sparkline(values))[0].attrib["points"].split()
    assert (points[0], points[-1]) == (first, last)
    if values[0] == 1e-3:
        assert points[1] == "60.0,12.0"  # of logarithms


def test_a_sparkline_needs_two_numbers() -> None:
    assert sparkline([1.0]) == sparkline([]) == sparkline([math.nan, 1.0]) == ""
