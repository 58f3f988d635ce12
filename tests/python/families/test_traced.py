"""Convolutional networks by a graph: every cut is the masked dense model, and what cannot be followed is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import timm
import torch
import torch.nn.utils.prune
from pruning import plan_of, set_fused
from secateur.budgets.limits import FreeGroups
from secateur.errors import Unsupported
from secateur.families.traced import Traced
from secateur.surgery.cut import cut
from secateur.surgery.verify import verify_cut
from sklearn.datasets import load_digits
from timm.layers import BlurPool2d, SEModule
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FAMILY = Traced()


def small(block=BasicBlock, first=1, **more):
    """A ResNet of four stages, of odd widths."""
    torch.manual_seed(0)
    return ResNet(block, (first, 1, 1, 1), **{"channels": (24, 37, 20, 29), "num_classes": 5, "stem_width": 16, **more})


def efficientnet(*stages, **more):
    """An EfficientNet of these stages, in timm's notation."""
    torch.manual_seed(0)
    blocks = decode_arch_def([[stage] for stage in stages])
    return EfficientNet(blocks, num_classes=5, num_features=51, stem_size=16, **more)


def live(model, size=(33, 41), seed=0):
    """Weights and running statistics that leave nothing at zero or one, in evaluation mode, for images of a size."""
    generator = torch.Generator().manual_seed(seed)
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "input_size": (3, *size)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.3)
        model.train()
        for _ in range(2):
            model(torch.randn(3, model.in_chans, *size, generator=generator))
    return model.eval()


