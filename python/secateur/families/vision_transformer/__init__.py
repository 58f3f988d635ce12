"""timm's VisionTransformer: vit, deit, deit3, dinov2, clip and siglip towers, hybrids."""

from .family import PlainViT

__all__ = ["PlainViT"]
