"""Pages that conf.py writes into docs/generated: method lists, figures, the gallery of pictures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from regularizers import catalog
from regularizers._bench.results import CaseResult, Measurement, Report

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def write_all(folder: Path) -> None:
    """Write everything that pages include."""
    folder.mkdir(exist_ok=True)
    for name, text in (
        *((family, _table(catalog.papers(family=family))) for family in catalog.families()),
        ("methods", _methods()),
        ("performance", _performance()),
        ("gallery", _gallery()),
    ):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def _methods() -> str:
    """Return the method index, by family and by number of paper."""
    counts = (f"{len(catalog.papers(status=status))} {status}" for status in catalog.STATUSES)
    parts = [f"{len(catalog.papers())} papers: {', '.join(counts)}.\n"]
    for name, family in catalog.families().items():
        parts.append(f"## {name}\n\n{_escape(family.summary)}\n\n{_table(family.papers)}")
    rows = ["| no. | component | family | status |", "| ---: | --- | --- | --- |"]
    for paper in catalog.papers():
        cells = (str(paper.number), _escape(paper.component), paper.family, paper.status)
        rows.append(f"| {' | '.join(cells)} |")
    parts.append("## By number of paper\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _table(papers: Iterable[catalog.Paper]) -> str:
    rows = ["| no. | component | paper | status | names |", "| ---: | --- | --- | --- | --- |"]
    rows += [f"| {' | '.join(_cells(paper))} |" for paper in papers]
    return "\n".join(rows) + "\n"


def _cells(paper: catalog.Paper) -> tuple[str, ...]:
    link = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    status = paper.status + (f": {paper.missing}" if paper.missing else "")
    exists = paper.status in ("implemented", "partial")
    names = (f"{{py:obj}}`~regularizers.{name}`" if exists else f"`{name}`" for name in paper.names)
    return (
        str(paper.number),
        _escape(paper.component),
        link or _escape(paper.source),
        _escape(status),
        ", ".join(names),
    )


def _performance() -> str:
    """Return the tables and plots of the committed benchmark files."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        report = Report.load(path)
        machine = report.machine
        where = machine["gpu"] or f"{machine['cores']} cores of an {machine['cpu']}"
        parts.append(
            f"## {report.family}, {report.device}\n\n{where} ({machine['instruction_set']}), torch "
            f"{machine['torch']}, {machine['date'][:10]}; `{machine['command']}`.\n"
        )
        parts += [_case(case) for case in report.cases]
        for curve in report.curves:
            picture = f"{report.stem}-{curve.name}.png"
            if (RESULTS / picture).exists():
                parts.append(
                    f"```{{figure}} ../benchmarks/results/{picture}\n:alt: {curve.title}\n\n"
                    f"{_escape(curve.title)}, over {_escape(curve.size)}\n```\n"
                )
    return "\n".join(parts)


def _case(case: CaseResult) -> str:
    rows = ["| | time | ours / this | memory |", "| --- | ---: | ---: | ---: |"]
    rows += [f"| {' | '.join(_measured(found))} |" for found in case.measurements]
    words = {None: "not measured", True: "met", False: "missed"}
    goals = [f"- {_escape(goal.goal)}: {words[goal.met]}" for goal in case.goals]
    lines = [f"**{_escape(case.name)}**\n", *rows, ""]
    return "\n".join([*lines, *goals, ""] if goals else lines)


def _measured(found: Measurement) -> tuple[str, str, str, str]:
    role = "" if found.role == "ours" else f", {found.role}"
    if found.missing:
        return f"{_escape(found.name)}{role}", f"missing: {_escape(found.missing)}", "", ""
    seconds, ratio = found.seconds, found.time_ratio
    time = f"{1e3 * seconds.median:.3g} ms" if seconds else ""
    against = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    memory = "" if found.peak_bytes is None else f"{found.peak_bytes / 2**20:.3g} MiB"
    return f"{_escape(found.name)}{role}", time, against, memory


def _gallery() -> str:
    """Return every picture with what its script says of it."""
    parts = []
    for script in sorted((DOCS / "pictures").glob("*.py")):
        picture = script.with_suffix(".png")
        if picture.exists():
            about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
            parts.append(
                f"```{{figure}} pictures/{picture.name}\n:alt: {script.stem}\n\n"
                f"{_escape(' '.join(about.split()))} (`docs/pictures/{script.name}`)\n```\n"
            )
    return "\n".join(parts)


def _escape(text: str) -> str:
    """Keep Markdown from reading signs of the text as its own."""
    return re.sub(r"([\\`*_{}\[\]<>$|#~])", r"\\\1", text)
