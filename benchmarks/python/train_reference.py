"""Train a ViT of CIFAR's size from scratch with secateur's finetune: a reference for bench_accuracy.py that is no toy.

pip install ".[bench]" && python benchmarks/python/train_reference.py --data FOLDER --device cuda --seconds 300
FOLDER holds train/ and test/ with one folder of images per class, of 32 x 32 pixels. The file has the arguments of
timm's VisionTransformer in its metadata, as bench_accuracy.py reads them. Images stay on the device and are augmented
there by torchvision, so that no processor has to keep up with it. Prints the top-1 on the images of test/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import secateur as sc
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.transforms import v2
from tuning import captured

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
# Images that are augmented alike, among 50,000 that are shuffled afterwards.
ALIKE = 250
TRIAL_STEPS = 40


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/ and test/, one folder of images per class in each")
    add("--out", type=Path, default=Path("reference.safetensors"))
    add("--width", type=int, default=192)
    add("--depth", type=int, default=9)
    add("--heads", type=int, default=3)
    add("--mlp-ratio", type=float, default=4.0)
    add("--patch", type=int, default=4)
    add("--drop-path", type=float, default=0.1, help="of the last block")
    add("--batch-size", type=int, default=512)
    add("--epochs", type=int, default=300, help="at most")
    add("--seconds", type=float, help="as many epochs as fit, by the time of a first few steps")
    add("--lr", type=float, default=2e-3)
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--amp", choices=("bfloat16", "float16"), help="mixed precision; none unless given")
    add("--steps", choices=("eager", "graphs", "compiled"), default="eager", help="how the model runs")
    add("--device", default="cpu")
    add("--workers", type=int, default=2, help="processes that decode images")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def pixels(folder: Path, split: str, model: VisionTransformer, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """All images of a split as they are stored, uint8 (images, 3, 32, 32), and their classes, on the device."""
    batches = sc.data.loader(
        folder, model, split=split, batch_size=1000, workers=options.workers, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    # What worker processes send stays in shared memory, with a file open for each tensor, until it is copied.
    parts = [((images * 255).round().to(torch.uint8), targets.clone()) for images, targets in batches]
    images, targets = map(torch.cat, zip(*parts, strict=True))
    return images.to(options.device), targets.to(options.device)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


class Augmented(Iterable[Any]):
    """Batches of one size; what is left of a pass is dropped. finetune seeds what is drawn."""

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int) -> None:
        self.images, self.targets, self.batch_size = images, targets, batch_size
        self.transform = v2.Compose(
            [
                v2.RandomCrop(images.shape[-1], padding=images.shape[-1] // 8),
                v2.RandomHorizontalFlip(),
                v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
                v2.RandomErasing(0.25),
            ]
        )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.images), device=self.images.device)
        images = torch.cat([self.transform(self.images[part]) for part in order.split(ALIKE)])
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled[: len(self) * self.batch_size].split(self.batch_size):
            yield normalised(images[batch]), self.targets[order[batch]]


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    built: dict[str, Any] = {
        "img_size": 32,
        "patch_size": options.patch,
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
        "mlp_ratio": options.mlp_ratio,
        "num_classes": 10,
    }
    model = VisionTransformer(**built, drop_path_rate=options.drop_path)
    images, targets = pixels(options.data, "train", model, options)
    test_images, test_targets = pixels(options.data, "test", model, options)
    model.to(options.device)
    batches = Augmented(images, targets, options.batch_size)

    def train(**length: Any) -> sc.FinetuneResult:
        return sc.finetune(
            model,
            batches,
            lr=options.lr,
            mixup=options.mixup,
            cutmix=options.cutmix,
            label_smoothing=0.1,
            amp=options.amp,
            seed=options.seed,
            **length,
        )

    fast: AbstractContextManager[None] = nullcontext()
    if options.steps == "graphs":
        fast = captured(model, normalised(images[: options.batch_size]), options.amp)
    elif options.steps == "compiled":
        model.compile()
    with fast:
        epochs = options.epochs
        if options.seconds is not None:
            fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            # The first steps compile and fill caches.
            train(steps=TRIAL_STEPS)
            start = time.perf_counter()
            train(steps=max(TRIAL_STEPS, len(batches)))
            seconds = time.perf_counter() - start
            model.load_state_dict(fresh)
            epochs = max(1, min(epochs, int(options.seconds / seconds)))
            print(f"{seconds:.2f} s an epoch, {epochs} epochs", flush=True)
        start = time.perf_counter()
        result = train(epochs=epochs)
        seconds = time.perf_counter() - start
    model._compiled_call_impl = None  # what is timed and saved is timm's model

    save_file(model.state_dict(), options.out, {"model": json.dumps(built)})
    test = zip(normalised(test_images).split(1000), test_targets.split(1000), strict=True)
    print(f"{result}; {seconds:.0f} s; {sc.evaluate(model, test)}; {options.out}", flush=True)


if __name__ == "__main__":
    main()
