"""`TrainState`: all that makes up a training run, and the loop that lets members come and go."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch

from ringps import probe
from ringps.checkpoint.host_copies import host_copies
from ringps.checkpoint.tree import flatten, unflatten
from ringps.collectives import Change, Communicator, ElasticCommunicator, current
from ringps.data import ElasticBatchSampler
from ringps.errors import CheckpointError, LayoutMismatchError, PeerLostError, RingChangedError
from ringps.membership import JobOver
from ringps.optim import randomness
from ringps.optim.admission import Admission, current_admission
from ringps.optim.placement import placed_like
from ringps.optim.replicate import replicate
from ringps.optim.wrapper import DistributedOptimizer

_LEFT_CODE = 128 + signal.SIGTERM


class Stateful(Protocol):
    """What a scheduler, a scaler and others have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class _Ask:
    """The handler of a signal: asks a loop to end."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._leave()


class Keeper(Protocol):
    """Takes part in the loop between two steps: whoever saves checkpoints."""

    def begin(self, loader: object) -> None:
        """The loop is about to begin; a joining worker has its state."""

    def ask_to_stop(self) -> None:
        """This process got SIGTERM. Called in a signal handler."""

    def stops(self, marks: Sequence[int]) -> bool:
        """Whether the job ends after this step, by all ranks' marks."""

    def stop(self) -> None:
        """Save, and leave. Returns only if the ring changed on the way: then the next step follows.

        Raises:
            SystemExit: it is done.
        """

    def between(self, marks: Sequence[int], *, begin: bool = True) -> bool:
        """All ranks are between the same two steps.

        Args:
            marks: of all ranks.
            begin: whether a save may begin; not where somebody is about to come.

        Returns:
            Whether this rank knows what all know now. If not, the ring is about to change.
        """

    def knows(self) -> dict[str, Any]:
        """What one that joins must know: plain values, the same on all ranks after `between`."""

    def learn(self, known: dict[str, Any]) -> None:
        """As one that joins: what the others know."""

    def finish(self) -> None:
        """The last step has been applied, on all ranks."""


