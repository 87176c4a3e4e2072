"""The command line: a flag for each field of each group of hyper-parameters, and the presets.

Hyper-parameters are dataclasses whose fields are `machinery.train.arg`s, beside the code that uses them; a program
hands them over as {group's name: dataclass}, and neither names nor defaults are written twice.

Exercised by `python -m pytest tests/test_pipeline.py`.
"""
import argparse
import dataclasses

from machinery.train import ONE_GPU, SMOKE, check_values, flag_of


def make_parser(text, stages, groups, worlds):
    """One flag for each field, with its default and the paper's value."""
    top = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False, usage="python sweet.py [STAGE] [--flags]")
    top.add_argument("stage", nargs="?", default="all", choices=stages, metavar="STAGE")
    top.add_argument("--task", choices=worlds, default=worlds[0], help=f"what to collaborate on (default {worlds[0]})")
    top.add_argument("--run", default="runs/default", help="folder of the run (default runs/default or runs/smoke)")
    top.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    top.add_argument("--smoke", action="store_true", help="everything in miniature")
    top.add_argument("--preset", choices=["small", "paper", "one-gpu"], default="small",
                     help="defaults: those of the small world, the paper's, or a small run on one GPU")
    top.set_defaults(running="")  # the stage that runs
    for group, kind in groups.items():
        section = top.add_argument_group(group, kind.__doc__)
        for f in dataclasses.fields(kind):
            paper = "" if f.metadata["paper"] is None else f", paper {f.metadata['paper']}"
            how = {"type": type(f.default), "metavar": f.name.upper()}
            how = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else how
            section.add_argument(flag_of(group, f), dest=f"{group}.{f.name}", default=None,
                                 help=f"{f.metadata['text']} (default {f.default!r}{paper})", **how)
    return top


def read_settings(options, groups, defaults, flags=True):
    """The hyper-parameters: flags (unless they are left out) over --smoke over --preset over a world's defaults over
    those of the dataclasses."""
    settings = {}
    for group, kind in groups.items():
        fields, values = dataclasses.fields(kind), dict(defaults.get(group, {}))
        if options.preset == "one-gpu":
            values |= ONE_GPU.get(group, {})
        if options.preset == "paper":
            values |= {f.name: f.metadata["paper"] for f in fields if f.metadata["paper"] is not None}
        if options.smoke:
            values |= SMOKE.get(group, {})
        given = {f.name: getattr(options, f"{group}.{f.name}") for f in fields} if flags else {}
        settings[group] = kind(**values | {name: value for name, value in given.items() if value is not None})
        check_values(group, settings[group])
    return settings
