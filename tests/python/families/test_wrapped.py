"""What is said of wrappers, larger networks, graphs, quantized, sharded and adapted models: one line, at `inspect`."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import secateur as sc
import timm
import torch
from foreign import Net, named, refusal
from models import images, make
from small_vits import small_vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

AO = "quantized or prepared for it by torch.ao; prune first, then quantize"
GRAPH = "a graph made by torch.fx or torch.export; prune the model that it was made from, then make it again"
SCRIPTED = "scripted or traced by torch.jit; prune the model that it was made from, then script or trace it again"
LAST = "prune first, wrap afterwards"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts of torch call themselves old
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        (lambda vit: Net(encoder=vit), [".encoder"]),
        (lambda vit: Net(neck=nn.Linear(2, 2), stem=Net(inner=Net(encoder=vit))), [".stem.inner.encoder"]),
        (lambda vit: nn.Sequential(vit, nn.Linear(7, 2)), ["[0]"]),
        (lambda vit: Net(models=nn.ModuleList([nn.Identity(), vit])), [".models[1]"]),
        (lambda vit: Net(models=nn.ModuleDict({"my-encoder": vit})), [".models['my-encoder']"]),
        (lambda vit: Net(models=nn.ModuleDict({"vit": vit})), [".models.vit"]),
        # Public and short ways first; the same module is named once.
        (lambda vit: Net(_encoder=vit), ["._encoder"]),
        (lambda vit: Net(_encoder=make("plain"), backbone=vit), [".backbone", "._encoder"]),
        (lambda vit: Net(deep=Net(inner=make("plain")), backbone=vit), [".backbone", ".deep.inner"]),
        (lambda vit: Net(deep=Net(inner=vit), encoder=vit), [".encoder"]),
        (lambda vit: Net(student=vit, teacher=make("plain")), [".student", ".teacher"]),
        (lambda vit: Net(**{name: make("plain") for name in "abcde"}), [".a", ".b", ".c", ".d", "others"]),
        (lambda vit: AveragedModel(vit), [".module"]),
        (lambda vit: Net(encoder=compiled(vit)), [".encoder._orig_mod"]),
        (lambda vit: Net(encoder=DataParallel(vit)), [".encoder.module"]),
    ],
)
def test_a_larger_network_names_what_to_pass(build, paths):
    model = build(make("plain"))
    assert refusal(model).endswith(f" (pass its {' or '.join(paths)})")
    for path in paths:
        if path != "others":
            assert sc.inspect(eval(f"model{path}", {"model": model})).groups


def test_what_cannot_be_pruned_is_not_advised():
    bad = make("plain")
    bad.blocks = nn.ModuleList(bad.blocks)
    reason = "blocks: expected an nn.Sequential of blocks, got ModuleList"
    assert refusal(Net(encoder=bad)).endswith(f"Net, whose .encoder cannot be pruned ({reason})")
    assert refusal(Net(a=bad, second=make("plain"))).endswith("Net (pass its .second)")


def test_without_a_candidate_the_class_alone_is_named():
    assert refusal(nn.Linear(2, 2)) == "torch.nn.modules.linear.Linear"
    sub = make("plain")
    sub.__class__ = type("Mine", (VisionTransformer,), {"__module__": "mine"})
    assert refusal(sub) == "mine.Mine (a subclass of timm's VisionTransformer, which may compute anything)"
    found = refusal(named("mine", "VisionTransformer")())
    assert found == "mine.VisionTransformer (not timm's class of that name, and its weights may have other names)"


def subclass(vit):
    vit.__class__ = type("Mine", (VisionTransformer,), {"__module__": "mine"})
    return vit


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (torch.jit.script, f"torch.jit._script.RecursiveScriptModule ({SCRIPTED})"),
        (
            lambda vit: torch.export.export(vit, (images(vit),)).module(),
            f"torch.export._unlift._StatefulGraphModule ({GRAPH})",
        ),
        (subclass, "mine.Mine (a subclass of timm's VisionTransformer, which may compute anything)"),
        (
            lambda vit: timm.create_model("resnet10t", features_only=True),
            "timm.models._features.FeatureListNet (layers that timm took out of a model; prune that first, then "
            "timm.models.FeatureListNet(model, …))",
        ),
        (lambda vit: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3))), None),
    ],
)
def test_what_cannot_be_passed_inside_a_network_is_named(hidden, said):
    part = hidden(make("plain"))
    if said is None:
        assert refusal(Net(neck=Net(decoder=part))).endswith(f".neck.decoder[0] is {refusal(part[0])}")
    else:
        assert (
            refusal(Net(neck=nn.Linear(2, 2), deep=Net(encoder=part))) == f"foreign.Net, whose .deep.encoder is {said}"
        )
    # What can be passed comes first.
    assert refusal(Net(first=part, second=make("plain"))).endswith("Net (pass its .second)")


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (compiled, "._orig_mod"),
        (lambda vit: compiled(Net(encoder=vit)), "._orig_mod.encoder"),
        (lambda vit: compiled(DataParallel(vit)), "._orig_mod.module"),
    ],
)
def test_a_compiled_model(wrap, path):
    model = wrap(make("plain"))
    name = "torch._dynamo.eval_frame.OptimizedModule"
    assert refusal(model) == f"{name} (a compiled model; pass its {path} and compile after pruning)"
    assert sc.inspect(eval(f"model{path}", {"model": model})).groups


def test_a_compiled_model_without_a_candidate_says_what_is_inside():
    name = "torch._dynamo.eval_frame.OptimizedModule"
    assert refusal(compiled(nn.Linear(2, 2))) == f"{name} around torch.nn.modules.linear.Linear"
    model = make("plain")
    model.blocks[1] = compiled(model.blocks[1])
    expected = f"got {name} (a compiled model; pass the model itself and compile after pruning)"
    assert refusal(model) == f"blocks.1: expected a layer as timm makes it, {expected}"


@pytest.mark.parametrize(
    ("wrap", "path"), [(lambda vit: vit, ".module"), (compiled, ".module._orig_mod"), (DataParallel, ".module.module")]
)
def test_data_parallel(wrap, path):
    name = "torch.nn.parallel.data_parallel.DataParallel"
    found = refusal(DataParallel(wrap(make("plain"))))
    assert found == f"{name} (a parallel wrapper; pass its {path} and wrap again after pruning)"


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrappers(gloo):
    name = "torch.nn.parallel.distributed.DistributedDataParallel"
    wrapper = DistributedDataParallel(make("plain"))
    assert refusal(wrapper) == f"{name} (wrapped for several processes; {LAST})"
    within = "cannot be pruned (wrapped for several processes; " + LAST + ")"
    assert refusal(Net(encoder=wrapper)).endswith(f"Net, whose .encoder {within}")
    assert refusal(compiled(wrapper)).endswith(f"OptimizedModule, whose ._orig_mod {within}")


@pytest.mark.parametrize("where", ["model", "part"])
def test_a_model_inside_a_live_wrapper_is_pruned_once_the_wrapper_is_gone(gloo, where):
    vit = small_vit()
    plan = sc.plan(vit, method="magnitude", ratios={"ffn": 0.5})
    wrapper = DistributedDataParallel(vit if where == "model" else Net(encoder=vit, head=nn.Linear(2, 2)))
    wrapper.itself = [wrapper]  # a cycle, which waits for the collector
    other = DistributedDataParallel(make("plain"))
    refused = r"^model: expected one outside DistributedDataParallel, got the module of one that is alive [^\n]*"
    with pytest.raises(sc.Unsupported, match=refused + rf"\({LAST}, or delete the wrapper first\)$"):
        sc.prune(vit, plan)
    gc.disable()
    try:
        del wrapper
        sc.prune(vit, plan)
    finally:
        gc.enable()
    assert vit.blocks[0].mlp.fc1.out_features < small_vit().blocks[0].mlp.fc1.out_features
    assert other.module is not vit


def test_shards_and_subclasses_of_tensors(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh, model = init_device_mesh("cpu", (1,)), make("plain")
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh))
    shards = "got DTensor (sharded over devices; prune first, shard afterwards)"
    assert refusal(model) == f"head.weight: expected a plain parameter, {shards}"
    model = make("plain")
    fully_shard(model, mesh=mesh)
    assert refusal(model).endswith(" (sharded by FSDP; prune first, shard afterwards)")
    model = make("plain")
    fully_shard(model.blocks[0], mesh=mesh)  # the model's own class stays
    assert refusal(model).endswith(" (sharded by FSDP; prune first, shard afterwards)")


def test_older_fsdp_by_its_marks():
    wrapper = named("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")()
    wrapper._fsdp_wrapped_module = make("plain")
    assert refusal(wrapper).endswith("FullyShardedDataParallel (sharded by FSDP; prune first, shard afterwards)")
    flat = make("plain")
    flat.norm.register_parameter("_flat_param", nn.Parameter(torch.zeros(3)))
    expected = "got FSDP's _flat_param (sharded by FSDP; prune first, shard afterwards)"
    assert refusal(flat) == f"norm: expected weights, {expected}"


def test_checkpoint_wrappers():
    said = f"(a wrapper for gradient checkpointing; {LAST}, or use set_grad_checkpointing)"
    assert refusal(checkpoint_wrapper(make("plain"))).endswith(f".CheckpointWrapper {said}")
    model = make("plain")
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    assert refusal(model).endswith(f".CheckpointWrapper {said}")
    model = make("plain")
    model.set_grad_checkpointing()
    assert sc.inspect(model).groups


def test_another_way_around_a_wrapper_is_named():
    vit = make("plain")
    assert "Net, whose .encoder cannot be pruned (" in refusal(Net(encoder=checkpoint_wrapper(vit)))
    assert refusal(Net(encoder=checkpoint_wrapper(vit), same=vit)).endswith("Net (pass its .same)")


def test_graphs():
    model = make("plain")
    program = torch.export.export(model, (images(model),))
    text = "an exported program; prune the model that it was made from, then export it again"
    with pytest.raises(sc.InvalidArgument, match=rf"^model: expected a timm model, got ExportedProgram \({text}\)$"):
        sc.inspect(program)
    assert refusal(program.module()).endswith(f" ({GRAPH})")
    assert refusal(torch.export.unflatten(program)) == f"torch.export.unflatten.UnflattenedModule ({GRAPH})"
    assert refusal(torch.fx.symbolic_trace(model)) == f"torch.fx.graph_module.GraphModule ({GRAPH})"


def test_scripts():
    model = make("plain")
    traced = torch.jit.trace(model, images(model))
    assert refusal(torch.jit.script(model)) == f"torch.jit._script.RecursiveScriptModule ({SCRIPTED})"
    assert refusal(traced) == f"torch.jit._trace.TopLevelTracedModule ({SCRIPTED})"
    model.blocks[0].mlp = torch.jit.script(model.blocks[0].mlp)
    assert refusal(model).endswith(f"RecursiveScriptModule ({SCRIPTED})")


def quantized_by_ao(how):
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    model = make("plain")
    if how == "dynamic":
        return quantization.quantize_dynamic(model, {nn.Linear})
    if how == "dynamic head":
        return quantization.quantize_dynamic(model, {"head"})
    if how in ("prepared", "wrapped"):
        model.qconfig = quantization.get_default_qconfig("x86")
        return quantization.prepare(quantization.QuantWrapper(model) if how == "wrapped" else model)
    if how == "qat":
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        return quantization.prepare_qat(model.train())
    batch = images(model)
    prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping(), (batch,))
    prepared(batch)
    return prepared if how == "prepared graph" else quantize_fx.convert_fx(prepared)


@pytest.mark.parametrize(
    "how", ["dynamic", "dynamic head", "prepared", "wrapped", "qat", "prepared graph", "converted graph"]
)
def test_quantized_by_torch(how):
    assert AO in refusal(quantized_by_ao(how))


def test_an_empty_wrapper_for_quantization_is_one_to_look_into():
    wrapper = torch.ao.quantization.QuantWrapper(make("plain"))
    assert refusal(wrapper) == "torch.ao.quantization.stubs.QuantWrapper (pass its .module)"


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes", "optimum.quanto", "modelopt", "brevitas", "hqq"])
@pytest.mark.parametrize("place", ["layer", "weight"])
def test_quantized_by_others(library, place):
    model = make("plain")
    if place == "layer":
        model.blocks[1].mlp.fc1.__class__ = named(f"{library}.nn", "Linear8", nn.Linear)
        start = f"blocks.1.mlp.fc1: expected a layer as timm makes it, got {library}.nn.Linear8"
    else:
        weight = model.blocks[1].mlp.fc1.weight.detach().as_subclass(named(f"{library}.nn", "Int8", torch.Tensor))
        model.blocks[1].mlp.fc1.weight = nn.Parameter(weight)
        start = "blocks.1.mlp.fc1.weight: expected a plain parameter, got Int8"
    assert refusal(model) == f"{start} (quantized or prepared for it by {library}; prune first, then quantize)"


def test_a_library_is_known_by_its_whole_name():
    model = make("plain")
    model.head.__class__ = named("torchaos.nn", "Linear", nn.Linear)
    assert "torchao;" not in str(refusal_or_none(model))
    weight = model.norm.weight.detach().as_subclass(named("mine", "Unknown", torch.Tensor))
    model = make("plain")
    model.norm.weight = nn.Parameter(weight)
    assert refusal(model) == (
        "norm.weight: expected a plain parameter, got Unknown (a subclass of torch's tensor, which may compute "
        "anything)"
    )


def refusal_or_none(model):
    try:
        sc.inspect(model)
    except sc.Unsupported as error:
        return error
    return None


def test_adapters():
    said = "(adapters of peft; merge and unload them first: model = peft_model.merge_and_unload())"
    outer, inner = named("peft.peft_model", "PeftModel")(), named("peft.tuners.lora.model", "LoraModel")()
    inner.model, outer.base_model = make("plain"), inner
    assert refusal(outer) == f"peft.peft_model.PeftModel {said}"
    injected = make("plain")
    injected.blocks[0].attn.qkv.__class__ = named("peft.tuners.lora.layer", "Linear", nn.Linear)
    assert refusal(injected).endswith(f"got peft.tuners.lora.layer.Linear {said}")
    assert refusal(Net(encoder=outer)).endswith(f"Net, whose .encoder cannot be pruned {said}")


def test_layers_that_timm_took_out():
    found = refusal(timm.create_model("resnet18", features_only=True, pretrained=False))
    assert found.startswith("timm.models._features.FeatureListNet (layers that timm took out of a model; prune that")
    assert timm.models.FeatureListNet.__name__ in found


def test_the_advice_on_layers_taken_out_of_a_model():
    """Channels are those of the pruned stages."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    stats = sc.calibrate(model, [x])
    sc.prune(model, sc.plan(model, stats, method="magnitude", groups=("width",), ratios={"width": 0.3}))
    net = timm.models.FeatureListNet(model)
    assert [each.shape[1] for each in net(x)] == net.feature_info.channels()
    assert net.feature_info.channels()[-1] < 512


def test_what_is_no_module():
    def said(held):
        with pytest.raises(sc.InvalidArgument) as caught:
            sc.inspect(held)
        return str(caught.value).removeprefix("model: expected a timm model, got ")

    assert said(make("plain").state_dict()) == "OrderedDict (weights alone; build the model and load them into it)"
    assert said({}) == "dict"
    assert said({"a": 1}) == "dict"
    assert said([make("plain")]) == "list"
    assert said("vit_tiny_patch16_224") == "str"
    assert said(None) == "NoneType"


def test_the_model_is_left_as_it_was():
    model = Net(encoder=make("plain"))
    before, mode = copy.deepcopy(model.state_dict()), model.training
    refusal(model)
    assert model.training is mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
