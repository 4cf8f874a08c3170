"""A recording in the place of a CUDA graph, for tests without a GPU.

What a graph would capture, aten operations and Triton launches, is recorded and run again on the same storages. What a capture
refuses because it needs the host is refused: values, data-dependent shapes, copies to the host or from it.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# They answer on the host without an operation that the dispatcher would see.
_HOST_METHODS = ("tolist", "numpy", "__array__", "cpu")
_EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
_MASKABLE = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class HostRead(RuntimeError):
    """A step that is being recorded asks for something that only the host has, or that it would have to wait for."""


class Tape:
    """As torch.cuda.CUDAGraph. A replay finds in the memory that the graph allocates what nobody wrote: NaN.

    recording: the tape that is recording, if any. replayed: the tape that was replayed last. launches: names of the recorded
    Triton kernels. notes: for who wants to know after a replay which tensors the recorded run had in its hands.
    """

    recording = None
    replayed = None

    def __init__(self, keep_graph=False):
        self.launches, self.notes = [], {}
        self._steps, self._recorder, self._patches = [], _Recorder(self), None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert Tape.recording is None, "two tapes cannot record at a time"
        with contextlib.ExitStack() as patches:
            for name in _HOST_METHODS:
                patches.enter_context(_replaced(torch.Tensor, name, _refuse(name)))
            patches.enter_context(_replaced(torch.Tensor, "to", _to))
            _record_launches(patches)
            self._patches = patches.pop_all()
        Tape.recording = self
        self._recorder.__enter__()

    def capture_end(self):
        self._recorder.__exit__(None, None, None)
        Tape.recording = None
        self._patches.close()

    def replay(self):
        for step in self._steps:
            step()
        Tape.replayed = self

    def reset(self):
        self._steps.clear()

    def note(self, step):
        """Record a call of ``step``."""
        self._steps.append(step)


class TapeEvent:
    """As an external torch.cuda.Event: recorded on a tape it is a place there, and replays that come by call ``reached``."""

    def __init__(self, reached=lambda: None):
        self._reached = reached

    def record(self, stream=None):
        if Tape.recording is not None:
            Tape.recording.note(self._reached)

    def wait(self, stream=None):
        """Nothing: on a CPU everything before has happened."""

    query = synchronize = wait


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None):
    """As torch.cuda.graph."""
    cuda_graph.capture_begin(pool=pool)
    try:
        yield
    finally:
        cuda_graph.capture_end()


class _Recorder(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _needs_host(func, args, kwargs):
            raise HostRead(f"{func} needs the host, which a CUDA graph cannot ask")
        out = func(*args, **kwargs)
        if not func.is_view:
            self._tape.note(_again(func, args, kwargs, out))
        return out


def _needs_host(func, args, kwargs):
    name = func._schema.name
    if name in _MASKABLE:  # a mask becomes as many indices as it has elements set
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    # lift_fresh: a tensor from Python's values.
    hosts = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return name == "aten::lift_fresh" or any(tag in func.tags for tag in hosts)


def _again(func, args, kwargs, out):
    """A call of ``func`` whose results land where the first ones are, for later steps were recorded with those."""
    if func._schema.is_mutable:
        return lambda: func(*args, **kwargs)
    results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    if func._schema.name in _EMPTY:
        return lambda: [x.fill_(float("nan")) for x in results if x.is_floating_point()]

    def again():
        new = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for old, value in zip(results, new, strict=True):
            if old.data_ptr() != value.data_ptr():
                old.copy_(value)

    return again


def _record_launches(patches):
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(self, *args, **kwargs):
        tape = Tape.recording
        tape.launches.append(self.fn.__name__)
        tape.note(lambda: run(self, *args, **kwargs))
        with _disable_current_modes(), contextlib.ExitStack() as original:
            # The interpreter is the device here: it may look at values.
            for name in _HOST_METHODS:
                original.enter_context(_replaced(torch.Tensor, name, getattr(torch.Tensor, name).original))
            run(self, *args, **kwargs)

    patches.enter_context(_replaced(InterpretedFunction, "run", recorded))


def _refuse(name):
    def method(self, *args, **kwargs):
        raise HostRead(f"Tensor.{name} needs the host, which a CUDA graph cannot ask")

    method.original = getattr(torch.Tensor, name)
    return method


def _to(self, *args, **kwargs):
    if any(isinstance(x, str) and x.startswith("cpu") for x in (*args, kwargs.get("device"))):
        raise HostRead("Tensor.to('cpu') needs the host, which a CUDA graph cannot ask")
    return _ORIGINAL_TO(self, *args, **kwargs)


_ORIGINAL_TO = torch.Tensor.to


@contextlib.contextmanager
def _replaced(owner, name, value):
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
