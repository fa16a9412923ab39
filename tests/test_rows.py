"""Rows of an evaluation are kept as they come, taken up by the same one, and refused to another."""

import dataclasses
import json

import pytest
from etils import epath

from medm2g_jax import cli
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import measure
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.rows import Against, Rows, figures_in

ABOUT = dict(task="mine", model="abc", seed=0)


def figure(name: str, value: float = 0.1) -> Figure:
    ends = dict(interval=(0.0, float("inf")), floor=Reference(0.5, "nothing"), p=0.25)
    return Figure(task=name, metric="SSIM", protocol="range1", value=value, n=3, seed=0, **ends)


def stopped():
    raise KeyboardInterrupt


def test_what_was_stopped_goes_on_at_the_row(tmp_path, capsys):
    file = epath.Path(tmp_path) / "mine.json"
    first = Rows(ABOUT, file, "medm2g evaluate --model=RUN")
    one = first("one", lambda: [figure("one", 1 / 3)])
    with pytest.raises(KeyboardInterrupt):
        first("two", stopped)
    told = json.loads(file.read_text())
    assert [r["row"] for r in told["rows"]] == ["one"] and told["command"] == "medm2g evaluate --model=RUN"
    assert {name: told[name] for name in ABOUT} == ABOUT and len(told["date"]) == 10
    again = Rows(ABOUT, file)
    assert again("one", stopped) == one, "taken up, not measured"
    again("two", lambda: [figure("two")])
    assert [f.task for f in again.figures] == ["one", "two"] and figures_in(
        json.loads(file.read_text())
    ) == again.figures
    assert f"{file}: taken up are the 1 rows that are there" in capsys.readouterr().out
    # A row that comes before those that are there loses none of them.
    more = Rows(ABOUT, file)
    more("zero", lambda: [figure("zero")])
    assert [r["row"] for r in json.loads(file.read_text())["rows"]] == ["zero", "one", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("name", ABOUT)
def test_another_evaluation_is_refused(name, tmp_path):
    file = epath.Path(tmp_path) / "mine.json"
    Rows(ABOUT, file)("one", lambda: [figure("one")])
    before = file.read_text()
    with pytest.raises(UserError, match=rf"mine.json holds 1 rows of another evaluation: {name} .*, now 7; name anoth"):
        Rows(ABOUT | {name: 7}, file)
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"figures": []}', json.dumps(ABOUT | {"rows": [{"row": "one"}]})])
def test_a_file_that_holds_no_rows_is_refused(text, tmp_path):
    file = epath.Path(tmp_path) / "mine.json"
    file.write_text(text)
    with pytest.raises(UserError, match="holds no rows that this version could take up; name another --out, or delete"):
        Rows(ABOUT, file)


def test_ctrl_c_says_what_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "measure", lambda *_, **__: stopped())
    words = ["evaluate", "--model", "phantom", "--config=configs/tasks.py:reports"]
    for out, said in ((["--out", str(tmp_path)], "goes on from there"), ([], "nothing is written: with --out DIR")):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *out])
        assert end.value.code == cli.STOPPED and said in capsys.readouterr().err


def test_two_protocols_in_one_comparison_are_refused(tmp_path):
    about = ABOUT | dict(data="phantom", contents="f00", records=3)
    file = tmp_path / "mine.json"
    Rows(about, epath.Path(file))("one", lambda: [figure("one", 0.25), figure("two", 0.5)])
    head, line = Against(str(file), about | dict(model="def")).lines([figure("one", 0.75)])
    assert "model abc, by 1 figures" in head and line == "one: SSIM 0.7500 - 0.2500 = +0.5"
    other = dataclasses.replace(figure("one"), protocol="masked")
    with pytest.raises(UserError, match="'one' is in protocol 'masked', 'one' in protocol 'range1'"):
        Against(str(file), about).lines([other])
    with pytest.raises(
        UserError, match="not of the same test records, measured alike: contents 'f00' there, 'bad' here"
    ):
        Against(str(file), about | dict(contents="bad"))
    for name, text in (("lost.json", None), ("bad.json", "{"), ("old.json", '{"figures": []}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"--against .*{name}"):
            Against(str(tmp_path / name), about)
