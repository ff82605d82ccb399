"""What tests/interpreter.py leaves out changes no number."""

import pytest
import torch

import dl_norm


@pytest.mark.parametrize("loss", ["log-probs", "logits"])
def test_patched_once_or_every_time(loss, make_batch, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang
    if not hasattr(patch, "patch"):
        pytest.skip("kernels are not interpreted")
    calls = []

    def every_time(function):
        calls.append(function)
        return patch.patch(function)

    batch = make_batch([30, 0, 5], holes=True, ref=True)
    logits = torch.randn(*batch.log_probs.shape, 40, generator=torch.manual_seed(1))
    ids = torch.zeros(batch.log_probs.shape, dtype=torch.int64)

    def run():
        kind = {"impl": "triton", "return_metrics": True, "beta": 0.1, **batch.kwargs()}
        leaf = (batch.log_probs if loss == "log-probs" else logits).clone().requires_grad_()
        rest = batch.args()[1:]
        if loss == "log-probs":
            value, metrics = dl_norm.policy_loss(leaf, *rest, **kind)
        else:
            value, outputs = dl_norm.logits_policy_loss(leaf, ids, *rest, **kind)
            metrics = outputs.metrics
        value.backward()
        return value.detach(), leaf.grad, metrics.kl_ref

    once = run()
    monkeypatch.setattr(interpreter, "_patch_lang", every_time)
    for got, expected in zip(once, run(), strict=True):
        assert torch.equal(got, expected)
    assert len(calls) > 10
    assert not patch.patched, "a launch has restored it"
