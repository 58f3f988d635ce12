"""`secateur finetune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import secateur as sc

from . import lazy
from .options import (
    DATA,
    BatchSize,
    Checkpoint,
    Classes,
    Data,
    Device,
    Every,
    Json,
    Kwargs,
    MaxImages,
    Model,
    Out,
    Pretrained,
    Resume,
    Seed,
    Split,
    Threads,
    Unreadable,
    UseEma,
    Workers,
    json_object,
)
from .output import collected

__all__ = ["finetune"]


def finetune(
    data: Data,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    use_ema: UseEma = False,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = None,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    augment: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Arguments of timm's create_transform.", rich_help_panel=DATA),
    ] = None,
    val_data: Annotated[
        str | None, typer.Option(help="Images to evaluate on after each pass.", rich_help_panel=DATA)
    ] = None,
    val_split: Annotated[str | None, typer.Option(help="Split of --val-data.", rich_help_panel=DATA)] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The dense model: a file of any kind that --checkpoint takes."),
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="Name of a timm model, where neither --teacher nor --checkpoint says it.")
    ] = None,
    teacher_pretrained: Annotated[
        bool | None,
        typer.Option("--teacher-pretrained", help="Fetch timm's weights for the teacher.", show_default=False),
    ] = None,
    teacher_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="More arguments of --teacher-model.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images; 1 by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    opt: Annotated[str, typer.Option(help="Name of a timm optimizer.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    min_lr: Annotated[float | None, typer.Option(help="Final learning rate; a hundredth of --lr by default.")] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps of linear warm-up; a twentieth of all steps by default.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.05,
    clip_grad: Annotated[float, typer.Option(help="Largest norm of the gradients; 0 for no limit.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of the teacher's logits.")] = 2.0,
    alpha: Annotated[
        float | None, typer.Option(help="The teacher's share of the loss; 0.5 by default with a teacher.")
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0 for none.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha of cutmix; 0 for none.")] = 0.0,
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights, which is then saved.")
    ] = None,
    amp: Annotated[str | None, typer.Option(help="Mixed precision: bfloat16 or float16.")] = None,
    resume: Resume = None,
    checkpoint_every: Every = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a model, with the dense one as teacher where given, and save it.

    Under torchrun (torchrun --nproc-per-node N -m secateur finetune ...) each process takes batches of its own.
    """
    if epochs is not None and steps is not None:
        raise typer.BadParameter("expected --epochs or --steps, got both")
    transform = {} if augment is None else json_object(augment)
    with collected(as_json) as output:
        like = lazy.said(teacher, "--teacher")
        net = lazy.model_from(model, checkpoint, pretrained, num_classes, model_kwargs, use_ema, like=like)
        master = None
        if teacher is not None or teacher_model is not None or teacher_pretrained:
            like = lazy.said(checkpoint, "--checkpoint")
            master = lazy.model_from(
                teacher_model, teacher, teacher_pretrained, None, teacher_kwargs, prefix="teacher-", like=like
            )
        images = sc.data.loader(
            data,
            net,
            split=split,
            batch_size=batch_size,
            workers=workers,
            max_images=max_images,
            shuffle=True,
            train=True,
            seed=seed,
            max_unreadable=max_unreadable,
            **transform,
        )
        validation = None
        if val_data is not None:
            validation = sc.data.loader(
                val_data, net, split=val_split, batch_size=batch_size, workers=workers, max_unreadable=max_unreadable
            )
        found = sc.finetune(
            net,
            images,
            teacher=master,
            epochs=epochs,
            steps=steps,
            opt=opt,
            lr=lr,
            min_lr=min_lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip_grad=clip_grad or None,
            temperature=temperature,
            alpha=alpha,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            ema=ema,
            amp=amp,
            val_loader=validation,
            resume=resume,
            checkpoint_every=checkpoint_every,
            seed=seed,
            device=device,
        )
        if lazy.first():
            sc.save(net, out)
            output.show(f"{found} -> {out}", **asdict(found), file=str(out))
