"""What people hold instead of a bare timm model: wrappers, larger networks, compiled, sharded and quantized models.

Other libraries are known by the names of their classes, so that none of them is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import Error, Unsupported
from .elsewhere import NOT_IN_TIMM, same_in_timm

__all__ = ["described", "not_a_module", "refuse_foreign", "refuse_live_wrapper"]


class _Mark(NamedTuple):
    text: str
    attribute: str = ""  # of what is inside, where that can be passed; {its} in the text is its place


_PRUNE_FIRST = "prune first, wrap afterwards"
_SHARDED = "sharded by FSDP; prune first, shard afterwards"
_QUANTIZED = "quantized or prepared for it by {}; prune first, then quantize"
_GRAPH = "a graph made by torch.fx or torch.export; prune the model that it was made from, then make it again"
# By the full name of a class or a module that holds it; the first that fits counts.
_MARKS: tuple[tuple[str, _Mark], ...] = (
    (
        "torch._dynamo.eval_frame.OptimizedModule",
        _Mark("a compiled model; pass {its} and compile after pruning", "_orig_mod"),
    ),
    (
        "torch.nn.parallel.data_parallel.DataParallel",
        _Mark("a parallel wrapper; pass {its} and wrap again after pruning", "module"),
    ),
    (
        "torch.nn.parallel.distributed.DistributedDataParallel",
        _Mark(f"wrapped for several processes; {_PRUNE_FIRST}"),
    ),
    ("torch.distributed.fsdp", _Mark(_SHARDED)),
    ("torch.distributed._composable", _Mark(f"wrapped for several processes; {_PRUNE_FIRST}")),
    ("torch.distributed.tensor", _Mark("sharded over devices; prune first, shard afterwards")),
    (
        "torch.distributed.algorithms._checkpoint",
        _Mark(f"a wrapper for gradient checkpointing; {_PRUNE_FIRST}, or use set_grad_checkpointing"),
    ),
    ("deepspeed", _Mark(f"wrapped by DeepSpeed; {_PRUNE_FIRST}")),
    ("fairscale", _Mark(f"wrapped by fairscale; {_PRUNE_FIRST}")),
    ("peft", _Mark("adapters of peft; merge and unload them first: model = peft_model.merge_and_unload()")),
    *((name, _Mark(_QUANTIZED.format("torch.ao"))) for name in ("torch.ao", "torch.nn.quantized", "torch.nn.qat")),
    ("torch.nn.intrinsic", _Mark(_QUANTIZED.format("torch.ao"))),
    *(
        (name, _Mark(_QUANTIZED.format(name)))
        for name in ("torchao", "bitsandbytes", "optimum.quanto", "modelopt", "brevitas", "hqq")
    ),
    (
        "torch.jit",
        _Mark("scripted or traced by torch.jit; prune the model that it was made from, then script or trace it again"),
    ),
    ("torch.fx.graph_module.GraphModule", _Mark(_GRAPH)),
    ("torch.export", _Mark(_GRAPH)),
)
# Whole models only: a hybrid's patch embedding may be one.
_FEATURES = {
    f"timm.models._features.{name}": _Mark(
        f"layers that timm took out of a model; prune that first, then timm.models.{name}(model, …)"
    )
    for name in ("FeatureListNet", "FeatureDictNet")
}
# A wrapper that holds no weights of its own says less than what is quantized in it.
_UNQUANTIZED = ("torch.ao.quantization.stubs.QuantWrapper",)
_MOST_NAMED = 4


def _mark(cls: type) -> _Mark | None:
    return _mark_of(tuple(_name(base) for base in cls.__mro__))


@lru_cache(maxsize=4096)
def _mark_of(names: tuple[str, ...]) -> _Mark | None:
    if any(name in _UNQUANTIZED for name in names):
        return None
    for prefix, mark in _MARKS:
        if any(name == prefix or name.startswith(f"{prefix}.") for name in names):
            return mark
    return None


def _name(cls: type) -> str:
    # torch.fx makes a class for each graph, within a function.
    cls = next(base for base in cls.__mro__ if "<locals>" not in base.__qualname__ or "torch" not in base.__module__)
    return f"{cls.__module__}.{cls.__qualname__}"


def refuse_foreign(model: nn.Module) -> None:
    """Refuse modules and parameters that another tool has put into a model: adapters, quantized or sharded weights.

    Raises:
        Unsupported: there are some; the text names the first, and what to do.
    """
    for name, module in model.named_modules():
        mark = _mark(type(module))
        if mark is not None:
            text = mark.text.format(its="the model itself")
            place = f"{name}: expected a layer" if name else "model: expected one"
            raise Unsupported(f"{place} as timm makes it, got {_name(type(module))} ({text})")
        for key, parameter in module._parameters.items():
            if parameter is None or type(parameter) in (nn.Parameter, torch.Tensor):
                if key == "_flat_param":
                    raise Unsupported(f"{name or 'model'}: expected weights, got FSDP's _flat_param ({_SHARDED})")
                continue
            # A quantized weight has the type of a tensor subclass, within a layer of the usual class.
            mark = _mark(type(parameter))
            what = "a subclass of torch's tensor, which may compute anything" if mark is None else mark.text
            place = f"{name}.{key}" if name else key
            raise Unsupported(f"{place}: expected a plain parameter, got {type(parameter).__name__} ({what})")


def refuse_live_wrapper(model: nn.Module) -> None:
    """Refuse a model inside a wrapper for several processes that is still alive, which the model itself cannot tell.

    DistributedDataParallel averages the gradients of the parameters that it was built with; of others, and in the first
    step of all, it averages nothing and does not say so. FSDP keeps shards of the weights it was built with.

    Raises:
        Unsupported: there is one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if next(_live_wrappers(model), None) is None:
        return
    gc.collect()  # a wrapper that nobody holds may wait for the collector
    wrapper = next(_live_wrappers(model), None)
    if wrapper is not None:
        raise Unsupported(
            f"model: expected one outside {wrapper}, got the module of one that is alive and would not know the "
            f"parameters of the pruned model ({_PRUNE_FIRST}, or delete the wrapper first)"
        )


