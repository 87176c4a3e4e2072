"""How fast the hot paths are, and how exact: ratios of time and memory against named peers, in one table.

    python -m bench.speed               everything that takes minutes: log-probs, DPO, scoring, sampling, growth
    python -m bench.speed dpo growth    some of it
    python -m bench.gpu                 the head on a GPU

A row is one contest: each contender does the same work on the same inputs, in turn, again and again, so that what else
the machine is doing hits all alike; what counts is the median of (peer / ours) over the repeats. CPU times are CPU
seconds of one thread. "difference" is the largest absolute difference between the peer's values and ours, in nats.
Memory is the peak above what was there before. Each group of rows has a fresh process: the memory that an allocator
keeps from earlier work, which later work need not ask for again, moves a ratio by up to a fifth. Peers: `pip install
trl torch==2.13.0`; what is not there is "not measured".

Shapes: N agent tokens, D hidden, V vocabulary, B pairs.
"""
import copy
import ctypes
import http.server
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.flop_counter import FlopCounterMode

import actor
from env import DialogueEnv, render
from kernels.logprob import add_reference, collate, lay_out, reference_sums, token_logprobs, turn_logprobs
from kernels.prefix import Rows
from machinery import sampling

REPEATS = 7


# ------------------------------------------------------------------ measuring

def seconds(work):
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_megabytes(work):
    """Peak resident memory of one call, above what was there before; None where the system does not tell (not Linux).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None

    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not yet given back would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def contest(title, ours, peers, target="", repeats=REPEATS, memory=False):
    """Run ours and each peer (name -> function that returns its values, or None: not installed) in turn; print a row
    for each."""
    present = {"ours": ours, **{name: peer for name, peer in peers.items() if peer}}
    values = {name: work().detach().float() for name, work in present.items()}  # the first call also warms up
    times = {name: [] for name in present}
    for _ in range(repeats):
        for name, work in present.items():
            times[name].append(seconds(work))
    for name in peers:
        if name not in present:
            row(title, name, *["not measured"] * 4, target)
            continue
        ratios = sorted(theirs / mine for theirs, mine in zip(times[name], times["ours"]))
        used = [peak_megabytes(present[who]) for who in (name, "ours")] if memory else [None]
        row(title, name, f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})",
            "" if None in used else f"{used[0] / used[1]:.1f}x ({used[0]:.0f} / {used[1]:.0f} MB)",
            f"{1000 * statistics.median(times['ours']):.0f} ms",
            f"{(values[name] - values['ours']).abs().max().item():.0e}" if values["ours"].dim() else "", target)


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*names):
    print()
    row(*names)
    row(*["---"] * len(names))


def installed(module):
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------ inputs

def llama(hidden=128, layers=4, vocab=8192, seed=0):
    """A random Llama with heads of 64, as larger ones have."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()


def endless():
    """No token ends a turn: every turn takes all the tokens that it may."""
    return mock.patch.multiple(sampling, end_of_turn=lambda tokenizer: -1, control_tokens=lambda tokenizer: [-1])


def ids(rng, n, vocab=8192):
    return [rng.randrange(1, vocab) for _ in range(n)]


def views(prompt, turns):
    return [(prompt + turn, [0] * len(prompt) + [1] * len(turn)) for turn in turns]


def eager(hidden_ND, weight_VD, targets_N):
    """What one writes first."""
    return (hidden_ND @ weight_VD.T).float().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def with_gradient(model, work):
    """Run forward and backward; the value."""
    model.zero_grad(set_to_none=True)
    value = work()
    value.sum().backward()
    return value


# ------------------------------------------------------------------ contests on the CPU

