"""What the Hopper kernels run on: the one place that knows GPUs, head_dims and dtypes."""

from __future__ import annotations

import torch

HEAD_DIMS = (64, 128)
DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}  # torch's, and the compiled module's name for it
CAPABILITY = (9, 0)

_NEED = "needs a Hopper GPU (compute capability 9.0)"


@torch.compiler.assume_constant_result
def hopper_obstacle(device: int | None = None) -> str | None:
    """Why the Hopper kernels cannot run on a CUDA device, None when they can.

    Args:
        device: index of the device; None: the current one.

    Returns the rest of a sentence whose subject is what needs the GPU.
    """
    if torch.version.hip is not None:  # such a torch calls AMD's GPUs "cuda", and numbers an MI200 (9, 0)
        return f"{_NEED}, this torch is built for AMD GPUs (ROCm {torch.version.hip})"
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():  # the former is asked in no time
        return f"{_NEED}, torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    return f"{_NEED}, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
