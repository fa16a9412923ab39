"""How near one report is to another: word for word, and by the findings that a labeller reads in both.

A labeller is text -> findings, as `data.source.labeller` has it of a source. Findings are one of

    a set of facts                  each of them stated
    a mapping, or a named tuple     field -> value, None where the text says nothing; a value that is true is stated
    an object with `facts()`        which says itself which of its fields together are a positive finding
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

Labeller = Callable[[str], Any]


def exact(real: Sequence[str], made: Sequence[str]) -> Bool[np.ndarray, "n"]:
    """Whether each text is the real one, word for word."""
    return np.asarray([a == b for a, b in zip(real, made, strict=True)], bool)


def fields(findings: Any) -> dict[str, Any]:
    """What findings say of each field; of a set, that each fact of it is stated."""
    if isinstance(findings, Set):
        return {str(fact): True for fact in sorted(findings, key=str)}
    return dict(findings) if isinstance(findings, Mapping) else findings._asdict()


def facts(findings: Any) -> Set:
    """The positive findings. A text without any has none, so that nobody earns F1 by calling everybody healthy."""
    if isinstance(findings, Set):
        return findings
    if hasattr(findings, "facts"):
        return findings.facts()
    return {(field, value) for field, value in fields(findings).items() if value}


def agreement(real: Any, made: Any) -> dict[str, bool | None]:
    """Field of the real findings -> is it right in the made ones; None where the real ones say nothing of it."""
    found = fields(made)
    return {k: None if v is None else k in found and found[k] == v for k, v in fields(real).items()}


def fact_counts(real: Sequence[str], made: Sequence[str], labeller: Labeller) -> Int[np.ndarray, "n 2"]:
    """Of each pair of texts: the facts that both state, and the number that each states, summed."""
    pairs = [(facts(labeller(a)), facts(labeller(b))) for a, b in zip(real, made, strict=True)]
    return np.asarray([(len(a & b), len(a) + len(b)) for a, b in pairs], int).reshape(-1, 2)


def micro_f1(counts: Int[np.ndarray, "n 2"]) -> float:
    """F1 of `fact_counts`, of all texts together; 1 where neither side states any."""
    hits, stated = counts.sum(0)
    return float(2 * hits / stated) if stated else 1.0


def finding_f1(real: Sequence[str], made: Sequence[str], labeller: Labeller) -> float:
    """Micro F1 over the facts that each text states, as `labeller` reads them; 1 where neither side states any."""
    return micro_f1(fact_counts(real, made, labeller))
