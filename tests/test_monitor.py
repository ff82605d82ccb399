"""The variance proxy against scores of a softmax policy; the monitor; the TRL callback."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dl_norm import theory
from dl_norm.monitor import VarianceMonitor, variance_proxy

# --- the proxy ------------------------------------------------------------------------------------


def padded(lengths, width=None, seed=0):
    """(B, T) log-probs, NaN where the mask is 0, and the mask."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = torch.arange(width or int(lengths.max())) < lengths[:, None]
    log_probs = -3 * torch.rand(mask.shape, generator=random)
    return log_probs.masked_fill(~mask, torch.nan), mask


def test_formula():
    log_probs = torch.tensor([[0.5, 0.25, 0.9], [0.75, 1.0, 0.1]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    coefficients = torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, -3.0]])
    assert variance_proxy(log_probs, mask).tolist() == pytest.approx([1.25, 1.15])
    weighted = variance_proxy(log_probs, mask, coefficients=coefficients)
    assert weighted.tolist() == pytest.approx([0.5 + 4 * 0.75, 9 * 0.9])


def test_is_the_mean_squared_score_of_independent_tokens():
    """Over samples of the policy, the mean proxy is E|sum_t d log pi_t / d logits|^2."""
    random = torch.Generator().manual_seed(0)
    tokens, vocabulary, samples = 12, 7, 20_000
    probabilities = torch.softmax(2 * torch.randn(tokens, vocabulary, generator=random), -1)
    chosen = torch.stack(
        [torch.multinomial(p, samples, replacement=True, generator=random) for p in probabilities],
        dim=1,
    )
    log_probs = probabilities.log().expand(samples, -1, -1).gather(2, chosen[:, :, None])[..., 0]
    proxy = variance_proxy(log_probs, torch.ones_like(log_probs))
    exact = (1 - probabilities.square().sum(-1)).sum()
    # Shared logits make the scores of one sequence add up as vectors: the cross terms must vanish.
    scores = torch.nn.functional.one_hot(chosen, vocabulary).sum(1) - probabilities.sum(0)
    squares = scores.square().sum(-1)
    for found in (proxy, squares):
        error = found.std() / samples**0.5
        assert abs(found.mean() - exact) < 4 * error


def test_squared_scores():
    """With sum p^2 a term is the squared score itself; of a certain token it is 0, not less."""
    random = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(2, 5, 7, generator=random)
    chosen = torch.randint(7, (2, 5), generator=random)
    logits[1] = -100.0
    logits[1].scatter_(1, chosen[1, :, None], 5.0)
    log_probs = logits.log_softmax(-1)
    score = torch.nn.functional.one_hot(chosen, 7) - log_probs.exp()
    squares = log_probs.exp().square().sum(-1)
    log_probs = log_probs.gather(-1, chosen[..., None])[..., 0]
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    found = variance_proxy(log_probs, mask, sum_sq_probs=squares)
    expected = (score.square().sum(-1) * mask).sum(1)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    assert found[1] >= 0
    monitors = VarianceMonitor(), VarianceMonitor()
    monitors[0].update(log_probs, mask, sum_sq_probs=squares)
    monitors[1].update(log_probs, mask)
    for monitor in monitors:
        monitor.end_batch()
    proxies = [monitor._batches[0][1] for monitor in monitors]
    assert torch.equal(proxies[0], found) and not torch.equal(*proxies)


def test_keeps_digits_of_a_certain_token():
    log_probs = torch.full((1, 4), -1e-9)
    found = variance_proxy(log_probs, torch.ones_like(log_probs)).item()
    assert found == pytest.approx(4e-9, rel=1e-6, abs=0)


def test_masked_positions_and_empty_sequences():
    log_probs, mask = padded([3, 0, 5])
    found = variance_proxy(log_probs, mask)
    assert found[1] == 0
    assert found[0] == variance_proxy(log_probs[:1, :3], mask[:1, :3])[0]


def test_packed_is_padded():
    log_probs, mask = padded([3, 0, 5, 1])
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    expected = variance_proxy(log_probs, mask, coefficients=log_probs)
    packed = log_probs[mask]
    found = variance_proxy(packed, None, coefficients=packed, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(found, expected)
    holes = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1])
    found = variance_proxy(packed, holes, cu_seqlens=cu_seqlens)
    assert found[0] == pytest.approx((2 - packed[0].exp() - packed[2].exp()).item())


