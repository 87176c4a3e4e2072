"""What tests/test_ranks.py does in one process, and, as `torchrun --nproc-per-node 2 ranks_worker.py WHAT FOLDER`, in
several: trainings that can be compared, and ends."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import ranks
from machinery.files import InputError, write_groups
from machinery.process import one_line

KINDS = ("critic", "actor", "rft")


class Killed(Exception):
    pass


def learn(kind, out, dtype="float64", micro_batch=None, die_after=None, shard=""):
    """Train a tiny model on nine examples, four at a time (the last step of an epoch has one); returns the bytes of
    this process's optimizer state. die_after: Killed after so many steps, with a checkpoint of the last one. shard: a
    model to load, in parts where there are several processes."""
    import torch
    from conftest import COVERAGE, tiny_llama

    import actor
    import critic
    from env import render
    from machinery import train
    from worlds import backend
    COVERAGE.stop()
    torch.set_num_threads(1)
    if shard:
        model, tokenizer = train.load_model(shard)
        model = model.double()  # Adam makes a step of a rounding error: in float32 the runs part
        if ranks.count() > 1:
            ranks.shard(model, "cpu")
        save = train.save_to(model, tokenizer)
    else:
        tokenizer = backend.make_tokenizer()
        model = tiny_llama(len(tokenizer), tie=kind == "critic").to(getattr(torch, dtype))

        def save(folder):
            torch.save(model.state_dict(), folder / "weights.pt")
    documents = [{"task": {"ground_truth": reference}, "dialogue_history": messages}
                 for messages, reference in backend.documents(18, seed=7)]
    views = [render(tokenizer, document["dialogue_history"]) for document in documents]
    optimizers, steps, adam, take_step = [], [], torch.optim.AdamW, train.take_step

    def makes(*args, **kwargs):
        optimizers.append(adam(*args, **kwargs))
        return optimizers[-1]

    def dies(*args):
        steps.append(1)
        if len(steps) > die_after:
            raise Killed
        return take_step(*args)

    seconds = 1e9 if die_after is None else 0.0
    how = {"save": save, "micro_batch": micro_batch, "checkpoint_seconds": seconds}
    torch.optim.AdamW, train.take_step = makes, take_step if die_after is None else dies
    try:
        if kind == "critic":
            pairs = list(zip(documents[::2], documents[1::2]))
            critic.train(model, tokenizer, pairs, out, critic.CriticSettings(batch_size=4, epochs=2), 0, **how)
        elif kind == "actor":
            examples = [{"chosen": one, "rejected": other} for one, other in zip(views[::2], views[1::2])]
            settings = actor.ActorSettings(batch_size=4, epochs=2)
            actor.train_preferences(model, examples, out, settings, 0, label="actor", **how)
        else:
            actor.train_imitation(model, views[:9], out, actor.Rft(batch_size=4, epochs=2), 0, label="rft", **how)
    except Killed:
        pass
    finally:
        torch.optim.AdamW, train.take_step = adam, take_step
    moments = [value for state in optimizers[0].state.values() for value in state.values() if value.dim()]
    return sum((value.to_local() if shard and ranks.count() > 1 else value).nbytes for value in moments)


def all_trainings(folder, name):
    """Every kind, whole; one in micro-batches, one in bfloat16, one that dies and one that goes on from where another
    number of processes died."""
    found = {kind: learn(kind, folder / f"{name}-{kind}") for kind in KINDS}
    learn("rft", folder / f"{name}-micro", micro_batch=1)
    found["bfloat16"] = learn("rft", folder / f"{name}-bfloat16", dtype="bfloat16")
    learn("actor", folder / f"{name}-dies", die_after=4)
    return found


def sharded_trainings(folder, name):
    """The same of models that are loaded: with a head of its own and a tied one."""
    found = {kind: learn(kind, folder / f"{name}-{kind}", shard=folder / kind) for kind in ("critic", "actor")}
    learn("actor", folder / f"{name}-dies", shard=folder / "actor", die_after=4)
    return found


def record(x):
    """What `write_groups` writes in the tests; says which process made it."""
    if x == 16 and ranks.rank():
        raise InputError("sixteen is refused")
    return {"x": x}


def ends(what, folder):
    """A run that cannot go on."""
    options = SimpleNamespace(run=folder, running="rollout")
    with one_line(options):
        if what == "all":  # everybody finds the same fault
            raise InputError("everybody finds this")
        if what == "one":  # one alone, while the other waits for its gradients
            if ranks.rank():
                raise InputError("only one finds this")
            ranks.of_all(0)
        write_groups(folder / "x.jsonl", range(20), 3, lambda part, _: list(map(record, part)), "x")


def main(what, folder):
    if what != "train":
        return ends(what, folder)
    ranks.join()
    found = all_trainings(folder, "two")
    learn("actor", folder / "one-dies")  # it goes on where one process was stopped
    found["sharded"] = sharded_trainings(folder / "sharded", "two")
    learn("actor", folder / "sharded/one-dies", shard=folder / "sharded/actor")
    found["squares"] = ranks.share_out(lambda x: x * x, range(5))
    found["first"] = ranks.by_first(ranks.rank)()
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
