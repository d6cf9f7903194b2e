"""Cuts any module into the stages that plans of rematerialization (`memory.remat`) are made of.

The module is traced by `torch.export` in training mode, with the shapes of an example. The graph is then run once, node by
node, to see which values need gradients, which nodes draw random numbers, and which memory is written to or kept for backward.
What needs no gradient, draws nothing and follows from inputs, weights and buffers alone (masks, positions) is free: any stage
may read it. It is computed in the stage that reads it, or before the first one if several do. All else is bound to the order of
the trace, and wherever what follows reads one bound tensor alone, there is a cut.

A stage is a function: it writes to copies of buffers (running statistics of a batch norm), and what these hold at the end is
put into the module when its forward pass is over. So computing a stage again, or measuring it, changes nothing.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bert_fast.errors import UserError
from bert_fast.memory.remat import Segment
from bert_fast.memory.segments import ModelStage, SegmentRunner

_BEFORE = -1  # the number of what is computed before the first stage
_TRACEABLE = (torch.Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
_TOLERANCE = 0.01  # of gradients: kernels that add in any order give other bits, a wrong trace gives others altogether
# What torch.export loses without a word, by what is then not the module's
_LOST = {
    "result": "torch.export does not see state outside of torch; keep it out of the forward pass",
    "buffers": "torch.export does not see that a buffer is assigned anew; change it in place, as copy_ does",
    "gradients": "torch.export does not follow the backward of a torch.autograd.Function; cut a part without one",
}

Pick = Callable[[Any], Any]
Find = Callable[[nn.Module], torch.Tensor]


class CutStage(NamedTuple):
    """A part of a module from one tensor to the next, named after the submodule and the operation that return the latter."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]


