import io

from rich.console import Console

from mmsr_jax.report.table import ALL, ERRORS, LEAD, evaluation_table, layout

SUMMARY = {
    "eval/after/accuracy": 0.961,
    "eval/after/count": 264.0,
    "eval/after/known/accuracy": 1,
    "eval/after/known/search_ratio": 0.02,
    "eval/after/never_shown/search_ratio": 0.7,
    "eval/after/reward": 0.949,
    "eval/after/reward_se": 0.0042,
    "eval/after/sampled/reward": 0.94,
    "eval/always_search/lead": 0.044,
    "eval/always_search/reward": 0.905,
    "eval/before/accuracy": 0.742,
    "time/total": 800.0,
}


def render(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def test_sections_are_kinds_and_lines_are_policies():
    plan = layout(SUMMARY)
    assert plan.columns == ("accuracy", "search", "reward", "lead")
    assert [section.title for section in plan.sections] == [ALL, "known", "never shown"]
    assert dict(plan.sections[0].lines) == {
        "before": ("0.742", "", "", ""),
        "after": ("0.961", "", "0.949 ±0.004", ""),
        "after, sampled": ("", "", "0.940", ""),
        "always search": ("", "", "0.905", "0.044"),
    }
    assert plan.sections[1].lines == (("after", ("1.000", "0.020", "", "")),)
    assert plan.notes == (ERRORS, LEAD)


def test_policies_and_kinds_that_nobody_foresaw_come_last():
    plan = layout({"eval/rag/live/accuracy": 0.5, "eval/after/known/accuracy": 0.5})
    assert [section.title for section in plan.sections] == ["known", "live"]


def test_the_whole_table_fits_eighty_columns():
    summary = {
        f"eval/{policy}{kind}/{metric}{error}": 0.12345
        for policy in ("before", "after", "always_search", "never_search")
        for kind in ("", "/sampled", "/known", "/sampled/known")
        for metric in ("accuracy", "format", "search_ratio", "reward", "lead")
        for error in ("", "_se")
    }
    lines = render(evaluation_table(summary)).splitlines()
    assert not any("…" in line for line in lines)
    assert sum("0.123 ±0.123" in line for line in lines) == 16
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_names_are_no_markup():
    assert "[red]x" in render(evaluation_table({"eval/[red]x/accuracy": 0.5}))


def test_a_run_without_evaluation_has_an_empty_table():
    assert layout({"time/total": 3.0}).sections == ()
    assert render(evaluation_table({"time/total": 3.0})).strip() == "Nothing was evaluated."
