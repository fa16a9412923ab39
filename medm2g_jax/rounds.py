"""The stage graph: who trains, who is frozen, what starts from what (section 3.5, Fig. 3).

    image_vae, text_vae -> align_<pair>... -> ldm_<modality>... -> <pair>...

A *listing* is the ordered tuple of rounds, each a pair of modalities: by default section 3.5's Text-Xray, Text-CT,
CT-MRI. Everything else follows from it by one rule: in alignment and in the rounds **a modality trains when it first
appears and is frozen afterwards**; every modality gets a single flow between the two. Beyond the paper, a flow that
is to read sources on its own grid trains on in the round that brings them (`Graph.freeze`). A listing is of the
modalities one has: any tuple will do, without text too; a single modality in place of a pair is aligned and guided by
its own contrasts alone, or, where it has none, gets a flow and nothing else.

One stage more may stand on all of these: a fine-tune of what one round has learnt, for one modality that is made (a row
of TASKS), in one of the ways of HOWS.

Parameters come in six groups a modality (or kind), and every group is trained by the stages named here:

    <kind>/vae      autoencoder, shared by a kind's modalities        image_vae, text_vae
    <m>/clip        prompt encoder C_M                                align_<pair>
    <m>/flow        UNet eps_theta and its prompt_in                  ldm_<m>, on in m's first round where it is open
    <m>/guide       V_M, f_M, theta_c of m's UNet                     the rounds
    <m>/grid        its UNet's input channels for sources on its      the rounds
                    own grid
    <m>/lora        low-rank additions to its UNet's kernels          fine-tunes
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from medm2g_jax.errors import UserError
from medm2g_jax.modality import KINDS, MODALITIES

LISTINGS = {
    "default": ("text_xray", "text_ct", "ct_mri"),  # section 3.5
    "text_mri": ("text_xray", "text_mri", "ct_mri"),  # "Implementation Details" of section 4
}
DEMO = "text_ct"  # the round that `make demo` ends with

# What every stage of a run root must agree on: handed to upstream stages, and compared with what is there.
SHARED = ("preset", "variant", "listing", "data", "image_size", "schedule", "net", "seed", "weights")

FREEZE = ("auto", "paper", "partner_open")  # see Graph
GROUPS = {
    "vae": r"{}/vae/",
    "clip": r"{}/clip/",
    "flow": r"{}/(prompt_in/|null/|unet/(?!.*guide/))",
    "guide": r"{}/(context/|adapt/|unet/(?!guide/).*guide/)",
    "grid": r"{}/unet/guide/",
    "lora": r"{}/lora/",
}


class Task(NamedTuple):
    """What a fine-tune adapts: a round's pair, what is made, and whose images may come from faster acquisitions."""

    round: str
    target: str
    accelerated: str = ""


TASKS = {
    "report": Task("text_xray", "text"),
    "ct_report": Task("text_ct", "text"),
    "xray": Task("text_xray", "xray"),
    "ct": Task("text_ct", "ct"),
    "mri_to_ct": Task("ct_mri", "ct", accelerated="mri"),
    "ct_to_mri": Task("ct_mri", "mri"),
    "mri": Task("mri", "mri"),  # one contrast from the others
}
HOWS = {"full": ("flow", "guide", "grid"), "guide": ("guide", "grid"), "lora": ("lora",)}  # what of the target trains


def group_regex(groups: Iterable[str]) -> str:
    """("ct/guide",) -> a regex that matches, from the start, the names of the parameters in any of the groups."""
    patterns = (GROUPS[g.split("/")[1]].format(re.escape(g.split("/")[0])) for g in groups)
    return "|".join(patterns) or r"(?!)"


def group_of(name: str) -> str | None:
    """The group of a parameter, None for what a stage drops afterwards (projectors, temperatures)."""
    owner = name.split("/")[0]
    return next((f"{owner}/{g}" for g, regex in GROUPS.items() if re.match(regex.format(owner), name)), None)


def members(round_name: str) -> tuple[str, ...]:
    """ "text_ct" -> ("text", "ct"); "mri" -> ("mri",).

    Raises:
      UserError: the name is no registered modality, nor two of them joined by an underscore.
    """
    if round_name in MODALITIES:
        return (round_name,)
    words = round_name.split("_")
    for i in range(1, len(words)):
        a, b = "_".join(words[:i]), "_".join(words[i:])
        if a in MODALITIES and b in MODALITIES and a != b:
            return a, b
    raise UserError(
        f"unknown round {round_name!r}: expected one of {', '.join(MODALITIES)}, or two joined by an underscore"
    )


