"""The verbs beside training: parse, call, print; no logic. Console script `medm2g`, or `python -m medm2g_jax VERB`."""

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from medm2g_jax.errors import UserError

MODEL = "a run root, one stage's folder in it, an exported folder, or phantom, the model in the box"
STOPPED = 130  # exit status of what Ctrl-C ended
EXTRACTORS = ("inception", "xrv", "radimagenet", "rad_dino")  # of `evaluate.extractors`, which is slow to import
SEEN = 3  # exit status of what was done and has found something that somebody has to look at


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="STREAM=VALUE",
        help="a text, an image file, or a volume (a file, a folder of DICOM), whose slices are then the samples; "
        "repeat for more sources. With --data STREAM alone: what records give",
    )
    parser.add_argument(
        "--make",
        required=True,
        metavar="STREAM[,STREAM]",
        help="what to make, as in ct,mri:t2; with --data also `missing`: what each record lacks",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the samples")
    parser.add_argument("--as", dest="form", metavar="FORM", help="png, dicom, and of a volume's slices nifti, mha or "
                        "nrrd; default the format of the volume that is given, else png")  # fmt: skip
    parser.add_argument("--plane", default="axial", help="of a volume that is given: axial, coronal or sagittal slices")
    parser.add_argument("--data", metavar="SOURCE", help="a whole data set: manifest:DIR, tfds:NAME or phantom")
    parser.add_argument("--split", help="of --data; default train where what is missing is made, else test")
    parser.add_argument("--count", type=int, help="samples; default one for each given value")
    parser.add_argument("--draws", type=int, default=1, help="of each sample, with their mean and standard deviation")
    parser.add_argument(
        "--best-of", type=int, help="keep the draw that agrees best with what is given, in the aligned space; default "
        "of reports alone the run's own sample.best_of_text, else 1"
    )
    parser.add_argument("--beams", type=int, default=1, help="of texts: hypotheses that the search keeps")
    _sampling_arguments(parser)
    parser.add_argument("--guides", default="trained", help="trained pairs, all, or none")
    parser.add_argument(
        "--register",
        default="trained",
        help="trained: sources on the wanted image's grid are read there; made: only what is made together; none",
    )
    parser.add_argument("--prompts", default="given", help="given, or none: only the guides then carry the sources")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="samples made at a time; default the run's own sample.rows")
    parser.add_argument("--steps", type=int, help="sampling steps; default the run's own")
    parser.add_argument("--sampler", help="ddim, ddpm, euler, heun, dpmpp_2m; default the run's own")
    parser.add_argument("--eta", type=float, help="ddim: 0 deterministic, 1 ancestral; default the run's own")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; default the run's own")
    parser.add_argument(
        "--guide-guidance", type=float, help="a scale for the guides, apart from that for the prompts (--guidance)"
    )
    parser.add_argument("--dtype", default="float32", help="of stored parameters: float32, or bfloat16, half of it")


