"""What a gradient op says when it is differentiated itself."""

import torch


def refuse_second(op: str) -> None:
    """Make the gradient of `fastvid::<op>` raise NotImplementedError: else it would be zero."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative")

    torch.library.register_autograd(f"fastvid::{op}_backward", refuse)
