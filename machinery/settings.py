"""Which settings the files of a stage depend on, and what has to go when one of them changes.

A stage depends on fields of its own and on all that the stages before it depend on. When it starts, it writes their
values to settings/STAGE.json beside its files, and whoever comes later with others is refused, with the one command
that makes room for them. A field that the file does not know is younger than the run, which was made with its default;
what only the file knows does not count any more. Settings of a stage that left nothing bind nobody.

Exercised by `python -m pytest tests/test_runs.py`.
"""
import dataclasses
import fnmatch
import os
import shlex
from pathlib import Path

from machinery.files import InputError, fingerprint, holds_something, note, read_json, split_specs, write_json
from machinery.train import name_of

# settings on which several stages depend: how a model is loaded, how it is trained, who replies, how a dialogue goes,
# and which tasks are held out
LOADED = ("dtype", "attention")
TRAINED = (*LOADED, "lora")
HUMAN = ("human", "human.max_tokens", "human.temperature", "human.prompt", "human.leaks")
PLAYED = (*HUMAN, "instructions", "clip", "rollout.max_turns", "rollout.max_tokens", "rollout.call_seconds",
          "rollout.answer_on_code", "rollout.last_turn_notice")
HELD_OUT = ("tasks", "heldout", "eval.tasks", "eval.first", "eval.split")


def flat(settings, **more):
    """{field: value} of groups of settings ({name: dataclass}), in the words in which runs are compared."""
    found = dict(more)
    for group, values in settings.items():
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            name = name_of(group, field)
            is_file = group == "given" or name == "human.prompt"
            found[name] = fingerprint(value) if is_file else value
    for name in ("human", "heldout_human"):
        found[name] = who(found[name] or "", found["human.model"])
    return found


def who(specs, model):
    """The humans of SPEC,SPEC,... in these words, None where nobody is named. A server may move to another address, its
    model may not change."""
    found = []
    for spec in split_specs(specs):
        if "://" in spec:
            found.append(f"server: {model}")
        else:
            found.append(fingerprint(spec) or "")
    return ",".join(found) or None


def no_held_out(given, first):
    """Whether there are tasks of the user's to train on, but none to evaluate on. first: how many of them are kept for
    that."""
    return bool(given.tasks and not given.heldout and not first)


def check_tasks_given(given, first, stage, trains=True):
    """InputError where a stage needs tasks that the user did not bring; says what is left out for want of them.
    trains: something is to be learned."""
    if trains and given.heldout and not (given.tasks or given.trajectories) and stage not in ("base", "play"):
        raise InputError("--heldout without --tasks or --trajectories: training tasks are missing")
    wanted = stage in ("eval", "credit", "best-of-n", "table", "play") or stage.startswith("study ")
    if no_held_out(given, first) and wanted:
        raise InputError(f"--tasks without --heldout: {stage} needs held-out tasks, a ColBench file: --heldout FILE")
    if no_held_out(given, first) and stage in ("all", "report"):
        note("sweet: note: --tasks without --heldout: held-out tasks are missing, so eval and credit are left out")


def stages_of_run(stages, run):
    """The stages (name -> Stage) as they hang together in this run.

    What does not depend on the critic is trained and evaluated without --critic. Without held-out tasks nothing is
    evaluated, and what is not evaluated need not be trained for that. A model that is tuned is made from documents and
    from the user's model; one that is taken as it is, from the model alone.
    """
    left_out = {"rft", "multiturn"} if run.further else set()
    if no_held_out(run.given, run.settings["eval"].first):
        left_out |= {"eval", "credit"}
    found = {}
    for name, stage in stages.items():
        unseen = set()
        if name == "eval" and not run.further:
            unseen = run.methods.keys() - run.settings["eval"].names
        after = [earlier for earlier in stage.after if earlier not in left_out | unseen]
        found[name] = dataclasses.replace(stage, after=after)
    if run.tunes:
        found["base"] = dataclasses.replace(found["base"], given="", own=("model", *TRAINED))
    elif run.given.model and getattr(run.options, "base.documents") is not None:
        found["base"] = dataclasses.replace(found["base"], own=("model", "base.documents"))
    return found


def dependencies(name, stages, values):
    """{field: value} of what the files of stage `name` depend on, out of all `values`."""
    stage, found = stages[name], {}
    for earlier in stage.after:
        found |= dependencies(earlier, stages, values)
    replaced = () if values.get(stage.given) else stage.replaced
    for pattern in ("task", "seed", *stage.own, *replaced):
        found |= {field: values[field] for field in fnmatch.filter(values, pattern)}
    return found


