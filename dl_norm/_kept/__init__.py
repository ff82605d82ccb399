"""The policy loss over kept sets, the tokens that truncated sampling left to choose from."""