def _generate(args: argparse.Namespace) -> None:
    from medm2g_jax import volume_files, volumes
    from medm2g_jax.data.write import NOTE, check_form, check_writable, write_samples
    from medm2g_jax.limits import check_sampling
    from medm2g_jax.loading import load
    from medm2g_jax.train.log import quiet

    start = time.time()
    quiet()
    numbers = ("count", "draws", "best_of", "steps", "eta", "guidance", "guide_guidance", "beams", "seed", "rows")
    asked = {name: getattr(args, name) for name in numbers}
    check_sampling("--{}", **asked)  # and the folder, before minutes of loading and sampling
    check_writable(args.out)
    make = tuple(s.strip() for s in args.make.split(",") if s.strip())
    options = {name: getattr(args, name) for name in ("guides", "register", "prompts")}
    options |= {} if args.sampler is None else {"sampler": args.sampler}
    if args.split is not None and args.data is None:
        raise UserError(f"--split {args.split}: of --data, and none is named")
    if args.data is not None:
        if args.form not in (None, "png"):
            raise UserError(f"--as {args.form}: a data set is filled with png alone")
        _fill(args, make, {name: value for name, value in (asked | options).items() if value is not None})
        print(f"{time.time() - start:.1f} s. {NOTE}")
        return
    given: dict[str, list[str]] = {}
    for item in args.given:
        stream, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--given {item!r}: expected STREAM=VALUE, as in --given text='...' or --given ct=FILE.png")
        if not value.strip():
            raise UserError(f"--given {item!r}: nothing after the equals sign; expected a text, or an image file")
        given.setdefault(stream, []).append(value)
    if "missing" in make:
        raise UserError("--make missing: what records of a data set lack; name the set, as in --data manifest:DIR")
    values, cut = volume_files.of_given(args.model, given, args.plane, args.form)
    form = args.form or volume_files.form_of(cut)
    check_form(form, cut is not None)
    if cut is not None and asked.pop("count") is not None:
        raise UserError(f"--count {args.count}: a volume is given, of {len(cut)} slices, and each is a sample")
    model = load(args.model, dtype=args.dtype)
    print(f"loaded {model.meta['stage']} from {args.model} in {time.time() - start:.1f} s", flush=True)
    if cut is None:
        out = model.generate(given, make, **asked, **options)
    else:
        out = volumes.generate(model, values, cut, make, **asked, **options)
    record = dict(model=str(args.model), given=given, **model.provenance(**asked, **options))
    for path in write_samples(args.out, out, record, form, cut):
        print(path)
    for stream, values in out.samples.items():
        for value in values if isinstance(values, list) else ():
            print(f"{stream}: {value}")
    for pair, how in out.pairs.items():
        print(f"  {pair}: {how}")
    for note in out.notes:
        print(f"  {note}")
    print(f"{time.time() - start:.1f} s. {NOTE}")


def _fill(args: argparse.Namespace, make: tuple[str, ...], asked: dict) -> None:
    from medm2g_jax import fill
    from medm2g_jax.loading import load

    if named := [item for item in args.given if "=" in item]:
        raise UserError(f"--given {named[0]!r}: with --data name a stream alone, as in --given mri:t2")
    for one in ("count", "draws"):
        if asked.pop(one, 1) != 1:
            raise UserError(f"--{one} and --data: records are made one sample each")
    order = fill.Order(make, tuple(args.given), args.split or ("train" if make == (fill.MISSING,) else "test"))
    model = load(args.model, dtype=args.dtype)
    source = fill.data_of(model, args.data)
    print(fill.fill(model, source, order, args.out, **asked))


def _translate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", required=True, metavar="VOLUME", help="a file, or a folder of DICOM")
    parser.add_argument("-o", "--output", required=True, metavar="VOLUME", help="format by its name: .nii.gz, .nii, "
                        ".mha, .nrrd; without any of these a folder of DICOM")  # fmt: skip
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--from", dest="source", metavar="STREAM", help="what the volume is of, ct or mri:t2; default "
                        "what a DICOM CT says")  # fmt: skip
    parser.add_argument("--to", dest="target", metavar="STREAM", help="what to make; default the one there is")
    parser.add_argument("--plane", default="axial", help="axial, coronal or sagittal slices are made")
    parser.add_argument("--draws", type=int, default=1, help="of which the mean is written")
    parser.add_argument("--uncertainty", metavar="VOLUME", help="where to write the standard deviation of the draws")
    parser.add_argument("--overwrite", action="store_true", help="files that are there; never a folder")
    _sampling_arguments(parser)


