"""What `inspect` says of models of transformers, torchvision and DINO's own code: timm's model of the same sizes."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import secateur as sc
import timm
import torch
import torchvision
from foreign import Net, named, refusal
from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import nn

OTHER_NAMES = "this model with the same weights, by other names: "
OWN_CLASS = "timm has its own class of this model, which takes the same weights by other names: "
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
SIZES |= {"huge": (1280, 32, 16)}


def configured(model_type, **values):
    return SimpleNamespace(model_type=model_type, **values)


def vit(model_type="vit", size="base", **changes):
    """A configuration as transformers writes it for a vision transformer."""
    width, depth, heads = SIZES[size]
    found = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "num_channels": 3}
    found |= {"intermediate_size": 4 * width, "hidden_act": "gelu", "image_size": 224, "patch_size": 16}
    return configured(model_type, **{**found, **changes})


def dinov2(model_type="dinov2", size="base", **changes):
    found = vars(vit(model_type, size, patch_size=14, image_size=518, mlp_ratio=4, use_swiglu_ffn=False))
    del found["intermediate_size"]
    return SimpleNamespace(**{**found, **changes})


def swin(model_type="swin", **changes):
    found = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "patch_size": 4}
    found |= {"image_size": 224, "num_channels": 3, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu"}
    return configured(model_type, **{**found, "use_absolute_embeddings": False, **changes})


def resnet(**changes):
    found = {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}
    found |= {"embedding_size": 64, "hidden_act": "relu", "num_channels": 3, "downsample_in_first_stage": False}
    return configured("resnet", **{**found, "downsample_in_bottleneck": False, **changes})


BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}


def of_transformers(config):
    model = named("transformers.models.some.modeling_some", "SomeModel")()
    model.config = config
    return model


def said(config):
    text = refusal(of_transformers(config))
    start = "transformers.models.some.modeling_some.SomeModel (of transformers; "
    assert text.startswith(start)
    assert text.endswith(")")
    return text[len(start) : -1]


def advised(text):
    """Build, without weights, what the text says."""
    call = re.search(r"timm\.(?:create_model|models\.\w+)\(.*\)$", text)[0].replace("timm.create_model(", "create(")
    with torch.device("meta"):
        return eval(call, {"timm": timm, "create": lambda name, **arguments: timm.create_model(name, **arguments)})


def sizes(model):
    """Width, depth, heads, hidden channels, channels, patch and positions, by the shapes of the weights."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    width, channels, *patch = shapes["patch_embed.proj.weight"]
    heads, hidden = model.blocks[0].attn.num_heads, shapes["blocks.0.mlp.fc2.weight"][1]
    return width, depth, heads, hidden, channels, tuple(patch), shapes["pos_embed"][1]


