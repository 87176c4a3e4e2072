"""How fast models read, write and learn: tokens a second, and the share of what the machine can do.

A hook on a model's body sees all that it reads while a stage runs, padding included, and a prefix that is shared once.
A token takes two operations (a product and a sum) for each weight of the body; where gradients flow, two more for the
gradient of what went through that weight, and two more for its own if it learns: 2, 4 or 6. Embedding, head and
attention scores are left out, so that the true share is somewhat larger. The peak is what one large matrix product
reaches here, in the run's number format. The seconds are those of the whole stage: loading, grading and the human, too.

Exercised by `python -m pytest tests/test_speed.py`.
"""
import time

import torch

from kernels import ranks


class Speed:
    """Tokens and operations of the stage that runs; machine: a Machine."""

    def __init__(self, machine):
        self.machine, self.hooks = machine, []
        self.written = self.read = self.learned = self.operations = 0
        if self.on_gpu():
            torch.cuda.reset_peak_memory_stats(machine.device)

    def on_gpu(self):
        """Whether a GPU is in use; asking for it does not take one into use."""
        return self.machine.device.startswith("cuda") and torch.cuda.is_initialized()

    def wrote(self, tokens):
        """So many tokens were sampled."""
        self.written += tokens

    def watch(self, model):
        """Count what this model reads until the stage ends; returns the model."""
        weights = list(model.base_model.parameters())
        embedding = model.get_input_embeddings().weight.numel()
        size = sum(weight.numel() for weight in weights) - embedding
        learning = sum(weight.numel() for weight in weights if weight.requires_grad)
        if model.get_input_embeddings().weight.requires_grad:
            learning -= embedding

        def count(module, inputs, output):
            tokens = output[0].shape[:2].numel()
            if torch.is_grad_enabled():
                self.learned += tokens
                self.operations += tokens * (4 * size + 2 * learning)
            else:
                self.read += tokens
                self.operations += tokens * 2 * size
        self.hooks.append(model.base_model.register_forward_hook(count))
        return model

    def end(self, seconds):
        """The stage has ended: {"written", "read", "learned": tokens a second, "share": of the peak, "gib": the most
        memory that tensors took on a GPU}, without what is 0; {} where no model did anything."""
        for hook in self.hooks:
            hook.remove()
        counted = ranks.of_all((self.written, self.read, self.learned))
        rates = {name: sum(counts) / seconds for name, counts in zip(("written", "read", "learned"), zip(*counted))}
        if self.operations:
            if self.on_gpu():
                rates["gib"] = torch.cuda.max_memory_allocated(self.machine.device) / 2 ** 30
            rates["share"] = self.operations / seconds / peak(self.machine)
        self.__init__(self.machine)
        return {name: float(f"{rate:.3g}") for name, rate in rates.items() if rate}


def peak(machine, tries=3):
    """Operations a second of a large matrix product: the best of some tries, as others may be busy here, too."""
    n = 1024 if machine.device == "cpu" else 8192
    square = torch.ones(n, n, dtype=getattr(torch, machine.dtype), device=machine.device)
    float((square @ square)[0, 0])  # the first one prepares
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        float((square @ square)[0, 0])  # reading a number waits for it
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def in_words(found):
    """What `end` has returned."""
    if not found:
        return ""
    rates = [f"{found[name]:,.0f} {name}" for name in ("written", "read", "learned") if found.get(name, 0) >= 1]
    memory = f"; {found['gib']:.1f} GiB" if "gib" in found else ""
    return f"tokens/s: {', '.join(rates)}; {100 * found['share']:.0f} % of the peak{memory}"
