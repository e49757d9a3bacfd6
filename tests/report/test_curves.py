import re
import xml.etree.ElementTree as ElementTree

import pytest

from mmsr_jax.report.curves import COLOURS, SERIES, Panel, Series, draw, stages


def line(step, stage="grpo", **values):
    return {"step": step, "stage": stage, **{k.replace("__", "/"): v for k, v in values.items()}}


def test_metrics_of_one_unit_share_a_panel_and_come_first():
    records = [
        line(step, train__loss=1.0, compile__count=2, reward__mean=0.5, reward__format=1.0)
        for step in (1, 2)
    ]
    titles = [(panel.title, len(panel.series)) for panel in stages(records)["grpo"]]
    assert titles == [("reward", 2), ("train/loss", 1), ("compile/count", 1)]


def test_stages_stay_apart_and_a_later_line_of_a_step_replaces_the_earlier():
    records = [line(1, "sft", a=1.0), line(2, "sft", a=2.0), line(1, a=3.0), line(2, a=4.0)]
    found = stages([*records, line(2, a=5.0)])
    assert list(found) == ["sft", "grpo"]
    assert found["grpo"][0].series[0] == Series("a", (1, 2), (3.0, 5.0))


def test_what_makes_no_curve_is_passed_over():
    records = [line(1, a=None, b="text", c=1.0), line(2, a=None, b="text")]
    assert stages(records) == {}


@pytest.mark.parametrize("value", [10**400, 1e308, float("nan"), float("-inf")])
def test_what_cannot_be_drawn_makes_no_curve(value):
    assert stages([line(1, a=value), line(2, a=value)]) == {}


def test_any_name_can_be_drawn():
    (panel,) = stages([line(1, **{"\ud800": 1.0}), line(2, **{"\ud800": 2.0})])["grpo"]
    assert panel.title == "?" and draw(panel)


def test_a_crowded_family_is_spread_over_panels():
    values = {f"time__{index}": 1.0 for index in range(len(SERIES) + 1)}
    panels = stages([line(1, **values), line(2, **values)])["grpo"]
    assert [(panel.title, len(panel.series)) for panel in panels] == [
        ("time", len(SERIES)),
        ("time (more)", 1),
    ]


def test_the_picture_takes_the_colours_of_the_page():
    series = [Series(f"reward/{i}", tuple(range(50)), (0.5,) * 50) for i in range(len(SERIES))]
    svg = draw(Panel("reward", tuple(series)))
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib and "viewBox" in root.attrib
    assert all(f"var({variable})" in svg for variable in COLOURS.values())
    assert not re.search("#[0-9a-f]{6}|font-family|<style|<script", svg)


def test_names_are_neither_formulas_nor_markup():
    name = "<script>$x^2$&"
    svg = draw(Panel(name, (Series(name, (1, 2), (1.0, 2.0)), Series("$b$", (1, 2), (1.0, 2.0)))))
    texts = [text.text for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("text")]
    assert name in texts and "$b$" in texts


def test_the_same_curve_gives_the_same_picture():
    panel = Panel("train/loss", (Series("train/loss", (1, 2, 3), (3.0, 2.0, 1.0)),))
    assert draw(panel) == draw(panel)
