"""Which images losses are measured on: few, but weighted so that they stand for all."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from secateur.anatomy.fingerprint import Fingerprint
from secateur.calibration.sample import sample
from secateur.families.registry import family_of
from secateur.statistics.measurements import Work
from secateur.statistics.statistics import Statistics
from swin_models import make as make_swin


def work(model, batches):
    anatomy = sc.inspect(model)
    nothing = Statistics.of_nothing(Fingerprint.without_weights(anatomy))
    return Work(model, family_of(model), anatomy, batches, nothing)


@torch.no_grad()
def losses(model, cut, x):
    """Kullback-Leibler divergence of each image's class probabilities, from its definition."""
    p, q = model(x).double().softmax(-1), cut(x).double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def numbers(chosen, x):
    """Which of the images x were chosen."""
    return [next(i for i, each in enumerate(x) if torch.equal(each, image)) for part in chosen for image in part.images]


@torch.no_grad()
def test_up_to_forty_images_count_alike(digits_model, digits_images):
    for count in (1, 7, 40):
        x = digits_images[:count]
        chosen = sample(work(digits_model, list(x.split(13))))
        assert numbers(chosen, x) == list(range(count))
        assert torch.cat([part.weights for part in chosen]).tolist() == [1.0] * count


@pytest.mark.parametrize("ratios", [{"ffn": 0.6, "tokens": 0.3}, {"v": 0.4}])
@torch.no_grad()
def test_the_sample_stands_for_all_images(digits_model, digits_loader, ratios):
    """Over several sets of 128 images, its estimate of a cut's loss is closer than that of the first 40."""
    model = digits_model.eval()
    x = torch.cat([batch[0] for batch in digits_loader])
    stats = sc.calibrate(model, [x[:256]])
    cut = copy.deepcopy(model)
    sc.prune(cut, sc.plan(model, stats, ratios=ratios))
    lost = losses(model, cut, x)
    errors, plain = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(24):
        pool = torch.randperm(len(x), generator=generator)[:128]
        true = float(lost[pool].mean())
        chosen = sample(work(model, list(x[pool].split(50))))
        weights = torch.cat([part.weights for part in chosen])
        assert len(weights) <= 40
        assert float(weights.sum()) == pytest.approx(40)
        lost_there = torch.cat([losses(model, cut, part.images) for part in chosen])
        found = float(weights @ lost_there) / 40
        errors.append(found / true - 1)
        plain.append(float(lost[pool[:40]].mean()) / true - 1)
    assert np.square(errors).mean() < 0.7 * np.square(plain).mean()


@torch.no_grad()
def test_images_that_lose_more_are_taken_more_often_and_count_less(digits_model, digits_loader):
    x = torch.cat([batch[0] for batch in digits_loader])[:128]
    chosen = sample(work(digits_model, [x]))
    merged = copy.deepcopy(digits_model)
    # 8 % of 64 tokens in each block but the last.
    ratios = {"blocks.0.tokens": 5 / 32, "blocks.1.tokens": 5 / 32}
    sc.prune(merged, sc.plan(digits_model, method="magnitude", ratios=ratios))
    lost, unsure = losses(digits_model, merged, x), 1 - digits_model(x).double().softmax(-1).square().sum(-1)
    taken = numbers(chosen, x)
    assert float(lost[taken].mean()) > float(lost.mean())
    weights = torch.cat([part.weights for part in chosen])
    chance = 0.3 + sum(each.sqrt() / each.sqrt().mean() for each in (lost.clamp_min(0), unsure))
    # An image that was taken twice counts twice.
    times = weights * chance[taken]
    assert torch.allclose(times / times.min(), (times / times.min()).round(), atol=1e-3)


@pytest.mark.parametrize("kind", ["swin", "map_pool", "features"])
@torch.no_grad()
def test_models_whose_tokens_do_not_merge(kind):
    model = make_swin("padded") if kind == "swin" else make("plain" if kind == "features" else kind)
    if kind == "features":
        model.reset_classifier(0, "")
    x = images(model, 55)
    chosen = sample(work(model, [x]))
    weights = torch.cat([part.weights for part in chosen])
    assert float(weights.sum()) == pytest.approx(40)
    assert sorted(set(numbers(chosen, x))) == sorted(numbers(chosen, x))
    if kind == "features":
        assert weights.tolist() == [1.0] * 40
