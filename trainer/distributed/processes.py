"""Several processes that train one run together: who is who, what the main one does alone, and where they meet.

`accelerate launch` (or torchrun) starts the whole program once a device. Each process takes its share of every batch and sums gradients with
the others, so that all hold the same weights; process 0, the main one, alone owns the folder, measures, saves and speaks. With one process
nothing here does anything, and torch.distributed is not touched.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from trainer.core.errors import FollowerExit, Interrupted, NonFiniteError, StorageError, UsageError
from trainer.core.ranks import rank_and_world_size
from trainer.core.signals import Signals
from trainer.distributed import sharding

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

ALONE = timedelta(days=14)
"""How long the others wait for the main process, which may have a large cache to fill."""
STALLED = timedelta(minutes=30)
"""How long a process waits for another one's gradients. One that died is noticed at once; this is for a machine that lost its network."""


def owns_stderr() -> bool:
    """Whether this process is the one that says why the run ends: of several the first that asks.

    What ends one ends all, most often for the same reason, which need not be told by each. The launcher holds the store that they ask, so
    that it outlives them; where there is none, each speaks for itself.
    """
    if rank_and_world_size()[1] == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch import distributed

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"trainer/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:
        return True


class Processes:
    """A context in which the processes of a run know each other; `open_device` is asked for the device once it is needed.

    `led` and `first` are meetings: each process must come to the same ones in the same order. Where another process is gone, a meeting raises
    errors.StorageError; where the main one ended for a reason of its own, errors.FollowerExit with its exit code in all others; where it was asked to
    stop, errors.Interrupted in all.
    """

    def __init__(self, signals: Signals, open_device: Callable[[], torch.device]):
        self.rank, self.count = rank_and_world_size()
        self.signals, self._open_device = signals, open_device
        self.sharded = self.count > 1 and sharding.asked()
        """Whether each holds only a part of the network, so that all must take part in every forward pass and in gathering weights."""
        self._control: Any = None
        self._asked = 0
        """The signal on which all have agreed to stop."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.count == 1:
            _check_alone()
            return self
        if not self.main:
            # A follower is told when to stop: one that left on its own would take the others down in the midst of a step.
            self.signals.note()
        from accelerate import PartialState
        from torch import distributed

        device = self._open_device()
        _check(device)
        with self._meeting():
            PartialState(cpu=device.type == "cpu", timeout=STALLED)
            # Short words over gloo on every device: it waits without turning a GPU's wheels, and knows at once when a process is gone.
            self._control = distributed.new_group(backend="gloo", timeout=ALONE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.count == 1:
            return
        if error is None:
            self.run_on_main(lambda: None)
            from accelerate import PartialState

            PartialState().destroy_process_group()
        elif not self.main and isinstance(error, FollowerExit | Interrupted | NonFiniteError):
            # All end so, and the main process says why. Who ends first has the launcher stop the others, so it goes first.
            with suppress(StorageError, FollowerExit):
                self._heard()
            raise FollowerExit(error.code) from error

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """What `work`, done by the main process alone while the others wait, returned there: something that JSON has."""
        if self.count == 1:
            return work()
        if not self.main:
            told = self._heard()
            if told.get("code", 0) > 128:
                raise Interrupted(told["code"] - 128)
            if "code" in told:
                raise FollowerExit(told["code"])
            return told["result"]
        try:
            if number := self._asked or self.signals.seen:
                raise Interrupted(number)
            result = work()
        except BaseException as error:
            with suppress(StorageError):
                self._tell({"code": getattr(error, "code", 1)})
            raise
        self._tell({"result": result})
        return result

    def main_first(self, work: Callable[[], Result]) -> Result:
        """`work`, done by all, by the main process first: the others find what it left on the disk."""
        done: list[Result] = []
        self.run_on_main(lambda: done.append(work()))
        return done[0] if self.main else work()

    def run_on_all(self, work: Callable[[], Result], beside: Callable[[], None]) -> Result:
        """`led`, for work in which the network is asked: where it is sharded the others do `beside`, the same forward passes."""
        if not self.sharded:
            return self.run_on_main(work)
        # All begin, or none where a signal came.
        self.run_on_main(lambda: None)
        with self._meeting():
            if not self.main:
                beside()
                return self._heard()["result"]
            result = work()
        self._tell({"result": result})
        return result

    def build(self, build: Callable[[Callable[[torch.nn.Module], None] | None], Result]) -> Result:
        """What `build` returns, given what divides a network among the processes (None: it stays whole)."""
        if not self.sharded:
            return build(None)
        from torch.distributed.device_mesh import init_device_mesh

        # accelerate's default, by which transformers leaves the weights of all but the first process empty.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # From here on a signal is answered where all do, at the end of a step: one alone can neither go on nor save.
        self.signals.note()
        with self._meeting():
            mesh = init_device_mesh(self._open_device().type, (self.count,))
        built: list[Result] = []
        for rank in range(self.count):
            # One after the other: before it is divided each has the whole network in memory.
            if rank == self.rank:
                built.append(build(lambda network: sharding.divide(network, mesh)))
            self.max_over_ranks(0)
        return built[0]

    def max_over_ranks(self, number: int) -> int:
        """The largest of the processes' numbers."""
        import torch
        from torch import distributed

        largest = torch.tensor([number])
        with self._meeting():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._control)
        return int(largest)

    def gathered(self, value: Any) -> Any:
        """Nested dicts of tensors with none of them a part any more; of a sharded network all must ask, and only the main process gets them."""
        if not self.sharded:
            return value
        with self._meeting():
            return sharding.gathered(value, self.main)

    def steps(self, steps: Iterator[Result]) -> Iterator[Result]:
        """The same steps, in the midst of which no process stops alone: a signal waits for `stop_if_asked`."""
        if self.count == 1:
            yield from steps
            return
        try:
            while True:
                with self.signals.noted(), self._meeting():
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        except BaseException:
            # When one process ends the launcher sends SIGTERM to the others, which is not why they end.
            self.signals.note()
            raise

    def stop_if_asked(self) -> None:
        """Raise errors.Interrupted where a signal was noted during the last step; in all processes after the same one. What the step did must be
        written down: until then a signal waits."""
        self.signals.release()
        if number := self.signals.seen if self.count == 1 else self._asked:
            raise Interrupted(number)

    def reduce(self, parameters: list[torch.nn.Parameter], loss: float) -> float:
        """Sum gradients (in place) and loss over all processes, and agree whether to stop.

        One flat sum after the last micro-batch, and no DistributedDataParallel: its buckets hide the transfer behind the backward pass, which
        is nothing to gain for adapters of some megabytes, and its wrapper would have to be taken off wherever weights have names.
        """
        import torch
        from torch import distributed

        # Also of bfloat16 gradients: torch.cat takes them along.
        kind = {"dtype": torch.float32, "device": parameters[0].device}
        if self.sharded:
            # Of parts the backward pass has summed the gradients.
            parameters = [p for p in parameters if not sharding.is_part(p)]
        seen = self.signals.seen
        # A parameter that no process has a gradient of keeps none: an optimizer leaves it alone, and would let zeros decay it.
        notes = [float(p.grad is not None) for p in parameters] + [
            loss,
            float(seen == signal.SIGINT),
            float(seen == signal.SIGTERM),
        ]
        parts = [torch.zeros(p.numel(), **kind) if p.grad is None else p.grad.flatten() for p in parameters]
        flat = torch.cat([*parts, torch.tensor(notes, **kind)])
        del parts
        with self._meeting():
            distributed.all_reduce(flat)
            *there, loss, interrupt, terminate = flat[-len(notes) :].tolist()
        start = 0
        for parameter, count in zip(parameters, there, strict=True):
            part = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.copy_(part)
            elif count:
                parameter.grad = part.clone()
        self._asked = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
        return loss

    def _tell(self, value: Any) -> None:
        """What the main process says to all others. As JSON: a pickle from a socket would be code."""
        import torch
        from torch import distributed

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.signals.noted(), self._meeting():
            distributed.broadcast(torch.tensor([data.numel()]), 0, group=self._control)
            distributed.broadcast(data, 0, group=self._control)

    def _heard(self) -> Any:
        """What the main process says."""
        import torch
        from torch import distributed

        with self._meeting():
            length = torch.zeros(1, dtype=torch.int64)
            distributed.broadcast(length, 0, group=self._control)
            data = torch.zeros(int(length), dtype=torch.uint8)
            distributed.broadcast(data, 0, group=self._control)
        return json.loads(data.numpy().tobytes())

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """For a block that waits for other processes, which may be gone."""
        from torch import distributed

        try:
            yield
        except RuntimeError as error:
            # gloo has no class of error of its own.
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            self.signals.note()
            if not self.main and self.signals.seen:
                # The main process was asked to stop as well, and has said so.
                raise FollowerExit(128 + self.signals.seen) from error
            raise StorageError(
                f"Another of the {self.count} processes of this run has ended or cannot be reached, so this one ends too "
                f"({' '.join(str(error).split())[:200]}). If none says why above, it was killed, for lack of memory perhaps. "
                "The same command continues from the last checkpoint, with as many processes as you like."
            ) from error


def _check_alone() -> None:
    """Raise errors.UsageError where this process was to be one of several."""
    # accelerate gives an address to meet at to who should meet others, and then starts one process.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise UsageError(
            "accelerate launch was asked for several processes and has started this one alone, as it does with --cpu and on a machine without "
            "GPUs. Type --multi_gpu, which starts them on CPUs too: accelerate launch --multi_gpu --num_processes 2 -m trainer hardware=cpu "
            "and your settings. For one process, type python -m trainer"
        )


def _check(device: torch.device) -> None:
    """Raise errors.UsageError where processes and devices do not match."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "mps" and here > 1:
        raise UsageError("A Mac's GPU is used by one process: type --num_processes 1, or leave accelerate launch out")
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UsageError(
            f"{here} processes are started on a machine with {torch.cuda.device_count()} GPUs: type --num_processes {torch.cuda.device_count()}"
        )
