"""Which window each denoising step, layer and head attends."""
