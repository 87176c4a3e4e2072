"""One training loop for every stage: AdamW, warm-up, linear decay, checkpoints that resume exactly.

The stages differ in their loss alone, so they hand it over: `fit(model, examples, loss_fn, ...)` calls
`loss_fn(model, part, batch)` on lists of examples and takes a step on what it returns. The order of examples depends on
(seed, epoch) only, and a checkpoint holds all that an uninterrupted run would have (weights, optimizer, step, log),
so that a run killed anywhere ends in the same weights.

Loading and saving live here, too, because they decide what is in memory: one copy of the weights, and what the
optimizer needs for those that learn (docs/memory.md has the arithmetic).

Exercised by `python -m pytest tests/test_train.py tests/test_real.py`.
"""
import importlib
import json
import math
import os
import shutil
import time
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from kernels import ranks
from machinery.bars import note, progress
from machinery.files import InputError, put, set_aside
from machinery.optional import first_line, require
from machinery.template import end_of_turn


BARE = ("common", "given", "machine", "table")  # groups whose fields are named without them


def arg(default, **limits):
    """A hyper-parameter that is not just a number above 0: least=0 (0 is allowed), most: the largest, flag: its flag's
    name."""
    return field(default=default, metadata=limits)


def name_of(group, f):
    """The name, in files and messages, of a field of a group of hyper-parameters."""
    return f.name if group in BARE else f"{group}.{f.name}"


def flag_of(group, f):
    """Its flag."""
    name = f.metadata.get("flag", name_of(group, f))
    return "--" + name.replace(".", "-").replace("_", "-")


def check_values(group, settings):
    """InputError where a number is none that its field allows."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        most = f.metadata.get("most", math.inf)
        least = f.metadata.get("least")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not (value > 0 or value == least) or not value <= most or value == math.inf:
                above = "of at least 0" if least == 0 else "above 0"
                raise InputError(f"{flag_of(group, f)} {value}: expected a number {above}"
                                 + (f" and at most {most:g}" if most < math.inf else ""))


@dataclass(frozen=True)
class Given:
    """What you bring; the small world stands in for what is missing."""
    model: str = ""
    """Initial policy, and where the critic starts: a directory, name or GGUF file."""
    tasks: str = ""
    """Training tasks: a ColBench file, or OWNER/NAME[:FILE] of the hub."""
    heldout: str = ""
    """Held-out tasks: a ColBench file."""
    trajectories: str = ""
    """Offline dialogues, so that one can start at the critic: a ColBench file."""
    candidates: str = ""
    """States with candidate turns sampled elsewhere: a line {task, messages, candidates} each."""
    clip: str = ""
    """Frontend: grade by the cosine of this CLIP model ('': by matched boxes)."""
    instructions: str = ""
    """What the agent reads before the request, in place of the world's: a file, with {max_turns} if wanted."""
    human: str = "scripted"
    """scripted | me | URL | module:Class | a model; A,B: one of them a dialogue."""
    heldout_human: str = ""
    """Another one for eval and best-of-n ('': the same)."""


@dataclass(frozen=True)
class Machine:
    """How models are held and run here."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 or bfloat16; the optimizer keeps float32 weights either way."""
    attention: str = ""
    """Attention implementation: eager, sdpa, flash_attention_2... ('': the model's own choice)."""
    shard: bool = False
    """Under torchrun each process holds a part of every weight while a model learns: for one that is too large."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora: int = arg(0, least=0)
    """Learn adapters of this rank (needs peft) instead of all weights; 0: all. A --model that is adapters learns on
    in these, whatever the rank."""
    micro_batch: int = arg(0, least=0)
    """Examples a backward pass (the step stays the same); 0: the whole batch."""
    threads: int = 1
    """Threads of torch; another number rounds otherwise and gives other results."""
    rows: int = 512
    """Dialogues that are sampled side by side."""
    policy_server: str = ""
    """URL of a server that samples in the model's place: vLLM, or another that takes and returns token ids."""
    track: Literal["off", "trackio", "wandb", "tensorboard"] = "off"
    """Log what the bars show there, too; on this machine, unless the tracker's own variables say otherwise."""


PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8"))
PAPER, OFFICIAL = PRESETS["paper"], PRESETS["official"]


def load_model(path, cfg=None, train=False, seed=0):
    """A causal language model and its tokenizer from a Hugging Face directory or name, or a GGUF file. cfg: a Machine;
    train: with adapters and activation checkpointing, if cfg says so. InputError, in one line, on what cannot work."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    cfg = cfg or Machine()
    if cfg.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {cfg.dtype}: expected float32 or bfloat16")
    extra = {"attn_implementation": cfg.attention} if cfg.attention else {}
    adapted = (Path(path) / "adapter_config.json").exists()
    if adapted:
        check_adapters(path)
    below = model_below(path) if adapted else str(path)
    if below.endswith(".gguf"):
        require("gguf", below, check_gguf)
    try:
        if below.endswith(".gguf"):
            model, tokenizer = read_gguf(below, dtype=cfg.dtype, **extra)
            if adapted:
                model.load_adapter(str(path))
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=cfg.dtype, **extra)
    except Exception as error:  # each format has its own, and a damaged file can have any
        raise InputError(f"{path}: cannot be loaded as a causal language model with its tokenizer "
                         f"({first_line(error)})") from None
    check_tokenizer(tokenizer, path)
    tokenizer.name_or_path = str(path)  # also of adapters, whose model is called like the one below them
    if getattr(model, "peft_config", None):
        restore_adapters(model, path, train)
    elif train and cfg.lora:
        add_adapters(model, cfg.lora, seed)
    if train and cfg.checkpointing:
        enable_checkpointing(model)
    if train and cfg.shard:
        ranks.shard(model, cfg.device)
    return model.to(cfg.device).eval(), tokenizer


def model_below(path):
    """The name of the model that a directory of adapters stands on."""
    try:
        return str(json.loads((Path(path) / "adapter_config.json").read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: its adapter_config.json names no model ({type(error).__name__}: {error})") from None


def check_gguf(_):
    """What transformers needs to read GGUF files, beside the package."""
    importlib.import_module("accelerate")
    return importlib.import_module("transformers").GgufConfig


def read_gguf(path, **extra):
    """(model, tokenizer) of a GGUF file, weights dequantized, as if they came from a Hugging Face directory: so that is
    what is saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    folder, name = os.path.split(os.path.abspath(path))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), **extra)
    model.name_or_path = os.path.abspath(path)  # what adapters call the model below them
    return model, tokenizer


def check_tokenizer(tokenizer, path):
    """InputError where a tokenizer cannot write dialogues; says what stands in for a pad or EOS token that is
    missing."""
    if not tokenizer.chat_template:
        raise InputError(f"{path}: its tokenizer has no chat template; take an instruct model, or put the template "
                         "into chat_template.jinja beside it")
    try:
        end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            note(f"note: {path}: its tokenizer has no {name}: its end of turn, {end}, stands in")
            setattr(tokenizer, name, end)


def context_of(model):
    """How many tokens the model reads at most; infinity where its configuration names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, positions depend on what else is in the batch
        limit = min(limit, rope.get("original_max_position_embeddings", limit))
    return limit


def check_length(tokens, limit, what):
    """InputError where `what`, of so many tokens, is longer than a model's context."""
    if tokens > limit:
        raise InputError(f"{what}: {tokens} tokens are more than the {limit} that the model reads; leave it out, lower "
                         "--rollout-max-turns or --rollout-max-tokens, or take a model with a longer context")


def check_context(model, tokens, what):
    check_length(tokens, context_of(model), what)


def check_views(model, views, names):
    """InputError, before any work, where one of these (input_ids, turn_ids) is longer than the model's context. names:
    what each one is, file and line."""
    limit = context_of(model)
    for (input_ids, _), name in zip(views, names):
        check_length(len(input_ids), limit, name)


