"""A CUDA device that is not there: its tensors lie in ordinary memory but may not meet those of the CPU.

`with pretend.device():` makes a script that runs with --cuda walk every line of that path on a machine without a GPU.
What mixes devices there raises here too, and so does what a CUDA graph cannot record: whatever waits for the device or
copies to it. A graph records operations without their effects, and repeats them on the memory that they had. Numbers
are the CPU's, so a run can be compared bit for bit with one on the CPU. Speed, kernels and compilers are not covered.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# functions that may meet tensors of both devices; an index may lie on the CPU, a tensor without axes nearly everywhere
MIXING = {"copy_", "to", "as_tensor", "__getitem__", "__setitem__", "__get__", "__set__"}
MIXING |= {"_has_compatible_shallow_copy_type"}  # asks whether they mix
WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "__bool__", "__float__", "__int__"}
without_modes = torch._C.DisableTorchFunction


def far(value) -> bool:
    """Does this tensor lie on the pretended device?"""
    return isinstance(value, torch.Tensor) and value.__dict__.get("far", False)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Device(TorchFunctionMode):
    """Marks what lies on the device, refuses what mixes, and computes everything on the CPU."""

    capturing = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if function == torch.Tensor.device.__get__:
            return CUDA if far(args[0]) else CPU
        devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        if name in ("device", "_parse_to") or not (devices or tensors((args, kwargs))):
            return function(*args, **kwargs)
        if devices:
            args, kwargs = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf, (args, kwargs))
        given = tensors((args, kwargs))
        here = name == "cpu" or (devices and devices[0].type == "cpu")
        there = not here and (bool(devices) or any(map(far, given[:1] if name in ("__getitem__", "copy_") else given)))
        upload = name in ("to", "as_tensor", "tensor") and there and not any(map(far, given))
        self.check(name, args, given, there, upload)
        if there or here:
            assert kwargs.get("generator") is None or kwargs["generator"].far == there, f"{name}: the other's generator"
        if name == "one_hot" and there:  # looks at its values first, but on a CPU only
            result = (args[0][..., None] == torch.arange(args[1])).long()
        else:
            result = function(*args, **kwargs)
        if function == torch.Tensor.data.__set__:
            args[0].far = far(args[1])
        if devices or name == "cpu":  # a move is a copy, never the same memory
            with without_modes():
                result = result.clone(memory_format=torch.preserve_format) if name in ("to", "as_tensor") else result
        for tensor in tensors(result):
            tensor.far = there
        return result

    def check(self, name: str, args, given: list[torch.Tensor], there: bool, upload: bool) -> None:
        near = [t for t in given if not far(t) and (t.dim() or name in ("cat", "stack", "linear"))]
        mixes = there and near and name not in MIXING
        misled = name in ("__getitem__", "__setitem__") and not far(args[0]) and any(map(far, tensors(args[1])))
        numpy = name in ("numpy", "__array__") and any(map(far, given))
        if mixes or misled or numpy:
            raise RuntimeError(f"{name} meets tensors of two devices")
        copies = upload or (name in ("copy_", "__setitem__") and far(args[0]) and near)
        if Device.capturing and (copies or (name in WAITING and any(map(far, given)))):
            raise RuntimeError(f"{name} cannot be recorded by a CUDA graph")


class Recorder(TorchDispatchMode):
    """Lists every operation, those of the backward pass too, and keeps what they overwrite."""

    def __init__(self):
        super().__init__()
        self.operations, self.overwritten, self.own = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            raise RuntimeError(f"{function} cannot be recorded by a CUDA graph")
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            for tensor in tensors(value) if argument.alias_info and argument.alias_info.is_write else ():
                memory = tensor.untyped_storage()
                if memory.data_ptr() not in self.own | self.overwritten.keys():
                    self.overwritten[memory.data_ptr()] = memory, memory.clone()
        result = function(*args, **kwargs)
        self.own |= {t.untyped_storage().data_ptr() for t in tensors(result)} - known
        self.operations.append((function, args, kwargs, result))
        return result


class Graph:
    """torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        with torch.no_grad(), without_modes():
            for function, args, kwargs, result in self.operations:
                for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, stream=None):
    """torch.cuda.graph: what stands in this block is recorded, and nothing has happened."""
    random, recorder, Device.capturing = torch.get_rng_state(), Recorder(), True
    try:
        with recorder:
            yield
    finally:
        Device.capturing = False
    with without_modes():
        for memory, before in recorder.overwritten.values():
            memory.copy_(before)
        torch.set_rng_state(random)
    graph.operations = recorder.operations


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.far = torch.device(device).type == "cuda"
        return generator


def without(function):
    def call(*args, **kwargs):
        with without_modes():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def device():
    """Until the end of this block there is a CUDA device. Nothing is compiled."""
    stream, autocast = mock.MagicMock(), torch.autocast
    answers = {"is_available": True, "is_current_stream_capturing": False, "get_device_name": "pretended"}
    answers |= {"mem_get_info": (2**33, 2**33), "is_bf16_supported": torch.cpu._is_avx512_bf16_supported()}
    cuda = {name: mock.Mock(return_value=answer) for name, answer in answers.items()}
    cuda |= {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    cuda |= {"Stream": stream, "current_stream": stream, "stream": stream, "CUDAGraph": Graph, "graph": capture}
    health = "_accelerator_graph_capture_health_check"  # of torch's optimisers; asks the driver
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(torch, Generator=Generator, save=without(torch.save), load=without(torch.load)),
        mock.patch.multiple(torch, compile=lambda f, **how: f, autocast=lambda kind, *a, **k: autocast("cpu", *a, **k)),
        mock.patch.object(torch.nn.Module, "compile", lambda self, **how: None),
        mock.patch.object(torch.nn.functional, "one_hot", lambda *args: torch._C._nn.one_hot(*args)),
        mock.patch.object(torch.optim.Optimizer, health, lambda self: None, create=True),
        Device(),
    ):
        yield
