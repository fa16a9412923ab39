"""`medm2g doctor`: what is here of what the program needs, and what to type about what is not.

It has to run where nothing else does. So this file imports Python's own library and reads what pip wrote down; what may
be broken itself (jax and its devices, the package, data, converted weights) is tried in a child, which says line by
line what it found, so that what it dies of takes no more than the rest with it.
"""

import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from medm2g_jax import cache
from medm2g_jax.errors import UserError

NAME = "medm2g-jax"
OK, LACKS, BROKEN = "ok", "-", "!!"
# What extras are for, where one misses them.
EXTRAS = {
    "demo": "medm2g demo",
    "dicom": "compressed DICOM",
    "itk": "MetaImage, NRRD and registration",
    "parquet": "medm2g embed --out vectors.parquet",
    "convert": "medm2g convert of files that torch wrote",
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs",
}
ACCELERATORS = {"cuda": "jax[cuda13]", "tpu": "jax[tpu]"}  # extras, and what of jax they bring
GB = 10**9
# Peak resident memory, measured on two cores: of `medm2g generate --model phantom`, and of training mri.py:tiny.
PAGE, TRAINING = 1.1 * GB, 2.0 * GB
PROGRAM = 2**22  # bytes of a compiled program that is kept, about
RUN_ROOT = 0.2 * GB  # what `make demo` leaves in runs/phantom-tiny
SECONDS = 180  # that the child may take


class Finding(NamedTuple):
    """A line of what is said: OK, LACKS (something that one can do without) or BROKEN; of what; what was found, and
    what mends it."""

    mark: str
    what: str
    said: str
    mend: str = ""

    def __str__(self) -> str:
        lines = [f"{self.mark:2s}  {self.what:14s} {self.said}", *self.mend.splitlines()]
        return "\n".join([lines[0], *(f"{'':19s}{line}" for line in lines[1:])])


def doctor(say: Callable[[str], object] = print) -> int:
    """Say all that is found; returns how many things are to be mended."""
    broken = 0
    for finding in (*here(), *tried()):
        say(str(finding))
        broken += finding.mark == BROKEN
    return broken


def here() -> Iterator[Finding]:
    """What can be known without any package."""
    yield _python()
    yield from packages()
    yield _memory()
    yield _disk()
    yield _cache()


def _pip(*what: str) -> str:
    return " ".join((sys.executable, "-m pip install", *map(shlex.quote, what)))


def _again() -> str:
    """What installs this package anew, from where it came (PEP 610)."""
    try:
        url = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}").get("url", "")
    except importlib.metadata.PackageNotFoundError:
        url = ""
    place = url2pathname(urlsplit(url).path) if url.startswith("file:") else url
    return _pip("--force-reinstall", "--no-deps", place or NAME)


def _python() -> Finding:
    version = sys.version_info
    said = f"{platform.python_version()}, {sys.executable}"
    if (3, 11) <= version < (3, 14):
        return Finding(OK, "python", said)
    mend = "make an environment with Python 3.11 to 3.13: make demo PYTHON=python3.12, or python3.12 -m venv FOLDER"
    return Finding(BROKEN, "python", f"{said}; expected 3.11 to 3.13", mend)


# --- packages -------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Of each package that is asked for: is it here, and in a version that fits; then a line an extra."""
    try:
        lines = importlib.metadata.requires(NAME) or ()
    except importlib.metadata.PackageNotFoundError:
        root = Path(__file__).parents[1]
        yield Finding(BROKEN, "packages", f"{NAME} runs from {root} and is not installed", _pip(str(root)))
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Finding(BROKEN, "packages", "packaging is not here, and versions cannot be compared", _pip("packaging"))
        return
    asked = [Requirement(line) for line in lines]
    needed = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [(r, said) for r in needed if (said := _misses(r))]
    of_theirs = {line: r.name for r in needed if _version(r.name) for line in importlib.metadata.requires(r.name) or ()}
    known = {r.name for r, _ in wrong}
    for line, name in of_theirs.items():  # as jaxlib of jax
        inner = Requirement(line)
        asked_for = inner.name not in known and (inner.marker is None or inner.marker.evaluate({"extra": ""}))
        if asked_for and (said := _misses(inner)):
            wrong.append((inner, f"{said}; {name} needs it"))
            known.add(inner.name)
    for requirement, said in wrong:
        yield Finding(BROKEN, "packages", said, _pip(_asked(requirement)))
    if not wrong:
        yield Finding(OK, "packages", f"all {len(needed)} that are needed, in versions that fit{_untested()}")
    machine = _accelerator()
    for extra in importlib.metadata.metadata(NAME).get_all("Provides-Extra") or ():
        if extra in ACCELERATORS and (machine is None or machine[1] != extra):
            continue  # on another machine a TPU's packages have jax wait for one
        of = [r for r in asked if r not in needed and r.marker and r.marker.evaluate({"extra": extra})]
        if lacking := [said for r in of if (said := _misses(r))]:
            why = f"for {EXTRAS[extra]}: " if extra in EXTRAS else ""
            yield Finding(LACKS, f"extra {extra}", why + "; ".join(lacking), _pip(*map(_asked, of)))
        else:
            yield Finding(OK, f"extra {extra}", ", ".join(f"{r.name} {_version(r.name)}" for r in of))