def test_dtype_and_gradient():
    log_probs, mask = padded([3, 5])
    half = log_probs.bfloat16().requires_grad_()
    found = variance_proxy(half, mask)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, variance_proxy(half.detach().float(), mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: variance_proxy(x[0], None), r"must be \(B, T\), or \(N,\) with cu_seqlens"),
        (lambda x: variance_proxy(x, None), "mask is required"),
        (lambda x: variance_proxy(x, x[:, 1:]), r"mask must be \(2, 5\) like log_probs"),
        (lambda x: variance_proxy(x, x, coefficients=x[0]), r"coefficients must be \(2, 5\)"),
    ],
)
def test_proxy_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5))


# --- the monitor ----------------------------------------------------------------------------------


def batches(count=6, size=32, seed=0):
    """Batches whose later tokens are more certain: an exponent below 1."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        lengths = torch.randint(2, 200, (size,), generator=random)
        mask = torch.arange(200) < lengths[:, None]
        noise = torch.rand(mask.shape, generator=random)
        certainty = (1 + torch.arange(200)).float() ** -0.4
        yield torch.log1p(-0.9 * noise * certainty), mask


def test_summary_is_the_estimate_of_what_went_in():
    monitor = VarianceMonitor(alpha=0.75)
    groups = torch.arange(32) // 4
    lengths, proxies, ids = [], [], []
    for i, (log_probs, mask) in enumerate(batches()):
        for part in (slice(0, 12), slice(12, 32)):
            monitor.update(log_probs[part], mask[part], groups=groups[part] + 8 * i)
        monitor.end_batch()
        lengths.append(mask.sum(1).numpy())
        proxies.append(variance_proxy(log_probs, mask).numpy())
        ids.append(groups.numpy() + 8 * i)
    found = monitor.summary()
    estimate = theory.estimate_exponent(
        np.concatenate(lengths), np.concatenate(proxies), np.concatenate(ids), resamples=500
    )
    assert (found["beta"], found["beta_low"], found["beta_high"]) == pytest.approx(
        (estimate.beta, estimate.low, estimate.high), rel=1e-9
    )
    # sum over t <= L of t^-0.4 grows like L^0.6.
    assert found["beta_low"] < 0.65 < found["beta_high"] + 0.05
    assert found["suggested_alpha"] == found["beta"]
    for method in theory.METHODS:
        alpha = 0.75 if method == "delta_l" else 1.0
        cvs = [
            theory.method_statistics(batch, method, alpha=alpha, beta=estimate.beta).cv
            / batch.mean() ** (estimate.beta / 2)
            for batch in lengths
        ]
        assert found[f"cv_{method}"] == pytest.approx(np.mean(cvs), rel=1e-9)


def test_processes_together_are_one():
    one, two = VarianceMonitor(), [VarianceMonitor(), VarianceMonitor()]
    for log_probs, mask in batches():
        one.update(log_probs, mask)
        one.end_batch()
        for rank, monitor in enumerate(two):
            monitor.update(log_probs[rank::2], mask[rank::2])
            monitor.end_batch()
    # A gather puts the processes' tensors end to end.
    theirs = iter([torch.cat(columns) for columns in zip(*(joined(m) for m in two), strict=True)])
    found = two[0].summary(lambda tensor: next(theirs))
    expected = one.summary()
    assert found.keys() == expected.keys()
    for name in found:
        if name not in ("beta_low", "beta_high"):  # another order, other resamples
            assert found[name] == pytest.approx(expected[name], rel=1e-9)


def joined(monitor):
    """The window's tensors, as the monitor hands them to ``gather``."""
    seen = []
    monitor.summary(lambda tensor: seen.append(tensor) or tensor)
    return seen


def test_equal_lengths_have_the_noise_of_their_number():
    monitor = VarianceMonitor()
    log_probs, mask = padded([8] * 25)
    monitor.update(log_probs, mask)
    monitor.end_batch()
    # No slope to fit; CV = 1/sqrt(G) of one response.
    assert monitor.summary() == {f"cv_{m}": pytest.approx(0.2) for m in theory.METHODS}


def test_nothing_before_the_first_batch():
    monitor = VarianceMonitor()
    assert monitor.summary() == {}
    monitor.end_batch()
    log_probs, mask = padded([3, 4])
    monitor.update(log_probs, mask)
    assert monitor.summary() == {}


def test_a_batch_without_a_token():
    monitor = VarianceMonitor()
    monitor.update(torch.zeros(3, 4), torch.zeros(3, 4))
    monitor.end_batch()
    assert monitor.summary() == {}
    log_probs, mask = padded([3, 4, 9])
    monitor.update(log_probs, mask)
    monitor.end_batch()
    assert "beta" in monitor.summary()


