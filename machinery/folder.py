"""What a run folder knows of itself: the flags that it was made with, what is done, how long it took.

settings.json (one in the run, and one in the folder of each further critic) holds every flag that was given, so that no
later command needs any. A flag that is given anew goes before; it is remembered, too, unless it contradicts what is
there. A run older than this file remembers by what its stages wrote down (machinery/settings.py).

Exercised by `python -m pytest tests/test_command.py`.
"""
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

from kernels import ranks
from machinery.bars import note
from machinery.files import InputError, read_json, split_specs, write_json
from machinery.hub import local_file
from machinery.process import KEPT, LOCK, holder, one_line
from machinery.settings import dependencies, leftovers
from machinery.speed import in_words as speed_in_words
from machinery.train import Given

FILE = "settings.json"
REDO = "redo.json"  # while what --redo removed is made again: the command that does
# seconds of the stages on two cores, for their proportions
DEFAULT_RUN = {"base": 73, "rollout": 6, "critic": 17, "samples": 35, "candidates": 9, "pairs": 1, "actor": 55,
               "rft": 9, "multiturn": 17, "eval": 21, "credit": 65, "best-of-n": 250}
SMOKE_RUN = {"base": 31, "rollout": 3, "critic": 2, "samples": 1, "candidates": 0.3, "pairs": 0.1, "actor": 0.4,
             "rft": 0.3, "multiturn": 1, "eval": 4, "credit": 1.5, "best-of-n": 15}
FILES = ("tasks", "heldout", "trajectories", "candidates")  # flags that name files of JSON lines
OWN = ("stage", "run", "redo", "given", "running")  # what a command does not leave to the next one


# ------------------------------------------------------------------ what a run remembers

def peek(path):
    """The object in a JSON file, {} where there is none. Only reads."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(Path(path).read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def critic_folder(kind):
    """The folder, in a run, of what depends on a critic that is not the run's own: `mine:Shortest` is mine-Shortest."""
    return re.sub(r"[^\w.-]+", "-", kind)


def further_critics(root):
    """{kind of critic: its folder} of those that a run has beside its own."""
    found = {}
    for folder in sorted(Path(root).glob("*/")):
        for file in (folder / FILE, folder / "settings/critic.json"):
            kind = str(peek(file).get("critic.kind", ""))
            if kind and critic_folder(kind) == folder.name:
                found[kind] = folder
    return found


def remembered(root, kind, read):
    """{flag's name: value} of a run, as a critic of this kind was made with, if there is one."""
    halves = [root, *further_critics(root).values()]
    halves.sort(key=lambda half: half != root / critic_folder(kind or ""))
    for file in [half / FILE for half in halves if os.path.isfile(half / FILE)]:
        if kept := read(file):
            return kept
    found = {}
    for file in [file for half in reversed(halves) for file in sorted(half.glob("settings/*.json"))]:
        found |= read(file)
    # of files and servers, an older run knows the name alone
    return {name: value for name, value in found.items()
            if value is not None and "(sha256 " not in str(value) and not str(value).startswith("server: ")}


def recall(flags, argv):
    """A command line as `flags` reads it, completed by what its run remembers. One line on what is none."""
    with one_line(SimpleNamespace(run="stdout", running="")):
        options = flags.parse_args(argv)
        run = "runs/smoke" if options.smoke and "run" not in options.given else options.run
        reads = options.stage.partition(" ")[0] in ("report", "status", "export")
        if reads and not os.path.isdir(run):
            raise InputError(f"--run {run}: there is no such run")
        read = peek if options.stage == "status" else lambda path: read_json(path, {})
        kind = getattr(options, "critic.kind")
        kept = remembered(Path(run), kind, read) if os.path.isdir(run) else {}
        try:
            options = flags.parse_args(argv, kept) if kept else options
        except InputError as error:
            raise InputError(f"{run}: what it remembers cannot be used: {error}") from None
        for name in FILES:
            if value := getattr(options, name):
                setattr(options, name, local_file(value, f"--{name}"))
    options.run = run
    for field in dataclasses.fields(Given):
        if value := getattr(options, field.name):
            setattr(options, field.name, ",".join(map(absolute, split_specs(value))))
    return options


def absolute(value):
    """A path that is there, as a command from another folder can use it; anything else as it is."""
    return os.path.abspath(value) if value not in ("scripted", "me") and os.path.exists(value) else value


def flags_given(options):
    """{flag's name: value} of what a run is to remember."""
    return {name: value for name, value in vars(options).items() if value is not None and name not in OWN}


def keep(run):
    """Write down the flags, unless they contradict what is there (and hold for this command alone)."""
    now = flags_given(run.options)
    if now != peek(run.variant / FILE) and not any(map(run.record.changes, run.stages)):
        write_json(run.variant / FILE, now)


# ------------------------------------------------------------------ --redo

def asked(options):
    """What tells one --redo from another."""
    return {"redo": options.redo, **flags_given(options)}


def to_redo(run):
    """The stages that --redo names; none where this very command was stopped after it had removed what they left."""
    done = run.options.redo and peek(run.variant / REDO) == asked(run.options)
    return [name for name in run.options.redo.split(",") if name and not done]


def remove(path):
    """A file, or a folder, which is there whole or not at all."""
    if path.is_dir():
        path = path.rename(f"{path}.gone")
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def remembering(run):
    """While stages run: what --redo names has gone, and the flags are kept."""
    if run.todo:
        make_room(run)
        keep(run)
    try:
        yield
    finally:
        run.track.close()
    if (run.variant / REDO).exists() and not ranks.rank():  # unlink alone fails where a run can only be read
        (run.variant / REDO).unlink()