def _asked(requirement) -> str:
    """A requirement without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _misses(requirement) -> str:
    """What is wrong with what is here of a requirement; "" where it is met. Of its own extras (jax[cuda13]): are their
    packages here?"""
    from packaging.requirements import Requirement

    found = _version(requirement.name)
    if not found:
        return f"{requirement.name}{requirement.specifier} is not here"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is here, and {requirement.name}{requirement.specifier} is asked for"
    for extra in requirement.extras:
        for line in importlib.metadata.requires(requirement.name) or ():
            inner = Requirement(line)
            if inner.marker and inner.marker.evaluate({"extra": extra}) and not inner.marker.evaluate({"extra": ""}):
                if not _version(inner.name):
                    return f"{inner.name}, of {requirement.name}[{extra}], is not here"
    return ""


def _untested() -> str:
    """Of a checkout: which packages are in other versions than those that are tested."""
    pins = Path(__file__).parents[1] / "requirements.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else ()
    exact = [m.groups() for line in lines if (m := re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)$", line))]
    other = [f"{name} {_version(name)} (tested: {pin})" for name, pin in exact if _version(name) != pin]
    return f"; not the tested ones: {', '.join(other)}" if other else ""


# --- the machine ----------------------------------------------------------------------------------------------------


def _memory() -> Finding:
    free, why = min(_memories())
    need = f"the page with the model in the box takes {PAGE / GB:g} GB, training at tiny size {TRAINING / GB:g}"
    said = f"{free / GB:.1f} GB {why}; {need}"
    if free >= TRAINING:
        return Finding(OK, "memory", said)
    if free >= PAGE:
        return Finding(LACKS, "memory", said, "end other programs before you train")
    return Finding(BROKEN, "memory", said, "end other programs, raise the limit, or take a machine with more")


def _memories() -> Iterator[tuple[float, str]]:
    """(bytes, in words) of every limit of what this process may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else ()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    if free is None:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "in all"
    else:
        yield free, "free"
    groups = Path("/sys/fs/cgroup")  # of a container
    older = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"
    for most, used in (("memory.max", "memory.current"), older):
        if (groups / most).is_file() and (limit := (groups / most).read_text().strip()).isdigit():
            yield int(limit) - int((groups / used).read_text()), "free of this container's"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit, "allowed by ulimit -v"


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    said = f"{free / GB:.1f} GB free in {os.getcwd()}; make demo leaves {RUN_ROOT / GB:g} GB there"
    if free >= 2 * RUN_ROOT:
        return Finding(OK, "disk", said)
    return Finding(BROKEN, "disk", said, "make room, or train elsewhere: --workdir=FOLDER")


def _cache() -> Finding:
    """Where compiled programs are kept: without it every start compiles them anew."""
    folder = cache.compiled()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROGRAM))
            file.flush()
    except OSError as error:
        why = f"{folder} cannot be written ({error.strerror}), so that every start compiles its programs anew"
        mend = "mend it, or name a folder of yours: export JAX_COMPILATION_CACHE_DIR=FOLDER"
        return Finding(BROKEN, "cache", why, mend)
    return Finding(OK, "cache", f"{folder} can be written")