def tune_name(task: str, how: str) -> str:
    """The stage that fine-tunes a task."""
    return f"tune_{task}_{how}"


def tuned(name: str) -> tuple[str, str] | None:
    """(task, how) of a stage that fine-tunes, None of any other."""
    return next(((task, how) for task in TASKS for how in HOWS if name == tune_name(task, how)), None)


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    Attributes:
      name: its run directory and, for rounds and autoencoders, its config file.
      verb: "vae" | "align" | "ldm" | "round".
      subjects: the kind (vae), the modality (ldm), the pair or single modality (align, round).
      trains, reads: groups; what it reads besides comes frozen from the stages that trained it.
      new: the modalities that first appear here (align, round), else subjects.
      contrasts: the subjects that are guided by their own other contrasts too (round).
      registered: a subject whose guide trains -> the modalities whose images may lie on its grid, and then stand on its
        UNet's input channels: its partner, and itself where its other contrasts guide it (round).
      earlier: a known subject whose flow trains on -> its partners of earlier rounds, with whom it goes on practising,
        so that it forgets nothing of them (round; a fine-tune's target: of other rounds, where it practises).
      target: the one subject whose flow learns, of a fine-tune; "" of all others.
    """

    name: str
    verb: str
    subjects: tuple[str, ...]
    trains: tuple[str, ...]
    reads: tuple[str, ...]
    new: tuple[str, ...]
    contrasts: tuple[str, ...] = ()
    registered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    earlier: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    target: str = ""


@dataclass(frozen=True)
class Graph:
    """All stages of a listing, in the order in which they can run.

    `freeze="paper"`: a modality's guide group trains in its first round only; "partner_open": the known partner of
    a round trains on as well; "auto": of the known partner the flow and its input channels do, its guide group not,
    where it may have sources on its grid and the round is open. `absent`: rounds that were never run (upstream="init"):
    a modality whose earlier round is absent counts as first appearing, so it trains; a new guide that is also frozen
    would give no gradient at all.
    `contrasts`: a modality whose guide trains is guided by its own other contrasts too. `register`: the rounds in which
    sources on the target's grid stand on its input channels. `opened`: the rounds in which the flows of new modalities
    train on, from where their single flow's stage left them; that of an open partner too, where it reads such sources.
    `tune`: the name of a fine-tune that stands on all of it, or ""; `practise`: it goes on practising what its target
    learnt with its partners of other rounds, those apart that may lie on its grid.
    """

    listing: tuple[str, ...]
    freeze: str = "paper"
    absent: tuple[str, ...] = ()
    contrasts: bool = True
    register: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    tune: str = ""
    practise: bool = False

    @cached_property
    def pairs(self) -> tuple[tuple[str, ...], ...]:
        """The modalities of each round: two, or a single one."""
        return tuple(members(name) for name in self.listing)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """In the order of their first appearance."""
        return tuple(dict.fromkeys(m for p in self.pairs for m in p))

    @cached_property
    def centre(self) -> tuple[str, ...]:
        """The centre, where a pair holds it and so trains its C: C("") is then everybody's null prompt. Else ()."""
        paired = {m for p in self.pairs if len(p) > 1 for m in p}
        return tuple(m for m in self.modalities if MODALITIES[m].centre and m in paired)

    def prompts(self, target: str) -> tuple[str, ...]:
        """Modalities whose C prompts the single flow of `target`: never its own x, so never its own stream.

        The centre is prompted by everything it is paired with; an imaging modality by the partner of its first round
        and, where it has contrasts, by another contrast of itself. A modality that has neither has no prompt.
        """
        partners = tuple(m for p in self.pairs if target in p for m in p if m != target)
        if MODALITIES[target].centre:
            return partners
        return partners[:1] + ((target,) if MODALITIES[target].contrasts else ())

    @cached_property
    def stages(self) -> dict[str, Stage]:
        kinds = [k for k in reversed(KINDS) if any(MODALITIES[m].kind == k for m in self.modalities)]
        out = [Stage(f"{kind}_vae", "vae", (kind,), (f"{kind}/vae",), (), (kind,)) for kind in kinds]
        first = {m: next(i for i, p in enumerate(self.pairs) if m in p) for m in self.modalities}
        for i, (name, ab) in enumerate(zip(self.listing, self.pairs, strict=True)):
            if len(ab) == 1 and not MODALITIES[ab[0]].contrasts:
                continue  # nothing to align it with
            new = tuple(m for m in ab if first[m] == i)
            clips = tuple(f"{m}/clip" for m in ab)
            out.append(Stage(f"align_{name}", "align", ab, tuple(f"{m}/clip" for m in new), clips, new))
        for m in self.modalities:
            prompts = dict.fromkeys((*self.centre, *self.prompts(m)))
            reads = (f"{MODALITIES[m].kind}/vae", *(f"{p}/clip" for p in prompts))
            out.append(Stage(f"ldm_{m}", "ldm", (m,), (f"{m}/flow",), reads, (m,)))
        for i, (name, ab) in enumerate(zip(self.listing, self.pairs, strict=True)):
            earlier = {m for r in self.listing[:i] if r not in self.absent for m in members(r)}
            new = tuple(m for m in ab if m not in earlier)
            open_ = ab if self.freeze == "partner_open" else new
            near = self.near(name) if name in self.register else {}
            auto = [m for m in near if m not in open_ and self.freeze == "auto" and name in self.opened]
            learn = [m for m in ab if m in open_ or m in auto]
            contrasts = tuple(m for m in learn if MODALITIES[m].contrasts and self.contrasts)
            if len(ab) == 1 and not contrasts:
                continue  # nothing to be guided by
            registered = {m: near[m] for m in learn if m in near}
            flows = [m for m in ab if name in self.opened and (m in new or m in registered)]
            known = {m: self._partners(m, self.listing[:i]) for m in flows if m not in new}
            practised = {m: others for m, others in known.items() if others}
            clips = dict.fromkeys((*self.centre, *ab, *(e for others in practised.values() for e in others)))
            with_grid = self._with_grid(out)
            reads = dict.fromkeys(
                (
                    *(f"{MODALITIES[m].kind}/vae" for m in (*ab, *(e for o in practised.values() for e in o))),
                    *(f"{m}/clip" for m in clips),
                    *(f"{m}/flow" for m in ab),
                    *(f"{m}/guide" for m in ab if m not in new),
                    *(f"{e}/guide" for others in practised.values() for e in others),
                    *(f"{m}/grid" for m in ab if m in with_grid and m not in new),
                )
            )
            trains = (
                *(f"{m}/flow" for m in flows),
                *(f"{m}/guide" for m in open_),
                *(f"{m}/grid" for m in registered),
            )
            out.append(Stage(name, "round", ab, trains, tuple(reads), new, contrasts, registered, practised))
        if self.tune:
            out.append(self._tune(out))
        return {stage.name: stage for stage in out}

    def _tune(self, before: Sequence[Stage]) -> Stage:
        """The fine-tune that stands on these stages.

        Raises:
          UserError: none of them has trained its target to be guided by its source.
        """
        task, how = tuned(self.tune)
        round_name, target, _ = TASKS[task]
        ab = members(round_name)
        pairs = {(a, b) for s in before if s.verb == "round" for a in s.subjects for b in s.subjects if a != b}
        pairs |= {(m, m) for s in before for m in s.contrasts}
        if (ab[ab[0] == target] if len(ab) == 2 else target, target) not in pairs:
            raise UserError(
                f"{task}: no round of the listing {self.listing} guides {target} so; expected one with {round_name}"
            )
        with_grid = self._with_grid(before)
        near = self.near(round_name).get(target, ()) if target in with_grid else ()
        registered = {target: near} if near else {}
        trains = tuple(f"{target}/{group}" for group in HOWS[how] if group != "grid" or registered)
        others = self._partners(target, [r for r in self.listing if r != round_name]) if self.practise else ()
        if self.practise and not others:
            raise UserError(
                f"config.rehearse: {self.tune} has nothing to go on practising: of {', '.join(self.listing)} no round "
                f"but {round_name} pairs {target}; leave it at 0"
            )
        reads = dict.fromkeys(
            (
                *(f"{MODALITIES[m].kind}/vae" for m in (*ab, *others)),
                *(f"{m}/clip" for m in (*self.centre, *ab, *others)),
                f"{target}/flow",
                *(f"{m}/guide" for m in (*ab, *others)),
                *((f"{target}/grid",) if target in with_grid else ()),
            )
        )
        contrasts = (target,) if (target, target) in pairs else ()
        earlier = {target: others} if others else {}
        return Stage(self.tune, "round", ab, trains, tuple(reads), (), contrasts, registered, earlier, target)

    def near(self, round_name: str) -> dict[str, tuple[str, ...]]:
        """Member of a round -> the modalities whose images may lie on its grid there: its partner, and itself where its
        other contrasts guide it."""
        ab, out = members(round_name), {}
        for m in ab:
            own = [p for p in ab if p != m and MODALITIES[m].shares_grid(MODALITIES[p])]
            own += [m] if MODALITIES[m].contrasts and self.contrasts else []
            if own:
                out[m] = tuple(own)
        return out

    def _with_grid(self, before: Sequence[Stage]) -> set[str]:
        """Whose input channels for sources on their grid these stages have trained."""
        return {m for stage in before if stage.name not in self.absent for m in stage.registered}

    def _partners(self, target: str, before: Sequence[str]) -> tuple[str, ...]:
        """Whom `target` was paired with in these rounds, as far as they were run."""
        rounds_ = [members(r) for r in before if r not in self.absent]
        return tuple(dict.fromkeys(m for p in rounds_ if target in p for m in p if m != target))

    def slots(self, target: str) -> tuple[str, ...]:
        """The streams that may stand on the input channels of `target`'s UNet, in the order of their slots: those of
        the modalities that the listing pairs it with and that may lie on its grid, then its own stated contrasts."""
        own = MODALITIES[target]
        partners = dict.fromkeys(m for p in self.pairs if target in p for m in p if m != target)
        near = [MODALITIES[m] for m in partners if own.shares_grid(MODALITIES[m])]
        return (*(s for m in near for s in m.streams), *own.streams[1:])

    def stage(self, name: str) -> Stage:
        if name not in self.stages:
            raise UserError(f"unknown stage {name!r} in the listing {self.listing}; stages: {', '.join(self.stages)}")
        return self.stages[name]

    def owners(self, name: str) -> dict[str, str]:
        """Group -> the last stage before `name` that trains it, for every group that `name` reads."""
        stage = self.stage(name)
        before = list(self.stages)[: list(self.stages).index(name)]
        return {
            group: next(s for s in reversed(before) if group in self.stages[s].trains)
            for group in stage.reads
            if any(group in self.stages[s].trains for s in before)
        }

    def plan(self, name: str) -> tuple[str, ...]:
        """All stages that `name` stands on, in order, and itself last."""
        needed, todo = set(), [name]
        while todo:
            stage = todo.pop()
            if stage not in needed:
                needed.add(stage)
                # A round builds on the earlier rounds of its modalities, even where it only reads their flows.
                todo += self.owners(stage).values()
        return tuple(s for s in self.stages if s in needed)

    @property
    def last(self) -> str:
        """The stage that stands on all others: the last round, or flow where no round has anything to train."""
        return list(self.stages)[-1]

    def trained_pairs(self, flows: Sequence[str], rounds: Sequence[str]) -> dict[str, tuple[tuple[str, str], ...]]:
        """Which source -> target pairs have been trained, of prompts and of guides, when these single flows and these
        rounds have been. (m, m): another contrast of m itself.

        Generation uses all tokens of a context for these pairs, its pooled token for all others.
        """
        prompts = tuple((source, target) for target in flows for source in self.prompts(target))
        guides = [(a, b) for r in rounds for a in members(r) for b in members(r) if a != b]
        guides += [(m, m) for r in rounds for m in self.stages[r].contrasts]
        return {"prompt": prompts, "guide": tuple(dict.fromkeys(guides))}


def graph(
    listing: Sequence[str],
    freeze: str = "paper",
    absent: Sequence[str] = (),
    contrasts: bool = True,
    register: Sequence[str] = (),
    tune: str = "",
) -> Graph:
    if freeze not in FREEZE:
        raise UserError(f"config.freeze={freeze!r}: expected one of {', '.join(FREEZE)}")
    return Graph(tuple(listing), freeze, tuple(absent), contrasts, tuple(register), tune=tune)
