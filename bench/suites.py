"""Every comparison that `python -m bench.table --suite NAME` can make."""

from __future__ import annotations

import dataclasses
import functools

from bench import cases, entropy, head_peers, heads, kept, parity, peers, precision
from bench.contest import Suite

LOG_PROBS = Suite(
    name="log_probs",
    about="policy_loss: log-probs to loss and gradient",
    cases=cases.cases_for,
    tiny=cases.TINY_CASES,
    make_inputs=cases.make_inputs,
    contestants=peers.CONTESTANTS,
    truth=parity.truth,
    check=parity.check,
)

KEPT = Suite(
    name="kept",
    about="linear_policy_loss over kept sets: hidden states and head to loss and gradients",
    cases=kept.cases_for,
    tiny=kept.TINY_CASES,
    make_inputs=kept.make_inputs,
    contestants=kept.CONTESTANTS,
    truth=kept.truth,
    check=kept.check,
    passes=("both",),
)


ENTROPY = Suite(
    name="entropy",
    about="linear_policy_loss with an entropy bonus: hidden states and head to loss and gradients",
    cases=functools.partial(heads.cases_for, "linear"),
    tiny=heads.tiny_cases("linear"),
    make_inputs=heads.make_inputs,
    contestants=entropy.CONTESTANTS,
    truth=entropy.truth,
    check=heads.check,
    passes=("both",),
)


PRECISION = dataclasses.replace(
    ENTROPY,
    name="precision",
    about="linear_policy_loss of a bfloat16 head, and the precision of its logits",
    make_inputs=precision.make_inputs,
    contestants=precision.CONTESTANTS,
    truth=heads.truth,
)


def _head_suite(name: str, about: str, **options) -> Suite:
    # One pass: where the gradient is made in the forward pass the two have no separate times.
    settings = {"passes": ("both",), "truth": heads.truth, "check": heads.check} | options
    return Suite(
        name=name,
        about=about,
        cases=functools.partial(heads.cases_for, name),
        tiny=heads.tiny_cases(name),
        make_inputs=heads.make_inputs,
        contestants=head_peers.CONTESTANTS[name],
        **settings,
    )


SUITES = {
    suite.name: suite
    for suite in (
        LOG_PROBS,
        _head_suite("logits", "logits_policy_loss: logits to loss and gradient"),
        _head_suite(
            "token_log_probs",
            "token_log_probs: logits to log-probs, no gradient",
            passes=("forward",),
            check=heads.check_log_probs,
        ),
        _head_suite("linear", "linear_policy_loss: hidden states and head to loss and gradients"),
        _head_suite(
            "cross_entropy",
            "linear_policy_loss as a mean cross-entropy, for peers that have no policy loss",
            truth=heads.cross_entropy_truth,
            check=heads.check_cross_entropy,
        ),
        ENTROPY,
        PRECISION,
        KEPT,
    )
}