@pytest.mark.parametrize(
    ("config", "name", "extra"),
    [
        # Published models: google/vit-*, WinKawaks/vit-tiny, facebook/vit-mae-*, vit-msn-*, ijepa-*, deit-*-distilled.
        (vit(), "vit_base_patch16_224", 1),
        (vit(size="tiny"), "vit_tiny_patch16_224", 1),
        (vit(size="small"), "vit_small_patch16_224", 1),
        (vit(image_size=384), "vit_base_patch16_384", 1),
        (vit(image_size=(384, 384), patch_size=[32, 32]), "vit_base_patch32_384", 1),
        (vit(size="large", patch_size=32, image_size=384), "vit_large_patch32_384", 1),
        (vit("vit_mae"), "vit_base_patch16_224.mae", 1),
        (vit("vit_mae", "base", patch_size=32), "vit_base_patch32_224", 1),
        (vit("vit_msn", "large"), "vit_large_patch16_224", 1),
        (vit("ijepa", "huge", patch_size=14), "vit_huge_patch14_gap_224", 0),
        (vit("deit", "small"), "deit_small_distilled_patch16_224", 2),
        (vit("deit", image_size=384), "deit_base_distilled_patch16_384", 2),
        # openai/clip-*, laion/CLIP-*, google/siglip-*.
        (
            vit("clip_vision_model", patch_size=32, hidden_act="quick_gelu"),
            "vit_base_patch32_clip_quickgelu_224.openai",
            1,
        ),
        (
            vit("clip_vision_model", "large", patch_size=14, image_size=336, hidden_act="quick_gelu"),
            "vit_large_patch14_clip_quickgelu_336.openai",
            1,
        ),
        (vit("clip_vision_model"), "vit_base_patch16_clip_224", 1),
        (vit("siglip_vision_model", hidden_act="gelu_pytorch_tanh"), "vit_base_patch16_siglip_224", 0),
        (vit("siglip_vision_model", image_size=512), "vit_base_patch16_siglip_512", 0),
        (
            vit(
                "siglip_vision_model",
                hidden_size=1152,
                num_hidden_layers=27,
                num_attention_heads=16,
                intermediate_size=4304,
                patch_size=14,
                image_size=384,
            ),
            "vit_so400m_patch14_siglip_384",
            0,
        ),
        # facebook/dinov2-*.
        (dinov2(), "vit_base_patch14_dinov2", 1),
        (dinov2(size="large"), "vit_large_patch14_dinov2", 1),
        (dinov2("dinov2_with_registers", "small", num_register_tokens=4), "vit_small_patch14_reg4_dinov2", 0),
    ],
)
def test_vision_transformers_by_name(config, name, extra):
    text = said(config)
    assert text == f'timm has {OTHER_NAMES}timm.create_model("{name}")'
    assert name.split(".")[0] in timm.list_models()
    assert "." not in name or name in timm.list_pretrained()
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    hidden = getattr(config, "intermediate_size", 4 * config.hidden_size)
    own = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, hidden)
    built = advised(text)
    assert sizes(built) == (*own, 3, (patch, patch), (side // patch) ** 2 + extra)
    assert getattr(built, "num_reg_tokens", 0) == getattr(config, "num_register_tokens", 0)


def test_dinov2_giant_is_gated():
    giant = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
    config = dinov2(use_swiglu_ffn=True, **giant)
    assert said(config) == f'timm has {OTHER_NAMES}timm.create_model("vit_giant_patch14_dinov2")'
    assert said(dinov2(**giant)) == "timm has its own class of this model"


@pytest.mark.parametrize(
    ("config", "name", "cls"),
    [
        (vit("beit"), "beit_base_patch16_224", "Beit"),
        (vit("beit", "large", image_size=512), "beit_large_patch16_512", "Beit"),
        (vit("dinov3_vit", num_register_tokens=4, query_bias=True), "vit_base_patch16_dinov3_qkvb", "Eva"),
        (vit("dinov3_vit", num_register_tokens=4, query_bias=False), "vit_base_patch16_dinov3", "Eva"),
        (
            vit("dinov3_vit", "small", num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
            "vit_small_plus_patch16_dinov3",
            "Eva",
        ),
        (swin("swinv2", window_size=8, image_size=256), "swinv2_tiny_window8_256", "SwinTransformerV2"),
    ],
)
def test_other_classes_by_name(config, name, cls):
    if getattr(config, "use_gated_mlp", False):
        config.intermediate_size = 1536  # facebook/dinov3-vits16plus-pretrain-lvd1689m
    text = said(config)
    size = ", img_size=224" if cls == "Eva" else ""  # timm's are of 256 pixels
    assert text == f'timm has {OTHER_NAMES}timm.create_model("{name}"{size})'
    assert type(advised(text)).__name__ == cls


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "swin_tiny_patch4_window7_224"),
        ({"depths": (2, 2, 18, 2)}, "swin_small_patch4_window7_224"),
        (
            {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}
            | {"image_size": 384},
            "swin_base_patch4_window12_384",
        ),
        ({"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}, "swin_large_patch4_window7_224"),
    ],
)
def test_swin(changes, name):
    config = swin(**changes)
    text = said(config)
    assert text == f'timm has {OTHER_NAMES}timm.create_model("{name}")'
    built = advised(text)
    blocks = [stage.blocks for stage in built.layers]
    assert [len(each) for each in blocks] == list(config.depths)
    assert [each[0].attn.num_heads for each in blocks] == config.num_heads
    assert blocks[0][0].attn.window_size == (config.window_size,) * 2
    width = config.embed_dim
    assert [tuple(each[0].mlp.fc1.weight.shape) for each in blocks[:2]] == [(4 * width, width), (8 * width, 2 * width)]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "resnet50"),
        ({"depths": [2, 2, 2, 2]}, "resnet26"),
        ({"depths": [3, 4, 23, 3]}, "resnet101"),
        ({"depths": [3, 8, 36, 3]}, "resnet152"),
        (BASIC | {"depths": [2, 2, 2, 2]}, "resnet18"),
        (BASIC, "resnet34"),
    ],
)
def test_resnet_of_transformers(changes, name):
    config = resnet(**changes)
    assert said(config) == f'timm has {OTHER_NAMES}timm.create_model("{name}")'
    built = advised(said(config))
    stages = [getattr(built, f"layer{stage}") for stage in (1, 2, 3, 4)]
    assert [len(stage) for stage in stages] == config.depths
    assert [list(stage.children())[-1].bn2.num_features for stage in stages] == [64, 128, 256, 512]
    assert built.fc.in_features == config.hidden_sizes[-1]


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (vit(image_size=256), '"vit_base_patch16_224", img_size=256'),
        (vit(image_size=(224, 192)), '"vit_base_patch16_224", img_size=(224, 192)'),
        (vit(num_channels=1), '"vit_base_patch16_224", in_chans=1'),
        (vit(num_channels=4, image_size=320), '"vit_base_patch16_224", in_chans=4, img_size=320'),
        (vit("deit", "tiny", image_size=384), '"deit_tiny_distilled_patch16_224", img_size=384'),
        (dinov2(image_size=224), '"vit_base_patch14_dinov2", img_size=224'),
        (resnet(num_channels=1), '"resnet50", in_chans=1'),
        (swin(num_channels=1), '"swin_tiny_patch4_window7_224", in_chans=1'),
    ],
)
def test_other_images_are_arguments(config, call):
    text = said(config)
    assert text == f"timm has {OTHER_NAMES}timm.create_model({call})"
    built = advised(text)
    side = getattr(config, "image_size", 64)
    images = torch.zeros(1, config.num_channels, *((side, side) if isinstance(side, int) else side), device="meta")
    assert built(images).shape[0] == 1


