"""The model of step time, and the counting that it rests on."""

import pytest
import torch
from distributed_case import run_ranks

from benchmarks import scaling, scaling_model, scaling_worker
from benchmarks.scaling_model import Nccl, Ring
from fastcifar.nn import BatchNormAct, DepthwiseConvBNAct
from fastcifar.training.distributed import Processes


def test_a_ring_by_hand():
    network = Ring(base=1.0, alpha=0.1, beta=0.01)
    assert network.seconds("all_reduce", 100, 4) == pytest.approx(1 + 0.1 * 6 + 0.01 * 150)
    assert network.seconds("all_gather", 100, 4) == pytest.approx(1 + 0.1 * 3 + 0.01 * 300)
    assert network.seconds("all_to_all", 100, 4) == pytest.approx(1 + 0.1 * 3 + 0.01 * 75)
    assert network.seconds("all_reduce", 100, 1) == 0.0
    with pytest.raises(ValueError, match="no model of 'broadcast'"):
        network.seconds("broadcast", 1, 2)


def rows_of(network, noise=1.0):
    return [
        {"kind": kind, "bytes": size, "processes": count, "seconds": noise * network.seconds(kind, size, count)}
        for kind in ("all_reduce", "all_gather")
        for size in (64, 4096, 1_000_000)
        for count in (2, 4, 8)
    ]


@pytest.mark.parametrize("network", [Ring(5e-5, 1e-5, 1e-9), Ring(0.0, 1e-5, 1e-9), Ring(5e-5, 0.0, 1e-9)], ids=str)
def test_the_fit_finds_the_network(network):
    found = scaling_model.fit_ring(rows_of(network))
    for name in ("base", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(network, name), rel=1e-6, abs=1e-12)


def test_the_fit_is_never_negative():
    rows = [{**row, "seconds": row["seconds"] / (row["processes"] ** 2)} for row in rows_of(Ring(1e-5, 1e-5, 1e-9))]
    found = scaling_model.fit_ring(rows)
    assert min(found.base, found.alpha, found.beta) >= 0.0


def test_nccl_gives_the_figure_that_it_prints():
    # 64 bytes over two machines of 8 H100 by a tree: NVIDIA/nccl issue 1453.
    assert 1e6 * Nccl().seconds("all_reduce", 64, 16) == pytest.approx(25.207382, rel=1e-3)


def test_an_all_gather_grows_with_the_ring_and_an_all_reduce_with_the_tree():
    network = Nccl()
    gather, reduce = (
        [network.seconds(kind, 1000, count) for count in (64, 1024)] for kind in ("all_gather", "all_reduce")
    )
    assert 12 < gather[1] / gather[0] < 20 and 1.5 < reduce[1] / reduce[0] < 2.5


def test_the_model_is_exact_where_the_network_is_a_ring():
    network = Ring(5e-5, 1e-5, 1e-9)
    volumes = [{"task": "ds_resnet", "kind": "all_reduce", "dtype": "float32", "bytes": 4000, "calls": 3}]
    steps = [
        {"task": "ds_resnet", "processes": 2, "images": 8, "together": together, "seconds": seconds}
        for together, seconds in ((False, 0.01), (True, 0.01 + 3 * network.seconds("all_reduce", 4000, 2)))
    ]
    (row,) = scaling.check(steps, rows_of(network), volumes)
    assert row["model's error, %"] == 0.0 and row["arithmetic, ms"] == pytest.approx(10)


def volumes():
    synchronised = [
        {"kind": "all_gather", "dtype": "float64", "bytes": 1032, "calls": 20},
        {"kind": "all_reduce", "dtype": "float64", "bytes": 1024, "calls": 20},
    ]
    gradient = {"kind": "all_reduce", "dtype": "float32", "bytes": 377_488, "calls": 1}
    rows = [{"task": "ds_resnet", **row} for row in (*synchronised, gradient)]
    return [*rows, {"task": "ds_resnet, local statistics", **gradient}]


@pytest.mark.parametrize("each", [True, False], ids=["each", "all together"])
def test_projections_fall_from_one_gpu_on(each):
    rows = scaling_model.projection(volumes(), (1, 8, 64, 1024), images=4096, each=each)
    for name in ("synchronised", "local"):
        efficiency = [row[f"{name}: efficiency, %"] for row in rows]
        assert efficiency[0] == 100.0 and efficiency == sorted(efficiency, reverse=True)
    assert all(row["local: exchange, ms"] < row["synchronised: exchange, ms"] for row in rows[1:])


def test_remedies_help():
    rows = {row["remedy"]: row["1024 GPUs: efficiency, %"] for row in scaling_model.remedies(volumes(), (1024,))}
    assert all(
        value > rows["statistics of all GPUs"] for name, value in rows.items() if name != "statistics of all GPUs"
    )


def counted(rank, world_size):
    torch.set_num_threads(1)
    processes, found = Processes(rank, world_size, rank), {}
    for name in ("ds_resnet", "ds_resnet, local, sharded images"):
        task = scaling_worker.build(name, 4, processes, model_options={"width": 0.25})
        norms = sum(isinstance(module, (BatchNormAct, DepthwiseConvBNAct)) for module in task.model.modules())
        parameters = sum(p.numel() for p in task.model.parameters())
        found[name] = scaling_worker.collectives_of(task), norms, parameters
    return found


def test_a_step_exchanges_two_messages_a_batch_norm_and_its_gradients():
    for rank in run_ranks(counted, 2):
        rows, norms, parameters = rank["ds_resnet"]
        calls = {
            kind: sum(row["calls"] for row in rows if row["kind"] == kind) for kind in ("all_gather", "all_reduce")
        }
        assert calls == {"all_gather": norms, "all_reduce": norms + 1}
        assert {"kind": "all_reduce", "dtype": "float32", "bytes": 4 * parameters, "calls": 1} in rows
        rows, _, _ = rank["ds_resnet, local, sharded images"]
        assert [row["kind"] for row in rows] == ["all_reduce", "all_reduce", "all_to_all"]