def _live_wrappers(model: nn.Module) -> Iterator[str]:
    known: dict[type, str] = {}
    for found in gc.get_objects():
        # The type and not isinstance, which would run the code of objects that stand for others.
        cls = type(found)
        wrapper = known.get(cls)
        if wrapper is None:
            wrapper = known[cls] = _wrapper(cls)
        if wrapper and "_modules" in vars(found) and any(each is model for each in found.modules()):
            yield wrapper


def _wrapper(cls: type) -> str:
    """Return the name of the class, if the wrapped module cannot tell that it is wrapped."""
    if not issubclass(cls, nn.Module):
        return ""
    names = {_name(base) for base in cls.__mro__}
    return next((wrapper.rpartition(".")[2] for wrapper in _WRAPPERS if wrapper in names), "")


_WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
)


def described(
    model: nn.Module,
    classes: Sequence[type[nn.Module]],
    accepts: Callable[[nn.Module], bool],
    require: Callable[[nn.Module], object],
) -> str:
    """Return what to say of a model that no family accepts: its class, and what to pass instead if it can be told.

    Args:
        model: the model.
        classes: those that families support.
        accepts: whether the class of a module is supported.
        require: raises an error of secateur's for a module that is not supported for another reason.
    """
    name = _name(type(model))
    quantized = _quantized(model)
    mark = quantized or _FEATURES.get(name) or _mark(type(model))
    found = sorted(_candidates(model, accepts), key=lambda each: each.order)
    passable = [each for each in found if each.mark is None]
    refused = [(each, _refusal(each.module, require)) for each in passable]
    fine = [each.path for each, reason in refused if reason is None]
    if mark is not None and not mark.attribute:
        return f"{name} ({mark.text})"
    if fine:
        its = f"its {' or '.join(fine[:_MOST_NAMED])}{' or others' if len(fine) > _MOST_NAMED else ''}"
        return f"{name} ({f'pass {its}' if mark is None else mark.text.format(its=its)})"
    if refused:
        each, reason = refused[0]
        return f"{name}, whose {each.path} cannot be pruned ({reason})"
    if found:
        assert found[0].mark is not None
        return f"{name}, whose {found[0].within} cannot be pruned ({found[0].mark.text})"
    if mark is not None:
        inner = getattr(model, mark.attribute)
        return f"{name} around {described(inner, classes, accepts, require)}"
    elsewhere = same_in_timm(model)
    if elsewhere is not None:
        return f"{name} ({elsewhere})"
    base = next((cls for cls in classes if isinstance(model, cls)), None)
    if base is not None:
        return f"{name} (a subclass of timm's {base.__name__}, which may compute anything)"
    if any(cls.__name__ == type(model).__name__ for cls in classes):
        return f"{name} (not timm's class of that name, and its weights may have other names)"
    for parts, child in _submodules(model):
        # Parts of timm's models and of torch's say nothing about the whole.
        said = described(child, classes, accepts, require) if _says_more(child, classes) else ""
        if said.endswith(")"):
            return f"{name}, whose {_path(parts)} is {said}"
    return name


