"""Stages side by side: who may train beside whom, on how many threads. That their bits are those of an uninterrupted
run, and that they end with it, is tested in test_loop.py."""

from medm2g_jax import beside
from medm2g_jax.config import get_config, stage_graph


def test_threads_are_those_of_the_whole_plan_whatever_of_it_is_left(monkeypatch):
    monkeypatch.setattr(beside, "cores", lambda: 4)
    graph = stage_graph(get_config("text_ct", "tiny"))
    plan = {name: {*graph.plan(name)} - {name} for name in graph.plan("text_ct")}
    vaes = {"image_vae", "text_vae"}
    whole = beside.tasks([*plan], plan, vaes, dict.fromkeys(plan, 1.0))
    assert {name for name, task in whole.items() if task.threads == 4} == {"text_ct"}  # all others stand under it
    assert {task.threads for task in whole.values()} == {2, 4}
    assert whole["align_text_xray"].stands_on == set() and whole["ldm_text"].constants == {"text_vae"}
    assert whole["text_ct"].stands_on == plan["text_ct"] and whole["text_ct"].constants == vaes
    left = beside.tasks(["text_xray", "text_ct"], plan, vaes, dict.fromkeys(plan, 1.0))
    assert left["text_ct"].stands_on == {"text_xray"} and left["text_xray"].stands_on == set()
    assert all(left[name].threads == whole[name].threads for name in left)
