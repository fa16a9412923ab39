"""What each field of a config may be, and what sampling takes: ranges of numbers, and names that stand in tables.

A config is read without jax, so the names stand here again; a test holds them to their tables.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ml_collections import ConfigDict

from medm2g_jax.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, these included but for an open end; never NaN or infinity."""

    low: float | int
    high: float | int
    whole: bool = True
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and math.isfinite(value) and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a finite number"
        low = "" if self.low == -math.inf else f"{'above' if self.open_low else 'from'} {self.low:g}"
        # :g would round the largest whole ones
        high = "" if self.high == math.inf else f"{'below' if self.open_high else 'to'} {self.high}"
        return " ".join(part for part in (number, low, high) if part)


MAX_INT = 2**31 - 1
MAX_SEED = 2**32 - 1  # jax.random.key takes no more bits than these: larger seeds would repeat smaller ones
_COUNT, _SIZE = Range(0, MAX_INT), Range(1, MAX_INT)
_SHARE = Range(0, 1, whole=False)
_BELOW_ONE = Range(0, 1, whole=False, open_high=True)
_POSITIVE = Range(0, math.inf, whole=False, open_low=True)
_NOT_NEGATIVE = Range(0, math.inf, whole=False)
_SCALE = Range(-1000, 1000, whole=False)  # of guidance; far beyond, float32 holds no sample

# Sampling, in configs, on the command line and from Python.
SAMPLING = {
    "count": Range(1, 100_000),
    "draws": Range(1, 1000),
    "best_of": Range(1, 1000),
    "beams": Range(1, 100),
    "rows": _SIZE,
    "seed": Range(0, MAX_SEED),
    "steps": Range(1, 1000),
    "eta": _SHARE,
    "guidance": _SCALE,
    "guide_guidance": _SCALE,
    "k": Range(1, 10_000),
}
# Every number of a config; "loss", "net" and "sample" say what holds for all numbers in them that have no row.
RANGES: Mapping[str, Range] = {
    "seed": SAMPLING["seed"],
    "image_size": _SIZE,
    "net": _SIZE,
    "net.image_vae.layers": _COUNT,  # 0: patches alone
    "data.most_pixels": _SIZE,
    "data.weights": _POSITIVE,
    "data.train": _SIZE,
    "data.val": _COUNT,
    "data.test": _COUNT,
    "mesh": Range(-1, MAX_INT),
    "steps": _SIZE,
    "batch": _SIZE,
    "lr": _POSITIVE,
    "lr_adapt": _NOT_NEGATIVE,
    "b1": _BELOW_ONE,
    "b2": _BELOW_ONE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup": _SHARE,
    "final_lr": _SHARE,
    "clip": _POSITIVE,
    "ema": _BELOW_ONE,
    "accumulate": _SIZE,
    "log_every": _SIZE,
    "eval_every": _COUNT,
    "eval_rows": _COUNT,
    "checkpoint_every": _SIZE,
    "show_every": _COUNT,
    "keep": _SIZE,
    "loss": _NOT_NEGATIVE,
    "barlow_lambda": _NOT_NEGATIVE,
    "crop": Range(0, 1, whole=False, open_low=True),
    "drop_prompt": _SHARE,
    "unprompted": _SHARE,
    "alone": _SHARE,
    "rehearse": _BELOW_ONE,
    "others": Range(0, 64),
    "clean": _SHARE,
    "contrast_tau": _POSITIVE,
    "min_snr": _NOT_NEGATIVE,
    "rank": _SIZE,
    "accelerate": Range(1, 64),
    **{f"sample.{field}": SAMPLING[field] for field in ("steps", "eta", "guidance", "rows")},
    "sample.best_of_text": SAMPLING["best_of"],
}


# Names that a field may be.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32", "bfloat16"),
    "freeze": ("auto", "paper", "partner_open"),
    "guide_init": ("prompt", "fresh"),
    "latents": ("auto", "on", "off"),
    "side_by_side": ("auto", "off"),
    "open": ("auto", "flow", "guide"),
    "keep_lines": ("block", "density"),
    "optimizer": ("adamw", "adam"),
    "predict": ("auto", "eps", "v", "sample"),
    "sample.guide": ("cond", "both"),
    "schedule": ("scaled_linear", "zero_snr"),
    "times": ("uniform", "logit_normal"),
    "sample.sampler": ("ddim", "ddpm", "euler", "heun", "dpmpp_2m"),
    "sample.spacing": ("auto", "leading", "trailing", "linspace"),
    "upstream": ("train", "init", "require"),
}


def _names(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, value) of every field of CHOICES in a config and in its stages."""
    for key, value in config.items():
        field = prefix + key
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{field}.")
        elif (field.split(".", 2)[2] if field.startswith("stages.") else field) in CHOICES:
            yield field, value


def numbers(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """(dotted field, value) of every number in a config; those in a tuple each."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from numbers(value, f"{prefix}{key}.")
        else:
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(one, Real) and not isinstance(one, bool):
                    yield prefix + key, one


def range_of(field: str) -> Range | None:
    """What a field of a config may be, "stages.text_vae.steps" like "steps"; None where nothing is said."""
    words = field.split(".")
    words = words[2:] if words[0] == "stages" else words
    return next((RANGES[at] for n in range(len(words), 0, -1) if (at := ".".join(words[:n])) in RANGES), None)


def check(config: ConfigDict) -> None:
    """Hold every number of a config to its range, and every name to its choices.

    Raises:
      UserError: names the field, what is expected and what was found.
    """
    for field, value in numbers(config):
        allowed = range_of(field)
        if allowed is not None and value not in allowed:
            raise UserError(f"config.{field}: expected {allowed}, found {value!r}")
    for field, value in _names(config):
        allowed = CHOICES[field.split(".", 2)[2] if field.startswith("stages.") else field]
        if value not in allowed:
            raise UserError(f"config.{field}={value!r}: expected one of {', '.join(allowed)}")
    for at, stage in (("", config), *((f"stages.{name}.", own) for name, own in config.stages.items())):
        if not any(stage.loss.values()):
            raise UserError(f"config.{at}loss: expected a weight above 0, found {', '.join(stage.loss)} all 0")
        if stage.steps * stage.accumulate > MAX_INT:
            raise UserError(
                f"config.{at}steps: expected steps x accumulate <= {MAX_INT}, found {stage.steps} x {stage.accumulate}"
            )


def check_sampling(name: str, **values: Any) -> None:
    """Hold what sampling takes, where it is not None, to its range.

    Args:
      name: how a value is called where it was given, "--{}" (with dashes) or "{}".

    Raises:
      UserError: names the value, what is expected and what was found.
    """
    for field, value in values.items():
        if value is not None and value not in SAMPLING[field]:
            said = name.format(field.replace("_", "-") if name.startswith("--") else field)
            raise UserError(f"{said}: expected {SAMPLING[field]}, found {value!r}")