def _accelerator() -> tuple[str, str] | None:
    """(what the machine has, the extra that jax needs for it), without jax."""
    if (smi := shutil.which("nvidia-smi")) is not None:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=60).stdout
        if gpus := [line.split(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]:
            return "; ".join(gpus), "cuda"
    if any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return "a TPU", "tpu"
    return None


# --- what only shows when it is tried -------------------------------------------------------------------------------


def tried() -> Iterator[Finding]:
    """What the child says, and what it dies of."""
    root = str(Path(__file__).parents[1])
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "medm2g_jax.doctor"], env=env, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        mend = "JAX_PLATFORMS=cpu leaves accelerators alone"
        if _version("libtpu"):  # jax waits for the TPU that it is not on
            mend = f"without a TPU: {sys.executable} -m pip uninstall libtpu\n{mend}"
        yield Finding(BROKEN, "devices", f"jax gave no answer within {SECONDS} s", mend)
        return
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    yield from (Finding(*line) for line in lines)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        said = f"the process that tries it ended with status {done.returncode} {last}".strip()
        yield Finding(BROKEN, "package", said, _again())


def _child() -> None:
    said: set[str] = set()
    for what, look in (
        ("devices", _devices),
        ("model", _box),
        ("data", _data),
        ("weights", _weights),
        ("make demo", _plan),
    ):
        try:
            finding = Finding(OK, what, look())
        except _Lacks as lack:
            finding = Finding(*lack.args)
        except UserError as error:
            finding = Finding(BROKEN, what, str(error))
        except Exception as error:  # whatever it is, it is what is looked for
            first = (str(error).strip().splitlines() or [""])[0]
            finding = Finding(BROKEN, what, f"{type(error).__name__}: {first}".rstrip(": "), _of_error(error))
        if finding.said not in said:  # a package that cannot be imported is named once
            said.add(finding.said)
            print(json.dumps(finding), flush=True)


class _Lacks(Exception):
    """A `Finding` that is no error of what was called."""


def _of_error(error: Exception) -> str:
    """What may mend it: the package that an error names, or in which it was raised, installed anew."""
    if "JAX_PLATFORMS" in os.environ and not isinstance(error, ImportError):
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: unset it, or install what it names: {_pip('jax[cuda13]')}"
    parts = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    raised = [p[p.index("site-packages") + 1] for p in parts if "site-packages" in p]
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
    elif named := re.search(r"module '(\w+)", str(error)):
        name = named[1]
    else:
        name = raised[-1] if raised else ""
    return _pip("--force-reinstall", name) if name and name != "medm2g_jax" else _again()


def _devices() -> str:
    import jax

    devices = jax.devices()
    first = devices[0]
    said = f"{len(devices)} x {first.device_kind} ({first.platform}), {os.cpu_count()} cores; jax {jax.__version__}"
    if first.platform == "cpu" and (found := _accelerator()) and os.environ.get("JAX_PLATFORMS") != "cpu":
        name, extra = found
        mend = _pip(f"{ACCELERATORS[extra]}=={jax.__version__}")
        raise _Lacks(BROKEN, "devices", f"{said}, though this machine has {name}", mend)
    room = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    return said + (f"; {room / GB:.0f} GB each" if room else "")


def _box() -> str:
    from medm2g_jax.loading import in_the_box, load

    names = in_the_box()
    if not names:
        mend = f"name one, medm2g demo --model RUN, or bring it back: {_again()}"
        raise _Lacks(LACKS, "model", "none in the box of this version", mend)
    try:
        makes = [", ".join(load(name).meta["modalities"]) for name in names]
    except UserError as error:
        raise _Lacks(BROKEN, "model", str(error), _again()) from error
    return "; ".join(f"{name}, in the box: {made}" for name, made in zip(names, makes, strict=True))


def _data() -> str:
    from medm2g_jax.config import get_config
    from medm2g_jax.data.open import source_of
    from medm2g_jax.rounds import DEMO

    config = get_config(DEMO, "tiny")
    source = source_of(config)
    return f"{config.data.source} ({config.data_reason}): {len(source.records)} records"


def _weights() -> str:
    from medm2g_jax.config import default_preset, weights_folder
    from medm2g_jax.convert import converted

    preset, reason = default_preset()
    if folder := weights_folder():
        for part in (p.name for p in Path(folder).iterdir() if p.name in converted.COMMANDS):
            converted.read(folder, part)
    return f"preset {preset} where none is named ({reason})"


def _plan() -> str:
    from etils import epath

    from medm2g_jax import run
    from medm2g_jax.config import get_config
    from medm2g_jax.rounds import DEMO
    from medm2g_jax.train.loop import plan_stages

    config = get_config(DEMO, "tiny")
    workdir = run.default_workdir(config)
    todo = plan_stages(config, epath.Path(workdir))
    left = [name for name, what in todo if what != "done"]
    return f"{len(todo)} stages in {workdir}, {len(left)} to train; medm2g plan --config={DEMO}:tiny lists them"


if __name__ == "__main__":
    _child()