def make_room(run):
    """Remove what --redo names and all that was made from it, the last first: at a stop, what is left fits together."""
    if run.redo:
        gone = list(run.record.what_follows(run.redo))

        @ranks.by_first
        def clear():
            for path in reversed(gone):
                remove(Path(path))
        clear()
        note(f"sweet: removed: {shlex.join(gone)}" if gone else "sweet: note: --redo: nothing was there")
        write_json(run.variant / REDO, asked(run.options))
    run.record.redo = []


# ------------------------------------------------------------------ what is done, and what is left

def in_words(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def measured(run, name):
    """The seconds that a stage took where it was made with the same settings, but for the seed and the critic: in this
    run, or in one beside it. None where that is not known."""
    def size(values):
        return {field: value for field, value in values.items() if field not in ("seed", "critic.kind")}
    mine = size(dependencies(name, run.stages, run.record.values))
    for folder in [run.root, *sorted(run.root.absolute().parent.glob("*/"))]:
        for half in (folder, *further_critics(folder).values()):
            seconds = peek(half / "seconds.json").get(name)
            if seconds and size(peek(half / f"settings/{name}.json")) == mine:
                return seconds
    return None


def place(run, name):
    """Where a run is when a stage begins, and about how long the rest takes: as long as it did elsewhere, or, where
    that is not known, in proportion to what this run took so far. run.todo: {stage: its seconds, or None} of what it
    makes."""
    shares = SMOKE_RUN if run.options.smoke else DEFAULT_RUN
    took = {stage: value for stage, value in peek(run.root / "seconds.json").items() if stage in shares}
    pace = sum(took.values()) / sum(shares[stage] for stage in took) if took else None
    todo = list(run.todo)
    done = todo.index(name)
    left = [run.todo[stage] for stage in todo[done:]]
    if pace:
        left = [pace * shares[stage] if known is None else known for stage, known in zip(todo[done:], left)]
    time = "" if None in left else f", about {in_words(sum(left))} left"
    return f"sweet: {done + 1} of {len(todo)}, {name}{time}"


def of_stages(root, file):
    """{stage: what a file of this name says of it}, those of further critics, too."""
    found = peek(root / file)
    for kind, folder in further_critics(root).items():
        found |= {f"{name} ({kind})": value for name, value in peek(folder / file).items()}
    return found


def spent(root):
    """Where the time went."""
    seconds = of_stages(root, "seconds.json")
    rows = ", ".join(f"{name} {in_words(value)}" for name, value in seconds.items())
    return f"time: {rows}; {in_words(sum(seconds.values()))} in all" if seconds else "time: nothing was made yet"


def closing(run):
    """What the end of a run says beside its table."""
    lines = [spent(run.root)]
    speeds = of_stages(run.root, "speed.json")
    lines += [f"  {name}: {speed_in_words(speed)}" for name, speed in speeds.items() if speed]
    missing = []
    for name in run.record.needs("report"):
        if run.outputs(name) and not run.outputs(name)[0].exists():
            missing.append(name)
    if missing := [name for name in missing if name != "report"]:
        lines.append(f"not made yet: {', '.join(missing)} (python sweet.py --run {run.root} makes them)")
    if run.options.smoke:
        lines.append("--smoke: everything is in miniature, and these numbers mean nothing")
    return "\n".join([*lines, f"report: {run.path('report.html')}"])


# ------------------------------------------------------------------ status

def size_of(path):
    """Bytes of a file, or of all in a folder, in words."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def state(run, name):
    """(state, time, size, file, speed) of a stage, in words."""
    if not run.outputs(name):
        return "given", "", "", getattr(run.options, run.stages[name].given), ""
    output = run.outputs(name)[0]
    if output.exists():
        seconds = peek(output.parent / "seconds.json").get(name)
        speed = speed_in_words(peek(output.parent / "speed.json").get(name))
        return "done", "" if seconds is None else in_words(seconds), size_of(output), output, speed
    begun = leftovers(output)
    if begun:
        return "begun", "", "", ", ".join(map(str, begun)), ""
    return "to do", "", "", "", ""


def show_status(root, open_run):
    """What there is of a run, or of all the seeds of a table, and what comes next. Only reads."""
    for folder in sorted(root.glob("seed*/")) or [root]:
        further = further_critics(folder)
        if (folder / FILE).exists() or not further:
            status(open_run(["status", f"--run={folder}"]), folder)
        for kind, half in further.items():
            status(open_run(["status", f"--run={folder}", f"--critic={kind}"]), half)


def status(run, title):
    """The same of a run with one critic."""
    names = [name for name in run.record.needs("report") if name != "report"]
    found = {name: state(run, name) for name in names}
    flags = [f"{flag} {value}" for flag, value in flags_given(run.options).items() if value is not False]
    print(f"{title}: {', '.join(flags)}")
    for name, row in found.items():
        print("  {:10}  {:5}  {:>6}  {:>9}  {}  {}".format(name, *row).rstrip())
    left = [name for name in names if found[name][0] in ("begun", "to do")]
    busy = holder(run.root)
    if busy:
        print(f"  lock: held by {busy}; it works here, others wait")
    elif (run.root / LOCK).exists():
        print(f"  lock: free; {LOCK} just stays there")
    if any(row[0] == "begun" for row in found.values()):
        print(f"  begun: {'being made now' if busy else f'stopped on the way; {KEPT}'}")
    print(f"  next: {f'{left[0]} (python sweet.py --run {run.root})' if left else 'nothing, everything is done'}")
