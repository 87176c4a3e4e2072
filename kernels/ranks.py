"""Several processes, one run: `torchrun --nproc-per-node N -- sweet.py ...` does what `python sweet.py ...` does, in
less time. (Without the two dashes torchrun would take our --run for an option of its own.)

All N processes (ranks) run the same program, line by line, on the same files. Four rules make that one run:

1. Only rank 0 changes files, and while it does the others wait (`by_first`). So at the same line all find the same.
2. Work on many items is dealt out, and all get all results, in the items' order (`share_out`). An item is computed as
   one process would compute it, so that the files are the same, byte for byte.
3. In training, each rank takes the gradient of its share of a step's examples, and the sum over the ranks is the step's
   (`summed_gradients`). Each tensor has one owner, to whom its sum goes. The owner alone holds what the optimizer needs
   for it (float32 weights and Adam's two averages: most of the memory), takes the step, and tells the others the new
   weights (`broadcast`). This is the idea of ZeRO (Rajbhandari et al., 2020, stage 2).
4. When one rank fails, it says why, once (`speaks`), and all end.

A model that does not fit on one GPU is trained with `--shard`: each rank holds a part of every tensor, and a layer is
put together while it computes (FSDP2, torch's `fully_shard`). Then nobody owns a whole one.

Without torchrun, or with one process, there is one rank, and nothing here communicates. On GPUs each rank has one of
its own, and tensors travel by NCCL; everything else, and all on the CPU, by gloo.

Exercised by `python -m pytest tests/test_ranks.py`.
"""
import atexit
import datetime
import functools
import os
import sys
import time

PATIENCE = datetime.timedelta(days=7)  # a rank waits that long for another one; a dead one is noticed at once


def count():
    """How many processes work on this run."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank():
    """The number of this one, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


@functools.cache
def join():
    """Wait for all ranks to be there: (torch.distributed, the store of names and values that they share)."""
    import torch
    dist, backend = torch.distributed, "gloo"
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # it is what `--device cuda` means from now on
        backend = "cpu:gloo,cuda:nccl"
    store, *_ = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank(), world_size=count(), timeout=PATIENCE)
    atexit.register(leave)
    if rank():  # one of them shows bars, notes and results
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    return dist, store


def leave():
    """Let go of the group. A thread of gloo's lets go of the last tensor only when it gets Python's lock: wait for it,
    because one that is too late aborts the process."""
    import torch
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


def speaks():
    """Whether this process, which fails, is the first one that does. The others fail as it did, or because it did."""
    first = rank() == 0
    if join.cache_info().currsize:
        _, store = join()
        try:
            first = store.add("failed", 1) == 1
        except RuntimeError:  # the rank that kept the store has gone
            first = False
    if first and rank():
        sys.stderr = sys.__stderr__  # `join` has silenced it
    return first


def share_out(work, items):
    """[work(item) for each item], on all ranks; each makes every N-th. What is wrong with one is raised on all."""
    if count() == 1:
        return [work(item) for item in items]
    dist, _ = join()
    made, error = [], None
    try:
        made = [work(item) for item in items[rank()::count()]]
    except (ValueError, OSError) as raised:
        error = raised
    parts, results = [None] * count(), [None] * len(items)
    dist.all_gather_object(parts, (made, error))
    for number, (part, error) in enumerate(parts):
        if error:
            raise error
        results[number::count()] = part
    return results


def of_all(value):
    """The value of each rank."""
    return share_out(lambda _: value, range(count()))


def by_first(work):
    """A function that rank 0 does, when all have come to it, while the others wait; all get what it returns."""
    @functools.wraps(work)
    def together(*args):
        of_all(None)
        result, = share_out(lambda _: work(*args), [0])
        return result
    return together


# ------------------------------------------------------------------ training

def is_sharded(what):
    """Whether FSDP2 has shared out a tensor, or a model's."""
    if count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    return isinstance(what, FSDPModule | DTensor)


def shard(model, device):
    """Share out the tensors of a model, layer by layer. (transformers 5.23 can do it while it loads, but ties embedding
    and head after that: the head stays what it was at first.)"""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    join()
    mesh = torch.distributed.init_device_mesh(torch.device(device).type, (count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
    for module in list(model.modules()):
        for layer in module if isinstance(module, torch.nn.ModuleList) else ():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole_state(model):
    """The weights of a sharded model, on rank 0; None where it is not."""
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def reshard(model):
    """Take tensors apart again that a pass without gradients has left whole."""
    for module in filter(is_sharded, model.modules()):
        module.reshard()


def owners(tensors):
    """The rank that owns each tensor: the largest first, each to the rank that has least so far. Of one that is sharded
    each rank owns its part."""
    held, owner = [0] * count(), {}
    for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].numel()):
        owner[i] = rank() if is_sharded(tensors[i]) else held.index(min(held))
        held[owner[i]] += tensors[i].numel()
    return [owner[i] for i in range(len(tensors))]


def take_gradient(parameter, owner):
    """A parameter's gradient, in at least float32 and summed over the ranks, for its owner; None for the others. It is
    taken from the parameter."""
    import torch
    gradient, parameter.grad = parameter.grad, None
    if gradient is None and count() > 1:  # this rank had no part in the step
        gradient = torch.zeros_like(parameter)
    if gradient is not None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if is_sharded(parameter):
        return gradient * count()  # FSDP2 has taken the mean
    if count() > 1:
        dist, _ = join()
        dist.reduce(gradient, owner)
    return gradient if owner == rank() else None


def norm(tensors):
    """The norm of all tensors, from what each rank owns of them."""
    import torch
    own = torch.nn.utils.get_total_norm([tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors])
    if count() == 1:
        return own
    return sum(part ** 2 for part in of_all(own.cpu())).sqrt()


def send(weight, owner):
    """All ranks get the owner's weight."""
    if count() > 1 and not is_sharded(weight):
        dist, _ = join()
        dist.broadcast(weight, owner)


def to_first(state):
    """The states of all ranks, rank 0's at last, on rank 0: nested dictionaries of tensors, which come to the CPU."""
    if count() == 1:
        return []
    dist, _ = join()
    found = [None] * count()
    dist.gather_object(on_cpu(state), None if rank() else found)
    return [] if rank() else found[::-1]


def on_cpu(state):
    """The same on the CPU; what is sharded is put together on rank 0."""
    if isinstance(state, dict):
        return {name: on_cpu(part) for name, part in state.items()}
    if is_sharded(state):
        state = state.full_tensor()
        return None if rank() else state.cpu()
    return state.cpu()


def part_of(value, like):
    """What this rank keeps of a whole tensor for one that is or is not sharded."""
    if not is_sharded(like) or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
