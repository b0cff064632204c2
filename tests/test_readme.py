"""The README's figures are those of the committed benchmark; run this file to write them anew."""

import re
from pathlib import Path

from regularizers._bench.results import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dropout-cpu.json"
ROWS = {
    "`dropout_samples`": ("dropout_samples, M = 8, x [512, 2048], fresh memory", "fill"),
    **{
        f"`multi_sample_dropout_cross_entropy`, forward and backward, {classes} classes": (
            "multi_sample_dropout_cross_entropy, forward + backward, M = 8, x [512, 2048], "
            f"C = {classes}",
            "products",
        )
        for classes in (10, 100, 1000)
    },
}


def _faster(ratio):
    return f"{1 / ratio.median:.1f}x faster"


def figures():
    """Return the table between the README's marks."""
    report = Report.load(RESULTS)
    cases = {case.name: case for case in report.cases}
    lines = [
        f"On {report.machine['cores']} cores of an {report.machine['cpu']} "
        f"({report.machine['instruction_set']}), torch {report.machine['torch']}, "
        f"{report.machine['date'][:10]}:",
        "",
        "| operator | against eager | against `torch.compile` | time / floor |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label, (name, floor) in ROWS.items():
        case = cases[name]
        ratios = [case[other].time_ratio for other in ("eager", "torch.compile", floor)]
        cells = (_faster(ratios[0]), _faster(ratios[1]), f"{ratios[2].median:.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _between_marks(text):
    return re.search(r"(?<=<!-- figures -->\n\n).*?(?=\n\n<!-- /figures -->)", text, re.S)


def test_figures_are_those_of_the_committed_benchmark():
    assert _between_marks((ROOT / "README.md").read_text())[0] == figures()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace(_between_marks(text)[0], figures()))
