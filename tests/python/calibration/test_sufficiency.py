"""How many images suffice: what the folds say of fits, against fits on other images, and the warning."""

from __future__ import annotations

import json

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from secateur.cli.app import app
from secateur.statistics.sufficiency import covariance, drawn, excess, images_for
from typer.testing import CliRunner


def rows(count, mix, generator, noise=0.3):
    """Correlated channels of many photographs: (count, d)."""
    hidden = torch.randn(count, mix.shape[0], generator=generator, dtype=torch.float64)
    return hidden @ mix + noise * torch.randn(count, mix.shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [33, 90])
@pytest.mark.parametrize("per_channel", [6, 30])
def test_the_excess_is_what_a_fit_errs_more_on_many_others(channels, per_channel):
    """Against the best ridge of a fit on all rows, by its error over 100,000 others, averaged over draws."""
    generator = torch.Generator().manual_seed(channels)
    mix = torch.randn(7, channels, generator=generator, dtype=torch.float64)
    others = rows(100_000, mix, generator)
    half = channels // 2
    count = 2 * half * per_channel
    estimates, truths = [], []
    for seed in range(8):
        found = rows(count, mix, generator)
        chosen = drawn(channels, seed)
        assert len(set(chosen)) == len(chosen) == min(channels, half + 64)
        estimates.append(excess([np.cov(found[fold::2, chosen].T, bias=True) for fold in (0, 1)], channels))
        known, wanted = chosen[:half], chosen[half:]
        gram, cross = found[:, known].T @ found[:, known], found[:, known].T @ found[:, wanted]
        ridges = [gram.diagonal().mean() * 10.0**exponent for exponent in range(-8, 4)]
        fits = [torch.linalg.solve(gram + ridge * torch.eye(half), cross) for ridge in ridges]
        best = torch.linalg.lstsq(others[:, known], others[:, wanted]).solution
        *left, least = ((others[:, wanted] - others[:, known] @ each).square().sum() for each in (*fits, best))
        truths.append(float(min(left) / least) - 1)
    assert 0.5 * np.mean(truths) < np.mean(estimates) < 2 * np.mean(truths)


def test_statistics_give_the_covariance_of_drawn_channels(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images])
    for group in ("blocks.1.ffn", "blocks.0.v", "blocks.2.norm1"):
        for fold in ("even", "odd"):
            whole = stats.moments(group, fold).covariance
            chosen = drawn(len(whole))
            np.testing.assert_allclose(
                covariance(stats.tensors, group, fold), whole[chosen][:, chosen], rtol=1e-9, atol=1e-12
            )


def test_more_images_err_less_and_need_no_more(digits_model, digits_loader):
    x = torch.cat([each for each, _ in digits_loader])
    found = {count: sc.calibrate(digits_model, [x[:count]]) for count in (24, 96, 384)}
    errors = [stats.excess for stats in found.values()]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0
    assert found[24].images_needed() > 24
    assert found[384].images_needed() < 384


def test_numbers_of_images():
    assert images_for(500, 0.02) == 500
    assert images_for(100, 0.04) == 270
    assert images_for(1000, 0.01) == 380
    assert images_for(7, 0.02) == 7
    assert images_for(100, 0.0) == 0


@pytest.mark.filterwarnings("default")
def test_few_images_are_warned_of(digits_model, digits_images, recwarn):
    """By methods that fit, not by those that only select; and not with many images."""
    few, many = (sc.calibrate(digits_model, [x]) for x in (digits_images[:12], digits_images))
    recwarn.clear()
    half = {"ratios": {"ffn": 0.5}}
    for method in ("project", "refit"):
        with pytest.warns(UserWarning, match=rf"^stats: 12 images are few for '{method}', whose fits err about \d+ %"):
            sc.plan(digits_model, few, method=method, **half)
    recwarn.clear()
    sc.plan(digits_model, few, method="snp", **half)
    if many.excess < 0.05:
        sc.plan(digits_model, many, **half)
    assert not recwarn


@pytest.mark.filterwarnings("error")
def test_a_sequential_run_takes_more_images_than_its_sizes_are_chosen_by(digits_model, digits_loader, monkeypatch):
    batches = [each for each, _ in digits_loader]
    monkeypatch.setattr("secateur.searches.sequential._SIZED", 16)
    arguments = {"target": sc.Target(macs=0.7), "groups": ("ffn",)}
    sc.prune_sequential(digits_model, batches, max_images=64, **arguments)
    with pytest.raises(UserWarning, match=r"^stats: 15 images are few for 'project'"):
        sc.prune_sequential(digits_model, batches, max_images=15, **arguments)


def test_without_moments_or_with_an_empty_fold_nothing_is_said():
    model = make("plain")
    x = images(model, 4)
    assert sc.calibrate(model, [x], collect="scores").images_needed() == 0
    assert sc.calibrate(model, [x[:1]]).images_needed() == 0


def test_dead_channels_need_no_images():
    zeros = np.zeros((40, 40))
    assert excess([zeros, zeros], 40) == 0
    # What is known exactly is fitted exactly.
    ones = np.ones((40, 40))
    assert excess([ones, ones], 40) == pytest.approx(0, abs=1e-6)


def test_the_command_tells(tmp_path):
    model = ["--model", "test_vit", "--no-pretrained"]
    arguments = ["calibrate", *model, "--data", "digits", "--max-images", "64", "--json", "--out"]
    outcome = CliRunner().invoke(app, [*arguments, str(tmp_path / "stats.safetensors")])
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert told["images_needed"] == sc.Statistics.load(tmp_path / "stats.safetensors").images_needed()
