"""How much memory and time a run takes, by arithmetic: bytes per parameter, activations with and without checkpointing,
the cache while sampling. Prints the tables of docs/memory.md.

    python docs/memory.py

P parameters, D hidden, I intermediate, L layers, V vocabulary, K width of keys (heads x head size), T tokens.
"""
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-like model, as in its config.json."""
    name: str
    D: int
    I: int  # noqa: E741
    L: int
    V: int
    K: int
    tied: bool
    bias: bool

    @property
    def P(self):
        """Parameters: embedding (and head), and in each layer attention, MLP and two norms."""
        layer = 2 * self.D * self.D + 2 * self.D * self.K + 3 * self.D * self.I + 2 * self.D
        return self.V * self.D * (1 if self.tied else 2) + self.L * (layer + self.bias * (self.D + 2 * self.K)) + self.D

    def adapters(self, rank):
        """Parameters of LoRA on every linear layer but the head: rank x (inputs + outputs) each."""
        D, K, I = self.D, self.K, self.I  # noqa: E741
        return self.L * rank * (2 * (D + D) + 2 * (D + K) + 3 * (D + I))


SHAPES = [Shape("0.5B (Qwen2.5)", 896, 4864, 24, 151936, 128, True, True),
          Shape("1.5B (Qwen2.5)", 1536, 8960, 28, 151936, 256, True, True),
          Shape("3B (Qwen2.5)", 2048, 11008, 36, 151936, 256, True, True),
          Shape("8B (Llama 3.1)", 4096, 14336, 32, 128256, 1024, False, False)]
GPUS = {24: ("RTX 4090", 165e12, 1.0e12), 48: ("L40S", 362e12, 0.86e12), 80: ("H100", 989e12, 3.35e12)}
TOKENS, SEQUENCES, RANK = 4096, 2, 16  # a long dialogue, chosen and rejected (--micro-batch 1), --lora 16
CUDA, LOGITS = 1.5 * GB, 2 ** 22  # the runtime itself and fragmentation; logits that the head makes at a time


def layer_bytes(s, lora):
    """Saved for the backward pass by one layer, bytes a token in bfloat16. Each norm keeps its input in float32 and
    both of its products; then query, key, value and the attention's output; then the MLP's four tensors. An adapter
    keeps what its second matrix reads, and its input in float32."""
    norms, attention, mlp = 2 * (4 + 2 + 2) * s.D, 2 * (2 * s.D + 2 * s.K), 4 * 2 * s.I
    return norms + attention + mlp + lora * (4 * (3 * s.D + s.I) + 7 * 4 * RANK)


def activations(s, lora, checkpointing):
    """Bytes of activations in a backward pass: all layers, or each layer's input and one layer; and a chunk of the
    head's logits (float32, three copies). Every sequence in full: a shared prefix makes it less."""
    tokens = TOKENS * SEQUENCES
    layers = s.L * 2 * s.D + layer_bytes(s, lora) if checkpointing else s.L * layer_bytes(s, lora)
    return tokens * layers + 3 * 4 * LOGITS


def held(s, lora):
    """Bytes of weights and what the optimizer needs. All weights learn: bfloat16 weights, and in float32 a copy of
    them, the gradient and Adam's two averages: 2 + 4 + 4 + 8 a parameter; the head's gradient is summed up in float32.
    Adapters: 2 a parameter of the model, 4 + 4 + 8 a parameter of the adapters."""
    return 2 * s.P + 16 * s.adapters(RANK) if lora else 18 * s.P + 4 * s.V * s.D


def training(s, lora, checkpointing):
    return held(s, lora) + activations(s, lora, checkpointing) + CUDA


def on_each_of(s, n, shard=False):
    """Bytes on each of n GPUs under torchrun, all weights learn, --checkpointing. Everybody holds the weights and, in
    the backward pass, their gradients (2 + 2 a parameter); the float32 copy, the summed gradient and Adam's averages
    have one owner (16 / n). shard: weights and gradients are split, too, (20 / n), but for two layers at a time, which
    are gathered while they compute, and for embedding and head."""
    own = 16 * s.P / n
    layer = (s.P - s.V * s.D * (1 if s.tied else 2)) / s.L
    gathered = 2 * layer + s.V * s.D * (1 if s.tied else 2)
    whole = (2 + 2) * gathered + (2 + 2) * s.P / n if shard else (2 + 2) * s.P
    return whole + own + 4 * s.V * s.D + activations(s, False, True) + CUDA


def cache(s, rows):
    """Bytes of keys and values of `rows` dialogues of TOKENS tokens in bfloat16."""
    return rows * TOKENS * s.L * 2 * s.K * 2


def rows_that_fit(s, gigabytes):
    """Dialogues that can be sampled side by side (--rows): a power of 2, 512 at most."""
    rows = 512
    while rows and 2 * s.P + cache(s, rows) + CUDA > gigabytes * GB:
        rows //= 2
    return rows


