"""docs/results.md from results/: what `medm2g evaluate` has left there, one JSON a task, good rows and bad.

medm2g evaluate --model phantom --config=configs/tasks.py:reports --out DIR     # then DIR/reports.json to results/
python -m benchmarks.results_page
"""

import json
from pathlib import Path

from medm2g_jax.evaluate import table
from medm2g_jax.evaluate.rows import figures_in

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "results.md"
HEAD = """# Results

Made by `python -m benchmarks.results_page` from `results/`, which holds what `medm2g evaluate` wrote, row by row; write
nothing here by hand. All of it is the built-in phantom, 64 px: not evidence for clinical performance, and in no column
beside the paper's figures. One model and one seed of everything; intervals are 95 %, over test subjects, so that they
say nothing of another training. p is Wilcoxon's signed-rank test of paired differences, not corrected for their number.
The protocols that the tables name stand at the end.
"""


def page() -> str:
    """The page that the files in results/ make."""
    parts, protocols = [HEAD], {}
    for path in sorted(RESULTS.glob("*.json")):
        told = json.loads(path.read_text())
        figures = figures_in(told)
        protocols |= dict.fromkeys(f.protocol for f in figures)
        words = ("model", "data", "contents", "config", "seed", "records", "version", "date")
        said = ", ".join(f"{word} {told[word]}" for word in words)
        parts.append(f"## {told['task']}\n\n`{told['command']}`: {said}; {told['seconds']:.0f} s\n")
        parts.append("\n".join(table.tables(figures)))
    return "\n".join([*parts, "## Protocols\n", *table.protocols(protocols)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
