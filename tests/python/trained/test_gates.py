"""Learnable gates: trained as the formula says, folded so that pruning computes what gates at zero do, resumed."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import models
import numpy as np
import pytest
import secateur as sc
import swin_models
import torch
from finetuning import batches, quiet, same, tiny, weights
from launch import on_ranks
from reference import masked
from safetensors.torch import load_file
from secateur.anatomy import Tap
from secateur.errors import InvalidArgument, Unsupported
from secateur.trained.base import TrainedMethod
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

RATIOS = {"qk": 0.4, "v": 0.3, "ffn": 0.55}


def gated(dense: nn.Module, gates: dict[str, Tensor]) -> nn.Module:
    """A copy of a timm model with gates on its units, by groups' names, (heads or 1, size): without secateur."""
    model = copy.deepcopy(dense)
    for name, block in model.named_modules():
        if not hasattr(block, "attn"):
            continue
        attn, mlp = block.attn, block.mlp
        qk, v, ffn = (gates.get(f"{name}.{kind}") for kind in ("qk", "v", "ffn"))
        if qk is not None and isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
            _after(attn.qkv, lambda x, g=qk, n=attn.num_heads: _on_scores(x, g, n))
        elif qk is not None:
            for norm in (attn.q_norm, attn.k_norm):
                _after(norm, lambda x, g=qk: x * g[:, None])
        if v is not None:
            _before(attn.proj, lambda x, g=v: x * g.flatten())
        if ffn is not None:
            _before(mlp.fc2, lambda x, g=ffn: x * g.flatten())
    return model


def _after(module: nn.Module, change: object) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: change(output))


def _before(module: nn.Module, change: object) -> None:
    module.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]),))


def _on_scores(x: Tensor, gate: Tensor, heads: int) -> Tensor:
    """Of (B, N, 3 * heads * dim), the first two thirds."""
    q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
    return torch.stack([q * gate, k * gate, v], dim=2).flatten(2)


def gates_of(method: TrainedMethod, model: nn.Module) -> dict[str, Tensor]:
    """The gates by group, (heads, size) or (1, size) where one serves all heads."""
    return {name: gate.detach().view(-1, sc.inspect(model).sizes[name]) for name, gate in method.state().items()}


