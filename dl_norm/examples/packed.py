"""Packed rollouts: responses end to end in one row of tokens, with their offsets, and no padding.

    python dl_norm/examples/packed.py

The loss and its gradient are those of the padded batch.
"""

import torch

import dl_norm

LENGTHS = [5, 120, 31, 64]


def main():
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    weights = dl_norm.sequence_weights(lengths, alpha=0.75, max_length=128)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])

    # Packed: (N,) tokens, and the G + 1 offsets that variable-length attention takes as well.
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    old = -3 * torch.rand(int(lengths.sum()))
    log_probs = (old + 0.2 * torch.randn(old.shape)).requires_grad_()
    loss = dl_norm.policy_loss(log_probs, old, advantages, None, weights, cu_seqlens=cu_seqlens)
    loss.backward()

    # The same padded: (G, T) tokens and a mask, which hides what lies behind a response.
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded_old = torch.full(mask.shape, torch.nan).masked_scatter(mask, old)
    padded = torch.full(mask.shape, torch.nan).masked_scatter(mask, log_probs.detach())
    padded.requires_grad_()
    same = dl_norm.policy_loss(padded, padded_old, advantages, mask, weights)
    same.backward()

    print(f"{old.numel()} tokens packed, {mask.numel()} padded")
    print(f"loss: packed {loss.item():.7f}, padded {same.item():.7f}")
    difference = (log_probs.grad - padded.grad[mask]).abs().max().item()
    print(f"largest difference of the gradients: {difference:.1e}")
    return loss.item(), same.item(), difference


if __name__ == "__main__":
    main()
