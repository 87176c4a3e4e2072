"""One training loop for every stage: AdamW, warm-up, linear decay, checkpoints that resume exactly.

The stages differ in their loss alone, so they hand it over: `fit(model, examples, loss_fn, ...)` calls
`loss_fn(model, batch)` on lists of examples and takes a step on what it returns. The order of examples depends on
(seed, epoch) only, and a checkpoint holds all that an uninterrupted run would have (weights, optimizer, step, log),
so that a run killed anywhere ends in the same weights.

Exercised by `python -m pytest tests/test_fit.py`.
"""
import json
import os
import shutil
import time
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


def arg(default, text, paper=None, **extra):
    """A hyper-parameter of a stage: its default (for the small world), what it means, and the paper's value."""
    return field(default=default, metadata={"text": text, "paper": paper, **extra})


def load_model(path, device="cpu"):
    """A causal language model and its tokenizer from a Hugging Face directory or name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(path).to(device).eval(), AutoTokenizer.from_pretrained(path)


def batches_of(n, batch_size, epochs, seed, sizes=None):
    """Lists of indices, epoch after epoch, each epoch a fresh permutation that depends on (seed, epoch) alone.

    With sizes (tokens per example), examples of like size share a batch, which saves padding; batches stay in random
    order.
    """
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(n)
        if sizes is not None:
            order = order[np.argsort(np.asarray(sizes)[order], kind="stable")]
        batches = [order[i:i + batch_size].tolist() for i in range(0, n, batch_size)]
        yield from (batches if sizes is None else [batches[i] for i in rng.permutation(len(batches))])


class Checkpoint:
    """What a run needs to go on as if it had never stopped: weights, optimizer, schedule, log. Written at most every
    `seconds`."""

    def __init__(self, path, seconds, **parts):
        self.path, self.seconds, self.parts, self.saved = Path(path), seconds, parts, time.monotonic()

    def load(self):
        """Put back what was saved, if anything; returns the log so far."""
        if not self.path.exists():
            return []
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["log"]

    def save(self, log):
        if time.monotonic() - self.saved > self.seconds:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            torch.save({"log": log, **parts}, f"{self.path}.new")
            os.replace(f"{self.path}.new", self.path)
            self.saved = time.monotonic()


def take_step(model, batch, loss_fn, micro_batch):
    """Gradient of the mean loss over a batch, `micro_batch` examples at a time; returns the step's figures."""
    row, size = {}, micro_batch or len(batch)
    for part in (batch[i:i + size] for i in range(0, len(batch), size)):
        loss, metrics = loss_fn(model, part)
        share = len(part) / len(batch)
        (share * loss).backward()
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            row[name] = row.get(name, 0.0) + share * value
    return row


def fit(model, examples, loss_fn, out, cfg, seed, save, *, label="fit", warmup=0.05, clip=1.0, micro_batch=None,
        sizes=None, checkpoint_seconds=20.0):
    """Train `model` in place on `examples` and let `save(folder)` write the result to `out`; returns the log, a row a
    step.

    loss_fn(model, list of examples) -> (loss, {name: float}), the loss a mean over the examples. cfg: .lr,
    .batch_size, .epochs; the learning rate rises to lr over the share `warmup` of the steps and then falls linearly
    to 0. micro_batch: examples per backward pass (memory); the step is the same. While training, OUT.partial holds a
    checkpoint; the result appears in one rename.
    """
    out, work = Path(out), Path(f"{out}.partial")
    work.mkdir(parents=True, exist_ok=True)
    plan = list(batches_of(len(examples), cfg.batch_size, cfg.epochs, seed, sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    warm = max(1, round(warmup * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(plan) - step) / max(1, len(plan) - warm)))
    checkpoint = Checkpoint(work / "checkpoint.pt", checkpoint_seconds, model=model, optimizer=optimizer,
                            schedule=schedule)
    log = checkpoint.load()
    model.eval()  # no dropout: it would move step 0, and log-probs would not be comparable with the reference's
    bar = tqdm(total=len(plan), initial=len(log), desc=f"{label:>12}", unit="step", mininterval=0.5)
    for batch in plan[len(log):]:
        row = take_step(model, [examples[i] for i in batch], loss_fn, micro_batch)
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        log.append(row)
        bar.update()
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "grad_norm"}, refresh=False)
        checkpoint.save(log)
    bar.close()
    save(work)
    (work / "log.json").write_text(json.dumps(log), encoding="utf-8")
    checkpoint.path.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)
    return log


def save_to(model, tokenizer):
    """A `save` for fit: write model and tokenizer as one Hugging Face directory."""
    def save(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return save
