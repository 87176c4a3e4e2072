"""One training loop for every stage: AdamW, warm-up, linear decay, checkpoints that resume exactly.

The stages differ in their loss alone, so they hand it over: `fit(model, examples, loss_fn, ...)` calls `loss_fn(model, batch)` on
lists of examples and takes a step on what it returns. The order of examples depends on (seed, epoch) only, and a checkpoint holds all
that an uninterrupted run would have (weights, optimizer, step, log), so that a run killed anywhere ends in the same weights.

Exercised by `python -m pytest tests/test_fit.py`.
"""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


def load_model(path, device="cpu"):
    """A causal language model and its tokenizer from a Hugging Face directory or name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(path).to(device).eval(), AutoTokenizer.from_pretrained(path)


def batches_of(n, batch_size, epochs, seed, sizes=None):
    """Lists of indices, epoch after epoch, each epoch a fresh permutation that depends on (seed, epoch) alone.

    With sizes (tokens per example), examples of like size share a batch, which saves padding; batches stay in random order.
    """
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(n)
        if sizes is not None:
            order = order[np.argsort(np.asarray(sizes)[order], kind="stable")]
        batches = [order[i:i + batch_size].tolist() for i in range(0, n, batch_size)]
        yield from (batches if sizes is None else [batches[i] for i in rng.permutation(len(batches))])


def fit(model, examples, loss_fn, out, *, lr, batch_size, epochs, seed, warmup=0.05, clip=1.0, micro_batch=None, sizes=None,
        save=None, checkpoint_seconds=20.0, label="fit"):
    """Train `model` in place on `examples`; returns the log, one dictionary a step.

    loss_fn(model, list of examples) -> (loss, {name: float}), the loss a mean over the examples. lr: peak learning rate, reached
    after the share `warmup` of the steps, then falling linearly to 0. micro_batch: examples per backward pass (memory), the step
    is the same. out: a folder for the checkpoint while training; save(folder) then writes the result, which appears in one rename.
    """
    out, work = Path(out), Path(f"{out}.partial")
    work.mkdir(parents=True, exist_ok=True)
    plan = list(batches_of(len(examples), batch_size, epochs, seed, sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    warm = max(1, round(warmup * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(plan) - step) / max(1, len(plan) - warm)))
    log, checkpoint = [], work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        log = state["log"]
    model.train()
    saved = time.monotonic()
    bar = tqdm(total=len(plan), initial=len(log), desc=f"{label:>12}", unit="step", mininterval=0.5)
    for batch in plan[len(log):]:
        parts = [batch[i:i + (micro_batch or len(batch))] for i in range(0, len(batch), micro_batch or len(batch))]
        row = {}
        for part in parts:
            loss, metrics = loss_fn(model, [examples[i] for i in part])
            share = len(part) / len(batch)
            (share * loss).backward()
            for name, value in {"loss": float(loss.detach()), **metrics}.items():
                row[name] = row.get(name, 0.0) + share * value
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        log.append(row)
        bar.update()
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "grad_norm"}, refresh=False)
        if time.monotonic() - saved > checkpoint_seconds:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                        "log": log}, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)
            saved = time.monotonic()
    bar.close()
    model.eval()
    if save is not None:
        save(work)
        (work / "log.json").write_text(json.dumps(log), encoding="utf-8")
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(work, out)
    return log
