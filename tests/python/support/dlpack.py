"""Tensors for the core that no library here would make."""

from __future__ import annotations

import ctypes


class FakeTensor:
    """A DLPack capsule made by hand, of a device and type that cannot be had here."""

    class DLTensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
        )

    class DLManagedTensor(ctypes.Structure):
        pass

    Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(DLManagedTensor))
    DLManagedTensor._fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter))

    def __init__(self, device=1, lanes=1):
        self.deleted = 0
        self.values = (ctypes.c_float * 7)(9, 9, 9, 1, 2, 3, 4)
        self.shape = (ctypes.c_int64 * 2)(2, 2)
        self.managed = self.DLManagedTensor()
        tensor = self.managed.tensor
        tensor.data = ctypes.addressof(self.values)
        tensor.device[:] = (device, 1)
        tensor.ndim, tensor.code, tensor.bits, tensor.lanes = 2, 2, 32, lanes
        tensor.shape = self.shape
        tensor.byte_offset = 12
        self.managed.deleter = self.Deleter(self.delete)

    def delete(self, _):
        self.deleted += 1

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)