def closed(gates: dict[str, Tensor], keep: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The gates with those of the removed units at zero."""
    found = dict(gates)
    for name, indices in keep.items():
        kept = torch.from_numpy(indices)
        mask = torch.zeros(len(kept), gates[name].shape[1], dtype=gates[name].dtype).scatter_(1, kept, 1.0)
        found[name] = gates[name] * mask
    return found


def nudge(method: TrainedMethod, low: float = -0.7, high: float = 1.3) -> None:
    """Gates that few steps would not reach, of both signs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in method.state().values():
            gate.copy_(torch.rand(gate.shape, generator=generator) * (high - low) + low)


def trained(model: nn.Module, source: list[tuple[Tensor, Tensor]], **wanted: object) -> TrainedMethod:
    method = sc.trained_method("gates", **wanted)
    sc.finetune(model, source, lr=1e-3, hooks=[method])
    return method


def pairs(model: nn.Module, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    kind = next(model.parameters()).dtype
    return [(models.images(model, 3, seed).to(kind), torch.tensor([0, seed, 6])) for seed in range(count)]


@pytest.mark.parametrize("wanted", [{"ratios": RATIOS}, {"target": sc.Target(macs=0.6)}, {"ratios": {"ffn": 0.5}}])
def test_pruned_is_the_trained_model_with_the_removed_gates_at_zero(
    wanted: dict[str, object], digits_model: nn.Module, digits_images: Tensor
) -> None:
    model, images = digits_model.double(), digits_images.double()
    targets = model(images).argmax(dim=1)
    method = trained(model, [(images[:32], targets[:32]), (images[32:], targets[32:])], **wanted)
    learnt = gates_of(method, model)
    assert {name.rpartition(".")[2] for name in learnt} == (
        {"ffn"} if wanted == {"ratios": {"ffn": 0.5}} else {*RATIOS}
    )
    assert all(len(gate) == (1 if name.endswith("ffn") else 3) for name, gate in learnt.items())
    assert all(0 < (gate - 1).abs().max() < 0.1 for gate in learnt.values())
    nudge(method)
    gates, plan = gates_of(method, model), method.plan()
    for name, indices in plan.keep.items():
        magnitude = gates[name].abs().numpy()
        largest = np.argsort(-magnitude, axis=1, kind="stable")[:, : indices.shape[1]]
        assert np.array_equal(indices, np.sort(largest, axis=1))
    with torch.no_grad():
        expected = gated(model, closed(gates, plan.keep)).eval()(images)
        whole = gated(model, gates).eval()(images)
        sc.prune(model, plan)
        assert (model.eval()(images) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (whole - expected).abs().max() > 0.01 * expected.abs().max()


VARIANTS = [
    "plain",
    "no_qkv_bias",
    "gate",
    "swiglu_packed",
    "swiglu_split",
    "registers_layer_scale",
    "post_norm",
    "inner_norms",
    "inner_rms_norms",
    "swiglu_packed_norm",
    "qk_norm",
    "qk_rms_norm",
]


@pytest.mark.parametrize("kind", VARIANTS)
def test_models_of_every_kind(kind: str) -> None:
    """Norms over units that are cut go over those that stay, as with every plan: so does the reference."""
    model = models.make(kind).double()
    method = trained(model, pairs(model), ratios=RATIOS)
    nudge(method)
    plan, gates, x = method.plan(), gates_of(method, model), pairs(model)[1][0]
    shared = kind in ("qk_norm", "qk_rms_norm")
    assert [len(gates[f"blocks.{index}.qk"]) for index in range(2)] == [1 if shared else 3] * 2
    with torch.no_grad():
        expected = gated(masked(model, plan.keep), gates).eval()(x)
        whole = gated(model, gates).eval()(x)
        sc.prune(model, plan)
        assert (model.eval()(x) - expected).abs().max() <= 1e-10 * whole.abs().max()
    assert (whole - expected).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("kind", ["padded", "fitting", "no_qkv_bias"])
def test_windows(kind: str) -> None:
    model = swin_models.make(kind).double()
    images = [swin_models.images(model, 3, seed).double() for seed in range(2)]
    method = trained(model, [(each, torch.tensor([0, 1, 6])) for each in images], ratios=RATIOS)
    nudge(method)
    plan, gates = method.plan(), gates_of(method, model)
    assert len(plan.keep) == len(gates) == 3 * sum(len(stage.blocks) for stage in model.layers)
    with torch.no_grad():
        expected = gated(model, closed(gates, plan.keep)).eval()(images[1])
        whole = gated(model, gates).eval()(images[1])
        sc.prune(model, plan)
        assert (model.eval()(images[1]) - expected).abs().max() <= 1e-10 * whole.abs().max()
    assert (whole - expected).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("kind", ["plain", "qk_norm"])
def test_groups_that_stay_whole_have_their_gates_folded_too(kind: str) -> None:
    model = models.make(kind).double()
    method = trained(model, pairs(model), ratios=RATIOS)
    nudge(method)
    plan, gates, x = method.plan(ratios={"blocks.1.ffn": 0.5}), gates_of(method, model), pairs(model)[0][0]
    assert plan.keep.keys() == {"blocks.1.ffn"}
    expected = gated(model, closed(gates, plan.keep))
    sc.prune(model, plan)
    with torch.no_grad():
        assert (model.eval()(x) - expected.eval()(x)).abs().max() <= 1e-10 * expected(x).abs().max()


def test_a_model_pruned_before_is_gated_and_pruned_again() -> None:
    model = models.make("qk_norm").double()
    first = trained(model, pairs(model), ratios=RATIOS)
    nudge(first, 0.5, 1.5)
    sc.prune(model, first.plan())
    method = trained(model, pairs(model), ratios=RATIOS)
    nudge(method)
    # The norms of queries and keys have a scale for every head by now, and so many gates.
    gates, x = gates_of(method, model), pairs(model)[0][0]
    assert gates["blocks.0.qk"].shape == (3, 8)
    whole = method.plan(ratios={"blocks.0.ffn": 0.01})
    assert whole.keep == {}
    expected = gated(model, gates)
    sc.prune(model, whole)
    with torch.no_grad():
        assert (model.eval()(x) - expected.eval()(x)).abs().max() <= 1e-10 * expected(x).abs().max()


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "pruned_norms", "swiglu_packed", "padded", "fitting"])
def test_a_step_by_hand(kind: str) -> None:
    """The gates' gradient is that of labels, teacher and the l1 term; weights see the gates."""
    source = swin_models if kind in swin_models.KINDS else models
    model, teacher = (source.make(kind.replace("pruned_norms", "qk_norm"), seed).double() for seed in (0, 5))
    if kind == "pruned_norms":  # each head has a scale of its own
        sc.prune(model, sc.plan(model, method="magnitude", ratios={"qk": 0.4}))
    for module in model.modules():
        if isinstance(module, DropPath):  # Swin's default
            module.drop_prob = 0.0
    reference, images, targets = copy.deepcopy(model), source.images(model, 3).double(), torch.tensor([0, 1, 6])
    method = sc.trained_method("gates", ratios=RATIOS, l1=0.125)
    options = {"opt": "momentum", "lr": 0.25, "min_lr": 0.25, "warmup": 0, "weight_decay": 0.0, "clip_grad": None}
    found = sc.finetune(
        model, [(images, targets)], teacher=teacher, alpha=0.25, temperature=3.0, hooks=[method], **options
    )

    after = gates_of(method, model)
    ones = {name: torch.ones_like(gate, requires_grad=True) for name, gate in after.items()}
    student = gated(reference.train(), ones)
    logits = student(images)
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(images) / 3, dim=1)
    soft = functional.kl_div(functional.log_softmax(logits / 3, dim=1), wanted, reduction="batchmean", log_target=True)
    loss = 0.75 * functional.cross_entropy(logits, targets) + 0.25 * 9 * soft
    loss = loss + 0.125 * sum(gate.abs().sum() for gate in ones.values())
    loss.backward()
    assert found.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, gate in ones.items():
        torch.testing.assert_close(after[name], (gate - 0.25 * gate.grad).detach(), rtol=0, atol=1e-10)
    expected = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name] - 0.25 * expected[name].grad, rtol=0, atol=1e-10)


