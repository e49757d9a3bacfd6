"""The evaluation table: one section per kind of question, one line per policy.

                         accuracy  format  search        reward          lead
    all questions
      before         0.742 ±0.012   0.981   0.512  0.701 ±0.011
      after          0.961 ±0.006   1.000   0.471  0.949 ±0.004
      always search  0.990 ±0.003   1.000   1.000  0.905 ±0.003  0.044 ±0.006
    known
      before ...

It is laid out from the flat figures of `summary.json`: `eval/after/accuracy`,
`eval/after/known/search_ratio`, `eval/after/sampled/reward`, `eval/after/sampled/reward_se`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

METRICS = ("accuracy", "format", "search_ratio", "reward", "lead")
WITH_ERROR = ("accuracy", "reward", "lead")  # METRIC_se beside them; more would not fit 80 columns
POLICIES = (
    "before",
    "after",
    "before, sampled",
    "after, sampled",
    "on_demand",
    "always_search",
    "never_search",
)
KINDS = ("", "known", "unknown", "unfamiliar", "never_shown")
TITLES = {"search_ratio": "search"}
ALL = "all questions"
ERRORS = "± standard error by entity"
LEAD = "lead: reward of the learned policy over this one, sampled, paired"


@dataclasses.dataclass(frozen=True)
class Section:
    """The lines of one kind of question."""

    title: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]  # (policy, one cell per column)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table laid out, for the terminal and the page alike."""

    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]  # what the signs and columns mean, where they occur


def layout(summary: Mapping[str, Any], prefix: str = "eval") -> Layout:
    """Sorts the figures of a summary into sections, lines and columns.

    Keys read `PREFIX/POLICY/[sampled/][KIND/]METRIC`; all others are passed over. A figure that
    one policy lacks is left blank.
    """
    figures = _figures(summary, prefix)
    columns = [metric for metric in METRICS if any(key[2] == metric for key in figures)]
    policies = _ordered((key[0] for key in figures), POLICIES)
    sections = []
    for kind in _ordered((key[1] for key in figures), KINDS):
        lines = tuple(
            (_words(policy), tuple(_cell(figures, policy, kind, metric) for metric in columns))
            for policy in policies
            if any((policy, kind, metric) in figures for metric in columns)
        )
        if lines:
            sections.append(Section(_words(kind) or ALL, lines))
    errors = any(metric.endswith("_se") for _, _, metric in figures)
    notes = (ERRORS,) * errors + (LEAD,) * ("lead" in columns)
    titles = tuple(TITLES.get(metric, metric) for metric in columns)
    return Layout(titles, tuple(sections), notes)


def evaluation_table(
    summary: Mapping[str, Any], title: str = "Evaluation", prefix: str = "eval"
) -> Table:
    """The table for a terminal, 80 columns wide; one line if nothing was evaluated."""
    plan = layout(summary, prefix)
    if not plan.sections:
        return Table("Nothing was evaluated.", box=None, pad_edge=False)
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join(plan.notes),
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for column in plan.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for section in plan.sections:
        table.add_row(Text(section.title, style="bold"))
        for policy, cells in section.lines:
            table.add_row(Text(f"  {policy}"), *(Text(cell) for cell in cells))
    return table


def _figures(summary: Mapping[str, Any], prefix: str) -> dict[tuple[str, str, str], float]:
    """(policy, kind, metric) -> value, for the metrics of the table and their errors."""
    wanted = {*METRICS, *(f"{metric}_se" for metric in WITH_ERROR)}
    found = {}
    for key, value in summary.items():
        head, _, rest = key.partition("/")
        policy, _, rest = rest.partition("/")
        if rest.startswith("sampled/"):
            policy, rest = f"{policy}, sampled", rest.removeprefix("sampled/")
        kind, _, metric = rest.rpartition("/")
        if head == prefix and metric in wanted and isinstance(value, int | float):
            found[policy, kind, metric] = float(value)
    return found


def _cell(figures: Mapping, policy: str, kind: str, metric: str) -> str:
    value = figures.get((policy, kind, metric))
    error = figures.get((policy, kind, f"{metric}_se"))
    if value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"


def _ordered(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Each name once: the known ones in their order, then the others as they come."""
    present = dict.fromkeys(names)
    return [n for n in known if n in present] + [n for n in present if n not in known]


def _words(name: str) -> str:
    return name.replace("_", " ")