def _translate(args: argparse.Namespace) -> None:
    from medm2g_jax import volume_files, volumes
    from medm2g_jax.data.marks import NOTE
    from medm2g_jax.limits import check_sampling
    from medm2g_jax.loading import load
    from medm2g_jax.modality import split_stream, stream_word
    from medm2g_jax.train.log import quiet

    start = time.time()
    quiet()
    numbers = ("draws", "steps", "eta", "guidance", "guide_guidance", "seed", "rows")
    asked = {name: getattr(args, name) for name in numbers}
    check_sampling("--{}", **asked)
    asked |= {} if args.sampler is None else {"sampler": args.sampler}
    words = ("source", "target", "plane", "draws", "uncertainty", "overwrite")
    order = volume_files.asked(args.model, args.input, args.output, **{name: getattr(args, name) for name in words})
    model = load(args.model, (split_stream(order.target)[0],), args.dtype)
    said = " x ".join(map(str, order.volume.values.shape))
    print(f"{args.input}: {stream_word(order.source)}, {said} voxels -> {stream_word(order.target)}", flush=True)
    made = volumes.translate(model, {order.source: order.volume}, [order.target], plane=args.plane, **asked)
    for path in order.write(made):
        print(path)
    for line in (*(f"{pair}: {how}" for pair, how in made.pairs.items()), *made.notes):
        print(f"  {line}")
    print(f"{time.time() - start:.1f} s. {NOTE}")


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="an image or a volume of any format, or a folder of "
                        "them; a folder of DICOM slices is a volume")  # fmt: skip
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--out", required=True, metavar="FILE", help="vectors.npz, or vectors.parquet")
    parser.add_argument("--stream", help="what the files are of, as in mri:t2; default what each says. With --data the "
                        "one that is embedded; default all")  # fmt: skip
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text, or a .txt file of one a "
                        "line; repeat for more")  # fmt: skip
    parser.add_argument("--data", metavar="SOURCE", help="a data set: manifest:DIR, tfds:NAME or phantom")
    parser.add_argument("--split", default="test", help="of --data")
    parser.add_argument("--volumes", choices=("mean", "slices"), default="mean", help="a volume is one vector, the "
                        "mean of its slices', or one a slice")  # fmt: skip
    parser.add_argument("--plane", default="axial", help="of volumes: axial, coronal or sagittal slices")


def _embed(args: argparse.Namespace) -> int:
    from medm2g_jax import embed, vectors
    from medm2g_jax.loading import load
    from medm2g_jax.train.log import quiet

    start = time.time()
    quiet()
    vectors.check_out(args.out)
    if not (args.files or args.text or args.data):
        raise UserError("nothing to embed: name files or folders, --text or --data")
    model = load(args.model, ())
    items = embed.of_files(model, args.files, args.stream, args.plane) + embed.of_texts(model, args.text)
    items += embed.of_data(model, args.data, args.split, args.stream) if args.data else []
    print(f"{model.meta['stage']}, {model.fingerprint}: {len(items)} to embed", flush=True)
    found, left = embed.embed(model, items, args.volumes == "slices")
    vectors.write(args.out, found)
    for name, why in left:
        print(f"left out: {why if name in why else f'{name}: {why}'}")
    print(f"{args.out}: {len(found.names)} vectors of {found.values.shape[1]}; {time.time() - start:.1f} s")
    if left:
        print(f"{len(left)} of {len(items)} were left out; exit status {SEEN}")
    return SEEN if left else 0


def _retrieve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--given", required=True, metavar="STREAM=VALUE", help="a text, or an image or volume's file")
    parser.add_argument("--among", required=True, metavar="VECTORS", help="what `medm2g embed` wrote, or a folder of "
                        "images")  # fmt: skip
    parser.add_argument("--stream", help="what is looked for, as in ct; default all there is")
    parser.add_argument("-k", type=int, default=5, help="how many are named")
    parser.add_argument("--sheet", metavar="PNG", help="where to draw what was given and what was found")
    parser.add_argument("--json", action="store_true", help="one object of JSON")


def _retrieve(args: argparse.Namespace) -> None:
    from medm2g_jax import retrieve
    from medm2g_jax.limits import check_sampling
    from medm2g_jax.loading import load
    from medm2g_jax.train.log import quiet

    quiet()
    check_sampling("-{}", k=args.k)
    model = load(args.model, ())
    query = retrieve.query_of(model, args.given)
    say = functools.partial(print, file=sys.stderr)  # what is found alone goes to the output
    found = retrieve.nearest(model, query, retrieve.among(model, args.among, args.stream, say), args.k)
    if args.json:
        nearest = [one._asdict() for one in found]
        print(json.dumps(dict(given=args.given, model=model.fingerprint, nearest=nearest)))
    else:
        print("\n".join(map(str, found)))
    if args.sheet:
        blank = retrieve.sheet(args.sheet, model, query, found)
        say(f"{args.sheet}{f': {len(blank)} of {len(found)} are texts, gone, or not to be shown' if blank else ''}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, or a folder of them")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")


