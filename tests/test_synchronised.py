"""Statistics over several ranks, with batches of different sizes, equal one process on the whole batch, at the cost of
one all-gather forward and one all-reduce backward."""

import collections
import contextlib
import functools
from unittest import mock

import batch_norm_case
import oracle
import pytest
import torch
import torch.distributed as dist
from distributed_case import run_ranks

from fastcifar import functional
from fastcifar.nn import AdaptiveWeightedHinge

SPLITS = {"uneven": (0, 3, 4), "one rank empty": (0, 4, 4)}
OPERATORS = {
    "depthwise": (functional.depthwise_conv_bn_act, {"padding": 1, "stride": 1}),
    "depthwise, stride 2": (functional.depthwise_conv_bn_act, {"padding": 1, "stride": 2}),
    "batch norm": (functional.batch_norm_act, {}),
    "batch norm and residual": (functional.batch_norm_act, {}),
}
IMPLS = {"reference": torch.float64, "native": torch.float32, "triton": torch.float32}
SHAPE = (4, 3, 7, 6)
CASES = [(o, i, s) for o in OPERATORS for i in IMPLS for s in SPLITS if s == "uneven" or i != "triton"]


def operands(operator):
    """Inputs by name, and the gradient of the output, of the whole batch."""
    if operator.startswith("depthwise"):
        inputs = oracle.depthwise_inputs(*SHAPE, 3, mean=5.0)
    else:
        inputs = batch_norm_case.inputs_of(SHAPE, residual="residual" in operator, mean=5.0)
    size = SHAPE[2:] if "stride" not in operator else (4, 3)
    return inputs, oracle.gradient_like((*SHAPE[:2], *size))


def run(operator, impl, dtype, inputs, dz, group=None):
    function, options = OPERATORS[operator]
    call = functools.partial(function, impl=impl, process_group=group)
    return oracle.run(call, inputs, dtype, dz, training=True, activation="silu", momentum=0.3, **options)


@contextlib.contextmanager
def counted(calls):
    """Counts collectives, and those that do not block, in `calls`."""
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather"):
            original = getattr(dist, name)

            def collective(*arguments, _original=original, _name=name, **options):
                calls[_name + (" in passing" if options.get("async_op") else "")] += 1
                return _original(*arguments, **options)

            stack.enter_context(mock.patch.object(dist, name, collective))
        yield calls


def rank_results(rank, world_size):
    found = {}
    for operator, impl, split in CASES:
        inputs, dz = operands(operator)
        part = slice(SPLITS[split][rank], SPLITS[split][rank + 1])
        inputs = {n: t[part] if n in ("x", "residual") and t is not None else t for n, t in inputs.items()}
        with counted(collections.Counter()) as both:
            results = run(operator, impl, IMPLS[impl], inputs, dz[part], dist.group.WORLD)
        with counted(collections.Counter()) as forward:
            run(operator, impl, IMPLS[impl], inputs, None, dist.group.WORLD)
        numpy = {name: None if t is None else t.numpy() for name, t in results.items()}
        found[operator, impl, split] = numpy, dict(forward), dict(both)
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(rank_results, 2)


@pytest.mark.parametrize(("operator", "impl", "split"), CASES, ids=[", ".join(case) for case in CASES])
def test_two_ranks_equal_one(operator, impl, split, ranks):
    inputs, dz = operands(operator)
    exact, low = (run(operator, "reference", dtype, inputs, dz) for dtype in (torch.float64, torch.float32))
    both = [rank[operator, impl, split][0] for rank in ranks]
    for name, value in exact.items():
        if value is None:
            continue
        parts = [torch.from_numpy(rank[name]) for rank in both]
        if name in ("z", "x", "residual"):
            parts = [torch.cat(parts)]
        elif not name.startswith("running"):
            parts = [sum(parts)]
        for part in parts:
            if impl == "reference":
                torch.testing.assert_close(part, value, rtol=1e-11, atol=1e-11 * float(value.abs().max()))
            else:
                oracle.within(part, value, low[name], torch.float32, name)


@pytest.mark.parametrize(("operator", "impl", "split"), CASES, ids=[", ".join(case) for case in CASES])
def test_one_all_gather_forward_and_one_all_reduce_backward(operator, impl, split, ranks):
    for rank in ranks:
        _, forward, both = rank[operator, impl, split]
        assert forward == {"all_gather": 1} and both == {"all_gather": 1, "all_reduce": 1}


def refuse_one_value(rank, world_size):
    x = torch.ones(1 - rank, 2, 1, 1)
    messages = []
    for impl in ("reference", "native"):
        try:
            functional.batch_norm_act(x, None, None, training=True, process_group=dist.group.WORLD, impl=impl)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_single_value_over_all_ranks_is_refused():
    for messages in run_ranks(refuse_one_value, 2):
        assert len(messages) == 2 and all("more than 1 value per channel" in message for message in messages)


def hinge_collectives(rank, world_size):
    network = torch.nn.Linear(3, 1)
    hinge = AdaptiveWeightedHinge(network.parameters(), process_group=dist.group.WORLD)
    events = collections.Counter()
    original = torch.autograd.grad
    under_way = []

    def grad(*arguments, **options):
        under_way.append(sum(events.values()))
        return original(*arguments, **options)

    with counted(events), mock.patch.object(torch.autograd, "grad", grad):
        hinge.backward(network(torch.ones(2 + rank, 3)), network(-torch.ones(2, 3)))
    return dict(events), under_way


def test_the_hinge_reduces_while_its_backward_passes_run():
    for events, under_way in run_ranks(hinge_collectives, 2):
        # Losses and counts before the first pass, a gradient before the second and one after it.
        assert events == {"all_reduce in passing": 3} and under_way == [1, 2]
