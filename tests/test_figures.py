"""The row type of measured numbers: one shape in JSON, and nothing lost there and back."""

import json
import math

import pytest

from medm2g_jax.evaluate.figures import Figure, Reference, from_json, line, scalars, to_json

CT = Figure(task="report -> CT", metric="PSNR dB", protocol="range1", value=13.9, interval=(13.0, 14.8), n=16, seed=0,
            floor=Reference(16.2, "the mean image"), ceiling=Reference(26.9, "the autoencoder"))  # fmt: skip
BARE = Figure(task="CT <-> report", metric="InfoNCE nats", protocol="tau 0.07", value=2.4, n=16, seed=0)


def test_there_and_back_in_one_shape():
    text = json.dumps(to_json([CT, BARE]), allow_nan=False)
    assert from_json(json.loads(text)) == [CT, BARE]
    order = ["task", "metric", "protocol", "value", "interval", "n", "seed", "floor", "ceiling", "p"]
    assert [list(row) for row in json.loads(text)] == [order, order]
    assert json.loads(text)[0]["floor"] == {"value": 16.2, "what": "the mean image"}
    assert json.loads(text)[1]["floor"] is None


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_survives_any_json_reader(value):
    odd = Figure(task="t", metric="m", protocol="range1", value=value, interval=(value, 1.0), n=1, seed=0,
                 floor=Reference(value, "f"))  # fmt: skip
    (back,) = from_json(json.loads(json.dumps(to_json([odd]), allow_nan=False)))
    assert repr(back) == repr(odd)


def test_a_protocol_is_a_row_of_the_table():
    with pytest.raises(ValueError, match="protocol 'my own'.*range1"):
        Figure(task="t", metric="m", protocol="my own", value=1.0, n=1, seed=0)


def test_rendered():
    assert line(CT) == (
        "report -> CT: PSNR dB 13.90 [13.00, 14.80]; floor 16.20, the mean image; ceiling 26.90, the autoencoder; n 16"
    )
    assert line(BARE) == "CT <-> report: InfoNCE nats 2.400; n 16"
    assert scalars([CT, BARE]) == {"result/report -> CT, PSNR dB": 13.9, "result/CT <-> report, InfoNCE nats": 2.4}
