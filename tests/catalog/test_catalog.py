"""The catalog: all papers once; every name of an implemented paper resolves and is tested."""

import importlib
import re
from pathlib import Path

import pytest

import regularizers
from regularizers import catalog

ROOT = Path(__file__).parents[2]
IMPLEMENTED = [paper for paper in catalog.papers() if paper.status in ("implemented", "partial")]


def _resolve(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"regularizers.{module}"), attribute)


def test_all_170_papers_stand_there_once():
    assert [paper.number for paper in catalog.papers()] == list(range(170))


@pytest.mark.parametrize("family", catalog.families())
def test_entries_are_complete_and_well_formed(family):
    for paper in catalog.papers(family=family):
        assert paper.title, paper.number
        assert paper.component, paper.number
        assert paper.summary, paper.number
        assert paper.names, paper.number
        assert paper.status in catalog.STATUSES, paper.number
        assert paper.formula in ("code", "paper", "reconstructed"), paper.number
        assert not paper.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv), paper.number
        assert bool(paper.missing) == (paper.status in ("partial", "none")), paper.number
        for name in paper.names:
            assert re.fullmatch(r"\w+\.\w+", name), (paper.number, name)


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper.component)
def test_names_of_an_implemented_paper_resolve_and_have_a_doctest(paper):
    for name in paper.names:
        thing = _resolve(name)
        assert ">>>" in (thing.__doc__ or ""), f"{name} has no example"


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper.component)
def test_names_of_an_implemented_paper_have_a_test_file(paper):
    for name in paper.names:
        path = Path(*_resolve(name).__module__.split(".")[1:])
        assert (ROOT / "tests" / path.parent / f"test_{path.name}.py").exists(), name


def test_public_names_of_a_family_are_those_of_the_catalog():
    for family in catalog.families():
        names = {
            name.partition(".")[2]
            for paper in IMPLEMENTED
            for name in paper.names
            if name.startswith(f"{family}.")
        }
        if names:
            assert set(importlib.import_module(f"regularizers.{family}").__all__) == names


@pytest.mark.parametrize(
    ("query", "number"),
    [
        ("30", 30),
        ("1905.09788", 30),
        ("multi-sample dropout", 30),
        ("DropPath", 63),
        ("monge gap", 42),
        ("label noise", 69),
    ],
)
def test_find_knows_numbers_ids_names_and_aliases(query, number):
    assert number in [paper.number for paper in catalog.find(query)[:5]]


def test_find_gives_nothing_for_nonsense():
    assert catalog.find("xyzzy") == []
    assert catalog.find("999") == []


def test_unknown_family_and_status_are_named():
    with pytest.raises(ValueError, match="family must"):
        catalog.papers(family="dropouts")
    with pytest.raises(ValueError, match="status must"):
        catalog.papers(status="done")


def test_package_lists_what_it_has():
    assert set(dir(regularizers)) >= {"catalog", "dropout", "info", "ops", "use_backend"}
    stub = (ROOT / "python/regularizers/__init__.pyi").read_text()
    assert set(re.findall(r" as (\w+)$", stub, re.M)) == set(regularizers.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = regularizers.nothing