def check_finite(numbers, what):
    """InputError where `what`, some numbers that a model gave, has one that is not finite."""
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{what}: log-probs are not finite; train anew, with a lower learning rate, or take another "
                         "--model")


def check_adapters(flag):
    """InputError, naming `flag`, unless peft is there and transformers can use it: seen on the smallest of models."""
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.random.fork_rng():
        tiny = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=2, intermediate_size=2, num_hidden_layers=1,
                                            num_attention_heads=1))
        require("peft", flag, lambda peft: tiny.add_adapter(peft.LoraConfig(target_modules="all-linear")))


def add_adapters(model, rank, seed):
    """Freeze the model and add LoRA adapters to its linear layers; they start at zero, so the model is still pi_ref."""
    check_adapters("--lora")
    from peft import LoraConfig
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # few of them, and small steps get lost in bfloat16


def restore_adapters(model, path, train):
    """The adapters of a loaded model as they were trained, in float32: loading has rounded them to the model's dtype.
    train: they learn on, from where they are."""
    from peft import load_peft_weights, set_peft_model_state_dict
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad = train
    weights = load_peft_weights(str(path), device="cpu")
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): w for name, w in weights.items()})


def enable_checkpointing(model):
    """Recompute activations in the backward pass; transformers 5.24 gave the method another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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
    `seconds`, as one file, from which any number of processes can go on. owner: the rank that owns each weight."""

    def __init__(self, path, seconds, owner, **parts):
        self.path, self.seconds, self.parts, self.saved = Path(path), seconds, parts, time.monotonic()
        self.owner = owner

    def load(self):
        """Put back what was saved, if anything; returns the log so far. A file that cannot be read, or is not of these
        weights, is set aside: training starts from the start."""
        if not os.path.lexists(self.path):
            return []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.check(state)
        except Exception as error:  # zip, pickle and torch have one each, and a damaged file can have any
            set_aside(self.path, f"{type(error).__name__}: {error}")
            return []
        weights, whole = self.parts["weights"], self.mine(state["optimizer"]["state"])
        state["weights"] = {name: ranks.part_of(value, weights[int(name)]) for name, value in state["weights"].items()}
        for i, moments in whole.items():
            whole[i] = {name: ranks.part_of(value, weights[i]) for name, value in moments.items()}
        state["optimizer"]["state"] = whole
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["log"]

    def mine(self, values):
        """Of {number of a weight: value}, what this process owns."""
        return {i: value for i, value in values.items() if self.owner[int(i)] == ranks.rank()}

    def check(self, state):
        """An exception unless this is a state of these parts. Nothing is put back before all of it is known to fit."""
        shapes = {name: weight.shape for name, weight in self.parts["weights"].state_dict().items()}
        found = {name: weight.shape for name, weight in state["weights"].items()}
        if found != shapes:
            raise ValueError("weights of another model")
        for i, moments in state["optimizer"]["state"].items():
            if {moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {shapes[str(i)]}:
                raise ValueError("an optimizer of another model")
        groups = [group["params"] for group in state["optimizer"]["param_groups"]]
        steps = state["schedule"]["last_epoch"]
        if groups != [list(range(len(shapes)))] or steps != len(state["log"]):
            raise ValueError("steps of another training")

    def state(self):
        """The state of each part; in the first process it is whole, with what the others own."""
        found = {name: part.state_dict() for name, part in self.parts.items()}
        moments = found["optimizer"]["state"]
        for theirs in ranks.to_first({"weights": self.mine(found["weights"]), "moments": moments}):
            found["weights"].update(theirs["weights"])
            moments.update(theirs["moments"])
        return found

    def save(self, log):
        start = time.monotonic()
        due, *_ = ranks.of_all(start - self.saved > self.seconds)
        if due:
            state = {"log": log, **self.state()}
            if ranks.rank() == 0:
                torch.save(state, f"{self.path}.new")
                put(f"{self.path}.new", self.path)
            self.saved = time.monotonic()
            if self.seconds:  # not much more than a twentieth of the time goes into large checkpoints
                self.seconds = max(self.seconds, 20 * (self.saved - start))

    def remove(self):
        """The checkpoint, and what is left of those that were set aside or half written."""
        for path in self.path.parent.glob(f"{self.path.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Once:
    """Hands each step on to `track`, if there is one, once: also where a killed training takes some steps again. How
    many were handed on is the size of a file that grows by a byte before each, and goes with the checkpoint."""

    def __init__(self, checkpoint, track, label):
        self.track, self.label, self.file = track, label, Path(f"{checkpoint.path}.handed_on")
        self.done = self.file.stat().st_size if self.file.exists() else 0

    def __call__(self, step, row):
        if self.track and step > self.done:
            with open(os.devnull if ranks.rank() else self.file, "ab") as file:
                file.write(b".")
            self.track(self.label, step, row)


def stop_unless_finite(checkpoint, label, cfg, step, figures):
    """InputError where one of a step's figures is not finite. Nothing of that training is kept: a checkpoint would bind
    the next try to the settings that led there."""
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    if not broken:
        return
    shutil.rmtree(checkpoint.path.parent, ignore_errors=True)
    updated = step or "weights" in broken  # before an update, lr has had no say
    remedies = [
        f"lower --{label}-{name} (now {getattr(cfg, name):g})"
        for name in (("lr",) if updated else ("beta", "nll"))
        if hasattr(cfg, name)
    ]
    if not updated:
        remedies.append("take another --model")
    raise InputError(f"step {step + 1} of {label}: {broken[0]} not finite ({figures[broken[0]]}); nothing of this "
                     f"training is kept: {' or '.join(remedies)}, and start again")


def take_step(model, batch, loss_fn, micro_batch):
    """Gradient of the mean loss over a batch, `micro_batch` examples at a time; returns the step's figures. A mean over
    tokens is one of the whole batch, which is why the loss sees the batch beside its part. Of several processes each
    takes some of the parts; their gradients are still to be added up. Who has no part left runs one for nothing,
    because layers that are sharded need everybody."""
    row, share = {}, -(-len(batch) // ranks.count())
    size = min(micro_batch or share, share)
    stride = size * ranks.count()
    rounds = -(-len(batch) // stride)
    for i in progress(range(size * ranks.rank(), stride * rounds, stride), "micro-batches"):
        part = batch[i:i + size]
        loss, metrics = loss_fn(model, part or batch[:1], batch)
        share = len(part) / len(batch)
        (share * loss).backward()
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            row[name] = row.get(name, 0.0) + share * value
    rows = ranks.of_all(row)
    return {name: sum(row[name] for row in rows) for name in row}


def without_dropout(model):
    """The model made ready to learn. Dropout would move step 0, and log-probs would not be comparable with the
    reference's."""
    model.eval()
    for module in model.modules():  # a layer recomputes its activations only if it believes that it trains
        module.training = getattr(module, "gradient_checkpointing", False)
        for name in ("dropout", "activation_dropout", "hidden_dropout") if module.training else ():
            if isinstance(getattr(module, name, None), float):  # OPT's layers apply their own
                setattr(module, name, 0.0)


def own_weights(parameters, owner):
    """What the optimizer changes: the model's parameters themselves, or float32 copies of short ones that are owned."""
    weights = torch.nn.ParameterList()
    for parameter, its in zip(parameters, owner):
        short = parameter.dtype.itemsize < 4 and its == ranks.rank()
        weights.append(parameter.detach().float() if short else parameter)
    return weights


@torch.no_grad()
def copy_weights(weights, parameters, owner):
    """The optimizer's float32 weights into the model's own, where they are not the same tensors, and from their owner
    to the other processes. A step of 1e-7 is too small for bfloat16 to see, but not the sum of many."""
    for weight, parameter, its in zip(weights, parameters, owner):
        if weight is not parameter:
            parameter.copy_(weight)
        ranks.send(parameter, its)


def optimizer_of(learning, owner, lr, steps, warmup):
    """(weights, AdamW, schedule) of the parameters that learn. The weights are theirs, in float32 where this process
    owns them; the learning rate rises over the share `warmup` of the steps, and then falls to 0."""
    weights = own_weights(learning, owner)
    fused = weights[0].device.type in ("cpu", "cuda")  # without a third copy of the gradients
    optimizer = torch.optim.AdamW(
        weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused or None)
    warm = max(1, round(warmup * steps))

    def rate(step):
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    return weights, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def fit(model, examples, loss_fn, out, cfg, seed, save, *,
        label="fit", warmup=0.05, clip=1.0, micro_batch=None, sizes=None, checkpoint_seconds=20.0, track=None):
    """Train `model` in place on `examples` and let `save(folder)` write the result to `out`; returns the log, a row a
    step.

    loss_fn(model, part, batch) -> (loss, {name: float}): the mean over some examples of a batch, all of them where
    there are no micro-batches. cfg: .lr, .batch_size, .epochs; the learning rate rises to lr over the share `warmup`
    of the steps and then falls linearly to 0. micro_batch: examples per backward pass (memory); the step is the same.
    track(label, step, row): who else sees each step, once.
    While training, OUT.partial holds a checkpoint; the result appears in one rename. Several processes share the work,
    and what the optimizer needs (kernels/ranks.py).
    """
    out, work = Path(out), Path(f"{out}.partial")
    work.mkdir(parents=True, exist_ok=True)
    plan = list(batches_of(len(examples), cfg.batch_size, cfg.epochs, seed, sizes))
    ranks.reshard(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    owner = ranks.owners(learning)
    weights, optimizer, schedule = optimizer_of(learning, owner, cfg.lr, len(plan), warmup)
    mine = [weight for weight, its in zip(weights, owner) if its == ranks.rank()]
    checkpoint = Checkpoint(work / "checkpoint.pt", checkpoint_seconds, owner, weights=weights, optimizer=optimizer,
                            schedule=schedule)
    log = checkpoint.load()
    hand_on = Once(checkpoint, track, label)
    copy_weights(weights, learning, owner)
    without_dropout(model)
    with tqdm(total=len(plan), initial=len(log), desc=f"{label:>12}", unit="step", mininterval=0.5) as bar:
        for batch in plan[len(log):]:
            row = take_step(model, [examples[i] for i in batch], loss_fn, micro_batch)
            for weight, parameter, its in zip(weights, learning, owner):
                weight.grad = ranks.take_gradient(parameter, its)
            norm = ranks.norm([weight.grad for weight in mine if weight.grad is not None])
            torch.nn.utils.clip_grads_with_norm_(weights, clip, norm)
            row["grad_norm"] = float(norm)
            stop_unless_finite(checkpoint, label, cfg, len(log), {"loss": row["loss"], "gradient": row["grad_norm"]})
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            copy_weights(weights, learning, owner)
            size = float(ranks.norm(mine))
            stop_unless_finite(checkpoint, label, cfg, len(log), {"weights": size})
            log.append(row)
            hand_on(len(log), row)
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "grad_norm"},
                            refresh=False)
            checkpoint.save(log)
    model.eval()
    sharded = any(map(ranks.is_sharded, learning))
    if sharded:
        save(work)  # everybody hands over a part; transformers lets the first write

    @ranks.by_first
    def finish():
        if not sharded:
            save(work)
        (work / "log.json").write_text(json.dumps(log), encoding="utf-8")
        checkpoint.remove()
        shutil.rmtree(out, ignore_errors=True)
        put(work, out)
    finish()
    return log


def save_to(model, tokenizer):
    """A `save` for fit: write model and tokenizer as one Hugging Face directory (with --lora: of the adapters), whose
    generation ends where the agent's turns do."""
    def save(folder):
        ends, eot = model.generation_config.eos_token_id, end_of_turn(tokenizer)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        model.generation_config.eos_token_id = ends if eot in ends else [*ends, eot]
        model.save_pretrained(folder, state_dict=ranks.whole_state(model))
        tokenizer.save_pretrained(folder)
    return save
