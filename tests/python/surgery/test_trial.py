"""Copies that are cut to be run once share what is not cut."""

from __future__ import annotations

import copy

import numpy as np
import secateur as sc
import torch
from models import images, make
from secateur.families.registry import family_of
from secateur.surgery.trial import cut_copy


def test_only_what_is_cut_is_copied():
    model = make("distilled").double()
    anatomy = sc.inspect(model)
    keep = {"blocks.1.ffn": np.arange(0, 66, 5, dtype=np.int64)[None]}
    bias = torch.randn(39, dtype=torch.float64)
    before = copy.deepcopy(model)
    cut = cut_copy(model, family_of(model), anatomy, keep, {"blocks.0.mlp.fc2.bias": bias})
    expected = copy.deepcopy(model)
    mlp = expected.blocks[1].mlp
    mlp.fc1.weight.data = mlp.fc1.weight[keep["blocks.1.ffn"][0]].detach().clone()
    mlp.fc1.bias.data = mlp.fc1.bias[keep["blocks.1.ffn"][0]].detach().clone()
    mlp.fc2.weight.data = mlp.fc2.weight[:, keep["blocks.1.ffn"][0]].detach().clone()
    expected.blocks[0].mlp.fc2.bias.data = bias
    x = images(model, 2).double()
    with torch.no_grad():
        assert torch.equal(cut(x), expected(x))
        assert torch.equal(model(x), before(x))
    for name, parameter in cut.named_parameters():
        touched = name.startswith(("blocks.1.mlp.fc1", "blocks.1.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"))
        assert (parameter.data_ptr() != model.get_parameter(name).data_ptr()) == touched, name
        assert parameter is not model.get_parameter(name)
