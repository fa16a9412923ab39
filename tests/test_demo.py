"""The demo: its desk and its views, on a compiled model of test size; its page, in a real browser where there is one.

The page's model paints by hand, at once, what it is asked for. MEDM2G_DEMO_MODEL=RUN takes a real one, with text, CT,
MRI and X-ray, in its place; MEDM2G_DEMO_PICTURES=DIR keeps screenshots.
"""

import base64
import importlib
import importlib.util
import io
import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import SECRET, dataset, save
from micro import micro, model_of
from PIL import Image

from medm2g_jax import cli, demo, demo_desk, demo_near, demo_view, load
from medm2g_jax.data import marks
from medm2g_jax.data.formats import raster
from medm2g_jax.data.picture import Picture
from medm2g_jax.demo_desk import Able, Desk, Given, Order, Progress, Result
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES
from medm2g_jax.train import results

DEFAULTS = dict(steps=2, guidance=1.0, eta=1.0, sampler="ddim")


def order(given=None, make=("ct",), **own) -> Order:
    return Order(given or {}, make, **(DEFAULTS | own))


def image(seed: int = 0, shape=(32, 32)) -> Given:
    return Given(Picture(np.random.default_rng(seed).random(shape, np.float32), None))


def last(steps) -> Result:
    *_, result = steps
    return result


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    model = model_of("ct_mri", "tiny,alone")
    able = Able("test", ("ct", "mri"), ("ct", "mri"), DEFAULTS, {}, 32)
    return Desk(able, lambda: model, str(tmp_path_factory.mktemp("desk")))


# --- requests -------------------------------------------------------------------------------------------------------


def test_the_first_images_are_made_unasked_and_once_for_all(desk):
    first = last(desk.first())
    assert tuple(first.rows[0].made.samples) == ("ct", "mri:t2") and last(desk.first()) is first


def test_a_result_is_what_the_model_makes_and_its_files_are_marked(desk, tmp_path):
    steps = list(desk.make(order({"mri:t2": image()}, draws=3, seed=7)))
    result = steps.pop()
    assert steps and all(isinstance(step, Progress) and "s" in step.text for step in steps)
    (row,) = result.rows
    assert row.made.samples["ct"].shape == (3, 32, 32) and row.made.draws == 3
    single = last(desk.make(order({"mri:t2": image()}, seed=7)))  # whatever the number of draws, the first is this
    np.testing.assert_allclose(single.rows[0].made.samples["ct"][0], row.made.samples["ct"][0], atol=1e-3)
    assert set(result.files) == {"png", "dicom", "json"}
    for form in ("png", "dicom"):
        with zipfile.ZipFile(result.files[form]) as file:
            file.extractall(tmp_path / form)
        found = list(marks.verify([tmp_path / form]))
        assert found and all(v.mark is not None and v.mark.seed == 7 for v in found), found
    (record,) = json.loads(Path(result.files["json"]).read_text())
    assert record["given"] == {"mri:t2": "an image of 32 x 32 pixels"} and record["seed"] == 7
    assert record["note"] == marks.NOTE and str(tmp_path.parent) not in json.dumps(record)


def test_the_mirrored_patient_stands_beside_the_first_with_the_same_noise(desk):
    before = last(desk.make(order({"mri:t2": image()}, seed=3)))
    after = last(desk.make(demo_desk.mirrored(before.rows[0].order), before))
    assert after.rows[0] is before.rows[0] and len(after.rows) == 2
    assert after.rows[1].order.seed == 3
    again = last(desk.make(demo_desk.mirrored(after.rows[0].order), after))
    assert len(again.rows) == 2 and len(json.loads(Path(again.files["json"]).read_text())) == 2


