"""Which paper is which public name: one TOML file a family, read on demand.

Status of an entry: ``implemented``, ``partial`` (with what is missing), ``planned``, or ``none``
(with the reason).
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from importlib import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STATUSES = ("implemented", "partial", "planned", "none")

__all__ = ["STATUSES", "Family", "Paper", "families", "find", "papers"]


@dataclass(frozen=True)
class Paper:
    """One paper of the list and where its mechanism is."""

    family: str
    number: int
    title: str
    component: str
    names: tuple[str, ...]  # below `regularizers.`, such as "dropout.MultiSampleDropout"
    summary: str
    status: str
    formula: str  # how sure: "code" (authors' code read), "paper" (text read) or "reconstructed"
    verified: str  # against what; may be empty
    aliases: tuple[str, ...]
    authors: str = ""
    arxiv: str = ""
    venue: str = ""
    year: int | None = None
    missing: str = ""  # what `partial` lacks, or why there is `none`
    see_also: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Authors, year and where to find the paper, as far as known."""
        place = f"arXiv {self.arxiv}" if self.arxiv else self.venue
        parts = (self.authors, str(self.year) if self.year and not self.venue else "", place)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Family:
    """A family of methods, that is, a subpackage of ``regularizers``."""

    name: str
    summary: str
    papers: tuple[Paper, ...]


@functools.cache
def families() -> dict[str, Family]:
    """Return all families by name, in alphabetical order.

    Example:
        >>> families()["dropout"].papers[0].family
        'dropout'
    """
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda item: item.name):
        if file.name.endswith(".toml"):
            table = tomllib.loads(file.read_text(encoding="utf-8"))
            name = table["family"]
            entries = tuple(_paper(name, entry) for entry in table.get("paper", ()))
            found[name] = Family(name, table["summary"], entries)
    return found


def _paper(family: str, entry: dict[str, object]) -> Paper:
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    return Paper(family=family, **values)  # type: ignore[arg-type]


def papers(*, family: str | None = None, status: str | None = None) -> list[Paper]:
    """Return the papers, all or those of one family or status, by number.

    Args:
        family: name of a family, or None for all.
        status: one of ``STATUSES``, or None for all.

    Raises:
        ValueError: unknown family or status.

    Example:
        >>> len(papers())
        170
    """
    known = families()
    if family is not None and family not in known:
        raise ValueError(f"family must be one of {', '.join(known)}, got {family!r}")
    if status is not None and status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
    chosen = [known[family]] if family is not None else known.values()
    found = [paper for group in chosen for paper in group.papers if status in (None, paper.status)]
    return sorted(found, key=lambda paper: paper.number)


def find(query: str) -> list[Paper]:
    """Return the papers that a number, an arXiv id, a name or words describe, best first.

    Words are looked for in component and public names, then aliases, title and summary; all of them
    must occur.

    Example:
        >>> find("multi-sample dropout")[0].number
        30
    """
    if query.strip().isdigit():
        return [paper for paper in papers() if paper.number == int(query)]
    words = _words(query)
    ranked = []
    for paper in papers():
        if query.strip() == paper.arxiv:
            return [paper]
        fields = (
            (4, " ".join((paper.component, *paper.names))),
            (3, " ".join(paper.aliases)),
            (2, paper.title),
            (1, f"{paper.summary} {paper.family}"),
        )
        texts = [(weight, "".join(_words(text))) for weight, text in fields]
        scores = [sum(weight for weight, text in texts if word in text) for word in words]
        phrase = sum(10 * weight for weight, text in texts if "".join(words) in text)
        if scores and all(scores):
            ranked.append((-(sum(scores) + phrase), paper.number, paper))
    return [paper for _, _, paper in sorted(ranked, key=lambda item: item[:2])]


def _words(text: str) -> list[str]:
    """Split at anything but letters and digits, and in front of capitals: DropPath = drop path."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower())
