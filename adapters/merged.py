"""Adapters written into plain weights, for tools that know no LoRA: `python sweet.py export merged`.

LoRA learns W + s B A, with W frozen and s, B, A in the adapter's files. Adding s B A to W once gives a model of the old
shape and speed, in the dtype of the run (in bfloat16 the sum is rounded to it). Each folder of adapters, such as
RUN/actor/, gives RUN/merged/actor/, a Hugging Face directory like any other, with its model card.

Exercised by `python -m pytest tests/test_adapters_merged.py`.
"""
import shutil
from pathlib import Path

from adapters import cards
from machinery.files import InputError, put
from machinery.optional import require
from machinery.train import load_model, model_below, save_to
from studies.critics import Headed


def merge(folder, machine):
    """(model, tokenizer) of a folder of adapters, which are added to the weights that they stand on."""
    from transformers import AutoTokenizer
    peft = require("peft", "export merged")
    below, _ = load_model(model_below(folder), machine)
    adapted = peft.PeftModel.from_pretrained(below, str(folder))
    return adapted.merge_and_unload(), AutoTokenizer.from_pretrained(folder)


def export(run):
    """Write merged/STAGE of each model of a run that is adapters. InputError where there is none."""
    stages = [stage for stage in cards.models(run) if cards.is_adapters(run.path(stage))]
    if not stages:
        raise InputError(f"{run.root}: export merged: holds no adapters; --lora RANK learns such")
    for stage in stages:
        run.record.check(stage)
    figures = cards.measured(run)
    for stage in stages:
        folder, out = run.path(stage), run.variant / "merged" / stage
        work = Path(f"{out}.partial")
        work.mkdir(parents=True, exist_ok=True)
        save_to(*merge(folder, run.machine))(work)
        if (folder / Headed.FILE).exists():  # what a critic has beside its model
            shutil.copy(folder / Headed.FILE, work)
        cards.write(run, stage, work, figures)
        shutil.rmtree(out, ignore_errors=True)
        put(work, out)
        print(f"{folder} is merged: {out}")