def _verify(args: argparse.Namespace) -> None:
    from medm2g_jax.data.marks import verify

    found = []
    for verdict in verify(args.files):
        print(json.dumps(verdict.record()) if args.json else verdict, flush=True)
        found.append(verdict)
    if broken := sum(bool(verdict.error) for verdict in found):
        raise UserError(f"{broken} of {len(found)} could not be read")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--config", default="configs/tasks.py:phantom", help="which measurements, as in "
                        "configs/tasks.py:translation")  # fmt: skip
    parser.add_argument("--data", default="", metavar="SOURCE", help="manifest:DIR, tfds:NAME; default what the model "
                        "was trained on")  # fmt: skip
    parser.add_argument("--rows", type=int, help="test subjects; default all, at most the config's")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", default="", metavar="DIR", help="for the figures as JSON, CSV and Markdown, and "
                        "pictures, row by row: stopped, the same command goes on; default evaluation.json beside the "
                        "result")  # fmt: skip
    parser.add_argument("--against", default="", metavar="FILE", help="TASK.json of another evaluation: print the "
                        "differences; what was not measured alike is refused")  # fmt: skip


def _evaluate(args: argparse.Namespace) -> int:
    from medm2g_jax.data.write import check_writable
    from medm2g_jax.evaluate.measure import measure
    from medm2g_jax.limits import check_sampling
    from medm2g_jax.main import parse
    from medm2g_jax.train.log import quiet

    quiet()
    check_sampling("--{}", rows=args.rows, seed=args.seed)
    if args.out:
        check_writable(args.out)
    config = parse([f"--config={args.config}", *args.overrides])
    if config.paper:
        print(f"the paper, {config.task}: {config.paper}", flush=True)
    if config.published:
        print(f"published, {config.task}: {config.published}", flush=True)
    if not any(config[name] for name in ("findings", "synthesis", "reports", "sets", "joint", "space", "readers")):
        return 0
    named = [("--config", args.config), ("--data", args.data), ("--rows", args.rows), ("--seed", args.seed)]
    own = [*(f"{name}={value}" for name, value in named if value), *args.overrides]
    typed = ["medm2g", "evaluate", f"--model={args.model}", *own]
    try:
        measure(
            args.model,
            args.rows,
            config.seed if args.seed is None else args.seed,
            config.synthesis,
            task=config.task,
            findings=config.findings,
            regression=config.regression,
            reported=config.reports,
            cleaning=config.cleaning,
            sets=config.sets,
            readers=config.readers.to_dict(),
            joint=config.joint,
            space=config.space,
            protocols=config.protocols,
            published=config.published or (config.paper and f"the paper: {config.paper}"),
            data=args.data,
            out=args.out,
            most=config.rows,
            command=shlex.join(typed),
            against=args.against,
        )
    except KeyboardInterrupt:
        kept = f"finished rows are in {args.out}, and the same command goes on from there" if args.out else ""
        print(f"\nstopped; {kept or 'nothing is written: with --out DIR finished rows are kept'}", file=sys.stderr)
        return STOPPED
    return 0


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--data", metavar="SOURCE", help="what it was trained on, where that has moved: manifest:DIR, "
                        "tfds:NAME; default the run's own")  # fmt: skip
    parser.add_argument("--make", default="", metavar="STREAM[,STREAM]", help="audit these; default all images that it "
                        "makes")  # fmt: skip
    parser.add_argument("--rows", type=int, default=200, help="samples of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="where to write; default the folder of the model's stage")


def _audit(args: argparse.Namespace) -> int:
    from medm2g_jax import audit, fill
    from medm2g_jax.limits import check_sampling
    from medm2g_jax.loading import BOX, load, locate
    from medm2g_jax.train.log import quiet

    start = time.time()
    quiet()
    check_sampling("--{}", rows=args.rows, seed=args.seed)
    folder = locate(args.model)
    out = args.out or ("." if folder.parent == BOX else str(folder))
    model = load(args.model)
    source = fill.data_of(model, args.data or model.meta["shared"]["data"]["source"])
    make = [s.strip() for s in args.make.split(",") if s.strip()]
    reasons = audit.audit(model, source, out, make=make, rows=args.rows, seed=args.seed)
    for reason in reasons:
        print(f"flagged: {reason}")
    print(f"{out}/audit.json: {f'flagged; exit status {SEEN}' if reasons else 'passes'}; {time.time() - start:.1f} s")
    return SEEN if reasons else 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    sources = ("sd15", "clip", "vd", "optimus", "bert-gpt2", "prompt_in", *EXTRACTORS, "export")
    parser.add_argument("source", choices=sources, metavar="SOURCE", help=", ".join(sources))
    parser.add_argument("--from", dest="source_path", metavar="PATH", help="file or folder to read")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--weights", default="", help="sd15, single file: ema (default where there) or plain")
    parser.add_argument("--context", default="image", help="vd: whose transformers, image (for reports) or text")
    parser.add_argument("--bert", metavar="DIR", help="optimus: the folder of BERT's tokenizer (bert-base-cased)")
    parser.add_argument("--gpt2", metavar="DIR", help="optimus: that of GPT-2's; bert-gpt2: GPT-2's weights")
    parser.add_argument("--as", dest="format", metavar="FORMAT", help="diffusers, clip, bert, gpt2, safetensors, hub")
    parser.add_argument(
        "--dtype", default="float32", help="export --as safetensors or hub: float32, float16, or int8, a byte a weight"
    )
    parser.add_argument("--flow", help="export of a run: which modality's UNet or prompt encoder")


def _convert(args: argparse.Namespace) -> None:
    from medm2g_jax import export
    from medm2g_jax.convert import run

    if args.source in EXTRACTORS:
        from medm2g_jax.evaluate import extractors

        if not args.source_path or not Path(args.source_path).exists():
            raise UserError(f"--from {args.source_path}: expected {extractors.EXTRACTORS[args.source].file}")
        print(extractors.convert(args.source, Path(args.source_path), Path(args.to)))
        return
    if args.source == "export":
        print(export.export(args.source_path, args.to, args.format, args.flow, args.dtype))
        return
    run.convert(
        args.source,
        args.source_path,
        args.to,
        weights=args.weights,
        context=args.context,
        bert=args.bert,
        gpt2=args.gpt2,
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="as for the trainer: configs/NAME.py:WORDS")
    parser.add_argument("--workdir", help="run root; default as the trainer's")
    parser.add_argument("--topology", default="", help="a TPU slice: v5e:2x4, v6e:4x4, v4:2x2x2, v5p:2x2x1 ...")
    parser.add_argument("--libtpu-python", default="", metavar="PATH", help="Python of an environment with libtpu; "
                        "default MEDM2G_LIBTPU_PYTHON, else .venv-tpu/bin/python, made by `make plan-env`")  # fmt: skip
    parser.add_argument("--commands", action="store_true", help="print the command of each stage that is not done")
    parser.add_argument("--sweep", action="store_true", help="compile its step under several meshes and batches")
    parser.add_argument("--meshes", default="", help="of the sweep: DATAxFSDPxTENSOR, commas between; default a few")
    parser.add_argument("--batches", default="", help="of the sweep: rows a chip, commas between; default 1 to 32")
    parser.add_argument("--costs", action="store_true", help="what each stage costs, from its traced step alone")
    parser.add_argument("--out", help="file for the rows; the sweep's, by default results/plan/STAGE-PRESET-TOPOLOGY"
                        ".json, goes on where it stopped")  # fmt: skip
    parser.add_argument("--price", type=float, default=0.0, help="dollars an hour and chip; default an assumption")


def _plan(args: argparse.Namespace) -> None:
    from etils import epath

    from medm2g_jax import plan, run, sweep
    from medm2g_jax.main import read_config
    from medm2g_jax.train.log import quiet

    quiet()
    config = read_config([f"--config={args.config}", *args.overrides])
    workdir = args.workdir or run.default_workdir(config)
    config = run.with_run_roots(config, epath.Path(workdir))
    if args.commands:
        for name, what, arguments in plan.commands(config, args.config, args.overrides, workdir):
            print(f"# {name}: {what}")
            if what != "done":
                print(shlex.join(["python", "-m", "medm2g_jax.main", *arguments]))
    elif args.costs:
        sweep.costs(config, workdir, args.out)
    elif args.sweep:
        sweep.show(
            config, workdir, args.topology, args.libtpu_python, args.meshes, args.batches, args.out, args.price
        )
    else:
        plan.show(config, workdir, args.topology, args.libtpu_python)


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", nargs="?", metavar="SET", help="which; without it the list of sets")
    parser.add_argument("--root", metavar="DIR", help="the set as it was downloaded")
    parser.add_argument("--out", metavar="DIR", help="folder for the prepared set")
    parser.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="STREAM=PATTERN",
        help="of folder:nifti, where files are: mri:t1='{subject}/t1.nii.gz'; repeat for more streams",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the set's own, as `medm2g prepare` lists them: views=all; repeat for more",
    )
    parser.add_argument("--size", type=int, help="the longer side of a stored image at most; default 512")
    parser.add_argument("--plane", help="of slices: axial (default), coronal, sagittal")
    parser.add_argument("--first", type=int, help="first slice of a volume that is taken")
    parser.add_argument("--last", type=int, help="the slice after the last")
    parser.add_argument("--every", type=int, help="every so many-th slice")
    parser.add_argument("--share", type=float, help="slices of which at least this part is no background")
    parser.add_argument("--square", type=float, metavar="MM", help="side of a volume's pixels; 0: the finer it has")
    parser.add_argument("--register", help="volumes of a case on different grids: none, grid, rigid or affine")
    parser.add_argument("--clean", help="reports: none, mimic-sections, r2gen or caption")
    parser.add_argument("--preset", help="which values of an MRI are -1 and +1: mr.zero, mr.maisi, mr.minmax")
    parser.add_argument("--range", metavar="STREAM=LOW:HIGH", help="values that are -1 and +1 where no unit says it")
    parser.add_argument("--split", metavar="A,B,C", help="train, val, test where the set has no split: 0.8,0.1,0.1")
    parser.add_argument("--seed", type=int, help="of that split")
    parser.add_argument("--limit", type=int, help="cases, for a first try")
    parser.add_argument("--pack", type=int, metavar="MB", help="write shards of so many MB, not a file an image")
    parser.add_argument("--tfds", metavar="NAME", help="then also as the TFDS set prepared/NAME, in TFDS's own folder "
                        "(TFDS_DATA_DIR): --config.data.source=tfds:prepared/NAME")  # fmt: skip
    parser.add_argument("--keep-ids", action="store_true", default=None, help="also where the licence is not open")
    parser.add_argument("--workers", type=int, help="processes; default one a core")


