"""Small trained models denoise held-out frames of a clip: dense, with FPSAttention, and fine-tuned with FPSAttention.

    python examples/denoise_tiny_dit.py

Prints PSNR, SSIM and the time of a forward of each, and writes a picture of them side by side. docs/training.md tells
how the models were trained. Without a GPU it takes about two minutes on two cores. Needs
pip install 'fpsattention[train]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fpsattention.cli.console import milliseconds, people, progress, table_of
from fpsattention.cli.errors import MachineError, UserError, chosen_device
from tiny_dit import denoise


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status: 0 done, 1 the device is not there, 2 the request was wrong."""
    parser = argparse.ArgumentParser(prog="denoise_tiny_dit.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=denoise.CHECKPOINTS,
        metavar="DIR",
        help="folder with dense.safetensors and fps.safetensors (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fpsattention-demo"),
        metavar="DIR",
        help="folder of denoise.png (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        run(args.checkpoints, args.device, args.output)
    except (MachineError, UserError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def run(checkpoints: Path, device_name: str, output: Path) -> None:
    """Denoise with every arm, print the table and write `output`/denoise.png."""
    device = chosen_device(device_name)
    paths = denoise.checkpoints(checkpoints)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made a folder ({error.strerror})") from error
    case = denoise.prepare(paths, device)
    steps, start = denoise.EFFORT[device.type]
    picture = output / "denoise.png"
    with progress() as bar:
        task = bar.add_task("denoising", total=3 * (steps - start))
        rows = denoise.run(case, steps, start, picture, partial(bar.advance, task))

    table = table_of("arm", "PSNR", "SSIM", "a forward", words=("arm",))
    for row in rows:
        table.add_row(row.arm, f"{row.psnr_db:.2f} dB", f"{row.ssim:.3f}", milliseconds(row.ms_per_forward))
    console = people(as_json=False)
    console.print(
        f"A trained model of 5.3 M parameters and 8,192 tokens denoises held-out frames of {denoise.CLIP}, from step "
        f"{start} of {steps}:"
    )
    console.print(table)
    bound = (
        "With so few tokens launches bound the times"
        if device.type == "cuda"
        else "The times are plain torch's"
    )
    console.print(
        f"PSNR and SSIM are against the held-out crop. {bound} and say nothing about the kernels.\nPicture: {picture}"
    )


if __name__ == "__main__":
    sys.exit(main())
