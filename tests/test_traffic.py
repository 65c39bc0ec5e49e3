"""Counting what kernels move: on kernels whose traffic is known, and the limits that our operators must keep."""

import importlib.util
import json
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs triton and its interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks import traffic
from benchmarks.counting import ELSEWHERE, count_traffic, saved_bytes


@triton.jit
def copy_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < length), mask=index < length)


@triton.jit
def neighbours_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + index, mask=index < length)
    total += tl.load(x_ptr + index - 1, mask=(index > 0) & (index <= length))
    total += tl.load(x_ptr + index + 1, mask=index + 1 < length)
    tl.store(y_ptr + index, total, mask=index < length)


@triton.jit
def careless_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every program writes the same element."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + index), 0))


@triton.jit
def count_kernel(x_ptr, bins_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins_ptr + tl.load(x_ptr + index), 1, mask=index > 0)


@triton.jit
def table_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    source = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + index, tl.load(source + index))


class _Doubling(torch.autograd.Function):
    """Twice x by way of `copy_kernel`; keeps a tensor where saved_tensors_hooks do not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = torch.ones(10)
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        copy_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
        return y

    @staticmethod
    def backward(ctx, gradient):
        result = torch.empty_like(gradient)
        copy_kernel[(triton.cdiv(gradient.numel(), 64),)](gradient, result, gradient.numel(), BLOCK=64)
        return result


def launch(kernel, elements, *arguments, **named):
    with count_traffic() as counted:
        kernel[(triton.cdiv(elements, 64),)](*arguments, **named, BLOCK=64)
    (row,) = counted.rows
    return row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_masked_lanes_do_not_count(dtype):
    x, y = torch.ones(150, dtype=dtype), torch.zeros(150, dtype=dtype)
    row = launch(copy_kernel, 192, x, y, 150)
    size = 150 * x.element_size()
    assert (row.name, row.kind) == ("copy_kernel", "triton")
    assert (row.read, row.written, row.requested_read, row.requested_written) == (size,) * 4
    assert row.arguments == {"x_ptr": (size, 0), "y_ptr": (0, size)}
    assert torch.equal(x, y)


def test_a_byte_counts_once_however_often_it_is_read():
    row = launch(neighbours_kernel, 150, torch.ones(150), torch.empty(150), 150)
    assert (row.read, row.requested_read) == (600, 4 * (3 * 150 - 1))


def test_a_tensor_given_twice_counts_once():
    x = torch.ones(128)
    row = launch(copy_kernel, 128, x, x, 128)
    assert (row.read, row.written) == (512, 512)


def test_two_views_of_one_storage_are_told_apart():
    both = torch.ones(2, 128)
    row = launch(copy_kernel, 128, both[0], both[1], 128)
    assert row.arguments == {"x_ptr": (512, 0), "y_ptr": (0, 512)}


def test_arguments_given_by_name_are_named():
    row = launch(copy_kernel, 64, torch.ones(64), length=64, y_ptr=torch.empty(64))
    assert row.arguments == {"x_ptr": (256, 0), "y_ptr": (0, 256)}


def test_writing_twice_shows():
    row = launch(careless_kernel, 128, torch.ones(128), torch.empty(1))
    assert (row.written, row.requested_written) == (4, 8)


def test_atomics_read_and_write():
    row = launch(count_kernel, 128, torch.arange(128, dtype=torch.int32) % 4, torch.zeros(8, dtype=torch.int32))
    assert row.arguments["bins_ptr"] == (16, 16)
    assert row.requested_written == 127 * 4


def test_memory_behind_a_table_of_addresses_is_seen():
    layers = [torch.full((64,), float(i)) for i in range(2)]
    table, y = torch.tensor([layer.data_ptr() for layer in layers]), torch.empty(128)
    row = launch(table_kernel, 128, table, y)
    assert row.arguments == {"table_ptr": (16, 0), "y_ptr": (0, 512), ELSEWHERE: (512, 0)}
    assert row.read == 16 + 512 and torch.equal(y, torch.cat(layers))


@pytest.mark.parametrize(
    ("operation", "read", "written"),
    [
        (lambda x: x.t().contiguous(), 96, 96),
        (lambda x: x.contiguous().view(24).detach()[2:], 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x.add_(1), 96, 96),
        (lambda x: x.copy_(torch.ones(())), 4, 96 + 4),
        (lambda x: x[:1].expand(5, 6) + 1, 24, 120),
        (lambda x: torch.cat([x, x[:2]]), 96 + 48, 144),
        (lambda x: x.sum(), 96, 4),
    ],
    ids=["copy", "views", "empty", "in place", "overwriting", "expanded", "list", "sum"],
)
def test_operators_of_torch_count(operation, read, written):
    x = torch.ones(4, 6)
    with count_traffic() as counted:
        operation(x)
    assert (counted.read, counted.written) == (read, written)
    assert not counted.launches


def test_operators_inside_a_library_count():
    library = torch.library.Library("fastcifar_traffic", "DEF")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: _Doubling.forward(torch.autograd.function.FunctionCtx(), x.contiguous()), "CPU")
    x = torch.ones(8, 8)
    with count_traffic() as counted:
        torch.ops.fastcifar_traffic.doubled(x.t())
    moved = {row.name: (row.read, row.written) for row in counted.rows}
    assert moved == {"aten::ones": (0, 40), "aten::clone": (256, 256), "copy_kernel": (256, 256)}


def test_backward_counts_too():
    x = torch.ones(100, requires_grad=True)
    y, saved = saved_bytes(lambda: _Doubling.apply(x))
    gradient = torch.ones(100)
    with count_traffic() as counted:
        torch.autograd.grad(y, x, gradient)
    assert [row.name for row in counted.rows] == ["copy_kernel"]
    assert counted.passes(x) == 2.0 and saved == 440


def test_kept_memory_is_whole_storages_once_without_parameters():
    x, weight = torch.ones(100, requires_grad=True), torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x * weight)[1] == 800
    assert saved_bytes(lambda: x * weight, parameters=[weight])[1] == 400
    assert saved_bytes(lambda: x[:50] * x[50:])[1] == 400
    # x, and what is hidden in the context.
    assert saved_bytes(lambda: _Doubling.apply(x))[1] == 440


def test_counting_is_exclusive_and_leaves_no_trace(monkeypatch):
    with pytest.raises(ZeroDivisionError), count_traffic():
        raise ZeroDivisionError
    with count_traffic() as counted:
        with pytest.raises(RuntimeError, match="only one context"), count_traffic():
            pass
    launched = len(counted.rows)
    copy_kernel[(1,)](torch.ones(64), torch.empty(64), 64, BLOCK=64)
    assert len(counted.rows) == launched == 0
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), count_traffic():
        pass


def test_separate_operators_make_19_passes():
    assert traffic.eager_passes(1, 1) == (7, 12)
    assert traffic.eager_passes(4, 1) == (10 / 4, 18 / 4)


def _doubling(forward, backward, kept):
    def build():
        x = torch.ones(256, requires_grad=True)
        return traffic.Setup(lambda: _Doubling.apply(x), (x,), (7.0, 1.0))

    return traffic.Subject("doubling", "256 fp32", build, (forward, backward, kept))


@pytest.mark.parametrize(
    ("limits", "status", "complaint"),
    [
        ((2.2, 2.0, 1.05), 0, None),
        ((1.9, 2.0, 1.05), 1, "forward is 2.039 × x, at most 1.9"),
        ((2.2, 1.9, 1.05), 1, "backward is 2.000 × x, at most 1.9"),
        ((2.2, 2.0, 1.03), 1, "saved is 1.039 × x, at most 1.03"),
    ],
    ids=["kept", "forward", "backward", "memory"],
)
def test_limits_decide_the_exit_status(tmp_path, monkeypatch, capsys, limits, status, complaint):
    monkeypatch.setattr(traffic, "SUBJECTS", [_doubling(*limits)])
    monkeypatch.setattr(traffic, "missing", lambda subject: None)
    assert traffic.main(["--output", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert "copy_kernel" in printed and "(note) doubling 256 fp32: backward moves 2.0 × x" in printed
    assert complaint is None or complaint in printed
    (result,) = json.loads((tmp_path / "traffic.json").read_text())["results"]
    assert result["rows"][-1]["pass"] == "backward" and result["rows"][-1]["read"] == 1024


def test_suspicious_launches_are_named():
    row = {"pass": "forward", "name": "k", "kind": "triton", "written": 4, "requested_written": 8}
    result = {"operator": "o", "label": "l", "limits": None, "by_address": False}
    result["rows"] = [row | {"arguments": {ELSEWHERE: (1, 0)}}]
    silent, raced, outside = traffic.failures([result])
    assert "no Triton launch was seen in backward" in silent
    assert "may race" in raced and "outside its arguments" in outside
    assert traffic.failures([{**result, "by_address": True}]) == [silent, raced]


def test_nothing_to_count_is_told(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "SUBJECTS", [_doubling(1, 1, 1)])
    assert traffic.main([]) == 2
    assert "there is no operator doubling" in capsys.readouterr().err


@pytest.mark.parametrize(
    "subject", [s for s in traffic.SUBJECTS if s.limits], ids=lambda subject: f"{subject.operator} {subject.label}"
)
def test_our_operators_keep_their_limits(subject):
    reason = traffic.missing(subject)
    if reason is not None:
        pytest.skip(reason)
    assert traffic.failures([traffic.measure(subject)]) == []
