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

Made by `python -m benchmarks.results_page` from `results/`, which holds what `medm2g evaluate` wrote, row by row;
write nothing here by hand. Most of it is the built-in phantom, 64 px; what is of real images only shows that the code
works on them. None is evidence for clinical performance, and none stands in a column beside the paper's figures. One
training and one seed of everything; intervals are 95 %, over test subjects, so that they say nothing of another
training. p is Wilcoxon's signed-rank test of paired differences, not corrected for their number. Seconds are of two
cores that did other things as well. Model 72e05f17 is the model in the box as it was before CT's flow trained on (its
card). The protocols that the tables name stand at the end.
"""

# How the models came that the commands name.
MODELS = {
    "phantom": "the model in the box; its card has its recipe",
    "runs/phantom-tiny": "`make demo`, seed 0",
}


def page() -> str:
    """The page that the files in results/ make."""
    parts, protocols = [HEAD], {}
    for path in sorted(RESULTS.glob("*.json")):
        told = json.loads(path.read_text())
        figures = figures_in(told)
        protocols |= dict.fromkeys(f.protocol for f in figures)
        words = ("model", "data", "contents", "config", "seed", "records", "version", "date")
        said = ", ".join(f"{word} {told[word]}" for word in words)
        name = next(word.removeprefix("--model=") for word in told["command"].split() if word.startswith("--model="))
        whose = f"{told['seconds']:.0f} s. {name}: {MODELS[name]}."
        parts.append(f"## {path.stem}\n\n`{told['command']}`: {said}; {whose}\n")
        parts.append("\n".join(table.tables(figures)))
    return "\n".join([*parts, "## Protocols\n", *table.protocols(protocols)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
