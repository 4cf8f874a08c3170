"""Root-mean-square normalisation."""

import torch

from sgl_kernel._checks import check_cpu


def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    """Scale each row of ``input`` to a root mean square of one, then by ``weight``.

    Args:
        input: [tokens, hidden] floating point.
        weight: [hidden] floating point.
        eps: added to the mean square.
        out: where to write the result, of ``input``'s shape; a new tensor where None.
        enable_pdl: a launch option of the GPU build; no meaning here.

    Returns:
        The result in ``input``'s dtype, computed in float32.

    Raises:
        ValueError: ``weight`` does not have one element per column.
    """
    check_cpu("input", input)
    if weight.shape != input.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the rows have {input.shape[-1]} elements")
    wide = input.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    result = (wide * scale * weight.float()).to(input.dtype)
    return result if out is None else out.copy_(result)
