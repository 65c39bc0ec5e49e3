"""Groups in a forward that is Python code, proven by tracing it symbolically in training and in evaluation mode."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx, nn

from fastcifar.fusing import patterns, reading
from fastcifar.fusing.patterns import Element, Pattern
from fastcifar.fusing.reading import Addition, Functional


class Group(NamedTuple):
    """What runs as one operator: modules, by their paths below the module that calls them, and functions."""

    pattern: Pattern
    chain: tuple[str | Functional | Addition, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules alone."""
        return tuple(element for element in self.chain if isinstance(element, str))


class Outcome(NamedTuple):
    """A group and its activation for the report, or None and the reason why there is no group."""

    group: Group | None
    note: str


class _Tracer(fx.Tracer):
    """Calls forward with the arguments that have no default, and keeps every child as it is, except those that only run
    their children in order. Each node remembers under what switches it was called."""

    def __init__(self):
        super().__init__()
        self.proxies: dict[fx.Node, weakref.ref[fx.Proxy]] = {}

    def is_leaf_module(self, module, qualified_name):
        return not reading.is_sequence(module) or reading.has_hooks(module)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        symbols = {name: self.create_proxy("placeholder", name, (), {}) for name in required_arguments(self.root)}
        positional = [symbols.pop(name) for name in list(symbols) if name not in _keyword_only(self.root)]

        def call(owner, *arguments):
            return root_fn(owner, *arguments, **symbols)

        return call, [self.root, *positional]

    def proxy(self, node):
        proxy = super().proxy(node)
        self.proxies[node] = weakref.ref(proxy)
        return proxy

    def keeps(self, node: fx.Node) -> bool:
        """Whether somebody still holds a node's output, although forward has returned."""
        if self.proxies[node]() is not None:
            gc.collect()
        return self.proxies[node]() is not None

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        node.meta["switches"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), devices)
        node.meta["recomputed"] = _inside_checkpoint()
        return node


