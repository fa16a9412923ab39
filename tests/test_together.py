"""Stages side by side: who waits for whom, who goes first, and what one's failure does to the others."""

import threading

import pytest

from medm2g_jax.config import get_config
from medm2g_jax.train import together

NEEDS = {"vae": [], "align": [], "ldm": ["vae", "align"], "other": ["align"], "round": ["vae", "align", "ldm", "other"]}
SECONDS = {"vae": 40.0, "align": 60.0, "ldm": 70.0, "other": 30.0, "round": 80.0}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_stage_trains_once_after_all_that_it_stands_on(workers):
    ended, begun, at_a_time = [], [], []

    def train(name):
        assert set(NEEDS[name]) <= set(ended)
        begun.append(name)
        at_a_time.append(len(begun) - len(ended))
        ended.append(name)

    together.run(NEEDS, SECONDS, train, workers, lambda: None)
    assert sorted(begun) == sorted(NEEDS) and max(at_a_time) <= workers
    if workers == 1:
        assert begun == list(NEEDS)


def test_two_truly_run_at_once_and_the_longest_way_goes_first():
    both = threading.Barrier(2, timeout=30)
    begun = []

    def train(name):
        begun.append(name)
        if name in ("vae", "align", "ldm", "other"):  # each waits for the other of its pair
            both.wait()

    together.run(NEEDS, SECONDS, train, 2, lambda: None)
    assert begun == ["align", "vae", "ldm", "other", "round"] or begun == ["align", "vae", "other", "ldm", "round"]


def test_an_error_has_the_others_save_and_end_and_is_what_is_raised():
    asked, saved = threading.Event(), []

    def train(name):
        if name == "align":
            raise ValueError("broken")
        assert asked.wait(30)
        saved.append(name)
        raise RuntimeError("stopped, saved")

    with pytest.raises(ValueError, match="broken"):
        together.run(NEEDS, SECONDS, train, 2, asked.set)
    assert saved == ["vae"]


def test_networks_short_of_memory_train_alone(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    tiny, large = get_config("text_ct", "tiny"), get_config("text_ct", "base")
    assert together.at_once(tiny, tiny.stages.values()) == 2 and together.at_once(large, large.stages.values()) == 1
    tiny.at_once = 1
    assert together.at_once(tiny, tiny.stages.values()) == 1
