"""The README's figures are those of the committed benchmarks; run this file to write them anew."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from regularizers import catalog
from regularizers._bench.results import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """A line of the table: a case of a report, and what it is compared with; "" for nothing."""

    label: str
    family: str
    case: str
    eager: str
    other: str
    floor: str


def _loss(classes):
    return Row(
        f"`multi_sample_dropout_cross_entropy`, forward and backward, {classes} classes",
        "dropout",
        "multi_sample_dropout_cross_entropy, forward + backward, M = 8, x [512, 2048], "
        f"C = {classes}",
        "eager",
        "torch.compile",
        "products",
    )


def _sinkhorn(strength):
    return Row(
        f"`sinkhorn`, 50 iterations, 2048 x 2048, $\\varepsilon$ {strength} of the largest cost",
        "sinkhorn",
        f"sinkhorn, 50 iterations, cost [2048, 2048], epsilon {strength} of its maximum",
        "PyTorch logsumexp",
        "OTT-JAX",
        "stored kernel, one pass each",
    )


def _pairs(loss):
    return Row(
        f"`pairwise_logsumexp` ({loss}), forward and backward, 8192 points, 128 features",
        "pairwise",
        f"{loss}, 8192 points, 128 features, forward and backward",
        "eager",
        "torch.compile",
        "products alone",
    )


ROWS = [
    Row(
        "`dropout_samples`",
        "dropout",
        "dropout_samples, M = 8, x [512, 2048], fresh memory",
        "eager",
        "torch.compile",
        "fill",
    ),
    *map(_loss, (10, 100, 1000)),
    *map(_sinkhorn, ("0.05", "0.005")),
    Row(
        "`sinkhorn_points`, 3 iterations, 20000 points a side, 16 features",
        "sinkhorn",
        "sinkhorn_points, 3 iterations, 20000 points on each side, d = 16",
        "",
        "",
        "products",
    ),
    Row(
        "`regularized_ot`, at most 10 nonzeros a column, 1024 x 1024",
        "sparse_ot",
        "regularized_ot, SparsityConstrained(1, 10), n = m = 1024",
        "",
        "POT",
        "one read of the cost an iteration",
    ),
    Row(
        "`sliced_epps_pulley` (SIGReg), forward and backward, 512 x 128, 1024 slices",
        "sketch",
        "sliced_epps_pulley, forward + backward, z [512, 128], K = 1024, 17 knots",
        "eager",
        "torch.compile",
        "products",
    ),
    Row(
        "`prefix_linear`, k uniform for each row, forward and backward, 512 x 2048 to 1000",
        "nested",
        "prefix_linear, k uniform a row, forward and backward, x [512, 2048], C = 1000",
        "mask, then multiply",
        "torch.compile",
        "a dense layer of D / 2 features",
    ),
    Row(
        "`prefix_accuracy`, all 512 prefixes, 100 classes",
        "nested",
        "prefix_accuracy, x [512, 512], C = 100",
        "loop over prefixes",
        "cumsum",
        "one dense layer",
    ),
    Row(
        "`gathered_attention`, 512 of 2048 keys, forward and backward",
        "subsampled_attention",
        "attention to n = 512 of 2048 keys, forward and backward",
        "dense",
        "gather",
        "as many operations in large products",
    ),
    Row(
        "`drop_block`, 32 x 64 x 56 x 56",
        "drop_block",
        "drop_block, x [32, 64, 56, 56]",
        "eager",
        "torch.compile",
        "copy",
    ),
    Row(
        "`paste_boxes` (CutMix), a box for each, 64 x 3 x 224 x 224",
        "mix",
        "paste_boxes, a box for each, x [64, 3, 224, 224]",
        "mask + where",
        "torch.compile",
        "copy, 2 passes",
    ),
    Row(
        "`nearest_code`, 4096 tokens, 16384 codes, 64 features",
        "code_search",
        "nearest code, 4096 tokens, 16384 codes, 64 features",
        "eager",
        "torch.compile",
        "best product",
    ),
    *map(_pairs, ("InfoNCE", "dispersive")),
    Row(
        "`mini_float_pack`, float32 to RF8",
        "mini_float",
        "pack, RF8, float32, 4194304 numbers",
        "eager",
        "to(float8_e4m3fn)",
        "copy",
    ),
    Row(
        "`Muon` step, 48 matrices of 64 x 128",
        "muon",
        "Muon, 48 matrices of 64 x 128",
        "",
        "torch.optim.Muon",
        "products",
    ),
    Row(
        "`AdamHD` step, 16 tensors of 2^20",
        "decay",
        "AdamHD, threshold tracked, 16 tensors of 1048576",
        "foreach",
        "AdamW(fused=True)",
        "copy",
    ),
]


def figures():
    """Return the table between the README's marks."""
    reports = {row.family: Report.load(RESULTS / f"{row.family}-cpu.json") for row in ROWS}
    machine = reports["sinkhorn"].machine
    lines = [
        f"On {machine['cores']} cores of an {machine['cpu']} ({machine['instruction_set']}), torch "
        f"{machine['torch']}, {machine['date'][:10]}:",
        "",
        "| operator | against eager PyTorch | against | time / floor |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        (case,) = (case for case in reports[row.family].cases if case.name == row.case)
        eager, other = (
            f"{1 / case[name].time_ratio.median:.1f}x faster" if name else "–"
            for name in (row.eager, row.other)
        )
        floor = f"{case[row.floor].time_ratio.median:.2f}"
        other = f"{row.other}: {other}" if row.other else other
        lines.append(f"| {row.label} | {eager} | {other} | {floor} |")
    return "\n".join(lines)


def _between_marks(text):
    return re.search(r"(?<=<!-- figures -->\n\n).*?(?=\n\n<!-- /figures -->)", text, re.S)


def test_figures_are_those_of_the_committed_benchmarks():
    assert _between_marks((ROOT / "README.md").read_text())[0] == figures()


@pytest.mark.parametrize("file", ["README.md", "docs/index.md"])
def test_the_number_of_papers_is_that_of_the_catalog(file):
    whole = len(catalog.papers(status="implemented"))
    text = " ".join((ROOT / file).read_text().split())
    assert f"{whole} of the {len(catalog.papers())} papers" in text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace(_between_marks(text)[0], figures()))