def _prepare(args: argparse.Namespace) -> None:
    from medm2g_jax import prepare
    from medm2g_jax.data.adapters import ADAPTERS, adapter_of

    if args.set is None:
        for adapter in ADAPTERS.values():
            print(f"{adapter.name:18s} {adapter.title} ({', '.join(adapter.streams)}; {adapter.licence})")
            for name, values in adapter.options.items():
                print(f"{'':18s}   --option {name}={'|'.join(values)}")
        return
    adapter = adapter_of(args.set)
    for name in ("root", "out"):
        if getattr(args, name) is None:
            raise UserError(f"medm2g prepare {args.set}: name --root DIR, the set as downloaded, and --out DIR")
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(prepare.Order)}
    asked = {name: value for name, value in asked.items() if value is not None}
    if "split" in asked:
        try:
            asked["split"] = tuple(float(part) for part in args.split.split(","))
        except ValueError:
            raise UserError(f"--split {args.split}: expected three parts, as in 0.8,0.1,0.1") from None
    asked["pack"] = asked.get("pack", 0) * 10**6
    patterns = {}
    for item in args.files:
        stream, equals, pattern = item.partition("=")
        if not (equals and pattern):
            raise UserError(f"--files {item!r}: expected STREAM=PATTERN, as in ct='{{subject}}/ct.nii.gz'")
        patterns[stream] = pattern
    options = dict(item.partition("=")[::2] for item in args.option)
    manifest = prepare.prepare(adapter, args.root, args.out, prepare.Order(**asked), patterns, options=options)
    if args.tfds is not None:
        from medm2g_jax.data.tfds_builder import build

        print(f"train with --config.data.source={build(manifest.parent, args.tfds)}")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{MODEL}; default the model in the box")
    parser.add_argument("--port", type=int, help="default the first free one from 7860")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="open none")


