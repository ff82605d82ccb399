"""The losses over logits and hidden states, and log-probs of tokens: rows of logits."""
