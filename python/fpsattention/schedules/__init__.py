"""Which tile and window each denoising step, layer and head attends with."""
