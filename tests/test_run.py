"""Training state: learning rate, pending evaluations, early stopping, extending a finished run."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from training.config import load_config
from training.run import TrainState, build_network, prepare


def new_state() -> TrainState:
    return TrainState(mean=0.0, std=1.0)


def rates(state: TrainState, steps: int, epochs: int, schedule: str, warmup: float) -> list[float]:
    state.extend(epochs)
    found = []
    for _ in range(epochs):
        for _ in range(steps):
            found.append(state.learning_rate(1.0, schedule, warmup, steps))
            state.end_step()
        state.end_epoch(test_every=1)
    return found


def test_a_constant_rate_is_constant() -> None:
    assert rates(new_state(), 3, 2, "none", 0) == [1.0] * 6


def test_warm_up_rises_linearly_and_reaches_the_rate() -> None:
    assert rates(new_state(), 4, 2, "none", 1.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_warm_up_never_exceeds_the_rate() -> None:
    assert rates(new_state(), 3, 1, "none", 0.5) == pytest.approx([2 / 3, 1.0, 1.0])
    assert max(rates(new_state(), 7, 2, "cosine", 0.01)) == 1.0


def test_a_cosine_falls_to_zero_over_the_epochs() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    state = new_state()
    assert rates(state, 3, 2, "cosine", 0) == pytest.approx(expected)
    assert rates(state, 3, 2, "cosine", 0) == pytest.approx(expected), "an extended run has its own"


def test_the_last_epoch_is_always_evaluated() -> None:
    state, evaluated = new_state(), []
    state.extend(5)
    for _ in range(5):
        state.end_epoch(test_every=2)
        evaluated.append(state.evaluation_pending)
        assert not (state.evaluation_pending and state.finished)
        if state.evaluation_pending:
            state.end_evaluation(1.0, None)
    assert evaluated == [False, True, False, True, True]
    assert state.finished


def test_early_stopping_counts_evaluations_without_improvement() -> None:
    state, finished = new_state(), []
    state.extend(100)
    for loss in [1.0, 0.5, 0.6, 0.5]:
        state.end_epoch(test_every=1)
        state.end_evaluation(loss, patience=2)
        finished.append(state.finished)
    assert finished == [False, False, False, True]
    assert state.best_loss == 0.5
    state.extend(3)
    assert not state.finished
    assert state.target_epoch == 7


# Network and optimizer


@pytest.fixture
def _torch_settings() -> Iterator[None]:
    """Restores what build_network sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.optimize_ddp = True


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group, for which DistributedDataParallel wraps the network."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_torch_settings")
@pytest.mark.parametrize(
    ("deterministic", "hip", "benchmark"), [(False, None, True), (True, None, False), (False, "6.4", False)]
)
def test_kernels_are_searched_unless_deterministic_or_on_rocm(
    experiment: Callable[..., Path],
    universe: Path,
    monkeypatch: pytest.MonkeyPatch,
    deterministic: bool,
    hip: str | None,
    benchmark: bool,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    config = load_config(experiment(deterministic=deterministic))
    build_network(config, Accelerator(), config.network_settings((1, 64, 64, 64)))
    assert torch.backends.cudnn.benchmark == benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.usefixtures("_torch_settings", "one_rank")
@pytest.mark.parametrize(
    ("backend", "compile", "graphs"), [("no", "auto", 0), ("eager", "auto", 1), ("eager", False, 0)]
)
def test_dynamo_config_compiles_the_network_inside_ddp(
    experiment: Callable[..., Path],
    universe: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    compile: object,
    graphs: int,
) -> None:
    """Accelerate would compile DDP itself: its class is hidden then, and `_orig_mod.` is added to names."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    config = load_config(experiment(compile=compile))
    accelerator = Accelerator()
    network = build_network(config, accelerator, config.network_settings((1, 64, 64, 64)))
    names = list(network.state_dict())
    wrapped = torch.nn.parallel.DistributedDataParallel(network)  # as Accelerate does with several ranks
    prepared, _ = prepare(config, accelerator, wrapped, (1, 64, 64))
    assert type(prepared) is torch.nn.parallel.DistributedDataParallel
    assert not prepared.broadcast_buffers
    assert list(accelerator.get_state_dict(prepared)) == names
    assert counters["stats"]["unique_graphs"] == graphs, "the warm-up of DDP ran"
