"""Makes the reference packages importable beside a CPU build of torch. For tests only.

torchvision's wheel is built against the CUDA build of torch. Beside the CPU build its
library can't be loaded, and the import ends at the first operator that it would have
brought: "operator torchvision::nms does not exist". RealESRGANer needs none of them, so
it is enough that the two which torchvision annotates while it is imported have a name.

basicsr's own release would need `torchvision.transforms.functional_tensor` too, which
torchvision removed in 0.17; the wheel my-basicsr 1.4.2 has that line corrected.
"""

from __future__ import annotations

import torch

# Kept for the life of the process: the operators vanish with the object that defined them.
_operators: list[torch.library.Library] = []


def install() -> None:
    """After this, `import realesrgan` works, in this process only.

    Raises ImportError when a package is not installed.
    """
    try:
        import torchvision  # noqa: F401  (beside a CUDA build nothing is missing)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
    import realesrgan  # noqa: F401