def random_keep(anatomy, seed=0):
    """An odd share of every group."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in anatomy.groups:
        count = int(rng.integers(group.least, group.size))
        keep[group.name] = np.sort(rng.choice(group.size, count, replace=False))[None]
    return keep


def hide(module, kept, channels):
    """Zero all channels of what a module outputs except those."""
    mask = torch.zeros(channels, dtype=torch.float64)
    mask[kept] = 1
    module.register_forward_hook(lambda _module, _args, out: out * mask[:, None, None].to(out.dtype))


def masked_resnet(dense, keep):
    """What a pruned ResNet must compute, written without secateur: channels zeroed in the places that names say."""
    model = copy.deepcopy(dense)
    for name, kept in keep.items():
        if name == "conv1":
            hide(model.act1, kept[0], model.conv1.out_channels)
            continue
        stage, _, rest = name.partition(".")
        if name.endswith(".width"):
            blocks = list(getattr(model, stage))
            width = (
                blocks[0].conv1.in_channels if blocks[0].downsample is None else blocks[0].downsample[0].out_channels
            )
            if blocks[0].downsample is None:
                hide(model.act1, kept[0], width)
            else:
                hide(blocks[0].downsample, kept[0], width)
            for block in blocks:
                hide(block.bn2 if type(block) is BasicBlock else block.bn3, kept[0], width)
            continue
        index, _, conv = rest.partition(".")
        block = getattr(model, stage)[int(index)]
        channels, groups = getattr(block, conv).out_channels, block.conv2.groups
        # A unit of a grouped convolution is one channel in each of its groups, on both sides.
        every = (np.arange(groups)[:, None] * (channels // groups) + kept[0]).ravel()
        hide(getattr(block, conv.replace("conv", "act")), every, channels)
    return model


def masked_mobilenet(dense, keep):
    """The same for MobileNetV2: what expands is masked before and after the depthwise convolution."""
    model = copy.deepcopy(dense)
    for name, kept in keep.items():
        if name == "conv_stem":
            places = [model.bn1, model.blocks[0][0].bn1]
        elif name == "conv_head":
            places = [model.bn2]
        elif name == "blocks.0.0.conv_pw":
            places = [model.blocks[0][0].bn2]
        else:
            _, stage, rest = name.split(".", 2)
            stage = model.blocks[int(stage)]
            index, _, conv = rest.partition(".")
            if rest == "width":
                places = [block.bn3 for block in stage]
            elif conv == "conv_pw":
                places = [stage[int(index)].bn1, stage[int(index)].bn2]
            else:
                assert conv == "conv_pwl"
                assert len(stage) == 1
                places = [stage[0].bn3]
        for place in places:
            hide(place, kept[0], place.num_features)
    return model


def check(model, masked=None, seed=0):
    """Cut it at random, compare with the masked dense model in float64, and every number that is foretold."""
    anatomy = FAMILY.inspect(model)
    keep = random_keep(anatomy, seed)
    sizes = {name: kept.shape[1] for name, kept in keep.items()}
    verify_cut(model, FAMILY, anatomy, keep)
    images = torch.randn(2, *anatomy.input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pruned = copy.deepcopy(model).double()
    with torch.no_grad():
        cut(pruned, FAMILY, anatomy, keep, {})
        found = pruned(images)
        if masked is not None:
            expected = masked(copy.deepcopy(model).double(), keep)(images)
            assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    after = FAMILY.inspect(pruned)
    assert after.sizes == sizes
    assert after.refused.keys() == anatomy.refused.keys()
    assert after.params == sum(parameter.numel() for parameter in pruned.parameters()) == anatomy.params_at(sizes)
    set_fused(pruned, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(images[:1])
    assert after.macs == counter.get_total_flops() // 2 == anatomy.macs_at(sizes)
    return anatomy, pruned


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_cut_resnet_is_the_masked_dense_one(name):
    model = live(timm.create_model(name, num_classes=7))
    anatomy, _ = check(model, masked_resnet)
    assert not anatomy.refused
    kinds = {group.name: group.kind for group in anatomy.groups}
    assert [n for n, kind in kinds.items() if kind == "width"] == [f"layer{stage}.width" for stage in range(1, 5)]
    assert kinds["layer1.0.conv1"] == kinds["layer4.1.conv1"] == "conv"


def test_a_cut_mobilenet_is_the_masked_dense_one():
    model = live(timm.create_model("mobilenetv2_100", num_classes=7))
    anatomy, pruned = check(model, masked_mobilenet)
    assert not anatomy.refused
    assert [group.name for group in anatomy.groups if group.kind == "width"] == [
        f"blocks.{i}.width" for i in range(1, 6)
    ]
    depthwise = pruned.blocks[1][0].conv_dw
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == len(depthwise.weight) < 96


VARIANTS = {
    "squeeze": lambda: small(Bottleneck, block_args={"attn_layer": SEModule}),
    "blur": lambda: small(aa_layer=BlurPool2d, stem_type="deep"),
    "averaged": lambda: small(Bottleneck, aa_layer=nn.AvgPool2d, avg_down=True),
    "tiered": lambda: small(Bottleneck, stem_type="deep_tiered", replace_stem_pool=True),
    "grouped": lambda: small(Bottleneck, 2, cardinality=3, base_width=14, act_layer=nn.SiLU),
    "two pools": lambda: small(global_pool="catavgmax"),
    "mixed pool": lambda: small(global_pool="avgmax"),
    "one colour": lambda: small(in_chans=1),
    "features": lambda: small(num_classes=0),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "same padding": lambda: efficientnet("ds_r1_k3_s1_c16_noskip", "ir_r2_k5_s2_e3_c24_se0.25", pad_type="same"),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "mobilenetv3, features": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "mobilenetv4": lambda: timm.create_model("mobilenetv4_conv_small_050", num_classes=5),
    "mobilenetv4, hybrid": lambda: timm.create_model("mobilenetv4_hybrid_medium", num_classes=5),
    "mixed kernels": lambda: efficientnet("ds_r1_k3_s1_c16", "ir_r2_k3.5_s2_e3_c24", "ir_r2_k3_s2_e2_c40"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    """Compared with the masked model by `verify_cut`, which is tested by itself."""
    # timm's average pools do not fit odd sizes.
    size = {"averaged": (64, 96), "mobilenetv4, hybrid": (64, 64)}.get(variant, (33, 41))
    anatomy, _ = check(live(VARIANTS[variant](), size))
    names = {group.name for group in anatomy.groups}
    if variant == "squeeze":
        assert {"layer1.0.se.fc1", "layer2.0.se.fc1"} <= names
    if variant == "two pools":
        (head,) = (m for m in anatomy.group("layer4.0.width").members if m.tensor == "fc.weight")
        assert head.entries[0, :, 1].tolist() == list(range(29, 58))
    if variant == "features":
        assert anatomy.refused == {"layer4.0.width": "the model returns it"}
    if variant == "mixed kernels":
        assert anatomy.refused["blocks.1.0.conv_pw"] == (
            "blocks.1.0.conv_dw: channels are not followed through split_with_sizes"
        )


def test_channels_before_a_flatten():
    model = small()
    model.global_pool = nn.Flatten()
    model.fc = nn.Linear(29 * 2 * 3, 5)
    anatomy, pruned = check(live(model, (35, 67)))
    (head,) = (m for m in anatomy.group("layer4.0.width").members if m.tensor == "fc.weight")
    assert head.entries[0, 3].tolist() == list(range(18, 24))
    assert pruned.fc.in_features == 6 * pruned.num_features == pruned.fc.weight.shape[1]


class Branches(nn.Module):
    """Two convolutions side by side, and one that both are added to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.sum = nn.Conv2d(24, 10, 1), nn.Conv2d(24, 14, 1, bias=False), nn.Conv2d(24, 24, 1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], dim=1) - self.sum(x)