ODD = {"hidden_size": 90, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 30, "patch_size": 6}


@pytest.mark.parametrize(
    ("config", "cls", "extra", "bias"),
    [
        # 200 / 96 and 200 / 90 hidden channels for each, which are no short numbers.
        (
            vit(**{**ODD, "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 200}),
            VisionTransformer,
            1,
            1,
        ),
        (vit(**ODD, intermediate_size=200), VisionTransformer, 1, 1),
        (vit(**ODD, intermediate_size=89, num_channels=2), VisionTransformer, 1, 1),
        (vit("vit_msn", **ODD, intermediate_size=180), VisionTransformer, 1, 1),
        (vit("vit_mae", **ODD, intermediate_size=181, qkv_bias=False), VisionTransformer, 1, 0),
        (vit("deit", **ODD, intermediate_size=270), VisionTransformerDistilled, 2, 1),
        (vit("ijepa", **ODD, intermediate_size=270), VisionTransformer, 0, 1),
        (vit(**{**ODD, "image_size": (30, 18)}, intermediate_size=180), VisionTransformer, 1, 1),
        # Sizes of which timm's model of that name has others: 12 heads, 3072 hidden channels, a bias, 12 heads.
        (vit(num_attention_heads=8), VisionTransformer, 1, 1),
        (vit(intermediate_size=2048), VisionTransformer, 1, 1),
        (vit(qkv_bias=False), VisionTransformer, 1, 0),
        (vit("ijepa"), VisionTransformer, 0, 1),
    ],
)
def test_sizes_without_a_name_are_arguments_of_the_class(config, cls, extra, bias):
    text = said(config)
    assert text.startswith(f"{OWN_CLASS}timm.models.{cls.__name__}(")
    built = advised(text)
    assert type(built) is cls
    own = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    patch, side = config.patch_size, config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    places = (height // patch) * (width // patch) + extra
    assert sizes(built) == (*own, config.num_channels, (patch, patch), places)
    assert (built.blocks[0].attn.qkv.bias is not None) == bool(bias)
    assert sc.inspect(built).groups


@pytest.mark.parametrize(
    "config",
    [
        vit("clip_vision_model", **ODD, intermediate_size=180),
        vit("siglip_vision_model", num_attention_heads=8),
        vit("dinov3_vit", num_register_tokens=1),
        vit("beit", intermediate_size=2048),
        vit("vit", hidden_act="relu"),
        vit("deit", hidden_act="silu"),
        dinov2(mlp_ratio=2),
        dinov2("dinov2_with_registers", num_register_tokens=3),
        swin(embed_dim=64),
        swin(num_heads=[2, 4, 8, 16]),
        swin(window_size=8),
        swin(patch_size=2),
        swin(mlp_ratio=2.0),
        swin(qkv_bias=False),
        swin(use_absolute_embeddings=True),
        swin(hidden_act="relu"),
        swin(image_size=(224, 192)),
        resnet(depths=[1, 2, 3, 4]),
        resnet(hidden_sizes=[128, 256, 512, 1024]),
        resnet(embedding_size=32),
        resnet(downsample_in_bottleneck=True),
        resnet(downsample_in_first_stage=True),
        resnet(hidden_act="gelu"),
        # Types that timm has, of which no name is looked for.
        configured("convnext", num_channels=3),
        configured("levit", num_channels=3),
        configured("bit", num_channels=3),
    ],
)
def test_of_other_sizes_the_class_alone_is_named(config):
    assert said(config) == "timm has its own class of this model"


@pytest.mark.parametrize(
    "config",
    [
        configured("yolos", num_channels=3),
        configured("vitdet", num_channels=3),
        configured("", num_channels=3),
        # Parts of timm's names by chance, and models of text and sound.
        configured("opt", hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
        configured("qwen3", hidden_size=768),
        configured("vits", hidden_size=192),
        configured("t5", num_channels=3),
        SimpleNamespace(),
        None,
        {"model_type": "vit"},
    ],
)
def test_a_type_that_timm_lacks(config):
    assert said(config) == "not timm's class"


def test_without_a_configuration():
    text = refusal(named("transformers.models.vit.modeling_vit", "ViTModel")())
    assert text == "transformers.models.vit.modeling_vit.ViTModel (of transformers; not timm's class)"


@pytest.mark.parametrize("make", [vit, dinov2, swin, resnet])
def test_missing_attributes(make):
    for name in set(vars(make())) - {"model_type", "num_channels", "use_swiglu_ffn"}:
        config = make()
        delattr(config, name)
        assert said(config) == "timm has its own class of this model"
    config = make()
    del config.num_channels
    assert said(config) == "not timm's class"


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "patch_size", "image_size", "hidden_act"])
@pytest.mark.parametrize("value", [None, "many", 0, (), {}])
def test_attributes_that_are_something_else(name, value):
    assert said(vit(**{name: value})) == "timm has its own class of this model"


def test_a_part_of_a_larger_configuration():
    clip = configured("clip", vision_config=vit("clip_vision_model", hidden_act="quick_gelu"), text_config=object())
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    part = "its part for images"
    assert said(clip) == f'timm has {part} with the same weights, by other names: timm.create_model("{name}")'
    segmenter = configured("upernet", backbone_config=swin("swinv2", window_size=16, image_size=256))
    name = "swinv2_tiny_window16_256"
    assert said(segmenter) == f'timm has {part} with the same weights, by other names: timm.create_model("{name}")'
    captions = configured("vision-encoder-decoder", encoder=vit(num_attention_heads=8))
    assert said(captions).startswith(f"timm has its own class of {part}, which takes the same weights by other names: ")
    assert said(configured("upernet", backbone_config=configured("convnext", num_channels=3))) == (
        f"timm has its own class of {part}"
    )


def test_inside_a_larger_network():
    inner = of_transformers(vit())
    inner.encoder = of_transformers(vit(size="tiny"))  # its own layers are not what to name
    text = refusal(Net(head=nn.Linear(2, 2), stem=Net(encoder=inner)))
    place = "Net, whose .stem.encoder is transformers.models.some.modeling_some.SomeModel (of transformers; "
    assert text.endswith(f'{place}timm has {OTHER_NAMES}timm.create_model("vit_base_patch16_224"))')
    text = refusal(nn.Sequential(torchvision.models.resnet18(), nn.Linear(1000, 2)))
    assert ', whose [0] is torchvision.models.resnet.ResNet (of torchvision; timm.create_model("resnet18") has' in text
    # What timm lacks is not worth naming; a model that can be pruned as it is comes first.
    text_model = of_transformers(configured("bert"))
    assert refusal(Net(text=text_model)).endswith("Net")
    assert ", whose .image is transformers" in refusal(Net(text=text_model, image=inner))
    fine = timm.create_model("resnet18", device="meta")
    assert refusal(Net(image=inner, other=Net(deep=fine))).endswith("Net (pass its .other.deep)")


def test_a_subclass_of_a_users_own():
    model = of_transformers(vit())
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    assert (
        refusal(model)
        == f'mine.Mine (of transformers; timm has {OTHER_NAMES}timm.create_model("vit_base_patch16_224"))'
    )


def test_a_library_of_a_similar_name():
    assert refusal(named("transformersmine", "ViTModel")()) == "transformersmine.ViTModel"


def of_torchvision(model):
    """Build what the text says, load the model's weights into it, and return both after the same random start."""
    text = refusal(model)
    found = re.fullmatch(
        r"torchvision\.models\.resnet\.ResNet \(of torchvision; timm\.create_model\((.*)\) has the same weights by the "
        r"same names: load_state_dict\(model\.state_dict\(\)\)\)",
        text,
    )
    assert found, text
    built = eval(f"create({found[1]})", {"create": timm.create_model})
    built.load_state_dict(model.state_dict())
    return built.eval()


def unlike(model):
    """Give batch norms statistics and weights of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                values.data.normal_(0, 0.2, generator=generator)
            for values in (module.running_var, module.weight):
                values.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (torchvision.models.resnet18, 3),
        (torchvision.models.resnet34, 3),
        (torchvision.models.resnet50, 3),
        (torchvision.models.resnext50_32x4d, 3),
        (lambda: torchvision.models.resnet18(num_classes=7), 3),
        (lambda: changed(fc=nn.Identity()), 3),
        (lambda: changed(fc=nn.Linear(512, 7)), 3),
        (lambda: changed(conv1=nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)), 1),
    ],
)
def test_resnets_of_torchvision_load_into_what_is_named(build, channels):
    model = unlike(build())
    images = torch.randn(2, channels, 70, 53, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = model(images), of_torchvision(model)(images)
    assert expected.std() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]
)
def test_large_resnets_of_torchvision(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert f'timm.create_model("{name}") has the same weights by the same names' in refusal(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in timm.create_model(name, device="meta").state_dict().items()}


def changed(**parts):
    model = torchvision.models.resnet18()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "model",
    [
        # The same names and shapes, and other outputs.
        torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]),
        changed(maxpool=nn.Identity()),
        changed(maxpool=nn.MaxPool2d(2)),
        changed(avgpool=nn.AdaptiveMaxPool2d(1)),
        changed(relu=nn.GELU()),
        changed(relu=Doubled()),
        changed(bn1=nn.BatchNorm2d(64, eps=1e-3)),
        changed(conv1=nn.Conv2d(3, 64, 7, stride=1, padding=3, bias=False)),
        # Other names or shapes.
        changed(conv1=nn.Conv2d(3, 64, 3, padding=1, bias=False)),
        changed(fc=nn.Sequential(nn.Dropout(), nn.Linear(512, 7))),
        changed(fc=nn.Linear(512, 7, bias=False)),
        torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d),
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 3, 4]),
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], width_per_group=96),
        torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], groups=3, width_per_group=5),
    ],
)
def test_changed_resnets_of_torchvision_are_not_advised(model):
    expected = "torchvision.models.resnet.ResNet (of torchvision; timm has its own class of this model)"
    assert refusal(model) == expected


@pytest.mark.parametrize(
    ("name", "cls", "expected"),
    [
        ("vit_b_16", "vision_transformer.VisionTransformer", "timm has its own class of this model"),
        ("swin_t", "swin_transformer.SwinTransformer", "timm has its own class of this model"),
        ("convnext_tiny", "convnext.ConvNeXt", "timm has its own class of this model"),
        ("alexnet", "alexnet.AlexNet", "not timm's class"),
        ("squeezenet1_1", "squeezenet.SqueezeNet", "not timm's class"),
    ],
)
def test_others_of_torchvision(name, cls, expected):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert refusal(model) == f"torchvision.models.{cls} (of torchvision; {expected})"


def of_dino(library, width, depth, heads, *, patch=14, registers=0, side=518, gated=None, chunks=False, bias=True):
    """A model as in DINOv2's and DINOv3's own code, with its attributes and one layer of each kind."""
    model = named(f"{library}.models.vision_transformer", "DinoVisionTransformer")()
    model.embed_dim, model.n_blocks, model.num_heads, model.patch_size = width, depth, heads, patch
    setattr(model, "num_register_tokens" if library == "dinov2" else "n_storage_tokens", registers)
    with torch.device("meta"):
        hidden = 4 * width if gated is None else gated
        mlp = Net(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))
        if gated is not None:
            mlp = Net(w12=nn.Linear(width, 2 * hidden), w3=nn.Linear(hidden, width))
        block = Net(attn=Net(qkv=nn.Linear(width, 3 * width, bias=bias)), mlp=mlp)
        embed = Net(proj=nn.Conv2d(3, width, patch, stride=patch))
    embed.img_size = (side, side)
    model.patch_embed, model.blocks = embed, nn.ModuleList([nn.ModuleList([block]) if chunks else block])
    return model


@pytest.mark.parametrize(
    ("model", "version", "expected"),
    [
        (of_dino("dinov2", 768, 12, 12), 2, f'timm has {OTHER_NAMES}timm.create_model("vit_base_patch14_dinov2")'),
        (
            of_dino("dinov2", 384, 12, 6, registers=4, side=224, chunks=True),
            2,
            f'timm has {OTHER_NAMES}timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224)',
        ),
        (
            of_dino("dinov2", 1536, 40, 24, gated=4096),
            2,
            f'timm has {OTHER_NAMES}timm.create_model("vit_giant_patch14_dinov2")',
        ),
        (of_dino("dinov2", 768, 12, 8), 2, "timm has its own class of this model"),
        (of_dino("dinov2", 100, 3, 5), 2, "timm has its own class of this model"),
        (of_dino("dinov2", 1536, 40, 24), 2, "timm has its own class of this model"),
        (of_dino("dinov2", 768, 12, 12, registers=1), 2, "timm has its own class of this model"),
        (
            of_dino("dinov3", 1024, 24, 16, patch=16, registers=4, side=224),
            3,
            f'timm has {OTHER_NAMES}timm.create_model("vit_large_patch16_dinov3_qkvb", img_size=224)',
        ),
        (
            of_dino("dinov3", 384, 12, 6, patch=16, registers=4, side=224, gated=1536, bias=False),
            3,
            f'timm has {OTHER_NAMES}timm.create_model("vit_small_plus_patch16_dinov3", img_size=224)',
        ),
        (
            named("dinov2.models.vision_transformer", "DinoVisionTransformer")(),
            2,
            "timm has its own class of this model",
        ),
        (named("depth.dinov2", "DinoVisionTransformer")(), 2, "timm has its own class of this model"),
        (
            named("dinov3.models.vision_transformer", "DinoVisionTransformer")(),
            3,
            "timm has its own class of this model",
        ),
    ],
)
def test_dinos_own_code(model, version, expected):
    name = f"{type(model).__module__}.DinoVisionTransformer"
    assert refusal(model) == f"{name} (of DINOv{version}'s own code; {expected})"


def test_the_models_and_the_generator_are_left_as_they_were():
    model = torchvision.models.resnet18().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    refusal(model)
    said(vit(num_attention_heads=8))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
