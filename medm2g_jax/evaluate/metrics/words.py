"""How near one report is to another by its words: BLEU, ROUGE-L and CIDEr as the report literature has them, which is
the COCO caption code's; one real report each. Texts are taken as they are, lower case or not, split at blanks: clean
them first, both alike, by a named way of `data.clean`.

A near-constant report earns a good BLEU: how many differ, and the score of a constant one, belong beside it.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from medm2g_jax.errors import UserError

ORDER = 4
BETA = 1.2  # of ROUGE-L's F: recall counts 1.44 times as much as precision
SPREAD = 6.0  # of CIDEr's penalty of unlike lengths, in bigrams


def tokens(real: Sequence[str], made: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """The words of each pair.

    Raises:
      UserError: a real report without words; unlike numbers of them, or none.
    """
    if len(real) != len(made) or not len(real):
        raise UserError(f"{len(real)} real reports and {len(made)} made ones; expected one of each a row, and a row")
    pairs = [(a.split(), b.split()) for a, b in zip(real, made, strict=True)]
    for row, (a, _) in enumerate(pairs):
        if not a:
            raise UserError(f"real report {row} has no word left after cleaning: nothing to compare with; leave it out")
    return pairs


def grams(words: Sequence[str], order: int) -> Counter:
    """How often each run of `order` words occurs."""
    return Counter(zip(*(words[i:] for i in range(order)), strict=False))


def bleu_counts(real: Sequence[str], made: Sequence[str]) -> Int[np.ndarray, "n 10"]:
    """Of each made report: its runs of 1 to 4 words that the real one has as well, each as often as there; all its runs
    of 1 to 4 words; its words, and the real one's."""
    out = []
    for a, b in tokens(real, made):
        orders = range(1, ORDER + 1)
        shared = [(grams(a, k) & grams(b, k)).total() for k in orders]
        out.append([*shared, *(max(len(b) - k + 1, 0) for k in orders), len(b), len(a)])
    return np.asarray(out, int).reshape(-1, 2 * ORDER + 2)


def bleu(counts: Int[np.ndarray, "n 10"], order: int) -> float:
    """BLEU-`order` of all reports together (Papineni et al. 2002): the geometric mean of the shares of runs found,
    times a penalty where the made reports together are shorter."""
    total = counts.sum(0)
    shared, runs, (made, real) = total[:order], total[ORDER : ORDER + order], total[2 * ORDER :]
    # The COCO code's small numbers: of what has no run of four words in common it gives about 1e-4, not 0.
    value = np.prod((shared + 1e-15) / (runs + 1e-9)) ** (1 / order)
    ratio = (made + 1e-15) / (real + 1e-9)
    return float(value * np.exp(min(1 - 1 / ratio, 0)))


def rouge_l(real: Sequence[str], made: Sequence[str]) -> Float[np.ndarray, "n"]:
    """F of the longest common subsequence of each pair (Lin 2004), beta 1.2; 0 where nothing is common."""
    out = []
    for a, b in tokens(real, made):
        common = longest(a, b)
        precision, recall = common / max(len(b), 1), common / len(a)
        out.append(common and (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision))
    return np.asarray(out, np.float64)


def longest(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one whole number (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        hit = row & places.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def cider(real: Sequence[str], made: Sequence[str]) -> Float[np.ndarray, "n"]:
    """CIDEr-D of each report, 0 to 10 (Vedantam et al. 2015): cosines of runs of 1 to 4 words, each weighed by how few
    real reports have it, made counts cut off at the real ones, unlike lengths penalised.

    Raises:
      UserError: fewer than two real reports, or all alike: no word is rarer than another.
    """
    pairs = tokens(real, made)
    counts = [[[grams(x, k) for k in range(1, ORDER + 1)] for x in pair] for pair in pairs]
    documents = Counter(run for one, _ in counts for order in one for run in order)
    if all(n == len(pairs) for n in documents.values()):
        raise UserError(
            f"CIDEr of {len(pairs)} real reports that all have the same words: it weighs a word by how few have it; "
            "expected several, not all alike"
        )
    rare = {run: np.log(len(pairs) / n) for run, n in documents.items()}
    unseen = np.log(len(pairs))

    def weighed(order: Counter) -> dict:
        return {run: n * rare.get(run, unseen) for run, n in order.items()}

    out = []
    for a, b in counts:
        cosines = []
        for x, y in zip(map(weighed, a), map(weighed, b), strict=True):
            norm = np.sqrt(sum(v**2 for v in x.values()) * sum(v**2 for v in y.values()))
            dot = sum(min(v, x[run]) * x[run] for run, v in y.items() if run in x)
            cosines.append(dot / norm if norm else 0.0)
        longer = a[1].total() - b[1].total()
        out.append(10 * np.mean(cosines) * np.exp(-(longer**2) / (2 * SPREAD**2)))
    return np.asarray(out, np.float64)


def lengths(real: Sequence[str], made: Sequence[str]) -> Float[np.ndarray, "n"]:
    """Words of each made report."""
    return np.asarray([len(text.split()) for text in made], np.float64)


def distinct(real: Sequence[str], made: Sequence[str]) -> float:
    """How many made reports differ, as a share of all of them."""
    return len(set(made)) / len(made)


def rexrank_bleu(real: Sequence[str], made: Sequence[str]) -> Float[np.ndarray, "n"]:
    """BLEU-2 of each report, as ReXrank averages it: CXR-Report-Metric's, which is fast-bleu's of a single report: what
    has no pair of words in common counts a tenth of a pair, what has no word in common is 0. Lower case; a full stop is
    a word.

    Raises:
      UserError: a real report without words.
    """
    lower = lambda texts: [text.lower().replace(".", " .") for text in texts]  # noqa: E731
    out = []
    for a, b in tokens(lower(real), lower(made)):
        shared = [(grams(a, k) & grams(b, k)).total() for k in (1, 2)]
        runs = [max(len(b) - k + 1, 1) for k in (1, 2)]
        shares = [max(n, 0.1) / m for n, m in zip(shared, runs, strict=True)]
        out.append(np.sqrt(np.prod(shares)) * np.exp(min(1 - len(a) / max(len(b), 1), 0)) if shared[0] else 0.0)
    return np.asarray(out, np.float64)
