from __future__ import annotations

import copy
import importlib
import math

import pytest
import secateur as sc
import torch
from secateur.data.loader import ImageLoader, loader
from secateur.errors import InvalidArgument, NumericalError
from secateur.runtime.devices import borrowed, place_for
from secateur.runtime.progress import progress
from secateur.training.evaluate import Evaluation, evaluate
from small_vits import small_batches, small_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Echo(nn.Module):
    """Answers with the first row of the first channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]


def logits_as_images(logits: list[list[float]]) -> Tensor:
    return torch.tensor(logits)[:, None, None, :].expand(-1, 1, len(logits[0]), -1)


def test_counts_and_loss_by_hand() -> None:
    falling = [6.0, 5, 4, 3, 2, 1, 0]
    logits = [falling, falling, falling, falling[::-1]]
    targets = [0, 4, 5, 6]  # the best, the fifth, the sixth, the best
    images = logits_as_images(logits)
    expected = sum(math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(logits, targets, strict=True))
    found = evaluate(Echo(), [(images[:3], torch.tensor(targets[:3])), (images[3:], torch.tensor(targets[3:]))])
    assert (found.top1, found.top5, found.images) == (50.0, 75.0, 4)
    assert found.loss == pytest.approx(expected / 4, rel=1e-6)
    # With fewer classes than five, all of them count.
    few = evaluate(Echo(), [(images[:1, :, :, :3], torch.tensor([2]))])
    assert (few.top1, few.top5) == (0.0, 100.0)


def test_trained_model(digits_model: nn.Module) -> None:
    images = loader("digits", digits_model, batch_size=64, max_images=307)
    found = evaluate(digits_model, images)
    hits = 0
    with torch.inference_mode():
        for batch, targets in images:
            hits += int((digits_model(batch).argmax(dim=1) == targets).sum())
    assert found.images == 307
    assert found.top1 == 100 * hits / 307
    assert 85 < found.top1 < found.top5 <= 100
    assert str(found) == (f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}, 307 images")


def test_batches_do_not_matter(digits_model: nn.Module, digits_images: Tensor) -> None:
    targets = torch.arange(64) % 10
    whole = evaluate(digits_model, [(digits_images, targets)])
    parts = evaluate(digits_model, list(zip(digits_images.split(7), targets.split(7), strict=True)))
    assert (whole.top1, whole.top5, whole.images) == (parts.top1, parts.top5, parts.images)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)


@pytest.mark.parametrize("max_images", [1, 63, 64, 65, 200])
def test_max_images_is_exact(digits_model: nn.Module, digits_loader: ImageLoader, max_images: int) -> None:
    images, targets = (torch.cat(parts)[:max_images] for parts in zip(*digits_loader, strict=True))
    expected = evaluate(digits_model, [(images, targets)])
    found = evaluate(digits_model, digits_loader, max_images=max_images)
    assert found.images == max_images
    assert (found.top1, found.top5) == (expected.top1, expected.top5)


def test_max_images_takes_no_batch_too_many(digits_model: nn.Module, digits_images: Tensor) -> None:
    def batches() -> object:
        yield digits_images, torch.zeros(64, dtype=torch.long)
        raise AssertionError("a batch too many was asked for")

    assert evaluate(digits_model, batches(), max_images=64).images == 64


def test_mode_of_every_module_is_restored(digits_model: nn.Module, digits_images: Tensor) -> None:
    digits_model.train()
    digits_model.blocks[1].eval()
    before = [module.training for module in digits_model.modules()]
    dropout = nn.Dropout(0.5)
    digits_model.norm = nn.Sequential(digits_model.norm, dropout)
    batch = (digits_images, torch.zeros(64, dtype=torch.long))
    assert evaluate(digits_model, [batch]) == evaluate(digits_model, [batch])  # dropout was off
    assert dropout.training
    with pytest.raises(InvalidArgument):
        evaluate(digits_model, [digits_images])
    assert dropout.training
    digits_model.norm = digits_model.norm[0]
    assert [module.training for module in digits_model.modules()] == before


def test_borrowed_moves_to_a_device_and_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    weight = model[0].weight
    with borrowed(model, "cpu", training=True) as place:
        assert place.type == "cpu"
        assert model.training
    assert model.training
    assert model[0].weight is weight


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_back(digits_model: nn.Module, digits_loader: ImageLoader) -> None:
    found = evaluate(digits_model, digits_loader, device="cuda")
    assert next(digits_model.parameters()).device.type == "cpu"
    assert found.top1 == pytest.approx(evaluate(digits_model, digits_loader).top1, abs=0.3)


@pytest.mark.parametrize(
    ("batches", "arguments", "text"),
    [
        ([], {}, r"loader: expected at least one batch, got none"),
        ([torch.zeros(2, 1, 3, 3)], {}, r"loader: expected \(images, targets\), got images alone"),
        (
            [(torch.zeros(2, 1, 3, 3), torch.tensor([0, 3]))],
            {},
            r"loader: expected class indices from 0 to 2, got 3",
        ),
        (
            [(torch.zeros(2, 1, 3, 3), torch.tensor([0, -1]))],
            {},
            r"loader: expected class indices from 0 to 2, got -1",
        ),
        (
            [(torch.zeros(2, 1, 3, 3), torch.zeros(2, 3))],
            {},
            r"loader: expected targets \(B,\) of class indices, got \(2, 3\) torch.float32",
        ),
        ([], {"max_images": 0}, r"max_images: expected an integer of at least 1, got 0"),
        ([], {"max_images": "5"}, r"max_images: expected an integer of at least 1, got '5'"),
        ([], {"device": "gpu"}, r"device: expected one that is there, got 'gpu' \([^\n]+\)"),
        ([], {"device": "meta"}, r"device: expected one that computes, got 'meta'"),
        ([torch.zeros(2, 1, 3, 3, dtype=torch.long)], {}, r"loader: expected \(images, targets\), got images alone"),
    ],
)
def test_refusals(batches: list[object], arguments: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        evaluate(Echo(), batches, **arguments)


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r"^model: expected logits \(B, classes\), got an output of shape \(2, 1, 3"
    ):
        evaluate(nn.Identity(), [(torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    images = torch.zeros(5, 1, 3, 3)
    images[3, 0, 0, 1] = value
    batches = [(images[:2], torch.zeros(2, dtype=torch.long)), (images[2:], torch.zeros(3, dtype=torch.long))]
    with pytest.raises(NumericalError, match=r"^model: expected finite logits, got nan or inf for image 3$"):
        evaluate(Echo(), batches)


def test_result_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Evaluation(1.0, 2.0, 3.0, 4).top1 = 5.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision(digits_model: nn.Module, digits_loader: ImageLoader, dtype: torch.dtype) -> None:
    expected = evaluate(digits_model, digits_loader, max_images=128)
    found = evaluate(digits_model.to(dtype), digits_loader, max_images=128)
    assert found.top1 == pytest.approx(expected.top1, abs=1.6)
    assert found.loss == pytest.approx(expected.loss, rel=0.05)
    assert {parameter.dtype for parameter in digits_model.parameters()} == {dtype}


def test_images_of_another_size_are_refused(digits_model: nn.Module) -> None:
    batch = (torch.zeros(4, 3, 20, 20), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InvalidArgument, match=r"^loader: expected images \(B, 3, 32, 32\), got \(4, 3, 20, 20\)$"):
        evaluate(digits_model.train(), [batch])
    assert digits_model.training


def test_what_is_no_model(digits_model: nn.Module) -> None:
    with pytest.raises(InvalidArgument, match=r"^model: expected an nn.Module, got str$"):
        evaluate("vit", [])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"^model: expected a model with weights, got one on the meta device$"):
        evaluate(digits_model.to("meta"), [])
    with pytest.raises(InvalidArgument, match=r"^teacher: expected an nn.Module, got NoneType$"):
        place_for(None, argument="teacher")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_without_its_driver(digits_model: nn.Module) -> None:
    digits_model.train()
    with pytest.raises(InvalidArgument, match=r"^device: expected one that is there, got 'cuda' \([^\n]+\)$"):
        evaluate(digits_model, [], device="cuda")
    assert digits_model.training


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^model: expected logits \(B, classes\), got a tuple$"):
        evaluate(Pair(), [(torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.long))])


def test_progress_knows_the_length_of_torchs_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    module = importlib.import_module("secateur.training.evaluate")

    def record(total: int | None, *arguments: object, **rest: object) -> object:
        totals.append(total)
        return progress(total, *arguments, **rest)

    monkeypatch.setattr(module, "progress", record)
    source = DataLoader(TensorDataset(torch.zeros(7, 1, 3, 3), torch.zeros(7, dtype=torch.long)), batch_size=2)
    evaluate(Echo(), source)
    evaluate(Echo(), source, max_images=9)
    assert totals == [7, 7]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_class_indices_of_any_integer_type(dtype):
    model = small_vit()
    images, targets = torch.cat(small_batches()), torch.arange(16) % 5
    wanted = sc.evaluate(model, [(images, targets)])
    assert sc.evaluate(model, [(images, targets.to(dtype))]) == wanted
    twin = copy.deepcopy(model)
    first = sc.finetune(model, [(images, targets)], steps=2)
    second = sc.finetune(twin, [(images, targets.to(dtype))], steps=2)
    assert first.history == second.history
    with pytest.raises(sc.InvalidArgument, match="loader: expected class indices from 0 to 4, got"):
        sc.evaluate(model, [(images, (targets + 100).to(dtype))])
