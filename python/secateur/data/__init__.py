"""Images for a model: folders, tars, Hugging Face data sets and scikit-learn's digits, as the model expects them."""

from .loader import ImageLoader, loader
from .model_input import data_config, images_in, input_dtype, model_input, split_batch
from .sources import default_split

__all__ = [
    "ImageLoader",
    "data_config",
    "default_split",
    "images_in",
    "input_dtype",
    "loader",
    "model_input",
    "split_batch",
]