def bench_logprobs():
    """The head alone, forward and backward, on 2048 rows of which a fifth are the agent's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 256, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(32768, 256, generator=generator) / 16)
    targets, agent = torch.randint(32768, (2048,), generator=generator), torch.arange(2048) % 5 == 0

    def run(logprobs):
        value = logprobs()
        value.sum().backward()
        hidden.grad = weight.grad = None  # so that the peak counts the gradients, too
        return value.detach()

    contest("log-probs, 2048 x 32768 x 256",
            lambda: run(lambda: token_logprobs(hidden[agent], weight, targets[agent])),
            {"log_softmax().gather(), all rows": lambda: run(lambda: eager(hidden, weight, targets)[agent])},
            "5x, memory 8x", memory=True)


def trl_step(model, reference, pairs, compact):
    """A function that takes TRL's DPO step, forward and backward, and returns its loss. compact: reference precomputed
    and only completion rows in the head, which TRL does by itself where it finds Triton."""
    import datasets
    import transformers
    import trl
    import trl.trainer.utils as trl_utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from worlds.backend import make_tokenizer
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    text = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    settings = trl.DPOConfig(output_dir=tempfile.mkdtemp(), beta=0.1, bf16=False, gradient_checkpointing=False,
                             report_to=[], use_cpu=True, disable_tqdm=True)
    policy = copy.deepcopy(model)
    trainer = trl.DPOTrainer(policy, copy.deepcopy(reference), args=settings, train_dataset=text,
                             processing_class=make_tokenizer())
    batch = DataCollatorForPreference(pad_token_id=0)([
        {"prompt_ids": pair["prompt"], "chosen_ids": pair["turns"][0], "rejected_ids": pair["turns"][1],
         **({"ref_chosen_logps": pair["ref_chosen"][0], "ref_rejected_logps": pair["ref_rejected"][0]}
            if compact else {})} for pair in pairs])
    if compact:
        trainer.precompute_ref_logps = True

    def step():
        with mock.patch.object(trl_utils, "_use_triton", lambda device: compact):
            return with_gradient(policy, lambda: trainer.compute_loss(policy, dict(batch)))[None]
    return step


def bench_dpo():
    """One DPO step on four pairs with ragged prompts, with a reference that is another model than the policy."""
    model, reference = llama(), llama(seed=1)
    for length, targets in ((256, ("6x", "1.5x")), (1024, ("7x", "2x"))):
        rng = random.Random(length)
        pairs = [{"prompt": ids(rng, length - rng.randint(0, length // 4)),
                  "turns": [ids(rng, rng.randint(16, 64)) for _ in range(2)]} for _ in range(4)]
        for pair in pairs:
            pair["chosen"], pair["rejected"] = views(pair["prompt"], pair["turns"])
        add_reference(reference, pairs)

        def ours(pairs=pairs):
            return with_gradient(model, lambda: actor.preference_loss(model, pairs, 0.1, 0.0)[0])[None]
        for compact, name, target in ((False, "TRL DPOTrainer", targets[0]),
                                      (True, "TRL, reference precomputed, rows compacted", targets[1])):
            peer = trl_step(model, reference, pairs, compact) if installed("trl") and installed("datasets") else None
            contest(f"DPO step, prompt {length}", ours, {name: peer}, target)


def bench_scoring():
    """Log-probs of 16 candidates, no gradient; the peer runs the head on the same rows."""
    model = llama()
    for length, tokens, target in ((256, 8, "5x"), (256, 24, "5x"), (1024, 8, "12x"), (1024, 24, "12x")):
        rng = random.Random(length)
        candidates = views(ids(rng, length), [ids(rng, tokens) for _ in range(16)])
        with torch.no_grad():
            contest(f"16 candidates of {tokens} tokens, prefix {length}",
                    lambda c=candidates: turn_logprobs(model, lay_out(model, c))[0],
                    {"16 full sequences": lambda c=candidates: turn_logprobs(model, collate(c))[0]}, target)


def bench_sampling():
    """16 turns of 24 tokens after one prompt. Sampling has no common value to compare: the tests compare the tokens."""
    from worlds.backend import make_tokenizer
    model, tokenizer = llama(), make_tokenizer()
    for length, target in ((64, "1.6x"), (256, "2.5x")):
        prompt = ids(random.Random(length), length)

        def generate(prompt=prompt):
            out = model.generate(torch.tensor([prompt]), do_sample=True, top_k=0, num_return_sequences=16,
                                 max_new_tokens=24, pad_token_id=0)
            return torch.tensor(float(out.shape[1]))

        def ours(prompt=prompt):
            with endless():
                turns = actor.sample(model, tokenizer, [prompt] * 16, range(16), max_tokens=24)
            return torch.tensor(float(min(map(len, turns))))
        contest(f"sampling 16 turns, prefix {length}", ours, {"generate(num_return_sequences=16)": generate}, target)


class Replies:
    """A human who says 24 random words."""

    def reply(self, tasks, dialogues):
        return [" ".join(random.Random(f"{i} {len(m)}").choices(("tides", "loans", "no", "first"), k=24))
                for i, m in enumerate(dialogues)]


def bench_rollouts():
    """16 dialogues of 6 turns of 24 tokens; the peer reads the history again in every turn. difference: in tokens."""
    from worlds.backend import make_tasks, make_tokenizer
    model, tokenizer, tasks = llama(), make_tokenizer(), make_tasks(16, 0, "train")

    def begin():
        envs = [DialogueEnv(6) for _ in tasks]
        for env, task in zip(envs, tasks):
            env.reset(task)
        return envs

    def ours():
        envs = begin()
        with endless():
            actor.play_out(model, tokenizer, envs, Replies(), range(16), max_tokens=24)
        return tokens_of(envs)

    def every_turn():
        envs, human = begin(), Replies()
        while active := [i for i, env in enumerate(envs) if env.answer is None]:
            actor.ask_human(human, [envs[i] for i in active])
            prompts = [render(tokenizer, envs[i].messages)[0] for i in active]
            keys = [(i, envs[i].turns) for i in active]
            with endless():
                turns = actor.sample(model, tokenizer, prompts, keys, max_tokens=24, memory=Rows(model, padded=True))
            for i, turn in zip(active, turns):
                envs[i].step(tokenizer.decode(turn), output_ids=turn)
        return tokens_of(envs)

    def tokens_of(envs):
        return torch.tensor([m["output_ids"] for env in envs for m in env.messages[1::2]])
    contest("rollouts, 6 turns", ours, {"history read in every turn": every_turn}, "1.6x")


def bench_server():
    """16 turns of 24 tokens after a prompt of 256 by --policy-server, from a server that answers at once: what asking,
    reading and the look at its log-probs cost here, which a server has to win back. Eight such requests at a time."""
    from machinery.policy_server import PolicyServer
    from machinery.train import Machine
    from worlds.backend import make_tokenizer
    model, tokenizer, rng = llama(), make_tokenizer(), random.Random(0)
    tokenizer.name_or_path = "m"
    known = sorted(tokenizer.get_vocab().values())[20:]
    prompts = [ids(rng, 256, len(known)) for _ in range(8)]
    turn = rng.choices(known, k=24)
    answers = {}
    for prompt in prompts:
        numbered = [([*prompt, *turn], [0] * 256 + list(range(1, 25)))]
        choice = {"token_ids": turn, "logprobs": {"token_logprobs": reference_sums(model, numbered)[0]}}
        answers[tuple(prompt)] = json.dumps({"choices": [choice] * 16}).encode()
    models = json.dumps({"data": [{"id": "m"}]}).encode()

    class Canned(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            answer = answers[tuple(json.loads(body)["prompt"])] if body else models
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        do_POST = do_GET

        def log_message(self, *_):
            pass
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    server = PolicyServer(Machine(policy_server=f"http://127.0.0.1:{httpd.server_address[1]}/v1"))
    rows = [prompt for prompt in prompts for _ in range(16)]
    keys = [(i, k) for i in range(8) for k in range(16)]

    def sampled(**how):
        with endless():
            return torch.tensor(float(len(actor.sample(model, tokenizer, rows, keys, max_tokens=24, **how))))
    contest("8 x 16 turns, prefix 256, by a server that answers at once", lambda: sampled(server=server),
            {"sampling here": sampled})
    httpd.shutdown()


def bench_growth():
    """Where cost should be flat, and where it should not. arithmetic: full / ours in operations of the layers' and the
    head's matrix products, which is what there is to gain; attention is not counted (it weighs on long prefixes)."""
    model, rng = llama(), random.Random(0)
    header("scoring", "ours, ms", "full sequences, ms", "ratio", "arithmetic")
    cases = [(256, n, 24) for n in (1, 2, 4, 8, 16, 32, 64)] + [(length, 16, 24) for length in (64, 256, 1024, 4096)]
    for length, n, tokens in cases + [(256, 16, 8), (1024, 16, 8)]:
        candidates = views(ids(rng, length), [ids(rng, tokens) for _ in range(n)])
        with torch.no_grad():
            works = (lambda c=candidates: turn_logprobs(model, lay_out(model, c)),
                     lambda c=candidates: turn_logprobs(model, collate(c)))
            operations = []
            for work in works:
                work()  # the probes, too, are behind us
                with FlopCounterMode(display=False) as counter:
                    work()
                operations.append(counter.get_total_flops())
            times = [[seconds(work) for work in works] for _ in range(3 if length < 4096 else 1)]
        ours, full = (1000 * statistics.median(column) for column in zip(*times))
        row(f"prefix {length}, {n} x {tokens}", f"{ours:.0f}", f"{full:.0f}", f"{full / ours:.1f}x",
            f"{operations[1] / operations[0]:.1f}x")
    header("head, 512 rows of 64, peak above the inputs and their gradients", "ours, MB", "log_softmax().gather(), MB")
    for vocab in (8192, 32768, 131072):
        hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(vocab, 64, requires_grad=True)
        targets = torch.randint(vocab, (512,))
        works = (lambda h=hidden, w=weight, y=targets: token_logprobs(h, w, y).sum().backward(),
                 lambda h=hidden, w=weight, y=targets: eager(h, w, y).sum().backward())
        for work in works:
            work()  # the gradients now exist
        row(f"vocabulary {vocab}", *("" if mb is None else f"{mb:.0f}" for mb in map(peak_megabytes, works)))


def on_one_thread(work):
    torch.set_num_threads(1)
    work()


def main(names):
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                     platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start (we add one); "
          f"torch {torch.__version__}")
    header("work", "peer", "time, peer / ours (range)", "peak memory, peer / ours", "ours", "difference", "aim")
    for work in (bench_logprobs, bench_dpo, bench_scoring, bench_sampling, bench_rollouts, bench_server,
                 bench_growth):
        if not names or work.__name__.removeprefix("bench_") in names:
            process = multiprocessing.get_context("spawn").Process(target=on_one_thread, args=(work,))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{work.__name__} ended with {process.exitcode}")


if __name__ == "__main__":
    main(sys.argv[1:])