def test_a_target_by_rank_within_the_kinds() -> None:
    """Where one layer's gates are all smaller than the other's, its units go first, whatever the gates' scale."""
    model = quiet()
    method = sc.trained_method("gates", target=sc.Target(macs=0.5), allocation="error", round_to=1, groups=["v", "ffn"])
    sc.finetune(model, batches(1), hooks=[method])
    with torch.no_grad():
        for name, gate in method.state().items():
            low = (name.startswith("blocks.0")) == name.endswith("ffn")
            gate.copy_(torch.linspace(0.1, 0.2, len(gate)) + (0 if low else 0.2))
            gate *= 1e-3 if name.endswith("v") else 1.0
    sizes = {name: keep.shape[1] for name, keep in method.plan().keep.items()}
    assert sizes.keys() == {"blocks.0.ffn", "blocks.1.v"}
    uniform = method.plan(target=sc.Target(macs=0.8)).macs
    assert method.plan().macs[1] <= 0.8 * uniform[0]


def test_a_large_l1_term_pulls_gates_to_zero() -> None:
    model = quiet()
    ends = {}
    for l1 in (0.0, 1e6):
        method = sc.trained_method("gates", ratios=RATIOS, l1=l1)
        sc.finetune(copy.deepcopy(model), batches(4), epochs=10, lr=0.1, warmup=0, hooks=[method])
        ends[l1] = torch.cat([gate.detach().abs() for gate in method.state().values()])
    assert ends[1e6].max() < 0.3 < ends[0.0].mean()


@pytest.mark.parametrize(("dtype", "amp"), [(torch.float32, "bfloat16"), (torch.bfloat16, None)])
def test_in_half_precision(dtype: torch.dtype, amp: str | None) -> None:
    """Gates are float32 at least: a small step from 1 is none in bfloat16."""
    model = tiny().to(dtype)
    method = sc.trained_method("gates", ratios=RATIOS)
    found = sc.finetune(
        model, batches(), teacher=tiny(), amp=amp, ema=0.5, mixup=0.4, lr=1e-4, warmup=0, hooks=[method]
    )
    assert np.isfinite(found.history[0]["loss"])
    for gate in method.state().values():
        assert gate.dtype == torch.float32
        assert 0 < (gate - 1).abs().max() < 1e-3
    plan = method.plan()
    assert {value.dtype for value in plan.weights.values()} == {dtype}
    sc.prune(model, plan)