def _demo(args: argparse.Namespace) -> None:
    from medm2g_jax import demo
    from medm2g_jax.train.log import quiet

    quiet()
    demo.run(args.model, args.port, args.browser)


def _doctor(args: argparse.Namespace) -> int:
    from medm2g_jax import doctor

    broken = doctor.doctor()
    print(f"{broken} to mend; exit status {SEEN}" if broken else "nothing to mend")
    return SEEN if broken else 0


class Verb(NamedTuple):
    """A row of VERBS: help in one line, its arguments, what it does with them (and its exit status, where that is not
    0), and what it is in more words."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    description: str = ""
    overrides: bool = False  # takes --config.FIELD=VALUE


VERBS = {
    "generate": Verb("make any streams from any others", _generate_arguments, _generate),
    "translate": Verb(
        "a volume into another modality, on its own grid",
        _translate_arguments,
        _translate,
        "One volume in, one out: each slice is made of its slice, with one noise for all, and lies where that lay.",
    ),
    "embed": Verb(
        "unit vectors of texts and images in the aligned space",
        _embed_arguments,
        _embed,
        "Of files of any format, texts and data sets. What cannot be read is listed and left out. Exit status 0 if all "
        "were embedded, 3 if some were left out.",
    ),
    "retrieve": Verb(
        "what lies nearest to a text or an image in the aligned space",
        _retrieve_arguments,
        _retrieve,
        "Prints rank, cosine and name. Cosines of one stream can be compared: name what is looked for, --stream ct.",
    ),
    "verify": Verb(
        "was a file made here, and by which model",
        _verify_arguments,
        _verify,
        "What files say of themselves: made by medm2g_jax or not marked by it, the model's fingerprint, the seed. Exit "
        "status 0 if all could be read. A file without a mark may be synthetic all the same.",
    ),
    "evaluate": Verb(
        "measure a trained model",
        _evaluate_arguments,
        _evaluate,
        "Tasks are rows of configs/tasks.py; --config.FIELD=VALUE changes a field of one, as --config.regression=20.",
        overrides=True,
    ),
    "audit": Verb(
        "does a model give back the people it was trained on",
        _audit_arguments,
        _audit,
        "Samples for held-out records beside training and held-out rows, in pixels and in the aligned space. Exit "
        "status 0 if it passes, 3 if it is flagged.",
    ),
    "convert": Verb(
        "published weights in, ours out",
        _convert_arguments,
        _convert,
        "Local files only. sd15, clip, vd, optimus, bert-gpt2: published weights -> DIR/<folder>, which "
        "MEDM2G_SD_WEIGHTS=DIR then names. prompt_in: fit what lets SD-1.5 read shared prompts (sd15 and clip do it as "
        "soon as both are there). export: a converted folder or a trained run -> other tools' formats.",
    ),
    "prepare": Verb(
        "data sets as downloaded -> what the trainer reads",
        _prepare_arguments,
        _prepare,
        "Without arguments: the sets that are known. Run again, the same command does what is left to do.",
    ),
    "plan": Verb(
        "the stages of a config; does its step fit a TPU slice",
        _plan_arguments,
        _plan,
        "The stages of a config, what there is of them and which records serve them. With --topology: compile the "
        "train step with the TPU compiler, on any Linux machine, and print its memory and cost. "
        "--config.FIELD=VALUE as for training.",
        overrides=True,
    ),
    "demo": Verb(
        "a web page of a model, on this machine",
        _demo_arguments,
        _demo,
        "Serves a page on 127.0.0.1: any to any, counterfactuals, downloads. Needs the extra `demo` (gradio).",
    ),
    "doctor": Verb(
        "what is installed here, what is missing, and what to do",
        lambda parser: None,
        _doctor,
        "Devices, memory, disk, packages, extras, data and weights. Each line is ok, - (one can do without it) or "
        "!! (to be mended), with what to type. Exit status 0 if there is nothing to mend, 3 if there is.",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Entry of the console script; an error a user can mend is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="medm2g", description="Medical any-to-any generation. Not for clinical use.")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.arguments(parsers.add_parser(name, help=verb.help, description=verb.description or verb.help))
    args, args.overrides = parser.parse_known_args(argv)
    verb = VERBS[args.verb]
    if unknown := [a for a in args.overrides if not verb.overrides or not a.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status = verb.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)  # as shells count SIGINT
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