def leftovers(output):
    """What a stage left: its output, finished, begun or kept aside; not what could not be read."""
    found = [output, *sorted(output.parent.glob(f"{output.name}.*"))]
    return [path for path in found if ".unreadable" not in path.suffix and holds_something(path)]


def same(then, now):
    """Whether two settings are one: a folder may be named in several ways, and a file may have gone since."""
    if isinstance(then, str) and isinstance(now, str):
        known = os.path.exists(now) or not then.startswith(f"{Path(now).name} (sha256 ")
        return os.path.abspath(then) == os.path.abspath(now) or not known
    return then == now


class Record:
    """The settings that the stages of a run are made with.

    stages: {name: Stage}; values, defaults: {field: value} as asked for now, and as without a flag; outputs: a function
    of a stage's name: where it leaves its files in this run, then where it does with other critics, if elsewhere;
    redo: the stages that are to be made again, so that what they left does not count.
    """

    def __init__(self, stages, values, defaults, outputs, redo=()):
        self.stages, self.values, self.defaults, self.outputs = stages, values, defaults, outputs
        self.redo = self.followers(redo)

    def file(self, name):
        return self.outputs(name)[0].parent / "settings" / f"{name}.json"

    def changes(self, name):
        """{field: text} for each field whose value is not the one that the files of stage `name` were made with."""
        begun = name not in self.redo and any(map(leftovers, self.outputs(name)[:1]))
        theirs = read_json(self.file(name), {}) if begun else {}
        if not theirs:  # nothing is there, or nothing is known of it
            return {}
        then = {**self.defaults, **theirs}
        now = dependencies(name, self.stages, self.values)
        return {
            field: f"{field} = {then[field]!r}, now it is {now[field]!r}"
            for field in sorted(now)
            if not same(then[field], now[field])
        }

    def closure(self, names, ways):
        """These stages with all that they lead to: ways(stage) are the names that one stage leads to."""
        found = set(names)
        for _ in self.stages:
            for name in list(found):
                found.update(ways(name))
        return [name for name in self.stages if name in found]

    def needs(self, name):
        return self.closure([name], lambda stage: self.stages[stage].after)

    def followers(self, names):
        def ways(name):
            return [later for later, stage in self.stages.items() if name in stage.after]
        return self.closure(names, ways)

    def check(self, name):
        """Refuse to mix: InputError where files of a stage, or of one that it reads from, were made with other
        settings, with all that has to go."""
        changed, stale = {stage: self.changes(stage) for stage in self.stages}, {}
        for stage in self.needs(name):
            stale |= changed[stage]
        if stale:
            made = [stage for stage in self.stages if stale.keys() & changed[stage].keys()]
            first = [stage for stage in made if not set(self.needs(stage)) & set(made) - {stage}]
            command = shlex.join(["rm", "-r", *self.what_follows(made)])
            raise InputError(f"{self.file(made[0])}: {made[0]} was made with {'; '.join(stale.values())}; use another "
                             f"--run, --redo {','.join(first)} (removes these and makes them again), or make room: "
                             f"{command}")

    def claim(self, name):
        """The same, and the settings are written down, unless the stage is done."""
        self.check(name)
        if name == "report" or not self.outputs(name) or self.outputs(name)[0].exists():
            return
        write_json(self.file(name), dependencies(name, self.stages, self.values))

    def what_follows(self, made):
        """The paths of all that these stages left, and of all that was made from it, here and, with other critics,
        beside it."""
        outputs = [output for stage in self.followers(made) for output in self.outputs(stage)[:1]]
        for stage in made:
            # what SWEET is made from, whatever the critic
            if len(self.outputs(stage)) == 1 and "candidates" in self.followers([stage]):
                outputs += [output for follower in self.followers([stage]) for output in self.outputs(follower)]
        return dict.fromkeys(str(path) for output in outputs for path in leftovers(output))

    def check_redo(self, names, stage):
        """InputError where one of these is no stage that `stage` makes."""
        makes = self.needs("report" if stage == "all" else stage) if stage in (*self.stages, "all") else []
        for name in names:
            if name not in makes or stage == "report" or not self.outputs(name):
                raise InputError(f"--redo {name}: expected a stage that '{stage}' makes in this run; they are "
                                 f"{', '.join(filter(self.outputs, makes)) if stage != 'report' else 'none'}")
