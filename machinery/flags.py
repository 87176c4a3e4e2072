"""The command line: a flag for each field of each group of hyper-parameters (by tyro), and the presets.

Hyper-parameters are plain dataclasses with a docstring a field, beside the code that uses them; a program hands them
over as {group's name: dataclass}, and neither names nor defaults are written twice. A flag that is not given is None,
so that what a run remembers, or a preset, can stand in for it. What tyro would say in a box becomes one line.

Exercised by `python -m pytest tests/test_command.py tests/test_pipeline.py`.
"""
import difflib
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import docstring_parser
import tyro
from tyro import _errors  # where tyro says in parts what is wrong; private, hence its exact version

from machinery.files import InputError
from machinery.train import OFFICIAL, PAPER, PRESETS, check_values, flag_of, name_of

SOURCES = {"paper": PAPER, "official code": OFFICIAL}
MATTER = """task run seed smoke preset redo model tasks heldout human device rollout.tasks
    eval.tasks""".split()  # the flags that --help shows


@dataclass(frozen=True)
class Common:
    """What every command knows."""
    stage: str = "all"
    """What to do; --help shows the stages."""
    task: str = "backend"
    """What to collaborate on: backend, frontend (pages), blind or module:Class."""
    run: str = "runs/default"
    """Folder of the run; with --smoke, runs/smoke."""
    seed: int = 0
    """Seed of everything."""
    smoke: bool = False
    """Everything in miniature; its numbers mean nothing."""
    preset: Literal["small", "paper", "one-gpu"] = "small"
    """Defaults: small (the small world's), paper, or one-gpu."""
    redo: str = ""
    """STAGE[,STAGE]: remove it, with what came of it; make it again."""


class Flags:
    """The flags of groups of hyper-parameters {name: dataclass}. text: what the help begins with; program: how it is
    called; choices: {name of a flag: its words}, where the program alone knows them."""

    def __init__(self, text, groups, program="python sweet.py", **choices):
        self.text, self.program, self.choices, self.groups = text, program, choices, {"common": Common, **groups}
        self.places = {}
        for group, kind in self.groups.items():
            self.places |= {name_of(group, f): (group, f) for f in fields(kind)}
        self.flags = {name: flag_of(*place) for name, place in self.places.items()}
        self.texts = {}
        parts = []
        for group, kind in self.groups.items():
            made = self.part(group, kind)
            how = tyro.conf.arg(help=kind.__doc__)
            parts.append((group, Annotated[made, how], field(default_factory=made)))
        self.kind = make_dataclass("Flags", parts)

    def part(self, group, kind):
        """The same dataclass in tyro's words."""
        texts = {part.arg_name: part.description for part in docstring_parser.parse_from_object(kind).params}
        made = []
        for f in fields(kind):
            name, said = name_of(group, f), ""
            self.texts[name] = " ".join(texts[f.name].split())
            for source, values in SOURCES.items():
                if f.name in values.get(group, {}):
                    said += f", {source} {values[group][f.name]!r}"
            how = tyro.conf.arg(name=self.flags[name][2:], prefix_name=False, help=self.texts[name],
                                metavar="STAGE" if name == "stage" else None,
                                help_behavior_hint=f"(default {f.default!r}{said})")
            allowed = Literal[tuple(self.choices[name])] if name in self.choices else f.type
            if name == "stage":
                allowed = tyro.conf.Positional[allowed]
            made.append((f.name, Annotated[allowed, how], f.default))
        return make_dataclass(group, made)

    def help(self):
        """The stages and the flags that matter, on one screen."""
        rows = [f"    {self.flags[name]:16}  {self.texts[name]}" for name in MATTER if name in self.flags]
        rows.append("    --help-all        Every flag, with its default and the paper's value.")
        return "\n".join([self.text, *rows])

    def other(self, name):
        """The flag that says no."""
        return self.flags[name].replace("--", "--no-", 1)

    def given(self, argv):
        """The names of the flags that a command line holds."""
        words = {word.partition("=")[0].replace("_", "-") for word in argv}
        return [name for name, flag in self.flags.items() if words & {flag, self.other(name)}]

    def words(self, values):
        """The command line that says {name: value}."""
        return [self.flags[name] if value is True else self.other(name) if value is False
                else f"{self.flags[name]}={value}" for name, value in values.items()]

    def nearest(self, word):
        """The flag that a word may stand for, in words; or nothing."""
        known = [flag for name, flag in self.flags.items() if name != "stage"]
        for name, (_, f) in self.places.items():
            if f.type is bool:
                known.append(self.other(name))
        near = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), known, 1)
        return f"perhaps {near[0]}; " if near else ""

    def refuse(self, event):
        """InputError, in one line, where tyro would draw a box."""
        flag = getattr(event, "argument", None) and event.argument.display_name().replace("common.stage", "STAGE")
        if isinstance(event, _errors.InvalidChoice):
            near = difflib.get_close_matches(event.value, event.choices, 1)
            perhaps = f" (perhaps {near[0]})" if near else ""
            raise InputError(f"{flag} {event.value}: expected {' or '.join(event.choices)}{perhaps}")
        if isinstance(event, _errors.BadValue):
            raise InputError(f"{flag}: expected a value")
        if isinstance(event, _errors.InstantiationFailure):
            whole = "whole " if "int()" in event.message else ""
            raise InputError(f"{flag} {event.message.rpartition(': ')[2]}: expected a {whole}number")
        raise InputError(f"{' '.join(event.tokens)}: not known; {self.nearest(event.tokens[0])}--help-all shows every "
                         "flag")

    def parse_args(self, argv, remembered=None):
        """An object with each field of Common, and {name of another flag: its value}, None where it is neither given
        nor remembered ({name: value}); .given: the names of those that are given. InputError on what is no flag or
        value. Help ends the program."""
        if {"-h", "--help"} & set(argv):
            print(self.help())
            sys.exit()
        given = self.given(argv)
        kept = {}
        for name, value in (remembered or {}).items():
            if name in self.flags and name not in given:
                kept[name] = value
        line = ["--help"] if "--help-all" in argv else [*self.words(kept), *argv]
        with _errors.on_parse_error(self.refuse):
            title, _, _ = self.text.partition("\n")
            found = tyro.cli(self.kind, args=line, prog=self.program, description=title)
        options = SimpleNamespace(given=given, running="")  # .running: the stage that runs
        for name, (group, f) in self.places.items():
            known = group == "common" or name in given or name in kept
            setattr(options, name, getattr(getattr(found, group), f.name) if known else None)
        return options


def read_settings(options, groups, defaults, flags=True):
    """The hyper-parameters: flags (unless they are left out) over --smoke over --preset over a world's defaults over
    those of the dataclasses."""
    settings, preset = {}, options.preset
    device = (options.device or "").partition(":")[0]
    names = [preset, f"{preset}-{options.task}", f"{preset}-{device}"]
    if preset == "paper":
        names = ["official", "neither", *names]
    layers = [defaults, *(PRESETS.get(name, {}) for name in names)]
    if options.smoke:
        layers.append(PRESETS["smoke"])
    for group, kind in groups.items():
        values = {}
        for layer in layers:
            values |= layer.get(group, {})
        for f in fields(kind) if flags else ():
            said = getattr(options, name_of(group, f))
            if said is not None:
                values[f.name] = said
        settings[group] = kind(**values)
        check_values(group, settings[group])
    return settings
