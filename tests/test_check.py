"""Every picture opened once: what is broken, which range 16 bits use, and what a cache saves."""

import json
import threading

import numpy as np
import pytest

from medm2g_jax.data import check
from medm2g_jax.data.check import Examined, Item, parse_ranges
from medm2g_jax.data.picture import Picture
from medm2g_jax.errors import UserError


class Set:
    """A data set whose pictures are counted as they are opened."""

    def __init__(self, tops, stamps=None, broken=()):
        self.opened, self.tops, self.broken = [], tops, broken
        self.stamps = stamps or [0] * len(tops)

    def read(self, number):
        self.opened.append(number)
        if number in self.broken:
            raise UserError(f"{number}.png: damaged")
        return Picture(np.full((2, 2), self.tops[number], np.uint16), (0, 65535))

    def items(self):
        for i, stamp in enumerate(self.stamps):
            yield Item(f"row {i}: ", ("xray", "ct")[i % 2], f"{i}.png", (stamp, 1), lambda i=i: self.read(i))

    def examined(self, asked=None, most_pixels=100):
        return Examined("set", asked or {}, most_pixels, self.items)


def test_the_range_is_what_holds_the_sets_greatest_value_and_is_said_once():
    data, said = Set([100, 1000, 4095, 1024, 4000, 7]), []
    examined = data.examined()
    examined.check(say=said.append)
    assert examined.ranges == {"ct": (0, 2047), "xray": (0, 4095)}
    examined.check(say=said.append)
    assert len(said) == 1 and "xray 0 to 4095 (the greatest value is 4095)" in said[0] and "ct 0 to 2047" in said[0]
    for top, high in ((0, 255), (255, 255), (256, 511), (4096, 8191), (65535, 65535)):
        assert Set([top]).examined().ranges == {"xray": (0, high)}


def test_a_range_is_found_when_it_is_first_needed_and_by_one_thread():
    data = Set([100, 1000, 4095])
    examined = data.examined({"ct": (5, 10)})
    picture = data.read(0)
    data.opened.clear()
    assert examined.ranged("ct", data.read(1)).span == (5, 10) and data.opened == [1]  # said: nothing to look for
    threads = [threading.Thread(target=examined.ranged, args=("xray", picture)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(data.opened) == [0, 1, 1, 2]
    assert examined.ranged("xray", picture).span == (0, 4095)
    eight = Picture(np.zeros((2, 2), np.uint8), (0, 255))
    assert examined.ranged("xray", eight).span == (0, 255)
    unit = Picture(np.zeros((2, 2), np.uint16), None)
    assert examined.ranged("xray", unit).span is None


def test_how_wide_pictures_are_is_kept_by_stream_and_in_the_cache(tmp_path):
    class Wide(Set):
        def read(self, number):
            self.opened.append(number)
            mm = (None, (0.5, 0.5), (2.0, 1.0), (0.25, 0.25), (0.5, 3.0))[number]
            return Picture(np.zeros((100, 50), np.uint8), (0, 255), spacing=mm)

    for opened in ([0, 1, 2, 3, 4], []):
        data = Wide([0] * 5)
        examined = data.examined()
        examined.check(tmp_path / "cache.json")
        assert examined.extents == {"ct": (25.0, 50.0), "xray": (150.0, 200.0)} and sorted(data.opened) == opened
    assert Set([1]).examined().extents == {}


def test_all_broken_ones_are_listed_in_one_line(monkeypatch):
    data = Set([1] * 6, broken=(1, 4))
    with pytest.raises(UserError, match=r"set: 2 of 6 images .*: row 1: 1.png: damaged; row 4: 4.png: damaged$"):
        data.examined().check()
    monkeypatch.setattr(check, "LISTED", 1)
    with pytest.raises(UserError, match=r"row 1: 1.png: damaged; and 1 more$"):
        data.examined().check()


def test_the_cache_knows_files_by_name_size_and_time(tmp_path):
    cache = tmp_path / "deep" / "cache.json"
    first = Set([10, 300, 4095], broken=(2,))
    with pytest.raises(UserError):
        first.examined().check(cache)
    second = Set([0, 0, 4095])  # not looked at again: their values are known
    second.examined().check(cache)
    assert second.opened == [2]
    third = Set([0, 0, 0], stamps=[0, 7, 0])
    examined = third.examined()
    examined.check(cache)
    assert third.opened == [1] and examined.ranges == {"ct": (0, 255), "xray": (0, 4095)}
    limited = Set([1, 1, 1])
    limited.examined(most_pixels=50).check(cache)  # what was too large then is another matter
    assert sorted(limited.opened) == [0, 1, 2]
    for content in ("", "[]", '{"most_pixels": 100, "pictures": {"0.png": 3, "1.png": [7]}}', '{"most_pixels": 100}'):
        cache.write_text(content)
        torn = Set([1, 1, 1])
        torn.examined().check(cache)
        assert sorted(torn.opened) == [0, 1, 2]
        assert set(json.loads(cache.read_text())["pictures"]) == {"0.png", "1.png", "2.png"}
    assert [f.name for f in cache.parent.iterdir()] == ["cache.json"]


def test_a_file_that_has_become_another_is_an_error():
    data = Set([1])
    examined = data.examined()
    examined.check(say=str)
    with pytest.raises(UserError, match="of 16 bits now, which it was not when the data were checked"):
        examined.ranged("ct", data.read(0))


def test_progress_is_said_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(check, "SLOW", -1.0)
    said = []
    Set([1, 2, 3]).examined().check(say=said.append)
    assert len(said) == 4 and said[0].startswith("data set: 1 of 3 images opened")


def test_ranges_as_they_are_typed():
    assert parse_ranges("") == {}
    assert parse_ranges("xray=0:4095, mri:t2=-1.5:1200,") == {"xray": (0, 4095), "mri:t2": (-1.5, 1200)}
    for spec in ("xray", "xray=4095", "xray=1:1", "xray=2:1", "xray=0:x", "xray=0:inf", "0:4095", "xray=0:nan"):
        with pytest.raises(UserError, match="expected STREAM=LOW:HIGH, as in xray=0:4095|unknown stream ''"):
            parse_ranges(spec)
    with pytest.raises(UserError, match="unknown stream 'pet'"):
        parse_ranges("pet=0:1")
