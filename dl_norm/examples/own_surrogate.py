"""A token loss of one's own: its formula is all there is to write.

    python dl_norm/examples/own_surrogate.py

The derivative, the CPU's closed form and the Triton function follow from the formula, which is
checked against autograd when it is made. It works from log-probs, logits and hidden states.
"""

import torch

import dl_norm


def soft_clip(log_prob, ratio, advantage, temperature):
    """The gradient fades smoothly as the ratio leaves 1, where a clip cuts it off."""
    gate = torch.tanh((ratio - 1) / temperature)
    return -advantage * temperature * gate, {"saturated": gate.abs() > 0.9}


def main():
    torch.manual_seed(0)
    mask = torch.arange(32) < torch.tensor([32, 7, 19])[:, None]
    old = -3 * torch.rand(mask.shape)
    log_probs = (old + 0.3 * torch.randn(mask.shape)).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.2])
    weights = dl_norm.sequence_weights(mask.sum(-1), max_length=32)

    surrogate = dl_norm.surrogate(soft_clip, temperature=0.3)
    loss, metrics = dl_norm.policy_loss(
        log_probs, old, advantages, mask, weights, surrogate=surrogate, return_metrics=True
    )
    loss.backward()
    summary = metrics.summary()
    print(f"{surrogate}: loss {loss.item():.6f}, saturated {summary['saturated'].item():.1%}")

    # What it is held to: the formula, the weights, and PyTorch's autograd.
    leaf = log_probs.detach().requires_grad_()
    token_losses, _ = soft_clip(leaf, (leaf - old).exp(), advantages[:, None], 0.3)
    (weights[:, None] * token_losses * mask).sum().backward()
    difference = (leaf.grad - log_probs.grad).abs().max().item()
    print(f"largest difference of the gradient from autograd's: {difference:.1e}")
    print("the Triton function begins with:", *surrogate.source().splitlines()[:6], sep="\n    ")
    return difference, summary


if __name__ == "__main__":
    main()