def test_window_drops_the_oldest_batches():
    new, both = VarianceMonitor(window=64), VarianceMonitor(window=64)
    for i, (log_probs, mask) in enumerate(batches(count=5)):
        for monitor in (both, new) if i >= 3 else (both,):
            monitor.update(log_probs, mask)
            monitor.end_batch()
    assert both.summary() == new.summary()


def test_packed_updates():
    padded_one, packed_one = VarianceMonitor(), VarianceMonitor()
    for log_probs, mask in batches():
        padded_one.update(log_probs, mask)
        padded_one.end_batch()
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed_one.update(log_probs[mask], None, cu_seqlens=cu_seqlens)
        packed_one.end_batch()
    assert packed_one.summary() == pytest.approx(padded_one.summary(), rel=1e-5)


def test_refused():
    with pytest.raises(ValueError, match="alpha"):
        VarianceMonitor(alpha=-1)
    with pytest.raises(ValueError, match="window >= 2"):
        VarianceMonitor(window=1)
    with pytest.raises(ValueError, match="confidence"):
        VarianceMonitor(confidence=1)
    log_probs, mask = padded([3, 4])
    with pytest.raises(ValueError, match=r"groups must be \(2,\), got \(1,\)"):
        VarianceMonitor().update(log_probs, mask, groups=torch.tensor([1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_does_not_wait_for_the_gpu():
    monitor = VarianceMonitor()
    log_probs, mask = (tensor.cuda() for tensor in padded([3, 0, 5, 1]))
    packed = log_probs[mask]
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            monitor.update(log_probs, mask)
            monitor.update(packed, None, cu_seqlens=cu_seqlens)
            monitor.end_batch()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    assert monitor.summary()


# --- the TRL callback -----------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed"
)


@needs_trl
class TestCallback:
    def callback(self, **settings):
        from dl_norm.integrations.trl import VarianceMonitorCallback

        return VarianceMonitorCallback(**settings)

    def test_prompt_ids(self):
        from dl_norm.integrations.trl.monitor import prompt_ids

        tokens = torch.tensor([[0, 5, 6], [5, 6, 7], [0, 5, 6], [0, 6, 5], [9, 5, 6]])
        mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]])
        ids = prompt_ids(tokens, mask).tolist()
        assert ids[0] == ids[2] == ids[4]  # what the padding holds does not matter
        assert len(set(ids)) == 3
        assert min(ids) >= 0
        wider = torch.nn.functional.pad(tokens, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
        assert prompt_ids(*wider).tolist() == ids

    def test_says_when_the_trainer_shows_nothing(self):
        control = SimpleNamespace(should_log=False)
        with pytest.raises(RuntimeError, match="use it with DeltaLGRPOTrainer"):
            self.callback().on_step_end(None, None, control)

    def test_settings_are_checked_at_once(self):
        with pytest.raises(ValueError, match="window >= 2"):
            self.callback(window=0)

    def test_logs_in_training(self, tmp_path):
        """A few steps of the real trainer, whose logged numbers are those of its rollouts."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        trainer, callback = tiny_trainer(tmp_path, self.callback())
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "variance/cv_grpo" in entry]
        assert len(logged) == 2  # steps 2 and 4 of 4, as TRL logs
        last = logged[-1]
        assert last["variance/beta_low"] <= last["variance/beta"] <= last["variance/beta_high"]
        assert last["variance/suggested_alpha"] == max(last["variance/beta"], 0)
        lengths, _, groups = (tensor.numpy() for tensor in callback.kept())
        assert len(lengths) == 4 * 8
        assert len(np.unique(groups)) == len(set(callback.prompts))
        assert lengths.max() <= 12
        expected = callback._monitor.summary()
        assert {f"variance/{k}": pytest.approx(v) for k, v in expected.items()} == {
            k: v for k, v in last.items() if k.startswith("variance/")
        }


def tiny_trainer(folder, callback):
    """DeltaLGRPOTrainer with a Qwen2 of two layers, 4 steps of 2 prompts x 4 samples."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(13))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    prompts: list[str] = [" ".join(f"w{i + k}" for k in range(1 + i % 3)) for i in range(8)]
    args = DeltaLGRPOConfig(
        output_dir=str(folder), max_completion_length=12, num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4,
        logging_steps=2, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    callback.prompts = []

    def reward(completions, prompts, **_):
        callback.prompts.extend(prompts)
        return [float(len(text)) for text in completions]

    def window():
        seen = []
        callback._monitor.summary(lambda tensor: seen.append(tensor) or tensor)
        return seen

    callback.kept = window
    trainer = DeltaLGRPOTrainer(
        model, reward, args, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=fast, callbacks=[callback],
    )  # fmt: skip
    return trainer, callback
