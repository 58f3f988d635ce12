"""Small timm models of every class with FFN layers, of odd hidden sizes where the builder allows it."""

from __future__ import annotations

import secateur as sc
import timm
import torch
from secateur.data.model_input import data_config

_TWINS = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
_TWINS |= {"mlp_ratios": (2.2, 1.7, 2, 2)}
# A name, the arguments that make it small, and the size of images.
MODELS = {
    "beit": (
        "beit_base_patch16_224",
        {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7},
        32,
    ),
    "beit with SwiGLU": (
        "beit_base_patch16_224",
        {
            "img_size": 32,
            "embed_dim": 48,
            "depth": 1,
            "num_heads": 3,
            "mlp_ratio": 1.7,
            "swiglu_mlp": True,
            "scale_mlp": True,
        },
        32,
    ),
    "eva02, packed": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}, 28),
    "eva02, with inner norms": (
        "eva02_base_patch14_224",
        {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3},
        28,
    ),
    "dinov3": (
        "vit_small_patch16_dinov3",
        {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7},
        32,
    ),
    "cait": ("cait_xxs24_224", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}, 32),
    "xcit": (
        "xcit_nano_12_p16_224",
        {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7},
        32,
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 3), "mlp_ratio": 1.7},
        32,
    ),
    "swinv2_cr": (
        "swinv2_cr_tiny_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 3), "mlp_ratio": 1.7},
        32,
    ),
    "maxvit": ("maxvit_tiny_tf_224", {"img_size": 64, "embed_dim": (32, 64), "depths": (1, 1), "stem_width": 16}, 64),
    "coatnet": ("coatnet_nano_rw_224", {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}, 64),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}, 64),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1), "mlp_ratio": 1.7},
        64,
    ),
    "convnext": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "conv_mlp": False, "ls_init_value": 1e-6},
        48,
    ),
    "convnext of convolutions": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}, 48),
    "convnextv2": ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}, 48),
    "convnextv2, channels last": (
        "convnextv2_atto",
        {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "conv_mlp": False},
        48,
    ),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "mobilevitv2": ("mobilevitv2_050", {}, 64),
    "volo": ("volo_d1_224", {"img_size": 64}, 64),
    "davit": ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 3), "mlp_ratio": 1.7}, 64),
    "twins pcpvt": ("twins_pcpvt_small", {"img_size": 64, **_TWINS}, 64),
    "twins svt": ("twins_svt_small", {"img_size": 64, **_TWINS}, 64),
    "efficientformer": ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 48)}, 224),
    "naflexvit": ("naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}, 64),
    "poolformer": ("poolformer_s12", {}, 64),
    "caformer": ("caformer_s18", {}, 64),
    "relative positions": (
        "vit_relpos_small_patch16_224",
        {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7},
        32,
    ),
    "tnt": (
        "tnt_s_patch16_224",
        {"img_size": 32, "depth": 2, "embed_dim": 48, "inner_dim": 12, "mlp_ratio": 1.7}
        | {"num_heads_outer": 3, "num_heads_inner": 2},
        32,
    ),
    "edgenext": ("edgenext_xx_small", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}, 64),
    "efficientformerv2": (
        "efficientformerv2_s0",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 48), "num_vit": 1, "mlp_ratios": (1.7, 2, 2, (2, 2))},
        224,
    ),
    "efficientvit": ("efficientvit_m0", {"depth": (1, 1, 1)}, 224),
    "fastvit": ("fastvit_sa12", {"layers": (1, 1, 1, 1)}, 64),
    "levit": ("levit_128s", {"depth": (1, 1, 1)}, 224),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "mlp_ratios": (1.7, 2, 2, 2)}, 64),
    "pvt_v2, linear": ("pvt_v2_b2_li", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}, 64),
    "swiftformer": ("swiftformer_xs", {}, 64),
    "tiny_vit": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, 224),
    "visformer": ("visformer_tiny", {}, 224),
    "qwen3, its encoder": ("qwen3_vit_88m_enc", {"depth": 1}, 224),
    "mixer": ("mixer_s16_224", {"img_size": 32}, 32),
    "gmixer": ("gmixer_12_224", {"img_size": 32}, 32),
}
# Those whose builders make no small ones.
LARGE = ("mvitv2", "volo", "poolformer", "caformer", "mixer", "gmixer", "fastvit", "tiny_vit", "visformer")
LARGE += ("swiftformer", "qwen3, its encoder", "levit")
# What cannot be cut at all, and what the refusal must name.
REFUSED = {
    "gemma4": ("gemma4_vit_167m", r"encoder\.blocks\.0\.mlp: expected Mlp, .*got Gemma4GatedMlp"),
    "gmlp": ("gmlp_ti16_224", r"blocks\.0\.mlp_channels\.gate: expected nn\.Dropout or nn\.Identity, got Spatial"),
}


def make(kind, seed=0):
    """A model of this kind whose norms, biases and scales are not trivial, in evaluation mode."""
    torch.manual_seed(seed)
    name, arguments, size = MODELS[kind]
    model = timm.create_model(name, num_classes=5, **arguments)
    return live(model, size, seed)


def live(model, size, seed=0):
    """Perturb all parameters and running statistics, and tell the size of images."""
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.dim() == 1 else 0.5 * parameter[0].numel() ** -0.5))
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.5)
    return model.eval()


def images(model, number, seed=0):
    """Images of random pixels, normalised as the model's data configuration says."""
    config, generator = data_config(model), torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (torch.rand(number, *sc.inspect(model).input_size, generator=generator) - mean) / std