def _submodules(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Return all submodules with their paths, short paths first."""
    found = [(tuple(path.split(".")), module) for path, module in model.named_modules() if path]
    return sorted(found, key=lambda each: len(each[0]))


def _says_more(module: nn.Module, classes: Sequence[type[nn.Module]]) -> bool:
    cls = type(module)
    if _mark(cls) is not None or _name(cls) in _FEATURES or isinstance(module, tuple(classes)):
        return True
    elsewhere = same_in_timm(module)
    return elsewhere is not None and not elsewhere.endswith(NOT_IN_TIMM)


def _quantized(model: nn.Module) -> _Mark | None:
    """Return the mark of quantized parts in a graph or a scripted model, which say more than the graph."""
    own = _mark(type(model))
    if own is None or own.attribute or own.text != _GRAPH:
        return None
    marks = (_mark(type(module)) for module in model.modules())
    return next((mark for mark in marks if mark is not None and mark.text.startswith("quantized")), None)


def _refusal(module: nn.Module, require: Callable[[nn.Module], object]) -> str | None:
    try:
        require(module)
    except Error as error:
        return str(error)
    return None


class _Candidate(NamedTuple):
    path: str
    module: nn.Module
    mark: _Mark | None  # of the outermost wrapper on the way whose inside cannot be passed
    within: str  # the path of that wrapper
    order: tuple[bool, int, int]


def _candidates(model: nn.Module, accepts: Callable[[nn.Module], bool]) -> list[_Candidate]:
    """Return the submodules that a family accepts, each once, by its shortest path."""
    found: dict[int, _Candidate] = {}

    def visit(module: nn.Module, parts: tuple[str, ...], mark: _Mark | None, within: str) -> None:
        if parts and accepts(module):
            path = _path(parts)
            order = (any(part.startswith("_") and part != "_orig_mod" for part in parts), len(parts), len(path))
            known = found.get(id(module))
            if known is None or (order < known.order and (mark is None or known.mark is not None)):
                found[id(module)] = _Candidate(path, module, mark, within, order)
            return
        own = _mark(type(module))
        if own is not None and not own.attribute and mark is None:
            mark, within = own, _path(parts)
        for part, child in module.named_children():
            visit(child, (*parts, part), mark, within)

    visit(model, (), None, "")
    return list(found.values())


def _path(parts: tuple[str, ...]) -> str:
    return "".join(
        f"[{part}]" if part.isdigit() else f".{part}" if part.isidentifier() else f"[{part!r}]" for part in parts
    )


def not_a_module(held: object) -> str:
    """Return what to say of something that is not an nn.Module, with what to pass instead if it can be told."""
    cls = type(held)
    name = _name(cls)
    if name.startswith("torch.export."):
        return f"{cls.__name__} (an exported program; prune the model that it was made from, then export it again)"
    if name.startswith("torch.jit."):
        return f"{cls.__name__} (scripted or traced; prune the model that it was made from)"
    weights: Any = held
    if isinstance(held, dict) and held and all(isinstance(value, torch.Tensor) for value in weights.values()):
        return f"{cls.__name__} (weights alone; build the model and load them into it)"
    return cls.__name__
