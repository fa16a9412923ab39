"""`medm2g evaluate`: a task of `configs/tasks.py`, measured. Prints each figure as it comes, then leaves them as JSON,
CSV and a table in Markdown, and pictures of the worst, the median and the best case.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from medm2g_jax import __version__
from medm2g_jax.data.contents import contents
from medm2g_jax.data.open import source_of
from medm2g_jax.data.source import Source, labels
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import downstream, table
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.joint import jointly
from medm2g_jax.evaluate.judge import PUBLIC
from medm2g_jax.evaluate.phantom import Bench, labelled_source, reader
from medm2g_jax.evaluate.reports import reports_from
from medm2g_jax.evaluate.rows import Against, Rows, fingerprint
from medm2g_jax.evaluate.sets import BENCH, as_sets
from medm2g_jax.evaluate.space import in_space
from medm2g_jax.evaluate.synthesis import can_synthesise, synthesis
from medm2g_jax.loading import BOX, load, locate, makes
from medm2g_jax.modality import centre, split_stream, stream_word
from medm2g_jax.train import checkpoint

Case = tuple[Callable, Sequence[str], str | Sequence[str]]  # what measures it, what is given, what is made


def measure(
    path: str,
    rows: int | None = None,
    seed: int = 0,
    synthesised: Sequence[tuple[Sequence[str], str]] = (),
    *,
    task: str = "phantom",
    findings: bool = True,
    regression: int = 0,
    reported: Sequence[str] = (),
    cleaning: str = "none",
    sets: Sequence[tuple[str, str]] = (),
    readers: Mapping[str, Any] | None = None,
    joint: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
    space: Sequence[str] = (),
    protocols: Sequence[str] = (),
    published: str = "",
    data: str = "",
    out: str = "",
    most: int = 200,
    command: str = "",
    against: str = "",
) -> list[Figure]:
    """Measure the model at `path`, print its figures, and write them down.

    Args:
      rows: test subjects; None: as many as there are, at most `most`.
      synthesised: (streams given, stream made) of `synthesis`, each where the model's guides are trained for that and
        the data hold it.
      findings: measure what reports and images say of exact labels, where the model was trained on data that have them.
      reported: image streams that reports are made from (`reports`), both cleaned by the way `cleaning`.
      sets: (stream given, stream made) of `sets`.
      readers: {"classified", "segmented": cases as those of `synthesised`}, and the fields of `downstream.Plan`.
      joint: (streams given, streams made together) of `jointly`.
      space: streams of `in_space`.
      protocols: public evaluators whose figures are wanted as well: of images made from others those of `judge.PUBLIC`,
        "rexrank" of reports, "chexgenbench" of sets.
      published: what others have printed, to stand below the table.
      data: another data set than the model's own, as config.data.source names it.
      regression: steps of the regression and of the pix2pix beside each synthesis; 0: none.
      out: a folder for TASK.json, TASK.csv, TASK.md and, of open data, TASK_*.png, where finished rows are kept as they
        come, and taken up; "": evaluation.json beside the round's result, or here where the model came with the
        package, at the end.
      command: what was typed.
      against: TASK.json of another evaluation of the same test records, to print the differences to; "": none.

    Raises:
      UserError: the folder holds rows of another evaluation by this name; the data that it was trained on has no exact
        labels to judge by, or too few test subjects; it was trained on test subjects of `data`; nothing that is
        measured here has been trained.
    """
    if rows is not None and rows < 1:
        raise UserError(f"--rows={rows}: expected at least one test subject")
    folder = locate(path)
    meta = checkpoint.read_meta(folder)
    text, able, pairs = centre().name, makes(meta), [tuple(p) for p in meta["pairs"]["guide"]]
    reports = [m for m in able if (text, m) in pairs and text in able] if findings else []
    asked = [*((synthesis, tuple(given), target) for given, target in synthesised)]
    asked += [(reports_from, (image,), text) for image in reported]
    asked += [(as_sets, (given,), target) for given, target in sets]
    asked += [(jointly, tuple(given), tuple(make)) for given, make in joint]
    asked += [(in_space, (), tuple(space))] if space else []
    plan, read = dict(readers or {}), (downstream.classified, downstream.segmented)
    asked += [(how, tuple(given), target) for how in read for given, target in plan.pop(how.__name__, ())]
    trained = [case for case in asked if _can(pairs, able, case)]
    for case in (case for case in asked if case not in trained):
        print(f"{_words(case)}: left out, the model was not trained for it", flush=True)
    if not reports and not trained:
        raise UserError(
            f"{path}: `medm2g evaluate` measures what is made from reports, reports made from images, and images "
            f"made from others; this model makes {', '.join(able)} by the guides "
            f"{', '.join(f'{a} -> {b}' for a, b in pairs) or 'of nobody'}; give it a round that was trained for one"
        )
    shared = meta["shared"]
    if data:
        source = source_of({**shared, "data": {**shared["data"], "source": data}})
        _apart(source, shared, data)
        if reports and labels(source) is None:
            raise UserError(
                f"--data {data}: its findings have no exact labels to judge by; name a task that needs none, as "
                "--config=configs/tasks.py:reports"
            )
    else:
        source = labelled_source(shared, path) if reports else source_of(shared)
    held = {case: _held(source, case) for case in trained}
    for case, count in held.items():
        if not count:
            print(f"{_words(case)}: no test record of {source.name} holds both", flush=True)
    if not reports and not any(held.values()):
        raise UserError(f"{source.name}: no test record holds what the task gives and makes")
    model = load(path)
    print(f"{path}: {model.meta['stage']}; {source.name}, {model.size} px, {model.meta['rounds']} trained", flush=True)
    if out:
        epath.Path(out).mkdir(parents=True, exist_ok=True)
    config = dict(synthesis=synthesised, findings=findings, regression=regression, reports=reported, sets=sets)
    config |= dict(readers=dict(readers or {}))
    # What came later is in it where it is asked for, so that rows of before it can be taken up.
    later = dict(joint=joint, space=space, protocols=protocols)
    config |= {name: value for name, value in later.items() if value}
    about = dict(
        task=task,
        model=model.fingerprint,
        data=source.name,
        contents=contents(source).fingerprint,
        seed=seed,
        records=rows or most,
        config=fingerprint(config | dict(cleaning=cleaning)),
        version=__version__,
    )
    other = Against(against, about) if against else None
    row = Rows(about, epath.Path(out) / f"{task}.json" if out else None, command)
    reads = functools.cache(lambda m: reader(model, source, m, seed)) if labels(source) else None
    if reports:
        Bench(model, source, rows or most, seed, reads).reports_and_images(reports, row)
    if out and not source.open:
        print(f"{source.name} is not open: its images are in no picture", flush=True)
    for case, count in held.items():
        if not count:
            continue
        how, given, target = case
        if rows and rows > count:
            needed = ", ".join((*given, target))
            raise UserError(f"--rows={rows}: {source.name} holds {count} test records with {needed}")
        sheet = _sheet(out, source, f"{task}_{_plain(given, target)}")
        of = lambda known: [p for p in protocols if p in known]  # noqa: E731
        options = {
            synthesis: dict(regression=regression, sheet=sheet, reads=reads, protocols=of(PUBLIC)),
            reports_from: dict(cleaning=cleaning, protocols=of(("rexrank",))),
            as_sets: dict(sheet=sheet, protocols=of((BENCH,))),
            jointly: dict(sheet=sheet),
            in_space: {},
            **dict.fromkeys(read, dict(plan=downstream.Plan(**plan))),
        }[how]
        how(model, source, given, target, rows or min(most, count), seed, row=row, **options)
    print(f"{row.seconds:.0f} s. {source.name}: not evidence for clinical performance.")
    _write(row, folder, task, out, published)
    if other is not None:
        print("\n  ".join(other.lines(row.figures)))
    return row.figures


def _held(source: Source, case: Case) -> int:
    how, given, target = case
    if how is in_space:
        return sum(r.split == "test" and len(set(target) & set(r.streams)) > 1 for r in source.records)
    needed = {*given, target} if isinstance(target, str) else {*given}
    needed = {target} if how is downstream.classified else needed  # which asks in words where no report is
    return sum(r.split == "test" and needed <= set(r.streams) for r in source.records)


def _can(pairs: Sequence[Sequence[str]], able: Sequence[str], case: Case) -> bool:
    """Was the model trained for it? Of what is made jointly, one is guided by what is given; the rest by each other."""
    _, given, target = case
    if isinstance(target, str):
        return can_synthesise(pairs, able, given, target)
    makes_all = {split_stream(s)[0] for s in target} <= set(able)
    return not given or (makes_all and any(can_synthesise(pairs, able, given, s) for s in target))


def _words(case: Case) -> str:
    _, given, target = case
    some = lambda streams: " + ".join(map(stream_word, streams))  # noqa: E731
    return " -> ".join(filter(None, (some(given), some([target] if isinstance(target, str) else target))))


def _sheet(out: str, source: Source, name: str) -> epath.Path | None:
    """Where a picture goes; nowhere of data that are not open, since it shows real images beside what is made."""
    return epath.Path(out) / f"{name}.png" if out and source.open else None


def _plain(given: Sequence[str], target: str | Sequence[str]) -> str:
    return "_".join([*given, "to", *([target] if isinstance(target, str) else target)]).replace(":", "-")


def _apart(source: Source, shared: Mapping[str, Any], data: str) -> None:
    """None of the test subjects may be one that the model has learnt from.

    Raises:
      UserError: some are.
    """
    try:
        own = source_of(shared)
    except UserError as error:
        print(f"not checked whether the model was trained on test subjects of {data}: {error}", flush=True)
        return
    # Subjects of other sets may go by the same names; hardly with the same records.
    seen = {(r.subject, r.id) for r in own.records if r.split == "train"}
    both = {r.subject for r in source.records if r.split == "test" and (r.subject, r.id) in seen}
    if both:
        raise UserError(
            f"{data}: {len(both)} of its test subjects are among those that the model was trained on "
            f"({shared['data']['source']}); a figure of them says nothing. Take them out, or evaluate a model that has "
            "not seen them"
        )


def _write(row: Rows, folder: epath.Path, task: str, out: str, published: str) -> None:
    if not out:
        row.write((epath.Path(".") if folder.parent == BOX else folder) / "evaluation.json")
        return
    row.write(epath.Path(out) / f"{task}.json")
    for ending, text in (("csv", table.csv(row.figures)), ("md", table.markdown(row.figures, row.record(), published))):
        (epath.Path(out) / f"{task}.{ending}").write_text(text)
    for ending in ("json", "csv", "md"):
        print(epath.Path(out) / f"{task}.{ending}")