def plan(s, gigabytes):
    """The first way of training that fits, the more memory-hungry one first, and the bytes that it takes."""
    for lora, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
        need = training(s, lora, checkpointing)
        if need <= gigabytes * GB:
            words = f"--lora {RANK}" if lora else "all weights"
            return words + (", --checkpointing" if checkpointing else ""), need, checkpointing
    return "does not fit", training(s, True, True), True


def hours(s, gigabytes, work):
    """(sampling, scoring, training) of --preset one-gpu. Sampling reads all weights and the caches once a token;
    scoring costs 2 P operations a token; training 6 P, with checkpointing 8 P. 40 % of the peak, 60 % of the
    bandwidth."""
    _, flops, bandwidth = GPUS[gigabytes]
    rows = max(1, min(work["rows"], rows_that_fit(s, gigabytes)))
    reads = work["sampled"] / rows * (2 * s.P + cache(s, rows) / 2) / (0.6 * bandwidth)
    scored = work["scored"] * 2 * s.P / (0.4 * flops)
    learned = work["learned"] * (8 if plan(s, gigabytes)[2] else 6) * s.P / (0.4 * flops)
    return [seconds / 3600 for seconds in (reads, scored, learned)]


def work_of_preset():
    """Tokens that --preset one-gpu samples, scores and learns from, taking a dialogue as TOKENS / 2 tokens of which a
    third is the agent's, and a turn's prompt as half of a dialogue."""
    import sweet
    settings = sweet.settings_of(sweet.parser().parse_args(["--preset", "one-gpu"]))
    rollout, candidates, pairs = settings["rollout"], settings["candidates"], settings["pairs"]
    dialogue, turn = TOKENS // 2, TOKENS // 2 // 3 // 5
    sides = 2 * pairs.per_task * rollout.tasks
    turns = candidates.states * candidates.n * (dialogue // 2 + turn)
    learned = sides * dialogue * settings["critic"].epochs
    learned += 2 * pairs.per_state * candidates.states * (dialogue // 2 + turn) * settings["actor"].epochs
    played = rollout.tasks * rollout.per_task + 4 * settings["eval"].tasks
    sampled = played * dialogue // 3 + candidates.states * candidates.n * turn
    return {"rows": settings["machine"].rows, "sampled": sampled,
            "scored": sides * dialogue + 3 * turns, "learned": learned}


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def tables():
    """The tables as text."""
    ways = [(False, False), (False, True), (True, False), (True, True)]
    need = [[s.name, f"{s.P / 1e9:.2f}", f"{2 * s.P / GB:.1f}", *(f"{training(s, *way) / GB:.0f}" for way in ways)]
            for s in SHAPES]
    fits = [[s.name, *(f"{plan(s, g)[0]} ({plan(s, g)[1] / GB:.0f} GB)" for g in GPUS)] for s in SHAPES]
    rows = [[s.name, f"{cache(s, 1) / GB:.2f}", *(rows_that_fit(s, g) or "does not fit" for g in GPUS)] for s in SHAPES]
    work = work_of_preset()
    time = [[s.name, *("does not fit" if plan(s, g)[0] == "does not fit" else " + ".join(
        f"{h:.1f}" for h in hours(s, g, work)) for g in GPUS)] for s in SHAPES]
    gpus = [f"{g} GB ({name})" for g, (name, _, _) in GPUS.items()]
    big = SHAPES[-1]
    several = [[f"`--lora {RANK}`, one GPU", training(big, True, True)]]
    several.append(["all weights, one GPU", training(big, False, True)])
    for n in (2, 4, 8):
        several.append([f"all weights, `torchrun --nproc-per-node {n}`", on_each_of(big, n)])
        several.append(["the same, `--shard`", on_each_of(big, n, shard=True)])
    return "\n\n".join([
        "**GB while training**, two sequences of 4,096 tokens in a backward pass (`--dtype bfloat16 --micro-batch 1`)",
        table(["model", "parameters (billions)", "weights", "all weights", "+ `--checkpointing`", f"`--lora {RANK}`",
               "+ `--checkpointing`"], need),
        "**The least saving way that fits**", table(["model", *gpus], fits),
        "**While sampling**: GB of cache for one dialogue of 4,096 tokens, and the largest `--rows` that fits",
        table(["model", "cache", *gpus], rows),
        f"**GB on each GPU while {big.name} is trained**, with `--checkpointing`",
        table(["way", "GB"], [[way, f"{need / GB:.0f}"] for way, need in several]),
        "**Hours of `--preset one-gpu`**: sampling + scoring + training, with the way above",
        table(["model", *gpus], time)])


if __name__ == "__main__":
    print(tables())