class Twice(nn.Module):
    """One convolution that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x).relu())


class Scaled(nn.Module):
    """A parameter that is viewed, and one for all channels."""

    def __init__(self):
        super().__init__()
        self.each, self.all = nn.Parameter(torch.rand(24)), nn.Parameter(torch.rand(1))

    def forward(self, x):
        return x * self.each.view(1, -1, 1, 1) + self.all


FOLLOWED = {
    "branches": (Branches, {"layer1.1.conv1": 24, "layer1.1.act1.width": 10, "layer1.1.act1.b": 14}),
    "twice": (Twice, {"layer1.1.conv1": 24}),
    "scaled": (Scaled, {"layer1.1.conv1": 24}),
    "prelu": (lambda: nn.PReLU(24), {"layer1.1.conv1": 24}),
    "hardswish": (lambda: nn.Hardswish(inplace=True), {"layer1.1.conv1": 24}),
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), {"layer1.1.conv1": 24}),
    "depthwise with more channels": (
        lambda: nn.Sequential(nn.Conv2d(24, 72, 3, padding=1, groups=24), nn.Conv2d(72, 24, 1)),
        {"layer1.1.conv1": 24, "layer1.1.act1.1": 24},
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed(name):
    make, sizes = FOLLOWED[name]
    model = small(first=2)
    model.layer1[1].act1 = make()
    anatomy, _ = check(live(model))
    here = {name: size for name, size in anatomy.sizes.items() if name.startswith("layer1.1.")}
    assert here == sizes
    assert not anatomy.refused


class Shuffle(nn.Module):
    def forward(self, x):
        images, channels, height, width = x.shape
        return x.view(images, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Rolled(nn.Module):
    def forward(self, x):
        return x.roll(1, dims=1)


class Half(nn.Module):
    """Half of the channels, however many there are."""

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return torch.cat([first * 2, second], dim=1)


class AcrossImages(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]).unsqueeze(0).reshape(x.shape) * 0.5


@pytest.mark.parametrize(
    "module", [Shuffle, Rolled, Half, AcrossImages, lambda: nn.Softmax(1), lambda: nn.GroupNorm(4, 24)]
)
def test_what_cannot_be_followed_is_never_cut(module):
    model = small(first=2)
    model.layer1[1].act1 = module()
    anatomy, _ = check(live(model))
    assert "layer1.1.conv1" not in anatomy.sizes
    assert anatomy.refused["layer1.1.conv1"].startswith("layer1.1.act1: channels are not followed through ")
    assert "layer1.0.conv1" in anatomy.sizes


class Counted(nn.Module):
    """Depends on the number of channels in a way that no graph of tensors shows."""

    def forward(self, x):
        return x / x.shape[1]


def test_what_a_graph_does_not_show_is_found_by_the_check():
    model = small(first=2)
    model.layer1[1].act1 = Counted()
    model = live(model)
    anatomy = FAMILY.inspect(model)
    keep = random_keep(anatomy)
    with pytest.raises(
        Unsupported, match=r"^layer1\.1\.conv1: expected a cut that only removes units, got outputs that"
    ):
        verify_cut(model, FAMILY, anatomy, keep)
    verify_cut(model, FAMILY, anatomy, {name: kept for name, kept in keep.items() if name != "layer1.1.conv1"})


class Wrong(Traced):
    """A family with one group that does not fit: test-only, and so not registered."""

    def __init__(self, change):
        self.change = change

    def inspect(self, model):
        anatomy = super().inspect(model)
        groups = []
        for group in anatomy.groups:
            members = group.members
            if group.name == "layer2.0.conv1":
                members = tuple(new for member in members if (new := self.change(member)) is not None)
            groups.append(type(group)(**{**vars(group), "members": members}))
        return type(anatomy)(
            **{**{f: getattr(anatomy, f) for f in anatomy.__dataclass_fields__}, "groups": tuple(groups)}
        )


def _moved(tensor):
    def change(member):
        if member.tensor != tensor:
            return member
        return type(member)(**{**vars(member), "entries": np.roll(member.entries, 1, axis=1)})

    return change


WRONG = {
    "a reader's other entries": _moved("layer2.0.conv2.weight"),
    "a norm's other entries": _moved("layer2.0.bn1.weight"),
    "a buffer's other entries": _moved("layer2.0.bn1.running_mean"),
    "a member missing": lambda member: None if member.tensor == "layer2.0.bn1.bias" else member,
    "no reader": lambda member: None if member.role == "reader" else member,
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("trained", [False, True])
def test_a_wrong_group_is_refused_by_name_and_the_model_is_untouched(change, trained):
    model = small(first=2)
    # At first, the last norm of every block is zero: nothing of what comes before it could be seen.
    model = live(model) if trained else model.eval()
    model.pretrained_cfg = {"input_size": (3, 33, 41)}
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    family = Wrong(WRONG[change])
    anatomy = family.inspect(model)
    with pytest.raises(Unsupported, match=r"^layer2\.0\.conv1: expected a cut that only removes units, got "):
        verify_cut(model, family, anatomy, random_keep(anatomy))
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert repr(model) == repr(small(first=2))


def _tied(model):
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight


def _masked(model):
    torch.nn.utils.prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)


class Peeks(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def _peeking(model):
    model.layer1[0].act1 = Peeks()


def _all_softmax(model):
    model.act1 = nn.Softmax(1)
    model.layer1 = model.layer2 = model.layer3 = model.layer4 = model.fc = nn.Identity()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_tied, "layer1.0.conv2.weight: expected a parameter of its own, got one tied to layer1.0.conv1.weight"),
        (_masked, "layer1.0.conv1.weight: expected a parameter, got a tensor that a hook computes"),
        (_parametrized, "layer1.0.conv1.weight: expected a parameter, got a tensor that a hook computes"),
        (_peeking, "layer1.0.act1: cannot run without values: "),
        (_all_softmax, "model: expected ResNet with channels to cut: act1: channels are not followed through _softmax"),
    ],
)
def test_models_are_refused_by_name(change, text):
    model = small()
    change(model)
    with pytest.raises(Unsupported) as error:
        FAMILY.inspect(model)
    assert str(error.value).startswith(text)


def test_classes_are_taken_by_exact_type():
    class Mine(ResNet):
        pass

    assert FAMILY.accepts(timm.create_model("test_resnet"))
    assert FAMILY.accepts(timm.create_model("test_efficientnet"))
    assert not FAMILY.accepts(Mine(BasicBlock, (1, 1, 1, 1)))
    assert sc.inspect(timm.create_model("test_resnet", device="meta")).family == "traced"


@pytest.mark.parametrize(
    ("name", "macs"), [("resnet18", 1.814e9), ("resnet50", 4.089e9), ("mobilenetv2_100", 0.3008e9)]
)
def test_known_costs(name, macs):
    anatomy = FAMILY.inspect(timm.create_model(name, device="meta"))
    assert anatomy.macs == pytest.approx(macs, rel=1e-3)
    assert anatomy.input_size == (3, 224, 224)


def test_inspecting_changes_nothing():
    model = small(drop_rate=0.1, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    model.layer1.eval()
    seen = []
    model.layer2.register_forward_hook(lambda *_: seen.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with torch.inference_mode():
        within = FAMILY.inspect(model)
    assert within.sizes == FAMILY.inspect(model).sizes
    assert not seen
    assert modes == [module.training for module in model.modules()]
    assert model.grad_checkpointing
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_a_model_says_of_itself_follows():
    for name in ("test_resnet", "test_efficientnet", "mobilenetv3_small_050", "mobilenetv4_conv_small_050"):
        _, pruned = check(live(timm.create_model(name, num_classes=5)))
        image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        features = pruned.forward_features(image)
        assert pruned.num_features == features.shape[1]
        assert pruned.head_hidden_size == pruned.forward_head(features, pre_logits=True).shape[1]
        _, maps = pruned.forward_intermediates(image)
        assert [info["num_chs"] for info in pruned.feature_info] == [x.shape[1] for x in maps]


def test_two_rounds_end_where_one_does():
    model = live(small(Bottleneck, cardinality=4, base_width=16))
    anatomy, once = check(model, seed=0)
    between = FAMILY.inspect(once)
    keep = {g.name: np.arange(g.least)[None] for g in between.groups}
    cut(once, FAMILY, between, keep, {})
    least = FAMILY.inspect(once)
    assert list(least.sizes) == list(anatomy.sizes)
    assert set(least.sizes.values()) == {2}
    once(torch.randn(1, 3, 33, 41, dtype=torch.float64))


@pytest.mark.parametrize("minimum", [{}, {"conv": 1}, {"conv": 5}])
def test_no_budget_goes_below_the_least(minimum):
    free = FreeGroups(FAMILY.inspect(small()), None, [], minimum, None, {})
    least = {group.kind: free.count(group, 1.0) for group in free.groups}
    assert least == {"conv": max(2, minimum.get("conv", 0)), "width": 2}


@pytest.fixture(scope="module")
def digits_resnet():
    """A ResNet trained on digits for seconds: real batch statistics, dead and outlying channels."""
    torch.manual_seed(0)
    images, targets = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=3, mode="bilinear")
    targets = torch.tensor(targets)
    model = ResNet(BasicBlock, (1, 2, 1, 1), channels=(22, 27, 31, 40), num_classes=10, in_chans=1)
    model.pretrained_cfg = {"input_size": (1, 24, 24)}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    model.train()
    for _ in range(6):
        for batch in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1000:]).argmax(1) == targets[1000:]).double().mean().item()
    assert accuracy >= 0.85, f"the model is not trained: {accuracy:.1%}"
    return model, images[1000:]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_trained_resnet(digits_resnet, seed):
    model, images = digits_resnet
    anatomy, pruned = check(model, masked_resnet, seed)
    keep = random_keep(anatomy, seed)
    with torch.no_grad():
        expected = masked_resnet(copy.deepcopy(model).double(), keep)(images.double())
        found = pruned(images.double())
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet10t", "resnetblur18", "test_efficientnet", "mobilenetv4_conv_small_050"])
def test_pruned_saved_loaded_and_trained(name, tmp_path):
    model = live(timm.create_model(name, num_classes=5))
    anatomy = sc.inspect(model)
    keep = random_keep(anatomy)
    report = sc.prune(model, plan_of(model, keep))
    assert report.groups == {group.name: (group.size, keep[group.name].shape[1]) for group in anatomy.groups}
    assert report.params[1] == sum(parameter.numel() for parameter in model.parameters())
    sc.save(model, tmp_path / "model")
    loaded = sc.load(tmp_path / "model")
    images = torch.randn(4, 3, 33, 41)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert sc.inspect(loaded).sizes == sc.inspect(model).sizes
    loaded.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_prune_refuses_a_cut_that_is_not_the_masked_model():
    model = small(first=2)
    model.layer1[1].act1 = Counted()
    model = live(model)
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(model, random_keep(sc.inspect(model)))
    with pytest.raises(sc.Unsupported, match=r"^layer1\.1\.conv1: expected a cut that only removes units"):
        sc.prune(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
