"""Who owns a run root: one live run; what a dead one has left is no obstacle."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from etils import epath

from medm2g_jax.errors import UserError
from medm2g_jax.train import owner
from medm2g_jax.train.owner import me, owned, release, take

ROOT = Path(__file__).parents[1]
HOLD = "import sys, time\nfrom medm2g_jax.train.owner import owned\nwith owned(sys.argv[1]):\n" + (
    "    print('mine', flush=True)\n    time.sleep(100)\n"
)


def hold(root):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_second_run_is_told_who_and_since_when(tmp_path):
    with owned(tmp_path / "run"):
        path = tmp_path / "run" / "owner.json"
        since = json.loads(path.read_text())["since"]
        message = rf"run belongs to process {os.getpid()} on .*, since {since}, .*--workdir.*delete {path}"
        with pytest.raises(UserError, match=message), owned(tmp_path / "run"):
            pass
        assert path.exists()
        with owned(tmp_path / "other"):
            pass
    assert not os.listdir(tmp_path / "run")
    with pytest.raises(KeyError), owned(tmp_path / "run"):  # given back, however the block ends
        raise KeyError
    assert not os.listdir(tmp_path / "run")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_dead_process_left_is_taken_over(how, reaped, tmp_path):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {process.pid} on"), owned(tmp_path):
        pass
    process.send_signal(how)
    if reaped:
        process.wait()
    else:  # its parent has not asked yet: a process no more, though its number is still taken
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    said = []
    with owned(tmp_path, said.append):
        assert len(said) == 1 and re.search(rf"owner.json: taken over from process {process.pid} on", said[0])
    process.wait()
    assert not os.listdir(tmp_path)


def left(root, now, **fields):
    """A file as some process has left it; `now`: seconds since its last sign of life."""
    path = root / "owner.json"
    path.write_text(json.dumps(asdict(replace(me(), **fields))))
    os.utime(path, (time.time() - now,) * 2)


@pytest.mark.parametrize(
    ("now", "fields", "alive"),
    [
        (1e6, {}, True),  # here, and there: a sign of life is not asked for (the process may be stopped)
        (0, {"started": "1"}, False),  # its number is another process' now
        (0, {"pid": 2**22 + 1}, False),
        (10, {"host": "elsewhere"}, True),
        (10, {"host": "elsewhere", "pid": 2**22 + 1}, True),
        (10, {"place": "another boot", "pid": 2**22 + 1}, True),  # a container's numbers say nothing here
        (181, {"host": "elsewhere"}, False),
        (181, {"place": "another boot"}, False),
    ],
)
def test_who_counts_as_alive(now, fields, alive, tmp_path):
    left(tmp_path, now, **fields)
    if alive:
        with pytest.raises(UserError, match="still running"), owned(tmp_path):
            pass
    else:
        with owned(tmp_path):
            pass


def test_a_file_cut_short_counts_by_its_age(tmp_path):
    (tmp_path / "owner.json").write_text('{"tok')
    with pytest.raises(UserError, match="belongs to another run"), owned(tmp_path):
        pass
    os.utime(tmp_path / "owner.json", (time.time() - 1000,) * 2)
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_gets_it(stale, links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    for _ in range(10):
        if stale:
            left(tmp_path, 0, started="1")
        begin, won, refused = threading.Barrier(8), [], []

        def attempt(begin=begin, won=won, refused=refused):
            mine = me()
            begin.wait()
            try:
                take(epath.Path(tmp_path), mine, lambda _: None)
                won.append(mine)
            except UserError:
                refused.append(mine)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(refused) == 7
        release(epath.Path(tmp_path), refused[0])  # not its own: stays
        assert os.listdir(tmp_path) == ["owner.json"]
        release(epath.Path(tmp_path), won[0])
        assert not os.listdir(tmp_path)


def test_a_live_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.02)
    with owned(tmp_path):
        path = tmp_path / "owner.json"
        os.utime(path, (0, 0))
        deadline = time.time() + 10
        while path.stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 10


def test_where_it_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, NotADirectoryError, FileExistsError)), owned(tmp_path / "file"):
        pass