class TrainState:
    """All that makes up a training run: what a worker that joins gets from its peers.

    ::

        state = ringps.TrainState(model=model, optimizer=opt, sampler=sampler, scheduler=sched)
        for step, (inputs, targets) in state.steps(loader, until=10_000):
            loss = loss_fn(model(inputs), targets)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()

    The parts are the script's own; this object refers to them. Everything that the next step depends on must
    be among them, and be the same on every rank between two steps, but for the model's buffers: a joining
    worker gets rank 0's. It gets all of it from all members at once, checked by hash, and so never reads what
    a script would load.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: DistributedOptimizer,
        sampler: ElasticBatchSampler | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        **others: Stateful,
    ) -> None:
        """
        Args:
            model: the module that is trained.
            optimizer: its wrapped optimizer.
            sampler: yields the loader's batches.
            scheduler: a learning-rate scheduler.
            scaler: a gradient scaler.
            others: anything else with `state_dict()` and `load_state_dict()`, of plain values and tensors.

        Raises:
            ValueError: a part has the wrong kind.
        """
        if not isinstance(optimizer, DistributedOptimizer):
            raise ValueError("optimizer must be a ringps.DistributedOptimizer; wrap yours first")
        parts = {"scheduler": scheduler, "scaler": scaler, **others}
        self._model = model
        self._optimizer = optimizer
        self._sampler = sampler
        self._parts: dict[str, Stateful] = {name: part for name, part in parts.items() if part is not None}
        for name, part in self._parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise ValueError(f"{name} has no state_dict() and load_state_dict()")
        self._step = 0

    @property
    def step(self) -> int:
        """Steps that have been applied."""
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """Everything, of plain values and tensors; the tensors are live."""
        state: dict[str, Any] = {
            "step": self._step,
            "model": dict(self._model.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        if self._sampler is not None:
            state["sampler"] = self._sampler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, alike on all ranks.

        Raises:
            KeyError: a part is missing.
        """
        self._load(state, joining=False)

    def steps(self, loader: Iterable[Any], until: int) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) until `until` steps have been applied, through as many epochs as it takes.

        Steps count from 1, and go on after `step`. Between two steps members may come and go: workers that
        start late get the members' state here, and one that gets SIGTERM finishes its step and leaves. When
        the ring changes, what the loader has read ahead is read anew, for the ranks as they are then.

        Args:
            loader: iterated over again and again; with the sampler as its `batch_sampler`.
            until: the last step.

        Raises:
            ValueError: the loader yields nothing.
            LayoutMismatchError: in a joining worker: its model or optimizer is not the members'.
            RingpsError: what collectives raise.
        """
        return self.run(loader, until, None)

    def run(self, loader: Iterable[Any], until: int, keeper: Keeper | None) -> Iterator[tuple[int, Any]]:
        """`steps`, with somebody who takes part between two of them."""
        ring, admission = current(), current_admission()
        if isinstance(ring, ElasticCommunicator) and admission is not None:
            self._begin(ring, admission, keeper)
        if keeper is not None:
            keeper.begin(loader)
        if admission is not None and self._sampler is not None and ring.rank == 0:
            admission.note("training", global_batch=self._sampler.global_batch_size, until=until)
        # The optimizer takes batches as they are trained, if it knows the sampler; else nobody would.
        takes = self._sampler is not None and not self._sampler.tracked
        if takes:
            assert self._sampler is not None
            self._sampler.track()
        with self._terminable(ring, admission, keeper):
            while self._step < until:
                generation, yielded = ring.generation.number, False
                with randomness.for_iterator(loader, self._step, ring.rank):
                    batches = iter(loader)
                for batch in batches:
                    yielded = True
                    yield self._step + 1, batch
                    self._step += 1
                    if takes:
                        assert self._sampler is not None
                        self._sampler.take()
                    if isinstance(ring, ElasticCommunicator) and admission is not None:
                        self._between(ring, admission, keeper)
                    elif keeper is not None:
                        self._keep(ring, keeper)
                    stale = self._sampler is not None and self._sampler.stale
                    if self._step >= until or stale or ring.generation.number != generation:
                        break
                if not yielded:
                    raise ValueError("the loader yields no batch")
            if keeper is not None:
                keeper.finish()

    # Coming and going.

    @contextlib.contextmanager
    def _terminable(
        self, ring: Communicator, admission: Admission | None, keeper: Keeper | None
    ) -> Iterator[None]:
        """While a loop runs that can leave in order, SIGTERM asks it to."""
        leave: Callable[[], None] | None = None
        if keeper is not None:
            leave = keeper.ask_to_stop
        elif ring.elastic and admission is not None:
            leave = admission.ask_to_leave
        here = threading.current_thread() is threading.main_thread()
        found = signal.getsignal(signal.SIGTERM)
        # A loop that an exception has ended may live on in its traceback; then its handler is still set.
        if leave is None or not here or not (found is signal.SIG_DFL or isinstance(found, _Ask)):
            yield
            return
        own = _Ask(leave)
        signal.signal(signal.SIGTERM, own)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is own:  # no later loop has taken over
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _begin(self, ring: ElasticCommunicator, admission: Admission, keeper: Keeper | None) -> None:
        if self._sampler is not None:
            self._sampler.redraws = True
        if ring.joining:
            self._join(ring, admission, keeper)
        admission.admit()

    def _keep(self, ring: Communicator, keeper: Keeper) -> None:
        """Between two steps of a fixed ring, whose ranks have not voted."""
        if probe.listener is not None:
            probe.reached("boundary", step=self._step)
        if not self._optimizer.between_steps:
            return
        own = torch.tensor([ring.marks()], dtype=torch.uint8)
        marks = torch.empty(ring.world_size, dtype=torch.uint8)
        ring.all_gather(marks, own)
        given = marks.tolist()
        if keeper.stops(given):
            keeper.stop()
        keeper.between(given)

    def _between(self, ring: ElasticCommunicator, admission: Admission, keeper: Keeper | None) -> None:
        if probe.listener is not None:
            probe.reached("boundary", step=self._step)
        change = ring.take_change()
        if change is None:
            return
        kept = keeper if self._optimizer.between_steps else None
        if kept is not None and kept.stops(change.marks):
            kept.stop()
        elif change.leavers:
            with contextlib.suppress(PeerLostError, RingChangedError):
                ring.raw.barrier()  # all have committed, and need not find out whether others did
            if ring.rank in change.leavers:
                self._leave(ring, admission)
            ring.reform(RingChangedError("members leave"))
            if ring.settle() and self._sampler is not None:
                self._sampler.divide(ring.rank, ring.world_size)
        elif change.joiners:
            if self._offer(ring, admission, change, keeper):
                ring.reform(RingChangedError("workers join"))
                ring.settle()
        elif kept is not None:
            kept.between(change.marks)

    def _leave(self, ring: ElasticCommunicator, admission: Admission) -> None:
        who = ring.generation.describe(ring.rank)
        admission.depart(self._step)
        print(f"ringps: {who} leaves after step {self._step}, as asked (SIGTERM)", file=sys.stderr)
        raise SystemExit(_LEFT_CODE)

    def _offer(
        self, ring: ElasticCommunicator, admission: Admission, change: Change, keeper: Keeper | None
    ) -> bool:
        """Let joining workers fetch the state, which stays as it is until the next step has committed."""
        if keeper is not None and not keeper.between(change.marks, begin=False):
            return False
        try:
            shared = self.shared(ring.raw)
        except (PeerLostError, RingChangedError):
            return False  # the next operation finds out what has become of the ring
        if probe.listener is not None:
            probe.reached("offer", step=self._step)
        if keeper is not None:
            shared["member"]["keeper"] = keeper.knows()
        offered = flatten(shared, devices=True)
        # The thread that serves it reads the CPU's memory only; what lies there is served as it is.
        offered = offered._replace(tensors=host_copies(offered.tensors))
        if not admission.offer(self._step, change.joiners, offered):
            return False
        self._optimizer.at_next_commit(admission.withdraw)
        return True

    def shared(self, ring: Communicator) -> dict[str, Any]:
        """What all ranks have in common, and what else a member needs. Collective.

        The model's buffers, which are each rank's own, are those of rank 0, in new memory; all other tensors
        are live.
        """
        buffers = {name: buffer.detach().clone() for name, buffer in self._buffers().items()}
        replicate(ring, list(buffers.values()))
        state = self.state_dict()
        state["model"] = {**state["model"], **buffers}
        state["member"] = {
            "layout": [list(entry) for entry in self._optimizer.layout()],
            "progress": self._optimizer.progress(),
            "parts": sorted(self._parts),
        }
        return state

    def own(self, loader: object) -> dict[str, Any]:
        """What is this rank's alone: its random number generators, and its model's buffers."""
        return {"random": randomness.capture(loader, self._model.parameters()), "buffers": self._buffers()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        buffers = dict(self._model.named_buffers())
        if not buffers:
            return {}
        persistent = self._model.state_dict()
        return {name: buffer for name, buffer in buffers.items() if name in persistent}

    def go_on(self, state: dict[str, Any], where: str) -> None:
        """Continue from what `shared` gave some time ago, with any number of ranks; alike on all ranks.

        Args:
            state: may come from a file.
            where: what to call it in errors.

        Raises:
            CheckpointError: it is that of another model, or of other parts.
        """
        member = state["member"]
        theirs, ours = dict(member["layout"]), dict(self._optimizer.layout())
        _compare_tensors(state["model"], self._model.state_dict(), where)
        missing = sorted({*self._parts} - {*member["parts"]})
        if missing or (self._sampler is not None and "sampler" not in state):
            raise CheckpointError(
                f"{where} has no state of {', '.join(missing) or 'the sampler'}, which this TrainState has; "
                "leave it out of TrainState, or begin in another directory"
            )
        try:
            self._load(state, joining=False)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{where} does not fit this script: {error}") from error
        # Of other buckets, their order means nothing.
        self._optimizer.go_on(member["progress"], order=theirs == ours)

    def go_on_alone(self, own: dict[str, Any] | None, loader: object, other: dict[str, Any]) -> None:
        """Continue from what `own` gave on the rank that had this one's number, or without it.

        Args:
            own: None if there was no such rank: generators are seeded anew, from those of `other`.
            loader: the loop's.
            other: rank 0's.
        """
        if own is None:
            randomness.seed_apart(other["random"], current().rank)
            return
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                if name in own["buffers"]:
                    buffer.copy_(own["buffers"][name])
        randomness.restore(own["random"], loader, self._model.parameters())

    @property
    def between_steps(self) -> bool:
        """Whether all gradients so far have been applied."""
        return self._optimizer.between_steps

    # As a joining worker.

    def _join(self, ring: ElasticCommunicator, admission: Admission, keeper: Keeper | None) -> None:
        """Become a member, and get the others' state while they are about their next step.

        In that step this rank has no samples. It votes when it has the state, and not before; so nobody
        changes the state while it is read.
        """
        try:
            entrance = admission.join()
        except JobOver:
            print("ringps: the job ended before this worker could join it", file=sys.stderr)
            raise SystemExit(0) from None
        ring.enter(entrance.generation, entrance.backend)
        fetched = entrance.fetch()
        state = unflatten(fetched.skeleton, fetched.tensors)
        self._compare(state["member"])
        self._load(state, joining=True)
        self._optimizer.go_on(state["member"]["progress"])
        if keeper is not None:
            keeper.learn(state["member"]["keeper"])
        if probe.listener is not None:
            probe.reached("fed", step=self._step)
        ring.note(
            "state_fetched",
            step=self._step,
            bytes=fetched.bytes_fetched,
            seconds=round(fetched.seconds, 4),
            servers_lost=len(fetched.lost),
        )

    def _compare(self, member: dict[str, Any]) -> None:
        """
        Raises:
            LayoutMismatchError: this worker's model, optimizer or parts are not the members'.
        """
        theirs = dict(member["layout"])
        ours = dict(self._optimizer.layout())
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            if theirs.get(name) != ours.get(name):
                raise LayoutMismatchError(
                    f'this worker differs from the ring that it joins at "{name}": the ring has '
                    f"{theirs.get(name, 'nothing of that name')}, this worker "
                    f"{ours.get(name, 'nothing of that name')}. Start the script that the ring runs, with "
                    "the same arguments"
                )
        if member["parts"] != sorted(self._parts):
            raise LayoutMismatchError(
                f"this worker's TrainState has the parts {sorted(self._parts)}, and that of the ring that it "
                f"joins has {member['parts']}"
            )

    def _load(self, state: dict[str, Any], *, joining: bool) -> None:
        self._model.load_state_dict(state["model"])
        # Torch moves each parameter's state to where the parameter is, but not options such as `lr`.
        optimizer = state["optimizer"]
        groups = placed_like(optimizer["param_groups"], lambda: self._optimizer.param_groups)
        self._optimizer.load_state_dict({**optimizer, "param_groups": groups})
        for name, part in self._parts.items():
            part.load_state_dict(placed_like(state[name], part.state_dict))
        if self._sampler is not None:
            self._sampler.load_state_dict(state["sampler"], joining=joining)
        self._step = state["step"]


def _compare_tensors(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        CheckpointError: a saved model's tensors are not those of this one; names the first that is not.
    """
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        there, here = (_describe(state.get(name)) for state in (theirs, ours))
        if there != here:
            raise CheckpointError(
                f'{where} is of another model: it has {there} as "{name}", and this script {here}. Build the '
                "model as it was, or begin in another directory"
            )


def _describe(entry: object) -> str:
    if isinstance(entry, torch.Tensor):
        dtype = str(entry.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, entry.shape))}]"
    return "nothing" if entry is None else f"a {type(entry).__name__}"