@pytest.mark.parametrize("opt", ["adamw", "muon", "lion"])
def test_optimizers_of_every_kind_move_each_gate_alone(opt: str) -> None:
    method = sc.trained_method("gates", ratios=RATIOS, l1=0.0)
    sc.finetune(quiet(), batches(2), opt=opt, lr=1e-2, hooks=[method])
    assert all(gate.ndim == 1 and (gate != 1).all() for gate in method.state().values())


@pytest.mark.parametrize("kind", ["qk_norm_without_scale"])
def test_norms_without_a_scale_are_refused_before_the_run(kind: str) -> None:
    model = models.make(kind)
    before = weights(model)
    text = r"^blocks\.0\.attn\.q_norm: expected a norm with a scale, which gates are folded into, got none$"
    with pytest.raises(Unsupported, match=text):
        trained(model, pairs(model), ratios=RATIOS)
    assert same(weights(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Its values and hidden units can be gated.
    sc.prune(model, trained(model, pairs(model), ratios={"v": 0.4, "ffn": 0.5}).plan())


@pytest.mark.parametrize("l1", [-1e-4, float("nan"), "much", True])
def test_terms_that_are_no_numbers(l1: object) -> None:
    with pytest.raises(InvalidArgument, match=f"^l1: expected a (finite )?number .*, got {re.escape(repr(l1))}$"):
        sc.trained_method("gates", ratios=RATIOS, l1=l1)


def test_a_module_that_is_not_run_is_refused_before_the_first_step() -> None:
    """Its gates would learn nothing but the l1 term."""
    model = quiet()
    before, mlp = weights(model), model.blocks[1].mlp
    mlp.forward = lambda x: functional.linear(mlp.act(mlp.fc1(x)), mlp.fc2.weight, mlp.fc2.bias)
    text = r"^blocks\.1\.mlp\.fc2: expected a module that every forward pass runs, got one that it did not$"
    with pytest.raises(Unsupported, match=text):
        trained(model, batches(1), ratios=RATIOS)
    assert same(weights(model), before)


def test_scores_that_cannot_be_multiplied_in_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("qk_norm")
    sc.prune(model, sc.plan(model, method="magnitude", ratios={"qk": 0.4}))
    read = Tap.read
    monkeypatch.setattr(Tap, "read", lambda tap, x: read(tap, x).clone())
    with pytest.raises(Unsupported, match=r"^blocks\.0\.attn\.q_norm: expected queries and keys .*, got a copy$"):
        trained(model, pairs(model), ratios=RATIOS)


def test_groups_without_gates_cannot_be_cut() -> None:
    model = quiet()
    method = trained(model, batches(1), ratios={"ffn": 0.5})
    text = r"^groups: expected groups that were trained with gates, got 'blocks\.0\.v'$"
    with pytest.raises(InvalidArgument, match=text):
        method.plan(ratios={"v": 0.5})


def test_gates_of_another_model_are_refused() -> None:
    method = trained(quiet(), batches(1), ratios=RATIOS)
    with pytest.raises(
        InvalidArgument, match=r"^resume: expected gates of \{'blocks\.0\.qk': \(16,\), .*, got those of"
    ):
        method.load_state({"blocks.0.qk": torch.ones(3)})


RANKED = """
import os, sys
import torch
import secateur as sc
from finetuning import batches, quiet, weights
from safetensors.torch import save_file

RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
source = [(images[2 * RANK : 2 * RANK + 2], targets[2 * RANK : 2 * RANK + 2]) for images, targets in batches(3)]
model, method = quiet(), sc.trained_method("gates", ratios={"qk": 0.4, "v": 0.3, "ffn": 0.55}, l1=1e-2)
sc.finetune(model, source, opt="momentum", lr=0.05, hooks=[method])
plan = method.plan()
keep = {f"keep.{name}": torch.from_numpy(each) for name, each in plan.keep.items()}
save_file({**weights(model), **dict(plan.weights), **keep}, f"{OUT}/{RANK}.safetensors")
save_file(dict(method.state()), f"{OUT}/gates{RANK}.safetensors")
"""


def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    for code, text in on_ranks(RANKED, tmp_path):
        assert code == 0, text
    assert same(*(load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)))
    method = sc.trained_method("gates", ratios=RATIOS, l1=1e-2)
    sc.finetune(quiet(), batches(3), opt="momentum", lr=0.05, hooks=[method])
    for name, gate in load_file(tmp_path / "gates1.safetensors").items():
        torch.testing.assert_close(gate, method.state()[name].detach(), rtol=1e-5, atol=1e-6)
