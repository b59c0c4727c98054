"""Data-parallel training in several processes, and the work that only the main process does.

`accelerate launch` (or torchrun) starts the program once per device. Each process trains on its share of every batch
and the gradients are summed, so that all processes hold the same weights. Rank 0 is the main process: only it writes to
the run folder, evaluates, saves and prints. The other processes are followers. With a single process, nothing here has
any effect, and torch.distributed is not initialized.
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

FOLLOWER_TIMEOUT = timedelta(days=14)
"""How long followers wait for the main process, which may have to fill a large cache."""
GRADIENT_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the gradients of another one. This is for a machine that has lost its network: a process
that dies is noticed at once."""


def owns_stderr() -> bool:
    """Returns whether this process prints why the run ends: among several processes, only the first that asks.

    An error usually ends all processes for the same reason, which needs to be printed once. The processes ask the
    launcher's store, which outlives them. Without such a store every process prints.
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
    """Context manager that connects the processes of a run.

    `open_device` returns the device of this process; it is called when the device is first needed. The methods
    `run_on_main`, `main_first`, `run_on_all`, `build_network`, `max_over_ranks`, `gather` and `sum_gradients` are
    collective: every process must call the same ones in the same order. They raise errors.StorageError if another
    process is gone. If the main process ends with an error, its followers raise errors.FollowerExit with its exit code;
    if it received a signal, all raise errors.Interrupted.
    """

    def __init__(self, signals: Signals, open_device: Callable[[], torch.device]):
        self.rank, self.world_size = rank_and_world_size()
        self.signals, self._open_device = signals, open_device
        self.sharded = self.world_size > 1 and sharding.is_requested()
        """Whether each process holds only its shard of the network, so that forward passes are collective too."""
        self._control_group: Any = None
        self._agreed_signal = 0
        """Number of the signal on which all processes have agreed to stop, or 0."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.world_size == 1:
            _check_single_process()
            return self
        if not self.is_main:
            # The main process tells its followers when to stop. If one left alone, the step would fail on the others.
            self.signals.record_only()
        from accelerate import PartialState
        from torch import distributed

        device = self._open_device()
        _check_devices(device)
        with self._collective():
            PartialState(cpu=device.type == "cpu", timeout=GRADIENT_TIMEOUT)
            # Messages use gloo on every device: waiting keeps no GPU busy, and it notices at once if a process is gone.
            self._control_group = distributed.new_group(backend="gloo", timeout=FOLLOWER_TIMEOUT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.world_size == 1:
            return
        if error is None:
            self.run_on_main(lambda: None)
            from accelerate import PartialState

            PartialState().destroy_process_group()
        elif not self.is_main and isinstance(error, FollowerExit | Interrupted | NonFiniteError):
            # All processes end for this reason, and the main process reports it. It must exit first, because the
            # launcher stops all processes as soon as one has exited. So wait until receiving fails.
            with suppress(StorageError, FollowerExit):
                self._receive()
            raise FollowerExit(error.code) from error

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the main process while the followers wait.

        Returns its result, which must be JSON-serializable, on all processes.
        """
        if self.world_size == 1:
            return work()
        if not self.is_main:
            message = self._receive()
            # Exit codes above 128 are those of signals.
            if message.get("code", 0) > 128:
                raise Interrupted(message["code"] - 128)
            if "code" in message:
                raise FollowerExit(message["code"])
            return message["result"]
        try:
            if number := self._agreed_signal or self.signals.seen:
                raise Interrupted(number)
            result = work()
        except BaseException as error:
            with suppress(StorageError):
                self._broadcast({"code": getattr(error, "code", 1)})
            raise
        self._broadcast({"result": result})
        return result

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on all processes, on the main process first: the followers find the files it has written."""
        results: list[Result] = []
        self.run_on_main(lambda: results.append(work()))
        return results[0] if self.is_main else work()

    def run_on_all(self, work: Callable[[], Result], follow: Callable[[], None]) -> Result:
        """Like `run_on_main`, for work that calls the network.

        If the network is sharded, the followers run `follow`, which must do the same forward passes.
        """
        if not self.sharded:
            return self.run_on_main(work)
        # All processes start the work, or none if a signal has arrived.
        self.run_on_main(lambda: None)
        with self._collective():
            if not self.is_main:
                follow()
                return self._receive()["result"]
            result = work()
        self._broadcast({"result": result})
        return result

    def build_network(self, build: Callable[[Callable[[torch.nn.Module], None] | None], Result]) -> Result:
        """Calls `build(shard)` and returns its result.

        `shard` is a function that shards a network in place, or None if each process holds the whole network.
        """
        if not self.sharded:
            return build(None)
        from torch.distributed.device_mesh import init_device_mesh

        # accelerate sets this to true, which makes transformers leave the weights empty on all ranks but the first.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # From here on all processes react to a signal together, at the end of a step: a single one could neither
        # continue nor save.
        self.signals.record_only()
        with self._collective():
            mesh = init_device_mesh(self._open_device().type, (self.world_size,))
        results: list[Result] = []
        for rank in range(self.world_size):
            # One process at a time, because each holds the whole network in memory until it is sharded.
            if rank == self.rank:
                results.append(build(lambda network: sharding.shard(network, mesh)))
            self.max_over_ranks(0)
        return results[0]

    def max_over_ranks(self, number: int) -> int:
        """Returns the largest `number` of all processes."""
        import torch
        from torch import distributed

        largest = torch.tensor([number])
        with self._collective():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._control_group)
        return int(largest)

    def gather(self, state: Any) -> Any:
        """Returns nested dicts in which every shard is replaced by its full tensor, or by None on followers."""
        if not self.sharded:
            return state
        with self._collective():
            return sharding.gather(state, self.is_main)

    def guard_steps(self, steps: Iterator[Result]) -> Iterator[Result]:
        """Yields the items of `steps`, each of which is a training step in which no process may stop alone.

        A signal that arrives during a step is deferred until `stop_if_signaled`.
        """
        if self.world_size == 1:
            yield from steps
            return
        try:
            while True:
                with self.signals.recorded(), self._collective():
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        except BaseException:
            # When one process ends, the launcher sends SIGTERM to the others, which is not the reason why they end.
            self.signals.record_only()
            raise

    def stop_if_signaled(self) -> None:
        """Raises errors.Interrupted, on all processes after the same step, if a signal arrived during the last step.

        Call this after the results of the step have been recorded: until then, signals are deferred.
        """
        self.signals.release()
        if number := self.signals.seen if self.world_size == 1 else self._agreed_signal:
            raise Interrupted(number)

    def sum_gradients(self, parameters: list[torch.nn.Parameter], loss: float) -> float:
        """Sums gradients (in place) and loss over all processes, and agrees on whether to stop. Returns the loss.

        This is one flat all-reduce after the last micro-batch instead of DistributedDataParallel, whose buckets overlap
        communication with the backward pass. Adapters of a few megabytes gain nothing from that, and its wrapper would
        change the names of all weights.
        """
        import torch
        from torch import distributed

        # float32 also for bfloat16 gradients, which torch.cat converts.
        options: Any = {"dtype": torch.float32, "device": parameters[0].device}
        if self.sharded:
            # FSDP has already summed the gradients of sharded parameters in the backward pass.
            parameters = [p for p in parameters if not sharding.is_sharded(p)]
        seen = self.signals.seen
        # A parameter without a gradient on any process must keep none: the optimizer skips it, but would apply weight
        # decay to zeros.
        flags = [float(p.grad is not None) for p in parameters]
        scalars = [*flags, loss, float(seen == signal.SIGINT), float(seen == signal.SIGTERM)]
        gradients = [torch.zeros(p.numel(), **options) if p.grad is None else p.grad.flatten() for p in parameters]
        flat = torch.cat([*gradients, torch.tensor(scalars, **options)])
        del gradients
        with self._collective():
            distributed.all_reduce(flat)
            *gradient_counts, loss, interrupted, terminated = flat[-len(scalars) :].tolist()
        start = 0
        for parameter, count in zip(parameters, gradient_counts, strict=True):
            gradient = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.copy_(gradient)
            elif count:
                parameter.grad = gradient.clone()
        self._agreed_signal = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        return loss

    def _broadcast(self, message: Any) -> None:
        """Sends a message to all followers. It is JSON because unpickling data from a socket could execute code."""
        import torch
        from torch import distributed

        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        with self.signals.recorded(), self._collective():
            distributed.broadcast(torch.tensor([data.numel()]), 0, group=self._control_group)
            distributed.broadcast(data, 0, group=self._control_group)

    def _receive(self) -> Any:
        """Returns the next message of the main process."""
        import torch
        from torch import distributed

        with self._collective():
            length = torch.zeros(1, dtype=torch.int64)
            distributed.broadcast(length, 0, group=self._control_group)
            data = torch.zeros(int(length), dtype=torch.uint8)
            distributed.broadcast(data, 0, group=self._control_group)
        return json.loads(data.numpy().tobytes())

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Wraps communication. Raises errors.StorageError or errors.FollowerExit if another process is gone."""
        from torch import distributed

        try:
            yield
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors.
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            self.signals.record_only()
            if not self.is_main and self.signals.seen:
                # The main process received the signal as well and has reported it.
                raise FollowerExit(128 + self.signals.seen) from error
            raise StorageError(
                f"Another of the {self.world_size} processes of this run has ended or cannot be reached, so this one "
                f"ends too ({' '.join(str(error).split())[:200]}). If no process reports why above, it was killed, "
                "possibly for lack of memory. The same command continues from the last checkpoint, with any number of "
                "processes."
            ) from error


def _check_single_process() -> None:
    """Raises errors.UsageError if accelerate was asked for several processes but started only this one."""
    # accelerate sets an address where the processes should connect, and then starts a single process.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise UsageError(
            "accelerate launch was asked for several processes but started only this one, as it does with --cpu and on "
            "machines without GPUs. Type --multi_gpu, which starts several processes on CPUs too: accelerate launch "
            "--multi_gpu --num_processes 2 -m trainer hardware=cpu and your settings. For one process, type "
            "python -m trainer"
        )


def _check_devices(device: torch.device) -> None:
    """Raises errors.UsageError if this machine has fewer devices than processes."""
    import torch

    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "mps" and local_world_size > 1:
        raise UsageError(
            "The GPU of a Mac can be used by one process only: type --num_processes 1, or leave out accelerate launch"
        )
    if device.type == "cuda" and local_world_size > (gpus := torch.cuda.device_count()):
        raise UsageError(
            f"{local_world_size} processes were started on a machine with {gpus} GPUs: type --num_processes {gpus}"
        )
