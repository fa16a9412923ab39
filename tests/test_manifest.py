import io
import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import dataset, placed, save
from PIL import Image

from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.open import open_source
from medm2g_jax.data.pipeline import Rows, batches, fixed, matching
from medm2g_jax.data.source import Source, is_open, stream_of
from medm2g_jax.errors import UserError

RNG = np.random.default_rng(0)


def picture(folder: Path, name: str, value: int, shape=(16, 12)) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(folder / name)
    return name


def write(folder: Path, rows: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return folder


def row(number: int, **fields) -> dict:
    return {"id": f"r{number}", "subject": f"s{number}", "split": "train", "license": "CC0", **fields}


@pytest.fixture
def folder(tmp_path):
    images = {key: picture(tmp_path, f"{key}.png", 10 * i) for i, key in enumerate(("ct", "mri", "mri_t1", "mri_t1gd"))}
    return write(
        tmp_path,
        [
            row(0, images=images, text=" clear lungs ", text_origin="report"),
            row(
                1, split="val", images={"xray": picture(tmp_path, "x.JPG", 51)}, text="made up", text_origin="template"
            ),
            row(2, text="only text", license="unclear: no CC BY"),
        ],
    )


def test_records_and_values(folder):
    source = Manifest(folder, 16)
    assert isinstance(source, Source) and source.name == folder.name
    assert [r.streams for r in source.records] == [
        ("ct", "mri", "mri:t1", "mri:t1ce", "text"),
        ("xray",),
        ("text",),
    ]
    assert [r.split for r in source.records] == ["train", "val", "train"]
    assert source.read(0, "text", RNG) == "clear lungs"
    image = source.read(0, "mri:t1ce", RNG)
    assert image.shape == (16, 16, 1) and image.dtype == np.float32
    np.testing.assert_allclose(image[:, 2:14, 0][:, 2:10], 30 / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(image[:, :2], -1)  # 16 x 12: padded left and right with black
    np.testing.assert_allclose(source.read(1, "xray", RNG)[8, 8, 0], -0.6, atol=0.01)
    assert source.licences == {"CC0": 2, "unclear: no CC BY": 1} and not source.open
    assert Manifest(folder, 16, template_text=True).records[1].streams == ("xray", "text")


def test_a_row_says_which_images_share_a_grid(tmp_path):
    images = {key: picture(tmp_path, f"{key}.png", 3) for key in ("ct", "mri_t1", "mri_t1gd", "pet")}
    said = ({}, {"registered": False}, {"registered": True}, {"registered": ["ct", "mri_t1gd", "pet"]})
    write(tmp_path, [row(i, images=images, text="t", **fields) for i, fields in enumerate(said)])
    whole, some = ("ct", "mri:t1", "mri:t1ce"), ("ct", "mri:t1ce")
    assert [r.grid for r in Manifest(tmp_path, 8).records] == [(), (), whole, some]
    assert [r.grid for r in Manifest(tmp_path, 8, registered=True).records] == [whole, (), whole, some]
    before = contents(Manifest(tmp_path, 8))
    write(tmp_path, [row(i, images=images, text="t", **fields) for i, fields in enumerate(reversed(said))])
    assert contents(Manifest(tmp_path, 8)).fingerprint != before.fingerprint


def test_decoded_images_are_remembered(folder):
    source = Manifest(folder, 16)
    before = source.read(0, "ct", RNG)
    (folder / "ct.png").unlink()
    after = source.read(0, "ct", RNG)
    np.testing.assert_array_equal(before, after)
    before[:] = 5  # the caller's copy
    np.testing.assert_array_equal(source.read(0, "ct", RNG), after)


def test_open_means_every_licence_is(folder):
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert Manifest(write(folder, rows[:2]), 8).open
    for text in ("CC BY 4.0", "CC-BY-SA-3.0", "cc0", "CC BY-NC-SA (version not stated)", "Apache-2.0 (code)", "MIT"):
        assert is_open(text)
    for text in ("synthetic", "Public domain", "BSD-2-Clause (repository)"):
        assert is_open(text)
    for text in ("", "unclear: no licence", "not MIT", "PhysioNet Credentialed", "mitre"):
        assert not is_open(text)


def test_keys_name_streams():
    assert stream_of("mri_t2") == "mri:t2" and stream_of("mri_t1gd") == "mri:t1ce" == stream_of("mri_t1ce")
    assert stream_of("ct") == "ct" and stream_of("text") == "text"
    assert stream_of("mra") is None and stream_of("mri_dwi") is None and stream_of("mri_t1_gd") is None


def test_what_is_left_out_is_counted_in_one_line(folder, caplog):
    files = {"mra": "a.nii.gz", "ct": "b.bmp", "xray": picture(folder, "x.png", 1)}
    write(
        folder, [row(0, images=files), row(1, images={"ct": "dicom_folder"}), row(2, text="t", text_origin="template")]
    )
    with caplog.at_level(logging.WARNING):
        source = Manifest(folder, 8)
    assert [r.streams for r in source.records] == [("xray",)]
    (line,) = [r.getMessage() for r in caplog.records]
    for part in ("1 of 3 rows", "2 images not PNG or JPEG or TIFF", "1 of unknown key 'mra'", "1 template texts"):
        assert part in line
    write(folder, [row(0, images={"mra": "a.png"}), row(1, images={"ct": "b.bmp"})])
    with pytest.raises(UserError, match="2 rows hold nothing that can be used .*unknown key 'mra'"):
        Manifest(folder, 8)


def test_several_folders_and_ids_that_meet(tmp_path):
    for name, subject in (("a", "p"), ("b", "q")):
        rows = [
            row(0, subject=subject, images={"ct": picture(tmp_path / name, "0.png", 1)}),
            {**row(1, subject=subject, text="t"), "id": f"only in {name}"},
        ]
        write(tmp_path / name, rows)
    source = Manifest(tmp_path, 8)
    assert [r.id for r in source.records] == ["a/r0", "only in a", "b/r0", "only in b"]


BAD = [  # rows, and what the error says
    ([], "manifest.jsonl: empty"),
    (['{"id": "a", "subject": "secret words'], r"manifest.jsonl:1: not JSON \(Unterminated string"),
    ([row(0, text="t"), "[1]"], "manifest.jsonl:2: expected a JSON object, found list"),
    ([{"id": "a", "split": "train"}], "manifest.jsonl:1: no 'subject'"),
    ([row(0, split="dev", text="t")], "split 'dev'; expected one of train, val, test"),
    ([row(0, images=["a.png"])], "'images' must map"),
    ([row(0, text=["a"])], "'text' must be a string, found list"),
    ([row(0, text="t"), row(0, text="t")], "manifest.jsonl:2: id 'r0' is taken by line 1"),
    ([row(0, images={"ct": "gone.png"})], "manifest.jsonl:1: row 'r0': no file .*gone.png"),
    ([row(0, images={"mri_t1gd": "x.png", "mri_t1ce": "x.png"})], "two images for stream 'mri:t1ce'"),
    (
        [row(0, images={"ct": "gone.png", "mri": "too.png"})],
        "row 'r0': no file .*gone.png; .*: row 'r0': no file .*too.png",
    ),
    ([row(0, text="t", subject=float("nan"))], "manifest.jsonl:1: 'subject': .*found a number that is not whole"),
    ([row(0, text="t", subject=True)], "'subject': expected a string or a whole number, found a bool"),
    ([row(0, text="t", subject=["Jane"])], "'subject': .*found a list"),
    ([row(0, text="t", subject={"name": "Jane"})], "'subject': .*found a dict"),
    ([row(0, text="t", subject="  ")], "'subject': .*found nothing"),
    ([row(0, text="t", subject="Jane\ud800")], "'subject': .*found half a character"),
    ([row(0, text="t", id=1.5)], "'id': expected a string or a whole number, found a number that is not whole"),
    ([row(0, text="t", id=1), row(1, text="t", id="1.0")], "manifest.jsonl:2: id '1' is taken by line 1"),
    ([row(0, images={"ct": "\udcff.png"})], "manifest.jsonl:1: 'images' holds half a character"),
    ([row(0, images={"ct": "x.png"}, registered="yes")], ":1: 'registered' must be true, false or a list"),
    ([row(0, images={"ct": "x.png"}, registered=1)], "manifest.jsonl:1: 'registered' must be .*found int"),
    ([row(0, images={"ct": "x.png"}, registered=["mri"])], "manifest.jsonl:1: 'registered' names 'mri', .* no key of"),
    ([row(0, images={"ct": "x.png"}, registered=[1])], "manifest.jsonl:1: 'registered' names a int, .* no key of"),
    (["[" * 100_000], r"manifest.jsonl:1: not JSON that can be read \(RecursionError\)"),
    (['{"id": ' + "1" * 5000 + "}"], r"manifest.jsonl:1: not JSON that can be read \(ValueError\)"),
    (
        [row(i, subject=f"Jane {i // 2}", split=("train", "test")[i % 2], text="t") for i in range(4)],
        "2 subjects are in",
    ),
]


@pytest.mark.parametrize("rows, message", BAD)
def test_errors_name_file_and_line_and_no_person(tmp_path, rows, message):
    picture(tmp_path, "x.png", 3)
    with pytest.raises(UserError, match=message) as error:
        Manifest(write(tmp_path, rows), 8)
    assert "secret" not in str(error.value) and "Jane" not in str(error.value)
    assert "\n" not in str(error.value)


def test_no_manifest_and_no_utf8(tmp_path):
    with pytest.raises(UserError, match="no manifest.jsonl there"):
        Manifest(tmp_path / "nowhere", 8)
    (tmp_path / "manifest.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        Manifest(tmp_path, 8)


def test_a_truncated_image_names_row_and_file(folder):
    file = folder / "ct.png"
    file.write_bytes(file.read_bytes()[:42])
    source = Manifest(folder, 8)  # opening only looks whether it is there
    with pytest.raises(UserError, match="row 'r0': .*ct.png"):
        source.read(0, "ct", RNG)


def test_texts_needed_and_only_templates_there(folder):
    write(folder, [row(0, images={"ct": "ct.png"}, text="made up", text_origin="template")])
    with pytest.raises(UserError, match="text and ct; its 1 records hold ct 1"):
        matching(Manifest(folder, 8), Rows(require=("text", "ct")), "train")
    assert list(matching(Manifest(folder, 8, template_text=True), Rows(require=("text", "ct")), "train")) == [0]


def test_a_manifest_feeds_the_pipeline(folder):
    source = Manifest(folder, 8)
    got = fixed(source, Rows(require=("ct",), prompts=("mri",)), "train", 4, 0, size=8)
    assert got["ct"].shape == got["about"]["prompt"]["mri"].shape == (1, 8, 8, 1)
    stream = batches(source, Rows(any_of=("ct", "xray", "mri"), merge="image"), "train", 4, 0, size=8)
    assert next(stream)["image"].shape == (4, 8, 8, 1)
    stream.close()


def test_open_source_knows_three_forms(folder):
    options = {"size": 8, "seed": 0, "pairs": (), "template_text": True, "phantom": {}}
    source = open_source(f"manifest:{folder}", **options)
    assert source.name == folder.name and source.records[1].streams == ("xray", "text")
    small = options | {"pairs": (("text", "ct"),), "phantom": {"train": 3, "val": 1, "test": 1}}
    source = open_source("phantom", **small)
    assert isinstance(source, Source) and source.open and source.records[0].streams == ("text", "ct")
    for spec in ("manifest", "manifest:", "hf:x", "phantom:x", ""):
        with pytest.raises(UserError, match="expected phantom, manifest:PATH or tfds:NAME"):
            open_source(spec, **options)


@pytest.mark.parametrize("other", [1.0, "1", " 1 ", "1.0", "1\u00a0"])
def test_one_person_written_in_two_ways_is_one_person(tmp_path, other):
    rows = [row(0, subject=1, text="t"), row(1, subject=other, split="test", text="t")]
    with pytest.raises(UserError, match="1 subjects are in more than one split"):
        Manifest(write(tmp_path, rows), 8)


def test_what_differs_stays_apart(tmp_path):
    subjects = [1, 2, "01", "a", "A", "1.5", -1, 10**30]
    source = Manifest(write(tmp_path, [row(i, subject=s, text="t") for i, s in enumerate(subjects)]), 8)
    assert [r.subject for r in source.records] == ["1", "2", "01", "a", "A", "1.5", "-1", str(10**30)]


def test_half_characters_in_texts_are_replaced_and_counted(tmp_path, caplog):
    rows = [row(0, text="a \ud800 b \udcff", license="CC0 \ud800"), row(1, text="whole \U0001f642")]
    assert "\\ud83d" in json.dumps(rows[1])  # a pair is how JSON spells a whole one
    with caplog.at_level(logging.WARNING):
        source = Manifest(write(tmp_path, rows), 8)
    assert source.read(0, "text", RNG) == "a \ufffd b \ufffd" and source.read(1, "text", RNG) == "whole \U0001f642"
    (line,) = [r.getMessage() for r in caplog.records]
    assert "2 half characters" in line and "U+FFFD" in line
    assert source.licences == {"CC0 \ufffd": 1, "CC0": 1}


def deep(folder: Path, name: str, values: np.ndarray) -> str:
    Image.fromarray(values.astype(np.uint16)).save(folder / name)
    return name


def test_12_bits_in_16_count_over_12_bits_and_all_levels_are_kept(tmp_path, caplog):
    """And never by one image's own greatest value: the same value is the same grey in each."""
    levels = np.arange(4096).reshape(64, 64)
    rows = [
        row(0, images={"xray": deep(tmp_path, "a.png", levels), "ct": deep(tmp_path, "ct.png", levels // 4)}),
        row(1, split="test", images={"xray": deep(tmp_path, "b.png", levels // 2)}),
        row(2, images={"xray": picture(tmp_path, "8.png", 51, (64, 64))}),
    ]
    source = Manifest(write(tmp_path, rows), 64)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # read, and remembered
            np.testing.assert_allclose(source.read(0, "xray", RNG)[..., 0], levels / 2047.5 - 1, atol=3e-5)
            np.testing.assert_allclose(source.read(1, "xray", RNG)[..., 0], levels // 2 / 2047.5 - 1, atol=3e-5)
            np.testing.assert_allclose(source.read(0, "ct", RNG)[..., 0], levels // 4 / 511.5 - 1, atol=3e-5)
            np.testing.assert_allclose(source.read(2, "xray", RNG), -0.6, atol=1e-6)
            assert len(np.unique(source.read(0, "xray", RNG))) == 4096
    (line,) = [r.getMessage() for r in caplog.records]
    for part in ("ct 0 to 1023", "xray 0 to 4095", "the greatest value is 4095", "--config.data.range=ct=LOW:HIGH"):
        assert part in line
    assert source.ranges == {"ct": (0, 1023), "xray": (0, 4095)}


def test_a_range_that_the_user_says_stands(tmp_path):
    images = {
        "mri_t2": deep(tmp_path, "a.png", np.full((8, 8), 100)),
        "ct": deep(tmp_path, "b.png", np.full((8, 8), 5)),
    }
    write(tmp_path, [row(0, images=images)])
    source = Manifest(tmp_path, 8, ranges={"mri": (0, 200), "ct": (0, 10)})
    np.testing.assert_allclose([source.read(0, s, RNG) for s in ("mri:t2", "ct")], 0, atol=2e-5)
    assert source.ranges == {"mri:t2": (0, 200), "ct": (0, 10)}
    with pytest.raises(UserError, match="data range of 'xray': .* has images of ct, mri:t2"):
        Manifest(tmp_path, 8, ranges={"xray": (0, 1)}).check()


def test_memory_keeps_as_many_bits_as_the_file_has(tmp_path):
    images = {"xray": deep(tmp_path, "a.png", np.eye(8) * 4095), "ct": picture(tmp_path, "b.png", 3)}
    source = Manifest(write(tmp_path, [row(0, images=images)]), 8)
    source.read(0, "xray", RNG), source.read(0, "ct", RNG)
    assert sorted(str(kept.dtype) for kept in source._memory.values()) == ["uint16", "uint8"]


def test_all_broken_images_are_listed_before_training(tmp_path):
    for i in range(6):
        picture(tmp_path, f"{i}.png", 10 * i)
    write(tmp_path, [row(i, images={"ct": f"{i}.png"}) for i in range(6)])
    for i in (1, 4):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:-20])
    source = Manifest(tmp_path, 8)
    with pytest.raises(UserError, match=r"2 of 6 images cannot be read.*row 'r1': .*1\.png.*row 'r4': .*4\.png"):
        source.check(tmp_path / "cache.json")
    for i in (1, 4):
        picture(tmp_path, f"{i}.png", 1)
    Manifest(tmp_path, 8).check(tmp_path / "cache.json")


def test_the_limit_of_pixels_names_row_and_file(tmp_path):
    write(tmp_path, [row(0, images={"ct": picture(tmp_path, "a.png", 1, (20, 30))})])
    with pytest.raises(UserError, match="row 'r0': .*a.png: 30 x 20 pixels, more than the 599"):
        Manifest(tmp_path, 8, most_pixels=599).read(0, "ct", RNG)


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data here")
def test_real_sets_open_and_every_image_is_read(tmp_path):
    held = {}
    for manifest in sorted(SHARED.glob("*/manifest.jsonl")):
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        if any("format" in line for line in lines):  # volumes, of formats to come
            continue
        source = Manifest(manifest.parent, 16)
        source.check(tmp_path / "cache.json", say=lambda line: pytest.fail(line))  # all are of 8 bits
        held[source.name] = len(source.records)
        image = source.read(0, next(s for s in source.records[0].streams if s != "text"), RNG)
        assert image.shape == (16, 16, 1) and image.min() < image.max()
    assert held == {"ct_mri": 129, "ct_text": 138, "mri_contrasts": 103, "xray_text": 139}


# --- tfds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Nine examples on disk; the builder's class is forgotten, so that the set is read from its files alone."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "ct": tfds.features.Image(shape=(None, None, 1)),
                "mri_t2": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
                "other": tfds.features.Tensor(shape=(8, 8), dtype=np.uint16, optional=True),
                "text": tfds.features.Text(),
                "subject": tfds.features.Text(),
                "hospital": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 6), "validation": self._generate_examples(6, 9)}

        def _generate_examples(self, begin, end):
            for i in range(begin, end):
                yield (
                    i,
                    {
                        "ct": Image.fromarray(np.full((8, 8), 20 * i, np.uint8)),
                        "mri_t2": np.full((8, 8), i / 10, np.float32),
                        "other": None if i % 2 else np.full((8, 8), 1000 * i, np.uint16),
                        "text": "" if i == 3 else f"text {i}",
                        "subject": f"subject {i // 2}",
                        "hospital": "one",
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    Small(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_gives_back_what_was_stored(prepared):
    from medm2g_jax.data.tfds import Tfds

    source = Tfds("small", 8, data_dir=prepared)
    assert isinstance(source, Source) and not source.open
    assert sorted(r.split for r in source.records) == ["train"] * 6 + ["val"] * 3
    for index, record in enumerate(source.records):
        number = round(float(source.read(index, "mri:t2", RNG)[0, 0, 0]) * 10)
        np.testing.assert_allclose(source.read(index, "ct", RNG), 20 * number / 127.5 - 1, atol=1e-6)
        assert record.subject == f"subject {number // 2}"
        assert ("text" in record.streams) == (number != 3)
        assert number == 3 or source.read(index, "text", RNG) == f"text {number}"
    assert not any(r.grid for r in source.records)
    said = Tfds("small", 8, data_dir=prepared, registered=True).records
    assert all(set(r.grid) == {s for s in r.streams if s != "text"} for r in said)
    stream = batches(source, Rows(require=("ct", "mri")), "train", 6, 0, size=8)
    got = next(stream)
    stream.close()
    assert sorted(np.round(got["mri"][:, 0, 0, 0] * 10)) == list(range(6))
    assert (got["about"]["stream"]["mri"] == 2).all()


def test_tfds_with_a_map_of_features(prepared):
    from medm2g_jax.data.tfds import Tfds

    source = Tfds("small", 8, {"other": "xray"}, {"validation": "test"}, prepared)
    assert [(r.split, r.streams) for r in source.records] == [("test", ("xray",))] * 2  # 6 and 8; 7 has none
    values = sorted(float(source.read(i, "xray", RNG)[0, 0, 0]) for i in range(2))
    # 13 bits hold the greatest value of the set, 8000.
    np.testing.assert_allclose(values, [6000 / 4095.5 - 1, 8000 / 4095.5 - 1], atol=1e-6)
    assert len({r.subject for r in source.records}) == 2


def test_tfds_errors(prepared):
    from medm2g_jax.data.tfds import Tfds

    with pytest.raises(UserError, match="tfds:nope: Dataset nope not found"):
        Tfds("nope", 8, data_dir=prepared)
    for wrong in ({"image": "ct"}, {"ct": "pet"}, {"subject": "subject"}):
        with pytest.raises(UserError, match="its features are ct, hospital, mri_t2, other, subject, text"):
            Tfds("small", 8, wrong, data_dir=prepared)
    with pytest.raises(UserError, match="none of its splits"):
        Tfds("small", 8, splits={"dev": "val"}, data_dir=prepared)
    with pytest.raises(UserError, match="not prepared"):
        Tfds("mnist", 8, {"image": "xray"}, data_dir=prepared)
    with pytest.raises(UserError, match=r"1 subjects are in .* train at example train/0 and val at example valid"):
        Tfds("small", 8, {"ct": "ct", "hospital": "subject"}, data_dir=prepared)


def jpeg(image: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Turned JPEGs, 12-bit X-rays, texts in Latin-1, subjects as numbers."""
    import tensorflow_datasets as tfds

    class Awkward(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "ct": tfds.features.Image(shape=(None, None, 1)),
                "xray": tfds.features.Tensor(shape=(16, 16, 1), dtype=np.uint16),
                "text": tfds.features.Text(),
                "subject": tfds.features.Scalar(np.float32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            half = np.zeros((16, 16), np.uint8)
            half[:, :8] = 255
            for i, orientation in enumerate((1, 2, 6)):
                levels = np.arange(256).reshape(16, 16, 1) * (16 if i else 1)
                yield (
                    i,
                    {
                        "ct": io.BytesIO(jpeg(half, orientation)),
                        "xray": levels.astype(np.uint16),
                        "text": b"d\xe9j\xe0 vu" if i else "whole",
                        "subject": i,
                    },
                )

    folder = tmp_path_factory.mktemp("awkward")
    Awkward(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_goes_the_way_of_all_files(awkward, caplog, tmp_path):
    from medm2g_jax.data.tfds import Tfds

    with caplog.at_level(logging.WARNING):
        source = Tfds("awkward", 16, data_dir=awkward)
    assert any("4 bytes of texts that are no UTF-8 became U+FFFD" in r.getMessage() for r in caplog.records)
    said = []
    source.check(tmp_path / "cache.json", said.append)
    assert len(said) == 1 and "xray 0 to 4095 (the greatest value is 4080)" in said[0]
    bright = {}
    for index, record in enumerate(source.records):
        number = int(record.subject)
        ct = source.read(index, "ct", RNG)[..., 0]
        bright[number] = ct[:, :8].mean() > 0.8, ct[:8].mean() > 0.8, ct[:, 8:].mean() > 0.8
        levels = np.arange(256).reshape(16, 16) * (16 if number else 1)
        np.testing.assert_allclose(source.read(index, "xray", RNG)[..., 0], levels / 2047.5 - 1, atol=1e-6)
        assert source.read(index, "text", RNG) == ("d\ufffdj\ufffd vu" if number else "whole")
    assert bright == {0: (True, False, False), 1: (False, False, True), 2: (False, True, False)}  # left, right, top
    again = Tfds("awkward", 16, data_dir=awkward)
    again._decode["xray"] = None  # nothing is decoded that the cache knows
    again.check(tmp_path / "cache.json", said.append)
    assert again.ranges == source.ranges == {"xray": (0, 4095)}


def test_tfds_lists_all_broken_images(awkward):
    from medm2g_jax.data.tfds import Tfds

    with pytest.raises(UserError, match=r"awkward: 3 of 6 images cannot be read.*example train/0, ct: .*train/2, ct: "):
        Tfds("awkward", 16, data_dir=awkward, most_pixels=255).check()


def test_slices_in_their_units_beside_pictures(tmp_path):
    """DICOM and NIfTI of one slice: HU through the window, a scanner's signal over its own range; volumes are named."""
    hu = np.array([[-1000, -300], [400, 50]], np.int16)
    save(dataset(hu, **placed(np.eye(4), 0)), tmp_path / "a.dcm")
    signal = np.array([[0, 500], [1000, 2000]], np.uint16)
    nibabel.save(nibabel.Nifti1Image(signal.T[::-1, ::-1, None], np.eye(4)), tmp_path / "b.nii.gz")
    write(tmp_path, [row(0, images={"ct": "a.dcm", "mri": "b.nii.gz"})])
    source = Manifest(tmp_path, 2)
    source.check()
    np.testing.assert_allclose(source.read(0, "ct", RNG)[..., 0], [[-1, 0], [1, 0.5]], atol=1e-4)
    top = np.percentile(signal, 99.5)
    np.testing.assert_allclose(source.read(0, "mri", RNG)[..., 0], np.minimum(signal / top, 1) * 2 - 1, atol=1e-4)
    assert source.ranges == {}  # 16 bits of HU or of signal have no range over the set
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "v.nii")
    write(tmp_path, [row(0, images={"ct": "v.nii"}), row(1, images={"mri": "a.dcm"})])
    with pytest.raises(UserError, match="v.nii: a volume .5 axial.*formats.pictures.*says it is CT"):
        Manifest(tmp_path, 2).check()
