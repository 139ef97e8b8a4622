"""A device without hardware, "standin", on which a step that mixes devices fails.

    import standin; standin.register()      then torch.device("standin") is a device like "cuda"

It uses torch's PrivateUse1 backend. Its tensors have ordinary memory, which DLPack passes on with another device name.
Every operator runs on the CPU, so results have the CPU's bits. As on a GPU, an operator may mix CPU tensors with those
of the device only if they have no dimensions, or in a copy; indices on the CPU, which CUDA allows, are refused too.
`python tests/standin.py SCRIPT …` runs a script or, with `-m`, a
module that may then take `--device standin`.
"""

from __future__ import annotations

import ctypes
import functools
import runpy
import sys

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "standin"
DLPACK_CPU, DLPACK_EXTENSION = 1, 12  # device types of DLPack; the second is PrivateUse1
COPIES = ("aten::_copy_from", "aten::_to_copy")  # may cross devices
OUTPUTS = ("out", "out0", "out1", "out2", "values", "indices")  # keyword arguments that are written


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DLTensor(ctypes.Structure):  # as far as its device
    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabel(x: Tensor, kind: int) -> Tensor:
    """The same memory, shape and strides as a tensor of another device."""
    capsule = torch._C._to_dlpack(x)
    _DLTensor.from_address(_pointer(capsule, b"dltensor")).device.type = kind
    return torch._C._from_dlpack(capsule)


def _map(function, x):
    """The function of x, or of what is in a list or tuple x."""
    return type(x)(_map(function, item) for item in x) if isinstance(x, (list, tuple)) else function(x)


def _number(value: float, args) -> Tensor:
    """A Python number as a tensor whose dtype does not change that of the result."""
    floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
    dtype = torch.float64 if floating else torch.float32
    return torch.tensor(value, dtype=dtype if isinstance(value, float) else None)


def _run_on_cpu(op, *args, **kwargs):
    """Any operator with a tensor, or a result, on the device."""
    name, ours = op._schema.name, {}  # id of a CPU alias -> the alias, the tensor

    def down(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not isinstance(x, Tensor):
            return x
        if x.device.type == NAME:
            alias = _relabel(x, DLPACK_CPU)
            ours[id(alias)] = alias, x
            return alias
        if x.ndim and name not in COPIES:
            raise RuntimeError(f"{op}: a tensor of shape {tuple(x.shape)} on {x.device} among those on {NAME}")
        return x

    if name == "aten::set_":  # (tensor, storage, offset, size, strides): the tensor takes the storage's memory
        tensor, storage, *layout = args
        offset, size, *strides = layout or (0, (storage.nbytes() // tensor.itemsize,), (1,))  # default strides: []
        flat = _memory(storage).view(tensor.dtype)
        tensor.data = _relabel(flat.as_strided(size, strides[0] if strides else (), offset), DLPACK_EXTENSION)
        return tensor
    target = kwargs.get("device")
    args = tuple(
        _number(value, args) if isinstance(value, (int, float)) and isinstance(p.type, torch.TensorType) else value
        for value, p in zip(args, op._schema.arguments)
    )
    args, kwargs = _map(down, args), {key: _map(down, x) for key, x in kwargs.items()}
    if name == "aten::_copy_from":
        source, goal = args[:2]
        goal.copy_(source)
        return ours[id(goal)][1] if id(goal) in ours else goal
    written = {key: x for key, x in kwargs.items() if key in OUTPUTS and isinstance(x, Tensor)}
    kwargs |= {key: x.new_empty(0) for key, x in written.items()}  # an alias cannot be resized
    result = op(*args, **kwargs)
    for key, alias in written.items():
        tensor, new = ours[id(alias)][1], kwargs[key]
        if new.shape == alias.shape:
            alias.copy_(new)
        else:
            tensor.data = _relabel(new, DLPACK_EXTENSION)
        ours[id(new)] = new, tensor

    def up(x):
        return (ours[id(x)][1] if id(x) in ours else _relabel(x, DLPACK_EXTENSION)) if isinstance(x, Tensor) else x

    return result if name == "aten::_to_copy" and target is not None and target.type != NAME else _map(up, result)


def _memory(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage on the device as a CPU tensor."""
    if storage.nbytes() == 0:
        return torch.empty(0, dtype=torch.uint8)
    array = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    array.owner = storage  # which lives as long as the tensor
    return torch.frombuffer(array, dtype=torch.uint8)


def _patch_storages() -> None:
    """Replace the copies of storages in deepcopy, torch.save and load, which need an allocator of the device."""
    deepcopy, cpu, to = Tensor.__deepcopy__, torch.UntypedStorage.cpu, torch.UntypedStorage.to

    def tensor_deepcopy(self, memo):
        if self.device.type != NAME:
            return deepcopy(self, memo)
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def storage_cpu(self):
        return _memory(self).clone().untyped_storage() if self.device.type == NAME else cpu(self)

    def storage_to(self, *, device, non_blocking=False):
        if torch.device(device).type != NAME:
            return to(self, device=device, non_blocking=non_blocking)
        flat = torch.empty(0, dtype=torch.uint8).set_(self.cpu())
        return _relabel(flat, DLPACK_EXTENSION).untyped_storage()

    Tensor.__deepcopy__, torch.UntypedStorage.cpu, torch.UntypedStorage.to = tensor_deepcopy, storage_cpu, storage_to


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """The CPU's fused attention, which torch chooses by the device's name; it supports fewer key heads itself."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        pass


@functools.cache
def register() -> torch.device:
    """Make the device known to torch, once a process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    register.library = torch.library.Library("_", "IMPL")  # registrations live as long as this object
    register.library.fallback(_run_on_cpu, "PrivateUse1")
    # What torch computes by other operators on a device that it does not know.
    register.named = torch.library.Library("aten", "IMPL")
    register.named.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    silu_backward = functools.partial(_run_on_cpu, torch.ops.aten.silu_backward.default)
    register.named.impl("silu_backward", silu_backward, "PrivateUse1")
    conj = functools.partial(_run_on_cpu, torch.ops.aten.conj_physical.default)  # at once: DLPack refuses lazy ones
    register.named.impl("_conj", conj, "PrivateUse1")
    _patch_storages()
    return torch.device(NAME)


if __name__ == "__main__":
    register()
    _, *sys.argv = sys.argv
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
