"""`DistributedOptimizer`: a torch optimizer whose gradients are those of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn, SupportsIndex

import torch

from ringps.buckets import BucketSettings, Entry, Reducer, ReducerStatistics, agree
from ringps.collectives import Communicator, current
from ringps.config import MIB
from ringps.data import ElasticBatchSampler
from ringps.device import accelerator_of
from ringps.kernels.digest import EMPTY, digest
from ringps.optim.replicate import describe_model, describe_optimizer, replicate
from ringps.optim.stragglers import Straggler
from ringps.optim.watch import CommitWatch, parameters_of
from ringps.optim.weights import SampleWeights


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer so that every rank applies the mean of all ranks' gradients.

    ::

        opt = ringps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), model)
        loss.backward()     # returns with the reduced gradients in .grad
        opt.step()          # applies them; parameters stay equal to the last bit

    Reduction overlaps the backward pass, in buckets, as in PyTorch DDP (Li et al., VLDB 2020).
    Everything else is the wrapped optimizer's: parameter groups, state, hooks (which are called
    with the wrapped optimizer), `state_dict()` of the same form. So schedulers, `GradScaler`,
    gradient clipping and closures work as ever.

    *Aliasing*: after a reduction `.grad` is a view of a bucket. It may be changed in place; its
    values last until the next reduction overwrites them, so clone what you want to keep.

    *Which gradients*: those of this optimizer's parameters that require a gradient. One that has no
    gradient on some ranks counts as zero there; one that has none on any rank keeps `.grad` None.
    Gradients must be dense, real, and on the CPU or this worker's GPU. Freezing, unfreezing and
    `add_param_group` are noticed at the next `zero_grad`, backward or `step`, and must happen on all
    ranks alike.

    *Mean*: over the ranks; with a sampler, weighted by the samples that each rank had of the global
    batch. Then each batch that the sampler yields must have one backward pass.

    *Accumulation*: inside `no_sync()`, or in all but every `accumulate_steps`-th backward,
    gradients add up locally, as in plain PyTorch: scale the loss yourself. With a sampler each
    backward is weighted by its own batch before it is added, so the result is that of one process
    whose loss is the mean over each whole global batch, added up over the backward passes.

    *Ranks that have nothing to do*: a rank that made no backward in a step takes part in `step()`
    with zeros. It then applies the gradients as the other ranks' scripts left them.

    *Closures*: `step(closure)` reduces at every evaluation and gives the optimizer the mean of the
    ranks' losses, so that line searches decide alike everywhere.

    Buffers (running statistics) are made equal at construction and are each rank's own thereafter.
    The wrapped optimizer's state is not exchanged: load a `state_dict` on every rank.
    """

    _step_supports_amp_scaling = False
    """GradScaler unscales before `step()`; the inner optimizer would not see a scale set on this one."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        sampler: ElasticBatchSampler | None = None,
        accumulate_steps: int = 1,
        bucket_cap_bytes: int | Literal["auto"] = 8 * MIB,
        first_bucket_bytes: int = MIB,
        communicator: Communicator | None = None,
    ) -> None:
        """Compare the ranks' layouts and copy rank 0's parameters and buffers to all. Collective.

        Args:
            optimizer: any torch optimizer; use it through this wrapper only from now on.
            model: the module whose parameters it optimizes.
            sampler: weights the ranks' gradients by their samples.
            accumulate_steps: reduce and count a step at every so many backward passes.
            bucket_cap_bytes: most bytes of gradients in a bucket. "auto" measures a few sizes on the first
                steps and keeps the best. Rounding depends on how gradients are cut into buckets, so two
                runs have the same bits only if they use the same size.
            first_bucket_bytes: the same for the bucket of the first gradients.
            communicator: the ring; the process's own by default.

        Raises:
            LayoutMismatchError: on every rank, if models, optimizers or options differ; names the
                first difference.
            ValueError: a parameter that cannot be reduced, or an option out of range.
            RingpsError: what collectives raise.
        """
        # No super().__init__(): whatever an optimizer keeps, the inner one keeps.
        if isinstance(optimizer, DistributedOptimizer):
            raise ValueError("the optimizer is wrapped already")
        self._inner = optimizer
        self._ring = communicator if communicator is not None else current()
        self._weights = None if sampler is None else SampleWeights(sampler, elastic=self._ring.elastic)
        settings = BucketSettings(
            cap_bytes=bucket_cap_bytes,
            first_cap_bytes=first_bucket_bytes,
            accumulate_steps=accumulate_steps,
        )
        names = _Names(model, optimizer)
        self._watch = CommitWatch(self._ring, optimizer)
        # Constructed first: it checks the parameters, which must not fail amid the collectives.
        self._reducer = Reducer(
            self._ring,
            lambda: parameters_of(optimizer),
            names,
            settings,
            self._weights,
            self._watch,
        )
        self._names = names
        tensors = [(names(one), one) for one in names.known]
        for name, tensor in tensors:
            try:
                accelerator_of(tensor)
            except ValueError as error:
                raise ValueError(f'"{name}" cannot be trained here: {error}') from error
        self._settings = settings
        if self._ring.joining:
            return  # it gets the members' state, and is compared with them then
        options = repr((settings, sampler is not None and sampler.state_dict()))
        entries = [
            *describe_model(tensors),
            *describe_optimizer(optimizer, names),
            ("options of DistributedOptimizer", options),
        ]

        ranks = (0, 1)

        def attempt(before: int) -> bytes:
            nonlocal ranks
            ranks = self._ring.rank, self._ring.world_size
            agree(self._ring.raw, entries)
            replicate(self._ring.raw, names.known)
            return digest(*names.known) if self._ring.elastic else EMPTY

        self._ring.transact(attempt)
        if sampler is not None:
            # Of the ranks that took part, also if one was lost since: the others know it no better.
            sampler.divide(*ranks)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._inner.defaults = defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the reduced gradients. Collective if `closure` is given or a rank made no backward.

        Args:
            closure: evaluates the model anew: zeroes the gradients, calls backward and returns the
                loss (a tensor of one element, or a float), of which the optimizer gets the mean
                over the ranks.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RingpsError: what collectives raise; nothing was applied by a step without closure.
            RuntimeError: the end of the last backward could not be noticed; says why.
        """
        if closure is None:
            if self._reducer.replayed:
                self._reducer.reduce()
            if self._weights is not None and self._reducer.backwards == 0:
                self._weights.skip()
            self._reducer.settle()
            result = self._inner.step()
        else:
            try:
                result = self._inner.step(lambda: self._evaluate(closure))
            finally:
                if self._weights is not None:
                    self._weights.end_evaluations()
        self._ring.record_step(self._reducer.next_step())
        return result

    def reduce(self) -> None:
        """Reduce the gradients that replaying a CUDA graph has left, as `backward()` does by itself.
        Collective.

        A backward that is captured runs no Python when it is replayed. So call this after each replay, before
        what looks at gradients (clipping, `GradScaler.unscale_`); `step()` does it if nobody has. Capture
        with `.grad` None (`zero_grad()` before), once, on all ranks alike; `.grad` is a view of a bucket
        afterwards. Modules of `torch.cuda.make_graphed_callables` do not need it: their gradients arrive as
        ever.

        Raises:
            RuntimeError: no backward was captured.
            RingpsError: what collectives raise.
        """
        self._reducer.reduce()

    @property
    def stragglers(self) -> tuple[Straggler, ...]:
        """Workers that are persistently slower than the others, the slowest first; see `Recovery`."""
        return self._watch.stragglers

    def layout(self) -> list[Entry]:
        """What must be alike on all ranks and does not change while training: names, shapes, options."""
        tensors = [(self._names(one), one) for one in self._names.known]
        groups = [entry for entry in describe_optimizer(self._inner, self._names) if "'" not in entry[0]]
        return [*describe_model(tensors), *groups, ("options of DistributedOptimizer", repr(self._settings))]

    def progress(self) -> dict[str, Any]:
        """What a new member needs beside the state, to reduce gradients together with the others."""
        return self._reducer.progress()

    @property
    def between_steps(self) -> bool:
        """Whether there are no gradients that are yet to be applied."""
        return self._reducer.between_steps

    def go_on(self, progress: dict[str, Any], *, order: bool = True) -> None:
        """Go on from the others' `progress`.

        Args:
            progress: theirs, or this ring's own of some time ago.
            order: also with the buckets in the order that was learned then; only for the same layout.
        """
        if not order:
            progress = {**progress, "order": None, "cap_bytes": self._reducer.progress()["cap_bytes"]}
        self._reducer.go_on(progress)

    def at_next_commit(self, call: Callable[[], None]) -> None:
        """Have `call` called once when the next reduction has committed, before anything can be applied."""
        self._watch.at_next_commit(call)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does."""
        self._reducer.prepare()
        self._inner.zero_grad(set_to_none)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up local gradients; the next one outside reduces the sum.

        Must be used alike on all ranks.
        """
        self._reducer.held += 1
        try:
            yield
        finally:
            self._reducer.held -= 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, alike on all ranks. Their values are not exchanged."""
        self._inner.add_param_group(param_group)
        self._reducer.prepare()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state; a plain optimizer can load it."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer's kind, also one saved without ringps. Local."""
        self._inner.load_state_dict(state_dict)

    def statistics(self) -> ReducerStatistics:
        """Counters since construction."""
        return self._reducer.statistics()

    def __getattr__(self, name: str) -> Any:
        # Reached for what this class lacks: hook registries and the like, which the base class's
        # methods use.
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self._inner!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a DistributedOptimizer belongs to its process's ring and cannot be pickled or copied; "
            "save its state_dict() instead"
        )

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The mean loss, with reduced gradients in place."""
        self._reducer.next_evaluation()
        if self._weights is not None:
            self._weights.start_evaluation()
        loss = closure()
        self._reducer.settle()
        return None if loss is None else self._reducer.mean(loss)


class _Names:
    """Names of parameters and buffers for messages, also of those that come later."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._by_id: dict[int, tuple[str, torch.Tensor]] = {}
        self.known: list[torch.Tensor] = []
        """All of the model's and the optimizer's tensors at construction; a shared one comes once."""
        for name, tensor in self._all():
            if id(tensor) not in self._by_id:
                self._by_id[id(tensor)] = name, tensor
                self.known.append(tensor)

    def __call__(self, tensor: torch.Tensor) -> str:
        name, known = self._by_id.get(id(tensor), ("", None))
        if known is tensor:
            return name
        return next((name for name, other in self._all() if other is tensor), "unknown parameter")

    def _all(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()
        for number, group in enumerate(self._optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                yield f"param_groups[{number}]['params'][{position}]", parameter
