"""A GPU without a GPU: tensors that compute on the CPU, say that they are on cuda:0, and count what a GPU would feel.

`on_device(model)` moves a model there, `to_device` of the package moves a batch. Inside `with Watch() as seen:`
`seen.waits` counts, by the line of the package that caused it, each time the host would wait for the device;
`seen.operations` counts what would be a kernel of its own (views are none); and mixing devices raises, as on a GPU.
FakeTensorMode cannot do this: it has no numbers, and our code asks for some.
"""
import traceback
from collections import Counter
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
VIEWS = set("view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided split "
            "split_with_sizes unbind _reshape_alias unfold diagonal lift_fresh view_as".split())
WAITS = {"_local_scalar_dense": "a number is read", "nonzero": "nonzero", "masked_select": "masked_select",
         "equal": "equal", "is_nonzero": "a number is read", "_unique2": "unique", "unique_dim": "unique",
         "unique_consecutive": "unique", "bincount": "bincount"}
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Pretended(torch.Tensor):
    "Holds a CPU tensor, `real`."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device="cpu", requires_grad=requires_grad)
        made.real_one = real
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        _wait("tolist")
        return self.detach().real_one.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args, **kwargs):
        return self.to("cpu")

    def to(self, *args, **kwargs):
        device, dtype = None, None
        for one in (*args, *kwargs.values()):
            if isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, (str, torch.device)):
                device = torch.device(one)
            elif isinstance(one, torch.Tensor):
                device, dtype = one.device, one.dtype
        moved = self if dtype in (None, self.dtype) else torch.Tensor.type(self, dtype)
        return _Down.apply(moved) if device is not None and device.type == "cpu" else moved

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Down(torch.autograd.Function):
    "A copy to the CPU, which waits."

    @staticmethod
    def forward(ctx, x):
        _wait("copy to the CPU")
        return x.real_one.clone()

    @staticmethod
    def backward(ctx, grad):
        return Pretended(grad)


class _Up(torch.autograd.Function):
    "A copy to the device; its gradient comes back."

    @staticmethod
    def forward(ctx, x):
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.real_one


class Watch(TorchDispatchMode):
    "While active, what is made on cuda is pretended, and everything is counted."
    active: "list[Watch]" = []

    def __init__(self):
        super().__init__()
        self.waits, self.operations, self.copies_in = Counter(), Counter(), 0

    def __enter__(self):
        Watch.active.append(self)
        self.kept = (torch.Tensor.to, torch.tensor, F.scaled_dot_product_attention, torch.cuda._lazy_init,
                     torch.cuda.get_device_properties)
        torch.Tensor.to, torch.tensor, F.scaled_dot_product_attention = _to, _tensor, _attention
        torch.cuda._lazy_init = lambda: None
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=80 * 2**30)
        return super().__enter__()

    def __exit__(self, *exc):
        (torch.Tensor.to, torch.tensor, F.scaled_dot_product_attention, torch.cuda._lazy_init,
         torch.cuda.get_device_properties) = self.kept
        Watch.active.remove(self)
        return super().__exit__(*exc)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, Pretended) for x in leaves) or _is_cuda(kwargs.get("device")):
            return _run(function, args, kwargs)
        out = function(*args, **kwargs)
        if not leaves and torch._C._current_graph_task_id() != -1:  # zeros that autograd makes beside a gradient:
            out = _wrap(out)  # where, nothing tells before they meet it
            for x in tree_leaves(out):
                x.undecided = isinstance(x, Pretended)
        return out


_REAL = torch.Tensor.to, torch.tensor, F.scaled_dot_product_attention


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _wrap(out):
    return tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)


def _wait(what: str) -> None:
    for watch in Watch.active:
        frames = [f for f in traceback.extract_stack() if "/lire_nb/" in f.filename]
        where = f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].line}" if frames else "elsewhere"
        watch.waits[what, where] += 1


def _run(function, args, kwargs):
    "One operation on the numbers behind."
    name = function._schema.name.partition("::")[2]
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    pretended = [x for x in leaves if isinstance(x, Pretended)]
    plain = [x for x in leaves if not isinstance(x, Pretended) and x.dim()]
    if plain and all(getattr(x, "undecided", False) for x in pretended):
        pretended = []
    there = bool(pretended) if kwargs.get("device") is None else _is_cuda(kwargs["device"]) or bool(pretended)
    for watch in Watch.active:
        watch.copies_in += bool(plain and there)
        watch.operations[name] += name not in VIEWS
    if pretended and plain and name != "copy_" and not (name in INDEXED and isinstance(args[0], Pretended)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
    indices = tree_leaves(args[1]) if name in INDEXED else []
    if name in WAITS or name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait(WAITS.get(name, name))
    if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
        _wait("index by a mask")
    real = lambda x: x.real_one if isinstance(x, Pretended) else x  # noqa: E731
    kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
    with torch.no_grad():
        out = function(*tree_map(real, args), **tree_map(real, kwargs))
    if name.endswith("_") and isinstance(args[0], Pretended):
        return args[0]
    return _wrap(out) if there and name != "_local_scalar_dense" else out


def _to(self, *args, **kwargs):
    if isinstance(self, Pretended):
        return Pretended.to(self, *args, **kwargs)
    if any(isinstance(x, (str, torch.device)) and _is_cuda(x) for x in (*args, *kwargs.values())):
        for watch in Watch.active:
            watch.copies_in += 1
        dtype = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        moved = _REAL[0](self, *dtype) if dtype else self
        return _Up.apply(moved) if moved.requires_grad else Pretended(moved.detach().clone())
    return _REAL[0](self, *args, **kwargs)


def _tensor(*args, device=None, **kwargs):
    made = _REAL[1](*args, **kwargs)
    return Pretended(made) if _is_cuda(device) else made


class _Attention(torch.autograd.Function):
    "One kernel forward, one backward."

    @staticmethod
    def forward(ctx, query, key, value, mask, options):
        with torch.enable_grad():
            ctx.inputs = [x.real_one.detach().requires_grad_() for x in (query, key, value)]
            ctx.out = _REAL[2](*ctx.inputs, attn_mask=None if mask is None else mask.real_one, **options)
        for watch in Watch.active:
            watch.operations["attention"] += 1
        return Pretended(ctx.out.detach())

    @staticmethod
    def backward(ctx, grad):
        return *map(Pretended, torch.autograd.grad(ctx.out, ctx.inputs, grad.real_one)), None, None


def _attention(query, key, value, attn_mask=None, **options):
    if not isinstance(query, Pretended):
        return _REAL[2](query, key, value, attn_mask=attn_mask, **options)
    if attn_mask is not None and not isinstance(attn_mask, Pretended):
        raise RuntimeError("Expected all tensors to be on the same device: the mask is on the CPU")
    return _Attention.apply(query, key, value, attn_mask, options)


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    "The module with pretended weights."
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(Pretended(p.data), requires_grad=p.requires_grad)
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = Pretended(b)
    return module