def _inside_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def _keyword_only(owner: nn.Module) -> set[str]:
    parameters = inspect.signature(type(owner).forward).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def required_arguments(owner: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward that have no default."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(type(owner).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in starred and p.default is p.empty)


def _apart(value: object) -> object:
    """A copy of what forward may change in place: tensors and collections, but not what these hold."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


class Trace:
    """One symbolic run of a module's forward, called with the arguments that have no default."""

    def __init__(self, owner: nn.Module, training: bool):
        # What forward assigns to the module, or changes of it, stays on this copy; the children are the module's own.
        shadow = copy.copy(owner)
        shadow.__dict__.update({name: _apart(value) for name, value in owner.__dict__.items()})
        shadow.__dict__["_buffers"] = {name: _apart(buffer) for name, buffer in owner._buffers.items()}
        shadow.training = training
        self.name = f"{type(owner).__name__}.forward"
        self.root = shadow
        self.tracer = _Tracer()
        with torch.random.fork_rng(devices=[]):
            self.graph = self.tracer.trace(shadow)
        self.calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        called = [shadow.get_submodule(target) for target in self.calls]
        self.nested = {id(below) for module in called for below in module.modules() if below is not module}
        self.claimed: set[fx.Node] = set()

    def _after(self, node: fx.Node) -> tuple[fx.Node | None, Element]:
        if not node.users:
            return None, f"{self.name} does not use its output"
        if len(node.users) > 1:
            return None, f"{self.name} uses its output {len(node.users)} times"
        if self.tracer.keeps(node):
            return None, f"{self.name} keeps its output"
        (user,) = node.users
        if user.op == "output":
            return None, f"{self.name} returns its output"
        if user.meta["switches"] != node.meta["switches"]:
            return None, f"{self.name} goes on under another gradient or autocast mode"
        if user.op == "call_module":
            if user.args != (node,) or user.kwargs:
                return None, f"{self.name} calls {user.target!r} with more than its output"
            return user, self._module(user)
        return user, self._function(user, node)

    def _function(self, user: fx.Node, node: fx.Node) -> Element:
        target = getattr(torch.Tensor, user.target, None) if user.op == "call_method" else user.target
        function = reading.function_of(target, user.args, user.kwargs)
        if isinstance(function, Addition):
            # The sum runs the group, so the normalised tensor must still be there then, and unchanged.
            (source,) = node.all_input_nodes[:1]
            operands = set(user.all_input_nodes)
            unchanged = len(source.users) == 1 and (node.next is user or self._makes_a_tensor(source))
            fits = len(operands) == 2 and unchanged and user not in self.claimed
        else:
            fits = function is not None and user.args[:1] == (node,) and user.all_input_nodes == [node]
        return function if fits else f"followed by {getattr(target, '__name__', user.target)}, not by BatchNorm2d"

    def _makes_a_tensor(self, node: fx.Node) -> bool:
        """A convolution does, for its users alone; another layer may return its input, which others could change."""
        if node.op != "call_module" or self.tracer.keeps(node):
            return False
        return isinstance(self.root.get_submodule(node.target), nn.modules.conv._ConvNd)

    def _module(self, node: fx.Node) -> Element:
        module = self.root.get_submodule(node.target)
        stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
        if self.calls[node.target] > 1 and not stateless:
            return f"{self.name} calls {node.target!r} {self.calls[node.target]} times"
        if id(module) in self.nested and patterns.beginning_at(module) is not None:
            return f"{self.name} calls {node.target!r} and a module that contains it"
        if node.meta["recomputed"]:
            return f"{self.name} calls {node.target!r} under activation checkpointing"
        return module

    def group(self, path: str, pattern: Pattern) -> Outcome:
        """What can be fused from the child at `path` on."""
        node = next((n for n in self.graph.nodes if n.op == "call_module" and n.target == path), None)
        if node is None:
            return Outcome(None, f"{self.name} does not call it")
        head = self._module(node)
        if isinstance(head, str):
            return Outcome(None, head)
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or node.kwargs:
            return Outcome(None, f"{self.name} does not call it with one positional tensor")
        chain, nodes = [head], [node]
        while len(chain) < patterns.LONGEST and not isinstance(chain[-1], str):
            following, element = self._after(nodes[-1])
            chain.append(element)
            nodes.append(following)
        match = pattern.match(chain)
        if isinstance(match, str):
            return Outcome(None, match)
        matched = list(zip(nodes[: match.length], chain, strict=False))
        self.claimed.update(n for n, element in matched if isinstance(element, Addition))
        elements = (n.target if isinstance(element, nn.Module) else element for n, element in matched)
        return Outcome(Group(pattern, tuple(elements)), match.activation)


def _traces(owner: nn.Module) -> list[Trace] | str:
    """The owner's forward in training and in evaluation, or why it cannot be traced."""
    name = reading.describe(owner)
    if reading.forward_of(owner) is None:
        return f"{name} has a forward of its own on the instance"
    traces = []
    for training in (True, False):
        try:
            if not required_arguments(owner):
                return f"{name}.forward has no required argument"
            traces.append(Trace(owner, training))
        except Exception as error:  # whatever a forward may raise when it meets a symbolic tensor
            text = str(error).strip() or type(error).__name__
            return f"{name}.forward cannot be traced: {text.splitlines()[0]}"
    return traces


def find(owner: nn.Module, candidates: Sequence[tuple[str, Pattern]]) -> dict[str, Outcome]:
    """What can be fused from each of these paths below `owner` on, whose modules begin these patterns; the patterns
    that come first in `PATTERNS` come first here, and have the first choice."""
    candidates = sorted(candidates, key=lambda candidate: patterns.PATTERNS.index(candidate[1]))
    traces = _traces(owner)
    if isinstance(traces, str):
        return {path: Outcome(None, traces) for path, _ in candidates}
    found, taken = {}, set()
    for path, pattern in candidates:
        if path in taken:
            continue
        trained, evaluated = (trace.group(path, pattern) for trace in traces)
        if trained.group is not None and trained != evaluated:
            reason = f"{reading.describe(owner)}.forward uses it differently in training and in evaluation"
            trained = Outcome(None, reason)
        if trained.group is not None:
            taken.update(trained.group.modules)
        found[path] = trained
    return found
