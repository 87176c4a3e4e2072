"""What can be known when a run starts is checked when it starts: a fault is one line, before any work.

Only what the stages that are still to do will need is checked, so that a finished run can be read anywhere, whatever
has become of its server or its GPU.

Exercised by `python -m pytest tests/test_install.py`.
"""
import dataclasses
import os
import tempfile

import torch

from kernels import ranks
from machinery.files import InputError, note
from machinery.optional import first_line, load, require
from machinery.policy_server import policy_server
from machinery.settings import check_tasks_given
from machinery.train import check_adapters, load_model

DIALOGUES = {"rollout", "eval", "credit", "best-of-n"}  # the stages that talk with the human and grade
HELD_OUT = {"eval", "best-of-n"}  # of these, those that talk with --heldout-human


def stages_to_do(run, stages, stage):
    """The names of the stages that `python sweet.py STAGE` has to run, of these (name -> Stage)."""
    if stage == "play":
        return {"play"}
    if stage == "report":  # of what is there
        return set()
    if stage == "table" and os.path.exists(run.root / "table.md"):
        return set()
    whole = stage in ("all", "table") or stage.startswith("study ")
    names, found = ["report" if whole else stage], set()
    while names:
        name = names.pop()
        given = {"base": run.initial, "rollout": run.given.trajectories}.get(name)
        made = os.path.exists(run.path(stages[name].output)) and name not in run.record.redo
        if not given and not made:
            found.add(name)
        names += stages[name].after
    return found - {"report"}  # it only reads


def check_start(run, stage, todo):
    """InputError where a stage that is to do would fail for a reason that is known already."""
    trains = stage != "eval" or "rollout" in run.record.needs(stage)
    check_tasks_given(run.given, run.settings["eval"].first, stage, trains)
    alone = stage in ("table", "play") or stage.startswith("study ")
    if ranks.count() > 1 and (alone or "me" in (run.given.human, run.given.heldout_human)):
        raise InputError(f"{stage if alone else '--human me'}: not under torchrun, which starts several processes; "
                         "expected plain python")
    if run.machine.shard and (ranks.count() == 1 or run.machine.lora):
        raise InputError("--shard: expected several processes (torchrun), and no --lora")
    folder = run.root if stage == "table" else run.variant
    check_folder(folder)
    if todo:
        check_folder(folder, write=True)
        check_device(run.machine.device)
        check_attention(run.machine)
        if run.machine.lora:
            check_adapters("--lora")
        if run.machine.track != "off":
            require(run.machine.track, "--track")
    if run.settings["rollout"].answer_on_code and "test_cases" in run.world.OPTIONAL:
        raise InputError("--answer-on-code: the answers of this --task are no functions; expected one with test cases")
    if "eval" in todo and run.world.PAIRED and "base" not in run.settings["eval"].names:
        raise InputError(f"--eval-methods {run.settings['eval'].methods}: expected base among them, with which "
                         "this --task compares the others")
    for group in sorted(todo & {"critic", "actor", "multiturn"}):
        load(run.settings[group].loss, f"--{group}-loss")
    if todo & {"base", "play", *DIALOGUES}:
        run.world.check_installed(run.given.clip)
    if stage not in ("table", "play", "report") and not stage.startswith("study "):
        for name in [*sorted(todo), "report" if stage == "all" else stage]:
            run.record.check(name)  # where files were made with other settings, that is what to say
    if todo and run.given.model and (run.initial or "base" in todo):
        load_model(run.given.model, run.machine, True, run.seed)
    if todo & {"samples", *DIALOGUES}:
        policy_server(run.machine)  # InputError where nobody is there
    for held_out in {name in HELD_OUT and bool(run.given.heldout_human) for name in todo & DIALOGUES}:
        run.human(held_out)


def machine_here(machine):
    """A machine that a run remembers, on the CPU where its device is not to be had."""
    try:
        check_device(machine.device)
    except InputError as error:
        note(f"sweet: note: {error}; here on the CPU")
        return dataclasses.replace(machine, device="cpu")
    return machine


def check_device(device):
    try:
        torch.ones(1, device=device).item()  # "meta" makes tensors, but of nothing
    except Exception as error:  # torch has another one for each kind of device
        here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(f"--device {device}: not to be had here ({first_line(error)}); expected "
                         f"{' or '.join(here)}") from None


def check_attention(machine):
    """Try the attention implementation on a tiny model, where the run's models will be."""
    if not machine.attention:
        return
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    try:
        config._attn_implementation = machine.attention
        with torch.random.fork_rng():
            model = LlamaForCausalLM(config).to(machine.device, getattr(torch, machine.dtype))
        model(torch.zeros(1, 2, dtype=torch.long, device=machine.device), use_cache=False)
    except Exception as error:  # transformers, or the package that it calls
        raise InputError(f"--attention {machine.attention}: cannot be used here ({first_line(error)}); expected eager, "
                         "sdpa, or another one that is installed and that the device has") from None


def check_folder(folder, write=False):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if write:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--run {folder}: expected a folder that can be written ({error.strerror})") from None
