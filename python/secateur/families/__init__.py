"""The families of models that secateur knows. All knowledge of timm's model code is here."""