def test_progress_within_a_draw_costs_no_other_program_and_changes_nothing(desk):
    model = desk._model.result()
    asked = order({"mri:t2": image()}, steps=20, seed=2)
    steps = list(desk.make(asked))
    known = len(model._samplers)
    seen: list[tuple[int, int]] = []
    picture = asked.given["mri:t2"].picture
    again = model.generate({"mri:t2": picture}, ["ct"], rows=1, seed=2, **DEFAULTS | {"steps": 20})
    np.testing.assert_array_equal(again.samples["ct"], steps[-1].rows[0].made.samples["ct"])
    model.generate({"mri:t2": picture}, ["ct"], rows=1, watch=lambda *x: seen.append(x), **DEFAULTS | {"steps": 13})
    assert len(model._samplers) == known and seen == [(n, 13) for n in range(1, 14)]
    with pytest.raises(ZeroDivisionError):  # what the watcher raises is the end of it
        model.generate({"mri:t2": picture}, ["ct"], rows=1, watch=lambda *_: 1 / 0, **DEFAULTS)


def test_the_time_that_is_left_is_that_of_the_steps_that_are_behind(monkeypatch):
    now = iter((100.0, 103.0, 106.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    pace = demo_desk._Pace(40)
    assert pace.after(10, "it") == Progress("making it", 0.25)  # whatever was compiled before
    assert pace.after(20, "it") == Progress("making it, 6 s left", 0.5)
    assert pace.after(40, "it") == Progress("making it", 1.0)


def test_what_lies_nearest_are_the_subjects_of_the_greatest_cosine(desk, monkeypatch):
    monkeypatch.setattr(demo_desk, "EVERY", 0.005)  # seconds between two looks at how far it is
    model = desk._model.result()
    given = image(3)
    result = last(desk.make(order({"mri:t2": given}, seed=1)))
    steps = list(desk.nearest(result))
    found = steps.pop()
    assert any("reading CT of 16 subjects" in step.text for step in steps)
    assert [(s, made, {n.near.stream for n in rows}) for s, made, rows in found.rows] == [
        ("mri:t2", False, {"ct"}),
        ("ct", True, {"ct"}),
    ]
    source = demo_near.data_of(model, "phantom")
    test = [i for i, record in enumerate(source.records) if record.split == "test"]
    images = {i: model.in_units("ct", source.read(i, "ct", np.random.default_rng([0, i]))[None])[0] for i in test}
    vectors = model.embed("ct", list(images.values()))
    for (stream, _, rows), value in zip(found.rows, (given.picture, result.rows[0].made.samples["ct"][0]), strict=True):
        cosines = vectors @ model.embed(stream, [value])[0]
        np.testing.assert_allclose([n.near.cosine for n in rows], np.sort(cosines)[::-1][:4], atol=1e-5)
        best = rows[0]
        assert best.near.name == f"phantom#{test[int(cosines.argmax())]}"
        np.testing.assert_allclose(best.image, images[test[int(cosines.argmax())]])
    assert not any("reading" in step.text for step in list(desk.nearest(result))[:-1])  # their vectors are there
    html = demo_view.nearest(found)
    assert html.count("<figure") == 8 and demo_view.NOT_MADE in html and "CT nearest to the given MRI T2" in html


def test_of_data_that_are_not_open_nothing_is_shown(desk, monkeypatch):
    class Closed:
        open = False

    monkeypatch.setattr(demo_near, "data_of", lambda model, spec: Closed())
    with pytest.raises(UserError, match="may not be shown"):
        last(desk.nearest(last(desk.first())))


class Held(Model):
    """A model that waits for a nod before each pass."""

    def __init__(self):
        self.params, self.defaults = {}, DEFAULTS
        self.nod, self.passes = threading.Semaphore(0), 0

    def generate(self, given, make, *, tell, watch, draws, steps, seed, **_):
        for n in range(draws):
            assert self.nod.acquire(timeout=20)
            self.passes += 1
            watch(steps, steps)
            tell(n + 1, draws)
        blank = {s: np.zeros((draws, 8, 8), np.float32) for s in make}
        return Generated(blank, {}, seed, draws=draws)

    def provenance(self, **asked):
        return dict(fingerprint="0badcafe", **asked)


@pytest.fixture
def held(tmp_path) -> tuple[Held, Desk]:
    model = Held()
    desk = Desk(Able("held", ("ct",), ("ct",), DEFAULTS, {}, 8), lambda: model, str(tmp_path))
    model.nod.release()
    last(desk.first())
    return model, desk


def until(steps, what: str) -> None:
    """Follow a request until it says so."""
    for step in steps:
        assert isinstance(step, Progress)
        if what in step.text:
            return
    raise AssertionError(f"never said {what!r}")


def test_requests_take_turns_and_can_be_cancelled(held):
    model, desk = held
    a, b, c = (desk.make(order(draws=2, seed=n), whose="abc"[n]) for n in range(3))
    until(a, "making")
    until(b, "1 before it")
    until(c, "2 before it")
    desk.cancel("b")  # while it waits
    assert not any(isinstance(step, Result) for step in b)
    until(c, "1 before it")
    model.nod.release()
    until(a, "draw 2 of 2")
    a.close()  # while it samples: the pass that runs is the last
    model.nod.release(3)
    assert last(c).rows[0].order.seed == 2
    assert model.passes == 1 + 2 + 2


def test_too_many_requests_are_refused(held, monkeypatch):
    model, desk = held
    monkeypatch.setattr(demo_desk, "MOST_WAITING", 1)
    a, b = desk.make(order()), desk.make(order())
    until(a, "making")
    until(b, "1 before it")
    with pytest.raises(UserError, match="1 requests wait already"):
        next(desk.make(order()))
    model.nod.release(2)
    last(a)
    last(b)


def test_a_model_that_cannot_be_loaded_says_so_to_whoever_asks(tmp_path):
    def broken():
        raise UserError("damaged")

    desk = Desk(Able("none", ("ct",), ("ct",), DEFAULTS, {}, 8), broken, str(tmp_path))
    for steps in (desk.first(), desk.make(order())):
        with pytest.raises(UserError, match="damaged"):
            last(steps)


@pytest.mark.parametrize(
    ("asked", "message"),
    (
        (dict(make=()), "tick at least one box"),
        (dict(given={"ct": image()}), "CT is both given and wanted"),
        (dict(given={"text": "x" * 2001}), "at most 2000 characters, found 2001"),
        (dict(draws=17), "draws: expected at most 16 on this page, found 17"),
        (dict(steps=251), "steps: expected at most 250"),
        (dict(seed=-1), "seed: expected a whole number from 0"),
        (dict(guidance=float("nan")), "guidance: expected a finite number"),
    ),
)
def test_what_may_not_be_asked_for_is_said(asked, message):
    with pytest.raises(UserError, match=message):
        demo_desk.checked(order(**asked))


# --- files that are dropped -----------------------------------------------------------------------------------------


def ramp_volume(path: Path) -> Path:
    """Head to foot in the file, 5 axial slices of the values 0 to 4 hundred from the feet up."""
    values = np.broadcast_to(np.arange(5)[::-1] * 100, (12, 10, 5)).astype(np.int16)
    affine = np.diag([2.0, 2.0, -3.0, 1.0])
    affine[:3, 3] = 5, 6, 40
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def test_a_slice_of_a_volume_is_given_and_keeps_its_place(tmp_path, desk):
    path = str(ramp_volume(tmp_path / "mr.nii.gz"))
    assert demo_desk.slices_of(path, MODALITIES["mri"]) == 5
    given = demo_desk.read(path, "mri:t2", {})
    assert given.picture.pixels.shape == (10, 12) and np.all(given.picture.pixels == 200)  # the middle one
    given = demo_desk.read(path, "mri:t2", {}, 1)
    assert np.all(given.picture.pixels == 100) and given.picture.orientation == "PL"
    assert str(tmp_path) not in given.picture.path + given.cut.source.path
    result = last(desk.make(order({"mri:t2": given})))
    with zipfile.ZipFile(result.files["nifti"]) as file:
        file.extractall(tmp_path / "out")
    (made,) = (tmp_path / "out").rglob("*.nii.gz")
    made = nibabel.load(made)
    assert made.shape == (12, 10, 1)
    np.testing.assert_allclose(made.affine[:3, 3], (5, 6, 40 - 3 * 3))


def test_counts_of_16_bits_have_the_range_of_training(tmp_path):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16
    raster.write_png(tmp_path / "a.png", Picture(pixels, (0, 65535)), {})
    path = str(tmp_path / "a.png")
    assert demo_desk.read(path, "xray", {}).picture.span == (0, 65535)
    assert demo_desk.read(path, "xray", {"xray": [0, 4095]}).picture.span == (0, 4095)
    assert demo_desk.slices_of(path, MODALITIES["xray"]) == 1


def test_wrong_files_are_named_without_their_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    save(dataset(np.zeros((8, 8), np.int16), Modality="MR"), tmp_path / "mr.dcm")
    for name, message in (("notes.txt", "of no format"), ("torn.png", "not a whole PNG"), ("mr.dcm", "taken for CT")):
        with pytest.raises(UserError, match=message) as error:
            demo_desk.read(str(tmp_path / name), "ct", {})
        assert name in str(error.value) and str(tmp_path) not in str(error.value)


def test_the_mirror_exchanges_words_and_columns():
    given = {"text": "Left mass, no RIGHT effusion, leftover .", "ct": image(1, (4, 6))}
    other = demo_desk.mirrored(order(given, ("mri",), seed=5))
    assert other.given["text"] == "Right mass, no LEFT effusion, leftover ." and other.seed == 5
    np.testing.assert_array_equal(other.given["ct"].picture.pixels, given["ct"].picture.pixels[:, ::-1])
    sagittal = Given(Picture(np.eye(4), None, orientation="FP"))
    assert not demo_desk.has_side(order({"text": "cardiomegaly .", "ct": sagittal}))
    with pytest.raises(UserError, match="nothing that is given has a side"):
        demo_desk.mirrored(order({"text": "cardiomegaly ."}))


# --- what is shown --------------------------------------------------------------------------------------------------

EVIL = '<img src=x onerror="alert(1)"> & left'


def result_of(given, samples, pairs=None, draws=1) -> Result:
    made = Generated(samples, pairs or {}, 0, notes=(EVIL,), draws=draws)
    return Result((demo_desk.Made(order(given, tuple(samples), draws=draws), made),), {}, 1.0)


def test_texts_are_escaped_wherever_they_stand():
    html = demo_view.results(result_of({"text": EVIL}, {"text": [EVIL]}))
    html += demo_view.results(result_of({"text": EVIL}, {"text": [EVIL, EVIL]}, draws=2))
    html += demo_view.problem(UserError(EVIL)) + demo_view.status(Progress(EVIL)) + demo_view.said(EVIL)
    html += demo_view.head(Able(EVIL, ("ct",), (), {}, {}, 8)) + demo_view.foot(Able(EVIL, (), (), {}, {}, 8, (EVIL,)))
    assert "<img" not in html and html.count("&lt;img src=x") >= 9


def test_every_view_says_synthetic_and_pictures_say_so_in_themselves():
    ct = np.linspace(-1000, 400, 64, dtype=np.float32).reshape(1, 8, 8)
    html = demo_view.results(result_of({}, {"ct": ct}))
    assert "generated, synthetic" in html and demo_view.WARNING in html
    for one in (demo_view.head, demo_view.foot):
        assert demo_view.WARNING in one(Able("a", ("ct",), (), {}, {}, 8))
    content = demo_view.data_uri(demo_view.levels(ct[0], (-1000.0, 400.0))).partition(",")[2]
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.text["Description"] == marks.NOTE and picture.size == (256, 256)


def test_windows_are_of_values_that_have_a_unit():
    assert demo_view.window_names(("xray", "mri:t2")) == ("Full",)
    assert demo_view.window_names(("mri", "ct")) == ("Full", "Lung", "Soft tissue", "Bone")
    ct = MODALITIES["ct"]
    values = np.array([[-2000.0, -160, 40, 240, 900]])
    np.testing.assert_array_equal(
        demo_view.levels(values, demo_view.window_of(ct, "Soft tissue")), [[0, 0, 128, 255, 255]]
    )
    assert demo_view.window_of(ct, "Full") == ct.window == demo_view.window_of(ct, "none such")
    assert demo_view.window_of(MODALITIES["mri"], "Lung") == MODALITIES["mri"].window


def test_what_was_trained_and_what_is_emergent_stands_beside_each_result():
    assert demo_view.kind_of("prompt tokens, guide tokens") == ("trained", "on pairs")
    assert demo_view.kind_of("guide tokens, registered") == ("trained", "on pairs, pixel by pixel")
    assert demo_view.kind_of("prompt pooled, guide tokens")[0] == "trained"
    assert demo_view.kind_of("prompt pooled")[0] == demo_view.kind_of("prompt pooled, guide pooled")[0] == "emergent"
    pairs = {"text -> ct": "prompt tokens", "text -> mri:t2": "prompt pooled", "ct -> mri:t2": "guide tokens"}
    made = result_of({}, {"ct": np.zeros((1, 8, 8)), "mri:t2": np.zeros((1, 8, 8))}, pairs).rows[0].made
    assert "Report → CT" in demo_view.arrows("ct", made) and "emergent" not in demo_view.arrows("ct", made)
    said = demo_view.arrows("mri:t2", made)
    assert "Report → MRI T2" in said and "emergent" in said and "CT → MRI T2" in said
    assert "from noise alone" in demo_view.arrows("xray", made)


def test_sides_are_the_patients():
    assert demo_view.ends_of(None) == ("R", "L") == demo_view.ends_of(Picture(np.eye(2), None))
    assert demo_view.ends_of(Picture(np.eye(2), None, orientation="PR")) == ("L", "R")
    assert demo_view.ends_of(Picture(np.eye(2), None, orientation="FP")) == ("A", "P")


def test_draws_come_with_mean_and_deviation():
    html = demo_view.results(result_of({}, {"ct": np.zeros((4, 8, 8), np.float32)}, draws=4))
    assert "mean of 4 draws" in html and "deviation, white 350 HU" in html and html.count("<img") == 6


# --- the verb -------------------------------------------------------------------------------------------------------


def test_without_gradio_the_verb_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--model", "nowhere"])
    assert left.value.code == 2 and "pip install 'medm2g_jax[demo]'" in capsys.readouterr().err


def test_without_a_model_in_the_box_one_has_to_be_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: True)
    monkeypatch.setattr(demo, "in_the_box", tuple)
    with pytest.raises(UserError, match="medm2g demo --model RUN"):
        demo.run(None)


# --- the page in a browser ------------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
REAL, PICTURES = os.environ.get("MEDM2G_DEMO_MODEL"), os.environ.get("MEDM2G_DEMO_PICTURES")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio (extra demo)")
needs_browser = pytest.mark.skipif(
    not all(BROWSER) or importlib.util.find_spec("selenium") is None, reason="needs chromium, chromedriver and selenium"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Painted(Model):
    """A body with a lesion on the side that the report names, or that of the image; reports say where it is."""

    tokenizers = None
    givable = ("text", "xray", "ct", "mri")

    def __init__(self):
        self.params, self.defaults = {}, DEFAULTS
        self.meta = dict(shared=results.shared(micro("ct_mri")), stage="painted", ranges={})
        self.nod = threading.Event()
        self.nod.set()

    def generate(self, given, make, *, rows, tell, watch, draws, steps, seed, **_):
        for n in range(draws):
            for step in range(steps):
                assert self.nod.wait(60)
                watch(step + 1, steps)
            tell(n + 1, draws)
        left = any("left" in v if isinstance(v, str) else self.is_left(v.pixels) for v in given.values())
        samples = {s: self.paint(MODALITIES[s.partition(":")[0]], left, draws, seed) for s in make}
        pairs = {f"{a} -> {b}": "prompt tokens, guide tokens" for a in given for b in make}
        return Generated(samples, pairs, seed, draws=draws)

    def ids(self, texts):
        return {"clip": np.array([["left" in text] for text in texts])}

    def embedded(self, stream, x):
        """Left, right, and a little of what else there is: texts and images of one side lie together."""
        left = x["clip"][:, 0] if isinstance(x, dict) else np.array([self.is_left(one[..., 0]) for one in x])
        return np.stack([left, ~left, np.full(len(left), 0.1)], axis=1).astype(np.float32) / np.float32(1.01**0.5)

    @staticmethod
    def is_left(pixels) -> bool:
        """Radiological convention: the patient's left is on the right."""
        middle = pixels.shape[1] // 2
        return float(pixels[:, middle:].mean()) > float(pixels[:, :middle].mean())

    @staticmethod
    def paint(modality, left, draws, seed):
        if not modality.is_image:
            return [f"mass in the {'left' if left else 'right'} lung ."] * draws
        y, x = np.mgrid[-1:1:32j, -1:1:32j]
        body = np.where(x**2 + 2 * y**2 < 0.8, 0.2, -0.9)
        image = np.where((x - (0.45 if left else -0.45)) ** 2 + y**2 < 0.04, 0.9, body)
        noise = np.random.default_rng(seed).normal(0, 0.02, (draws, 32, 32))
        return np.float32(modality.in_unit((image + noise).clip(-1, 1)))

    def provenance(self, **asked):
        return dict(fingerprint="0badcafe", **asked)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of a desk, its model, and its address."""
    folder = str(tmp_path_factory.mktemp("page"))
    os.environ |= demo.ENVIRONMENT | {"GRADIO_TEMP_DIR": folder}
    # gradio looks whether a function is a generator, and one with checked annotations (conftest.py) is none to it.
    finders = list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    importlib.import_module("medm2g_jax.demo_page")
    sys.meta_path[:] = finders
    if REAL:
        model, able = load(REAL), demo_desk.able(REAL)
    else:
        everything = ("text", "xray", "ct", "mri")
        model, able = Painted(), Able("painted", everything, everything, DEFAULTS, {}, 32, ("synthetic",))
    desk = Desk(able, lambda: model, folder)
    blocks = demo.serve(desk)
    yield model, blocks.local_url
    blocks.close(verbose=False)


@needs_gradio
def test_the_server_answers_its_own_machine_alone_and_forbids_what_comes_from_elsewhere(served):
    url = served[1]
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["content-security-policy"] == demo.POLICY
        content = answer.read().decode()
    assert "fonts.googleapis" not in content
    for path, headers in (("", {"Host": "evil.example"}), ("openapi.json", {}), ("docs", {}), ("gradio_api/mcp/", {})):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(url + path, headers=headers))
        assert error.value.code in (400, 404), path
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


class Tab:
    """A page in the browser, and what a user does there."""

    def __init__(self, driver, url: str):
        driver.switch_to.new_window("tab")
        self.driver, self.handle = driver, driver.current_window_handle
        driver.get(url)

    def all(self, selector: str) -> list:
        self.driver.switch_to.window(self.handle)
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.until(lambda: next(iter(self.all(selector)), None), selector)

    def until(self, true, what: str = "", seconds: float = 120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except Exception as error:  # what was found may just be drawn anew
                if "Reference" not in type(error).__name__:
                    raise
            time.sleep(0.1)
        raise AssertionError(f"never came: {what or true}; the page says {self.text('body')[:2000]}")

    def text(self, selector: str) -> str:
        return " ".join(x.text for x in self.all(selector))

    def says(self, what: str, selector: str = "#status") -> None:
        self.until(lambda: what in self.text(selector), f"{what!r} in {selector}")

    def done(self) -> None:
        self.until(lambda: "done" in self.text("#status") and self.one("#make").is_enabled(), "the end of it")

    def write(self, text: str) -> None:
        self.until(lambda: self.one("#text-text textarea").is_enabled())
        area = self.one("#text-text textarea")
        area.clear()
        area.send_keys(text)

    def want(self, *streams: str) -> None:
        for box in self.all("#wanted input"):
            if box.is_selected() != (box.get_attribute("name") in streams):
                box.click()

    def make(self) -> None:
        self.click("#make")

    def click(self, selector: str) -> None:
        self.until(lambda: self.one(selector).is_enabled(), f"{selector} enabled")
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", self.one(selector)
        )

    def drop(self, name: str, path) -> None:
        self.one(f"#drop-{name} input[type=file]").send_keys(str(path))

    def picture(self, stream: str, row: int = 0) -> np.ndarray:
        """A generated image, as the page shows it."""
        source = self.all(f'[data-stream="{stream}"] .m2g-tile img')[row].get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))), float)

    def close(self) -> None:
        self.driver.switch_to.window(self.handle)
        self.driver.close()
        self.driver.switch_to.window(self.driver.window_handles[0])


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    # The driver that is here is named: selenium looks for none, loads none down, and counts nobody.
    os.environ |= dict(SE_OFFLINE="true", SE_AVOID_STATS="true", SE_AVOID_BROWSER_DOWNLOAD="true")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for flag in (*FLAGS, "--window-size=1440,1000", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(BROWSER[1])) as driver:
        yield driver


@pytest.fixture
def tab(served, driver):
    tab = Tab(driver, served[1])
    tab.until(lambda: tab.all(".m2g-card"), "the first images, made unasked", seconds=600)
    tab.done()
    yield tab
    tab.close()


@needs_gradio
@needs_browser
def test_type_make_look_and_swap_sides(served, tab, tmp_path):
    assert "Not for clinical use" in tab.text(".m2g-warning")
    tab.write("large mass in the right upper lung . <b>&")
    tab.want("ct", "mri:t2", "xray")
    tab.make()
    tab.says("right upper lung . <b>&", "#results h2")
    tab.done()
    assert len(tab.all(".m2g-card")) == 3 and "trained" in tab.text("#results")
    assert {x.text for x in tab.all(".m2g-tile .m2g-left")} == {"R"}
    right = tab.picture("ct")
    full = right.copy()
    assert not Painted.is_left(right)

    tab.click("#swap")
    tab.says("Left and right exchanged", "#results")
    tab.done()
    assert "left upper lung" in tab.text("#results") and len(tab.all(".m2g-card")) == 6
    np.testing.assert_array_equal(tab.picture("ct", 0), full)
    assert Painted.is_left(tab.picture("ct", 1))

    (lung,) = [x for x in tab.all("#window label") if x.text == "Lung"]
    lung.click()
    tab.until(lambda: "-1350 to 150 HU" in tab.text("#results"), "the lung window")
    assert not np.array_equal(tab.picture("ct", 0), full)
    tab.driver.execute_cdp_cmd("Browser.setDownloadBehavior", dict(behavior="allow", downloadPath=str(tmp_path)))
    for form, name, begin in (("png", "*_png.zip", b"PK"), ("dicom", "*_dicom.zip", b"PK"), ("json", "*.json", b"[")):
        tab.click(f"#download-{form}")
        tab.until(lambda name=name: list(tmp_path.glob(name)), name)
        assert next(tmp_path.glob(name)).read_bytes().startswith(begin)
    assert not tab.all("#download-nifti")


@needs_gradio
@needs_browser
def test_what_lies_nearest_stands_below_until_something_else_is_made(served, tab):
    model = served[0]
    tab.write("mass in the left lung .")
    tab.want("ct")
    tab.make()
    tab.says("mass in the left lung", "#results h2")
    tab.done()
    tab.click("#near")
    tab.until(lambda: len(tab.all('#neighbours [data-near="ct"]')) == 8, "four for the report, four for the CT", 600)
    assert len(tab.all("#neighbours figure")) == 16 and all(x.text for x in tab.all("#neighbours figcaption"))
    assert "CT nearest to the given report" in tab.text("#neighbours h2")
    assert "not made by the model" in tab.text("#neighbours")
    if not REAL:
        shown = tab.all('#neighbours [data-near="ct"] img')[0].get_attribute("src")
        assert model.is_left(np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))), float))
    tab.make()
    tab.until(lambda: not tab.all("#neighbours figure"), "what was found of something else is gone")
    tab.done()


@needs_gradio
@needs_browser
def test_drop_an_image_read_the_report_and_a_wrong_file(served, tab, tmp_path):
    ct = Painted.paint(MODALITIES["ct"], True, 1, 0)[0]
    save(dataset(np.int16(ct), RescaleSlope=1, RescaleIntercept=0), tmp_path / "ct.dcm")
    tab.drop("ct", tmp_path / "ct.dcm")
    tab.one("#previews img")
    tab.until(lambda: not tab.one('#wanted input[name="ct"]').is_selected(), "what is given is not wanted")
    tab.want("text")
    tab.until(lambda: not tab.one("#text-text textarea").is_enabled(), "a wanted text is not given")
    tab.make()
    tab.until(lambda: tab.all('[data-stream="text"] .m2g-report'), "the report")
    tab.done()
    assert REAL or "left lung" in tab.text('[data-stream="text"] .m2g-report')
    assert tab.all('[data-stream="ct"]') and SECRET not in tab.driver.page_source

    wrong = tmp_path / "notes.txt"
    wrong.write_text("no image")
    tab.drop("xray", wrong)
    tab.says("notes.txt: of no format that is read here", "#previews [role=alert]")
    tab.make()
    tab.says("notes.txt: of no format that is read here", "#status [role=alert]")
    assert str(tmp_path) not in tab.driver.page_source and "medm2g-demo" not in tab.text("body")
    assert tab.all('[data-stream="text"] .m2g-report')  # what was there stays


@needs_gradio
@needs_browser
@pytest.mark.skipif(bool(REAL), reason="the model has to be held")
def test_two_tabs_take_turns_and_cancel(served, driver, tab):
    model, url = served
    other = Tab(driver, url)
    other.until(lambda: other.all(".m2g-card"))
    other.done()
    model.nod.clear()
    try:
        tab.make()
        tab.says("making")
        other.write("mass in the right lung .")
        other.make()
        other.says("waiting its turn, 1 before it")
        other.click("#cancel")
        other.says("cancelled")
        assert other.one("#make").is_enabled()
        other.make()
        other.says("1 before it")
    finally:
        model.nod.set()
    tab.done()
    other.done()
    assert "right lung" in other.text("#results h2") and "right lung" not in tab.text("#results h2")
    other.close()


@needs_gradio
@needs_browser
def test_the_page_loads_nothing_from_elsewhere(served, driver, tab):
    seen = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in seen if m["method"] == "Network.requestWillBeSent"]
    own = (served[1], "data:", "blob:", "chrome:", "chrome-untrusted:")  # chrome: the tab that is there before the page
    assert any(url.startswith(served[1]) for url in urls) and not [url for url in urls if not url.startswith(own)]
    assert not [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@needs_gradio
@needs_browser
@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (1280, 390))
def test_nothing_is_wider_than_the_window(served, driver, tab, width, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=False)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.refresh()
    tab.until(lambda: tab.all(".m2g-card"), "the first images")
    tab.done()
    tab.click("#swap")
    tab.says("Left and right exchanged", "#results")
    tab.done()
    keep(driver, size, f"demo-{width}-{scheme}")
    tab.click("#near")
    tab.until(lambda: tab.all("#neighbours figure"), "what lies nearest", 600)
    tab.done()
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert bool(tab.all("body.dark")) == (scheme == "dark")
    keep(driver, size, f"demo-{width}-{scheme}-near")


def keep(driver, size: dict, name: str) -> None:
    """A picture of the whole page, where somebody wants it."""
    if not PICTURES:
        return
    high = driver.execute_script("return document.documentElement.scrollHeight")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": min(high, 4000)})
    time.sleep(1)
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    shot.quantize(64).save(f"{PICTURES}/{name}.png", optimize=True)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