class CutModule(nn.Module):
    """A module in stages, as `cut_module` makes it: in training, a call takes inputs like those of the example.

    It returns the one tensor of the module's outputs that gradients flow back from, or the one that was picked. In evaluation
    mode it calls the module itself. Which weights are frozen, and the modes of submodules, are to stay as when it was cut.

    module:     the module, whose weights and buffers are in use
    run_stages: computes the stages; one of a plan (`SegmentRunner(plan.segments)`) keeps less for backward
    """

    def __init__(self, module: nn.Module, arguments: _Arguments, pick: Pick, pieces: _Pieces) -> None:
        super().__init__()
        self.module = module
        self._arguments, self._pick, self._pieces = arguments, pick, pieces
        kept = [Segment(number, number + 1, recompute=False) for number in range(len(pieces.stages))]
        self.run_stages: Callable[[Sequence[ModelStage], torch.Tensor], torch.Tensor] = SegmentRunner(kept)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Raises:
            UserError: in training, inputs that are not like those of the example.
        """
        if not self.module.training:
            return self._pick(self.module(*args, **kwargs))
        call = _Call(self.module, self._pieces, self._arguments.tensors_of(self.module, args, kwargs))
        result = self.run_stages(call.stages(), call.first)
        call.put_changes()
        return result

    def stages_of(self, *args: Any, **kwargs: Any) -> tuple[list[CutStage], torch.Tensor]:
        """The stages of a call in training and what the first one takes: for `measure_chain` and `SegmentRunner`.

        The first stage reads what it takes only if gradients flow back to it. Buffers stay as they are.

        Raises:
            UserError: inputs that are not like those of the example.
        """
        call = _Call(self.module, self._pieces, self._arguments.tensors_of(self.module, args, kwargs))
        return call.stages(), call.first


def cut_module(
    module: nn.Module, *args: Any, output: Pick | None = None, check_gradients: bool = True, **kwargs: Any
) -> CutModule:
    """Cut a module by a trace of a call with these inputs. Weights, buffers and torch's random state stay as they are.

    Args:
        output: from what the module returns to the tensor that the last stage returns; not needed where gradients flow back
            from one tensor alone.
        check_gradients: compare the gradients of the trace with the module's own; False where a step that keeps everything
            does not fit into memory.

    Raises:
        UserError: the module is in evaluation mode, cannot be traced, has no point to cut at, or changes a weight; its forward
            pass is not the same twice; its trace is not what it computes; no output or several have gradients, or not the one
            that is picked; an input is neither a tensor nor a plain value.
    """
    name = type(module).__name__
    if not module.training:
        raise UserError(f"{name} is in evaluation mode, in which a trace has no dropout; call train() before it is cut")
    arguments = _Arguments.of(module, args, kwargs)
    tensors = arguments.tensors_of(module, args, kwargs)
    devices = sorted({t.device.index for t in [*tensors, *module.parameters()] if t.device.type == "cuda"})
    weights = [t for t in [*module.parameters(), *tensors] if t.requires_grad] if check_gradients else []
    with torch.enable_grad():
        with _put_back(module, devices), _nothing_kept():
            pick = _find_output(name, module(*args, **kwargs), output)
        once, again = (_outcome(lambda: pick(module(*args, **kwargs)), module, devices, w) for w in ([], weights))
        if not _are_same(once[0], again[0]):
            raise UserError(
                f"{name} cannot be computed again: its forward pass is not the same twice with torch's random state put back; "
                "draw with torch what it draws with random or numpy.random, and keep counters out of it"
            )
        with _put_back(module, devices):
            pieces = _trace(_Flat(module, arguments, pick), tensors, devices, name)
        cut = CutModule(module, arguments, pick, pieces)
        traced = _outcome(lambda: cut(*args, **kwargs), module, devices, weights)
    for what, same in (
        ("result", _are_same(again[0][:1], traced[0][:1])),
        ("buffers", _are_same(again[0][1:], traced[0][1:])),
        ("gradients", _are_close(again[1], traced[1])),
    ):
        if not same:
            raise UserError(f"the trace of {name} has not the {what} of the module: {_LOST[what]}")
    return cut


def _find_output(name: str, returned: Any, output: Pick | None) -> Pick:
    if output is not None:
        if not _needs_gradient(output(returned)):
            raise UserError(f"output= picks no tensor of {name} that gradients flow back from; let it return one")
        return output
    numbers = [number for number, leaf in enumerate(tree_leaves(returned)) if _needs_gradient(leaf)]
    if len(numbers) != 1:
        raise UserError(
            f"{name} returns {len(numbers)} tensors that gradients flow back from, and its last stage can return one; pick it "
            "with output=, a function of what the module returns"
        )
    return lambda result: tree_leaves(result)[numbers[0]]


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


@dataclass(frozen=True)
class _Arguments:
    """How a module was called: the arguments but for its tensors, and what the arguments of other calls have to be like."""

    leaves: tuple[Any, ...]  # Tensor for tensors
    spec: TreeSpec
    texts: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any) -> _Arguments:
        leaves, spec = _flatten(module, args, kwargs)
        for leaf in leaves:
            if not isinstance(leaf, _TRACEABLE):
                raise UserError(
                    f"{type(module).__name__} is given a {type(leaf).__name__}, which a trace does not look into; give it "
                    "tensors, plain values, or tuples, lists and dicts of them"
                )
        plain = tuple(torch.Tensor if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        return cls(plain, spec, tuple(map(_text_of, leaves)))

    def tensors_of(self, module: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The tensors of a call. Raises UserError where it is not like the one that was traced."""
        leaves, spec = _flatten(module, args, kwargs)
        texts = tuple(map(_text_of, leaves))
        if spec != self.spec or texts != self.texts:
            raise UserError(
                f"{type(module).__name__} was cut for ({', '.join(self.texts)}) and is called with ({', '.join(texts)}); "
                "cut it again with such inputs, or pad them"
            )
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def call(self, module: nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
        following = iter(tensors)
        leaves = [next(following) if leaf is torch.Tensor else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return module(*args, **kwargs)


def _flatten(module: nn.Module, args: Any, kwargs: Any) -> tuple[list[Any], TreeSpec]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return tree_flatten((bound.args, bound.kwargs))


def _text_of(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return repr(leaf)


class _Flat(nn.Module):
    """What is traced: from the tensors of a call to the one that is picked of what the module returns."""

    def __init__(self, module: nn.Module, arguments: _Arguments, pick: Pick) -> None:
        super().__init__()
        self.module = module
        self._arguments, self._pick = arguments, pick

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._pick(self._arguments.call(self.module, tensors))


@contextmanager
def _put_back(module: nn.Module, devices: list[int]) -> Iterator[None]:
    """Afterwards, torch's random state and the module's buffers are what they were."""
    before = [(name, buffer, buffer.clone()) for name, buffer in module.named_buffers()]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for name, buffer, value in before:
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, buffer)
                if not _are_same([buffer], [value]):
                    buffer.detach().copy_(value)


def _nothing_kept() -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda nothing: nothing)


def _outcome(
    function: Callable[[], torch.Tensor], module: nn.Module, devices: list[int], weights: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What a call returns and leaves in the buffers, and gradients. Without weights nothing is kept for backward."""
    with _put_back(module, devices), nullcontext() if weights else _nothing_kept():
        result = function()
        values = [result.detach(), *(buffer.clone() for buffer in module.buffers())]
        if not weights:
            return values, []
        # Not the same everywhere: the sum of what a norm returns has no gradient
        slope = torch.linspace(-1, 2, result.numel(), device=result.device, dtype=result.dtype).view(result.shape)
        return values, list(torch.autograd.grad(result, weights, slope, allow_unused=True))


def _are_same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(left, right, strict=True))


def _are_close(left: Sequence[torch.Tensor | None], right: Sequence[torch.Tensor | None]) -> bool:
    largest = max((float(a.norm()) for a in left if a is not None), default=0.0)
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif not float((a - b).norm()) <= _TOLERANCE * (float(a.norm()) + _TOLERANCE * largest):
            return False
    return True


def _trace(flat: _Flat, tensors: list[torch.Tensor], devices: list[int], name: str) -> _Pieces:
    sources: dict[fx.Node, Find] = {}
    inputs: list[fx.Node] = []
    try:
        program = torch.export.export(flat, tuple(tensors))
        placeholders = program.graph_module.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                inputs.append(node)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                sources[node] = partial(lambda constant, _: constant, program.constants[str(spec.target)])
            else:
                sources[node] = attrgetter(str(spec.target).removeprefix("module."))
        values = {node: find(flat.module) for node, find in sources.items()} | dict(zip(inputs, tensors, strict=True))
        record = _Recorder(program.graph_module, devices)
        with torch.autograd.graph.saved_tensors_hooks(record.note_kept, lambda nothing: nothing):
            record.run(*(values[node] for node in placeholders))
    except Exception as error:  # torch.export raises many kinds of them
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{name} cannot be traced by torch.export: {reason}; cut a part that can, or use torch.utils.checkpoint by hand"
        ) from error
    result = next(node for node in record.order if node.name == program.graph_signature.user_outputs[0])
    return _Cutter(record, result, name).pieces(program.graph_module, sources, inputs)


@dataclass(eq=False)
class _Memory:
    """What the nodes of a graph, by their numbers, do to one piece of memory.

    outside: it was there before the graph, and any node can read it by its own name
    kept:    for backward
    """

    size: int
    outside: bool = False
    first: int = 2**62
    last: int = -1
    last_write: int = -1
    kept: bool = False

    def spans(self, number: int) -> bool:
        """Whether a cut after a node would part a use of it from a later writing, or from a later reading by its own name."""
        return self.last_write >= 0 and self.first <= number < (self.last if self.outside else self.last_write)


class _Writes(TorchDispatchMode):
    """Finds the memory that operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = func._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | (kwargs or {})
        for argument in arguments:
            # Schemas do not tell that norms write to their running statistics
            running = argument.name in ("running_mean", "running_var")
            if running or (argument.alias_info is not None and argument.alias_info.is_write):
                leaves = tree_leaves(given.get(argument.name))
                self.storages += [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return func(*args, **(kwargs or {}))


class _Recorder(fx.Interpreter):
    """Runs a graph and notes what its nodes do.

    order:          the nodes with their numbers
    differentiable: those with a value that needs a gradient
    effects:        those that draw random numbers, or write to what is there before them
    memory:         that of a value which is a tensor
    memories:       all of them, and those that only backward needs
    """

    def __init__(self, module: fx.GraphModule, devices: list[int]) -> None:
        super().__init__(module)
        self.order = {node: number for number, node in enumerate(module.graph.nodes)}
        self.differentiable: set[fx.Node] = set()
        self.effects: set[fx.Node] = set()
        self.memory: dict[fx.Node, _Memory] = {}
        self._devices, self._number = devices, 0
        self.memories: list[_Memory] = []
        self._of_storage: WeakKeyDictionary[torch.UntypedStorage, _Memory] = WeakKeyDictionary()

    def run_node(self, n: fx.Node) -> Any:
        self._number = self.order[n]
        before = self._random_states()
        with _Writes() as writes:
            value = super().run_node(n)
        if any(not torch.equal(a, b) for a, b in zip(before, self._random_states(), strict=True)):
            self.effects.add(n)
        if any(map(_needs_gradient, tree_leaves(value))):
            self.differentiable.add(n)
        if isinstance(value, torch.Tensor):
            self.memory[n] = self._memory_of(value)
            self.memory[n].outside |= n.op == "placeholder"
        if n.op == "call_function":
            self._note_uses(n, (self.fetch_args_kwargs_from_env(n), value), writes.storages)
        return value

    def _note_uses(self, node: fx.Node, values: Any, written: list[torch.UntypedStorage]) -> None:
        number = self._number
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                memory = self._memory_of(leaf)
                memory.first, memory.last = min(memory.first, number), number
        for found in map(self._of_storage.get, written):
            if found is not None and (found.outside or found.first < number):
                found.last_write = number
                self.effects.add(node)

    def note_kept(self, tensor: torch.Tensor) -> None:
        """The first of the hooks for saved tensors: nothing is kept in fact."""
        memory = self._memory_of(tensor)
        memory.kept, memory.first = True, min(memory.first, self._number)

    def _memory_of(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        if storage not in self._of_storage:
            self._of_storage[storage] = _Memory(storage.nbytes())
            self.memories.append(self._of_storage[storage])
        return self._of_storage[storage]

    def _random_states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]


@dataclass(frozen=True)
class _Piece:
    """Nodes as a function of a boundary (but for what is before the first stage) and the values of other nodes, `reads`.

    writes: those of `reads` whose values it changes
    """

    name: str
    run: Callable[..., Any]
    reads: tuple[fx.Node, ...]
    writes: frozenset[fx.Node]


@dataclass(frozen=True)
class _Pieces:
    """A graph in pieces.

    sources: finds the tensor of a weight, buffer or constant in the module
    inputs:  the nodes of tensors that the module is given
    entry:   number of the one of them that the first stage takes
    before:  what is computed before the first stage: the values of the nodes `results`
    stages:  from first to last
    """

    sources: Mapping[fx.Node, Find]
    inputs: Sequence[fx.Node]
    entry: int
    before: _Piece
    results: Sequence[fx.Node]
    stages: Sequence[_Piece]


class _Call:
    """One call of a module: its stages with what they read, and the changed buffers."""

    def __init__(self, module: nn.Module, pieces: _Pieces, tensors: Sequence[torch.Tensor]) -> None:
        self._values = {node: find(module) for node, find in pieces.sources.items()}
        self._values.update(zip(pieces.inputs, tensors, strict=True))
        self._originals = {node: self._values[node] for piece in pieces.stages for node in piece.writes}
        self._changed: dict[fx.Node, torch.Tensor] = {}
        # What a stage computes again it computes from the buffers as they are now
        self._values.update((node, original.detach().clone()) for node, original in self._originals.items())
        self._values.update(zip(pieces.results, self._run(pieces.before), strict=True))
        self.first = self._values[pieces.inputs[pieces.entry]] if tensors else torch.empty(0)
        self._pieces = pieces

    def stages(self) -> list[CutStage]:
        # Not an attribute: a call that holds what holds it would keep its tensors until the garbage collector comes
        return [CutStage(piece.name, partial(self._run, piece)) for piece in self._pieces.stages]

    def _run(self, piece: _Piece, *boundary: torch.Tensor) -> Any:
        copies = {node: self._values[node].clone() for node in piece.writes}
        result = piece.run(*boundary, *(copies.get(node, self._values[node]) for node in piece.reads))
        self._changed.update(copies)
        return result

    @torch.no_grad()
    def put_changes(self) -> None:
        """Give the buffers the values that the stages left in their copies."""
        for node, value in self._changed.items():
            self._originals[node].copy_(value)


class _Cut(NamedTuple):
    after: int  # which of the bound nodes
    place: int  # of that among all nodes
    boundary: fx.Node
    memory: _Memory


class _Cutter:
    """Finds the cuts of a graph and makes its pieces.

    Raises:
        UserError: there is no cut, or a weight is written to.
    """

    def __init__(self, record: _Recorder, result: fx.Node, name: str) -> None:
        self._record, self._result = record, result
        live = {result}
        for node in reversed(record.order):
            if node in live or node in record.effects:
                live.update((node, *node.all_input_nodes))
        self._written = {n for n, memory in record.memory.items() if n.op == "placeholder" and memory.last_write >= 0}
        if changed := self._written & record.differentiable:
            raise UserError(
                f"{name} changes {changed.pop().name} in place, which needs a gradient; change it outside of forward"
            )
        fixed = self._written | record.differentiable | record.effects
        self._free: set[fx.Node] = set()
        self._bound: list[fx.Node] = []
        for node in (node for node in record.order if node in live):
            if node.op != "call_function":
                self._free |= {node} - self._written
            elif node in fixed or not self._free.issuperset(node.all_input_nodes):
                self._bound.append(node)
            else:
                self._free.add(node)
        cuts = self._cuts()
        if not cuts:
            raise UserError(
                f"{name} cannot be cut: from where it first keeps anything for backward, what follows needs more than one "
                "tensor (a skip connection or a with block over all of it); use torch.utils.checkpoint by hand on parts of it"
            )
        self._ends = [cut.after for cut in cuts]
        self._boundaries = [*(cut.boundary for cut in cuts), result]

    def _cuts(self) -> list[_Cut]:
        record, found, seen = self._record, list[_Cut](), set[_Memory]()
        last_read = {source: number for number, node in enumerate(self._bound) for source in node.all_input_nodes}
        last_read[self._result] = len(self._bound)
        waiting: list[fx.Node] = []
        for number, node in enumerate(self._bound):
            waiting = [n for n in (*waiting, node) if last_read.get(n, -1) > number]
            if self._result in waiting:
                break
            if len(waiting) != 1 or waiting[0] not in record.differentiable or waiting[0] not in record.memory:
                continue
            memory, place = record.memory[waiting[0]], record.order[node]
            # A view of a boundary is none: it costs nothing to keep or to compute
            if memory not in seen and not any(other.spans(place) for other in record.memories):
                seen.add(memory)
                found.append(_Cut(number, place, waiting[0], memory))
        return self._useful(found)

    def _useful(self, cuts: list[_Cut]) -> list[_Cut]:
        """Those that plans may gain from.

        A boundary that backward needs costs nothing where all is kept. Another one is worth its bytes only between stages that
        keep more than it takes, unless the next boundary is larger; and a first stage that keeps nothing has nothing to forget.
        """
        useful: list[_Cut] = []
        for number, cut in enumerate(cuts):
            size = cut.memory.size
            previous = useful[-1] if useful else None
            following = cuts[number + 1] if number + 1 < len(cuts) else None
            before = self._kept_between(-1 if previous is None else previous.place, cut)
            after = self._kept_between(cut.place, following)
            is_idle = any(
                kept <= size and (other is None or other.memory.size <= size)
                for kept, other in ((before, previous), (after, following))
            )
            if (previous is not None or before) and (cut.memory.kept or not is_idle):
                useful.append(cut)
        return useful

    def _kept_between(self, place: int, end: _Cut | None = None) -> int:
        """Bytes that are kept for backward beside the boundaries."""
        last = len(self._record.order) if end is None else end.place
        inside = (m for m in self._record.memories if m.kept and not m.outside and place < m.first <= last)
        return sum(memory.size for memory in inside if end is None or memory is not end.memory)

    def pieces(self, module: fx.GraphModule, sources: Mapping[fx.Node, Find], inputs: Sequence[fx.Node]) -> _Pieces:
        stage_of = {node: bisect_left(self._ends, number) for number, node in enumerate(self._bound)}
        for node in reversed(self._record.order):
            if node in self._free and node.op == "call_function":
                readers = {stage_of[user] for user in node.users if user in stage_of}
                stage_of[node] = readers.pop() if len(readers) == 1 else _BEFORE
        inside: dict[int, list[fx.Node]] = {number: [] for number in range(_BEFORE, len(self._boundaries))}
        for node in self._record.order:
            if node in stage_of:
                inside[stage_of[node]].append(node)
        results = [n for n in inside[_BEFORE] if any(stage_of.get(user, _BEFORE) != _BEFORE for user in n.users)]
        differentiable = [number for number, node in enumerate(inputs) if node in self._record.differentiable]
        taken = inputs[differentiable[0]] if differentiable else None
        stages = []
        for number, boundary in enumerate(self._boundaries):
            stages.append(self._piece(module, inside[number], boundary, [taken]))
            taken = boundary
        before = self._piece(module, inside[_BEFORE], tuple(results), [])
        return _Pieces(sources, inputs, differentiable[0] if differentiable else 0, before, results, stages)

    def _piece(
        self, module: fx.GraphModule, nodes: list[fx.Node], result: Any, boundary: list[fx.Node | None]
    ) -> _Piece:
        """A function of the value of `boundary`, which it may have but not read (None), and of what the nodes read beside."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for taken in boundary:
            given = graph.placeholder("boundary")
            if taken is not None:
                copies[taken] = given
        own = {*nodes, *copies}
        outside = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
        reads = tuple(node for node in outside if node.op != "get_attr")
        copies |= {node: graph.placeholder(node.name) for node in reads}
        for node in (*(node for node in outside if node.op == "get_attr"), *nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(result, copies.__getitem__))
        name = _name_of(result) if isinstance(result, fx.Node) else "before"
        return _Piece(name, fx.GraphModule(module, graph).forward, reads, frozenset(self._written.intersection(reads)))


def _name_of(node: fx.Node) -> str:
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = paths[-1].removeprefix("module").removeprefix(".") if paths else ""
    return f"{path}:{node.name}" if path else node.name
