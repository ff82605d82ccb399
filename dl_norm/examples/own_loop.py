"""A training loop of one's own on one process: rollout, weights, micro-batches, optimizer step.

    python dl_norm/examples/own_loop.py

The policy emits tokens that do not depend on each other, and is rewarded for its first token where
it is even. Its end-of-sequence token makes the lengths differ, which is what the weights are for.
"""

import torch

import dl_norm

VOCABULARY, EOS, MAX_LENGTH = 8, 0, 16
PROMPTS, GROUP, MICRO_BATCH, EPOCHS = 8, 8, 16, 2


def rollout(logits):
    """Tokens (G, T) up to the first EOS, their mask and log-probs, advantages (G,) per prompt."""
    log_probs = logits.log_softmax(-1)
    shape = PROMPTS * GROUP, MAX_LENGTH
    tokens = torch.multinomial(log_probs.exp(), shape[0] * shape[1], replacement=True).view(shape)
    ended_before = (tokens == EOS).cumsum(-1) - (tokens == EOS).long()
    mask = ended_before == 0
    rewards = (tokens[:, 0] % 2 == 0).float().view(PROMPTS, GROUP)
    spread = rewards.std(-1, keepdim=True) + 1e-4
    advantages = ((rewards - rewards.mean(-1, keepdim=True)) / spread).flatten()
    return tokens, mask, log_probs[tokens], advantages, rewards.mean().item()


def main(steps=20):
    torch.manual_seed(0)
    logits = torch.zeros(VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    rewards = []
    for step in range(steps):
        with torch.no_grad():
            tokens, mask, old, advantages, reward = rollout(logits)
        # Once, over the whole rollout: a micro-batch takes its slice.
        weights = dl_norm.sequence_weights(mask.sum(-1), alpha=1.0, max_length=MAX_LENGTH)
        for _ in range(EPOCHS):
            metrics = []
            for rows in torch.arange(len(tokens)).split(MICRO_BATCH):
                log_probs = logits.log_softmax(-1)[tokens[rows]]
                loss, counted = dl_norm.policy_loss(
                    log_probs, old[rows], advantages[rows], mask[rows], weights[rows],
                    eps_high=0.28, return_metrics=True,
                )  # fmt: skip
                loss.backward()  # the slices' gradients add up to the batch's
                metrics.append(counted)
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward)
        if step % 5 == 4:
            clipped = sum(metrics[1:], metrics[0]).summary()["clip_fraction_high"].item()
            print(f"step {step + 1}: reward {reward:.2f}, {clipped:.1%} of tokens clipped above")
    return rewards


if __name__ == "__main__":
    main()
