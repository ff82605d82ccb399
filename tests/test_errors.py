"""Bad input: the exception, and a message that says what was expected, what came and what to do.

The messages of sequence_weights and reweight_advantages are in test_weights.py.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dl_norm
from dl_norm._batch import make_batch
from dl_norm._log_probs import launch
from dl_norm._options import make_token_loss

ROOT = Path(__file__).resolve().parents[1]
B, T, N, G = 3, 8, 20, 4


@pytest.fixture
def padded(make_batch):
    return make_batch([8, 0, 5], T)


@pytest.fixture
def packed(make_batch):
    return make_batch([8, 0, 5, 7], layout="packed")


def refused(error, expected: str, batch, **options) -> None:
    """policy_loss and its reference refuse alike, before anything is computed."""
    for function in (dl_norm.policy_loss, dl_norm.reference.policy_loss):
        with pytest.raises(error) as raised:
            function(*batch.args(), **batch.kwargs(), **options)
        assert expected in str(raised.value)


# -- options -------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"eps_low": -0.1}, ValueError, "expected 0 <= eps_low <= 1 and finite, got eps_low=-0.1"),
    ({"eps_low": 1.1}, ValueError, "expected 0 <= eps_low <= 1 and finite, got eps_low=1.1"),
    ({"eps_low": math.nan}, ValueError, "got eps_low=nan"),
    ({"eps_low": None}, TypeError, "eps_low must be a number, got NoneType"),
    ({"eps_high": -1e-9}, ValueError, "expected eps_high >= 0 and finite, got eps_high=-1e-09"),
    ({"eps_high": math.inf}, ValueError, "expected eps_high >= 0 and finite, got eps_high=inf"),
    ({"eps_high": "0.2"}, TypeError, "eps_high must be a number, got str"),
    ({"eps_high": torch.tensor(0.2)}, TypeError, "eps_high must be a number, got Tensor"),
    ({"dual_clip": 1.0}, ValueError,
     "expected dual_clip > 1 (or None) and finite, got dual_clip=1.0"),
    ({"dual_clip": math.inf}, ValueError, "dual_clip > 1 (or None) and finite, got dual_clip=inf"),
    ({"dual_clip": True}, TypeError, "dual_clip must be a number, got bool"),
    ({"delta": 1.0}, ValueError, "expected delta > 1 (or None) and finite, got delta=1.0"),
    ({"delta": 0.0}, ValueError, "expected delta > 1 (or None) and finite, got delta=0.0"),
    ({"log_ratio_clamp": 0.0}, ValueError,
     "expected log_ratio_clamp > 0 (or None) and finite, got log_ratio_clamp=0.0"),
    ({"log_ratio_clamp": math.inf}, ValueError, "got log_ratio_clamp=inf"),
    ({"beta": -0.5}, ValueError, "expected beta >= 0 and finite, got beta=-0.5"),
    ({"beta": None}, TypeError, "beta must be a number, got NoneType"),
    ({"beta": 0.5}, ValueError, "needs ref_log_probs"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_options(options, error, message, padded):
    refused(error, message, padded, **options)
    if "needs" not in message:
        with pytest.raises(error, match=re.escape(message)):
            dl_norm.DeltaLLoss(max_length=8, **options)
        with pytest.raises(error, match=re.escape(message)):
            make_token_loss(**options)


def test_unknown_option_is_no_option(padded):
    for call in (
        lambda: dl_norm.policy_loss(*padded.args(), epsilon=0.2),
        lambda: dl_norm.delta_l_loss(*padded.args()[:4], alpha=1.0, max_length=8, epsilon=0.2),
        lambda: dl_norm.DeltaLLoss(max_length=8, epsilon=0.2),
        lambda: dl_norm.delta_l_loss(*padded.args()[:4], alpha=1.0),
    ):
        with pytest.raises(TypeError, match=r"epsilon|max_length"):
            call()


# -- tensors -------------------------------------------------------------------------------------

FLOATS = "float32, bfloat16, float16"
BAD_PADDED = [
    ("log_probs", lambda t: t.tolist(), TypeError, "log_probs must be a tensor, got list"),
    ("log_probs", lambda t: t.long(), TypeError, f"log_probs must be {FLOATS}"),
    ("log_probs", lambda t: t[0], ValueError,
     "log_probs must be (B, T), or (N,) with cu_seqlens; got (8,) and no cu_seqlens"),
    ("log_probs", lambda t: t[..., None], ValueError, "got (3, 8, 1) and no cu_seqlens"),
    ("old_log_probs", lambda t: 0.0, TypeError, "old_log_probs must be a tensor, got float"),
    ("old_log_probs", lambda t: t.int(), TypeError, "old_log_probs must be float32"),
    ("old_log_probs", lambda t: t[:, 1:], ValueError,
     "old_log_probs must be (3, 8) like log_probs, got (3, 7)"),
    ("old_log_probs", lambda t: t[:, 0], ValueError,
     "old_log_probs must be (3, 8) like log_probs, got (3,)"),
    ("old_log_probs", lambda t: t.clone().requires_grad_(), ValueError,
     "old_log_probs requires grad, but policy_loss is differentiable with respect to log_probs "
     "alone: pass old_log_probs.detach()"),
    ("ref_log_probs", lambda t: torch.zeros(3, 7), ValueError,
     "ref_log_probs must be (3, 8) like log_probs, got (3, 7)"),
    ("ref_log_probs", lambda t: torch.zeros(3, 8, requires_grad=True), ValueError,
     "pass ref_log_probs.detach()"),
    ("ref_log_probs", lambda t: [0.0], TypeError, "ref_log_probs must be a tensor, got list"),
    ("advantages", lambda t: None, TypeError, "advantages must be a tensor, got None"),
    ("advantages", lambda t: t.long(), TypeError, "advantages must be float32"),
    ("advantages", lambda t: t[:2], ValueError,
     "advantages must be (3, 8) like log_probs or (B,) = (3,), got (2,)"),
    ("advantages", lambda t: t[:, None], ValueError, "or (B,) = (3,), got (3, 1)"),
    ("advantages", lambda t: t.clone().requires_grad_(), ValueError, "pass advantages.detach()"),
    ("rollout_weights", lambda t: torch.ones(4), ValueError,
     "rollout_weights must be (3, 8) like log_probs or (B,) = (3,), got (4,)"),
    ("rollout_weights", lambda t: torch.ones(3, requires_grad=True), ValueError,
     "pass rollout_weights.detach()"),
    ("rollout_weights", lambda t: torch.ones(3, dtype=torch.int64), TypeError,
     "rollout_weights must be float32"),
    ("weights", lambda t: None, TypeError, "weights must be a tensor, got None"),
    ("weights", lambda t: 0.1, TypeError, "weights must be a tensor, got float"),
    ("weights", lambda t: torch.ones(3, 8), ValueError, "weights must be (B,) = (3,), got (3, 8)"),
    ("weights", lambda t: t.long(), TypeError, "weights must be float32"),
    ("weights", lambda t: t.clone().requires_grad_(), ValueError, "pass weights.detach()"),
    ("mask", lambda t: None, ValueError,
     "mask is required for padded (B, T) input: pass a (B, T) tensor"),
    ("mask", lambda t: t.tolist(), TypeError, "mask must be a tensor, got list"),
    ("mask", lambda t: t[:, :-1], ValueError, "mask must be (3, 8) like log_probs, got (3, 7)"),
    ("mask", lambda t: t.to(torch.complex64), TypeError,
     "mask must be bool, integer or floating point, got torch.complex64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    BAD_PADDED,
    ids=[f"{case[0]}-{i}" for i, case in enumerate(BAD_PADDED)],
)  # fmt: skip
def test_padded_tensors(name, change, error, message, padded):
    value = change(getattr(padded, name))
    if isinstance(value, torch.Tensor) and not value.requires_grad:
        value = value.to(padded.log_probs.device)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        value = value.detach().to(padded.log_probs.device).requires_grad_()
    refused(error, message, padded.replace(**{name: value}))


def test_float64_log_probs_are_for_the_reference(padded):
    wide = padded.replace(log_probs=padded.log_probs.double())
    with pytest.raises(
        TypeError, match=r"float32, bfloat16, float16; got torch.float64.*\.float\(\)"
    ):
        dl_norm.policy_loss(*wide.args())
    assert dl_norm.reference.policy_loss(*wide.args()).dtype == torch.float64


def test_float64_constants_are_taken(padded):
    """Advantages and weights often come from float64 numpy code: they are converted."""
    expected = dl_norm.policy_loss(*padded.args())
    wide = padded.replace(
        old_log_probs=padded.old_log_probs.double(),
        advantages=padded.advantages.double(),
        weights=padded.weights.double(),
    )
    for impl in ("torch", "triton"):
        loss = dl_norm.policy_loss(*wide.args(), impl=impl)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)


def test_requires_grad_is_no_error_where_none_is_recorded(padded):
    constants = padded.replace(old_log_probs=padded.old_log_probs.clone().requires_grad_())
    with torch.no_grad():
        dl_norm.policy_loss(*constants.args())


def test_other_devices(padded):
    for name in ("old_log_probs", "advantages", "weights", "mask"):
        elsewhere = padded.replace(**{name: getattr(padded, name).to("meta")})
        place = padded.log_probs.device
        refused(
            ValueError, f"{name} is on meta, log_probs on {place}: move {name} there", elsewhere
        )


# -- packed --------------------------------------------------------------------------------------

BAD_CU_SEQLENS = [
    (lambda c: c.tolist(), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda c: c.float(), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    (lambda c: c.to(torch.int16), TypeError, "cu_seqlens must be int32 or int64, got torch.int16"),
    (lambda c: c[None], ValueError, "cu_seqlens must be (G + 1,), got (1, 5)"),
    (lambda c: c[:0], ValueError, "cu_seqlens must be (G + 1,), got (0,)"),
    (lambda c: c.to("meta"), ValueError, "cu_seqlens is on meta"),
]
BAD_OFFSETS = [
    [1, 8, 8, 13, 20],  # does not begin at 0
    [0, 8, 8, 13, 19],  # ends before the stream
    [0, 8, 8, 13, 21],  # ends past it
    [0, 8, 7, 13, 20],  # falls
    [0, -8, 8, 13, 20],  # leaves the stream on the way
    [0, 8, 8, 99, 20],
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CU_SEQLENS)
def test_cu_seqlens(change, error, message, packed):
    refused(error, message, packed.replace(cu_seqlens=change(packed.cu_seqlens)))


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_offsets_on_the_cpu(offsets, packed):
    """On a GPU their values are not read: see test_offsets_that_do_not_span_give_nan."""
    packed = packed.map(torch.Tensor.cpu).replace(cu_seqlens=torch.tensor(offsets))
    message = (
        f"cu_seqlens must rise from 0 to N = {N} without falling, got "
        f"[{offsets[0]}, ..., {offsets[-1]}]"
    )
    refused(ValueError, message, packed)


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_offsets_in_delta_l_loss(offsets, with_mask, packed):
    """The same words, although it takes the lengths from the offsets first."""
    packed = packed.map(torch.Tensor.cpu)
    mask = torch.ones(N, dtype=torch.bool) if with_mask else None
    with pytest.raises(ValueError, match=f"cu_seqlens must rise from 0 to N = {N}"):
        dl_norm.delta_l_loss(
            packed.log_probs, packed.old_log_probs, packed.advantages, mask,
            alpha=1.0, max_length=8, cu_seqlens=torch.tensor(offsets),
        )  # fmt: skip


@pytest.mark.parametrize("write_grad", [False, True])
@pytest.mark.parametrize("offsets", BAD_OFFSETS[:3], ids=str)
def test_offsets_that_do_not_span_give_nan(offsets, write_grad, packed):
    """Past the host's check, as on a GPU: the loss says so, and nothing is read out of bounds."""
    bad = torch.tensor(offsets, device=packed.log_probs.device)
    for cu_seqlens, spans in ((bad, False), (packed.cu_seqlens, True)):
        batch = make_batch(**vars(packed))
        batch = batch._replace(cu_seqlens=cu_seqlens)
        loss, _, _ = launch.policy_loss_fwd(batch, make_token_loss(), write_grad, False)
        assert loss.isfinite().item() is spans


def test_packed_shapes(packed):
    refused(ValueError, "must be packed in one dimension, (N,); got (4, 5)",
            packed.replace(log_probs=packed.log_probs.reshape(4, 5)))  # fmt: skip
    refused(ValueError, "advantages must be (20,) like log_probs or (G,) = (4,), got (5,)",
            packed.replace(advantages=packed.advantages.new_zeros(5)))  # fmt: skip
    refused(ValueError, "weights must be (G,) = (4,), got (20,)",
            packed.replace(weights=packed.weights.new_zeros(20)))  # fmt: skip
    refused(ValueError, "mask must be (20,) like log_probs, got (21,)",
            packed.replace(mask=packed.log_probs.new_ones(21)))  # fmt: skip


# -- delta_l_loss --------------------------------------------------------------------------------


def test_delta_l_loss_refuses(padded, packed):
    def call(*args, **kwargs):
        return dl_norm.delta_l_loss(*args, **{"alpha": 1.0, "max_length": 8, **kwargs})

    args = padded.args()[:4]
    with pytest.raises(ValueError, match=r"\(B, T\), or \(N,\) with cu_seqlens; got \(20,\)"):
        call(*packed.args()[:4])
    with pytest.raises(ValueError, match="mask is required for padded"):
        call(*args[:3], None)
    with pytest.raises(ValueError, match="0 <= alpha <= 16 and finite, got alpha=-1"):
        call(*args, alpha=-1)
    with pytest.raises(ValueError, match="max_length > 0 and finite, got max_length=0"):
        call(*args, max_length=0)
    with pytest.raises(ValueError, match="needs max_length"):
        call(*args, max_length=None)
    with pytest.raises(TypeError, match="log_probs must be a tensor, got list"):
        call(padded.log_probs.tolist(), *args[1:])
    with pytest.raises(ValueError, match=r"mask must be \(3, 8\) like log_probs, got \(3, 7\)"):
        call(*args[:3], padded.mask[:, 1:])


# -- impl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cuda", "Triton", "", "reference", 1])
def test_unknown_implementation(impl, padded):
    message = f"impl must be None or one of triton, torch; got {impl!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        dl_norm.policy_loss(*padded.args(), impl=impl)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


CALL = """
import torch, dl_norm
log_probs = torch.zeros(2, 3, requires_grad=True)
loss = dl_norm.policy_loss(
    log_probs, None, torch.ones(2), torch.ones(2, 3), torch.ones(2), impl={impl!r}
)
loss.backward()
print(loss.item(), log_probs.grad.sum().item())
"""


def test_triton_on_the_cpu_needs_the_interpreter():
    """In a process of its own, where it was not asked for."""
    done = run_python(CALL.format(impl="triton"))
    assert done.returncode != 0
    expected = (
        'ValueError: impl="triton" got tensors on cpu: move them to a GPU, use impl="torch", or '
        "set TRITON_INTERPRET=1 before importing dl_norm"
    )
    assert done.stderr.strip().endswith(expected)


@pytest.mark.parametrize(("impl", "environment"), [("triton", {"TRITON_INTERPRET": "1"}),
                                                   ("torch", {}), (None, {})])  # fmt: skip
def test_the_other_choices_run_on_the_cpu(impl, environment):
    done = run_python(CALL.format(impl=impl), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-6.0", "-6.0"]


def test_torch_implementation_needs_no_triton():
    """Triton exists for few platforms; the closed form runs on all of them."""
    block = "import sys; sys.modules['triton'] = None\n"
    done = run_python(block + CALL.format(impl="torch"))
    assert done.returncode == 0, done.stderr


def test_the_import_is_light():
    """What torch.compile and kernels need comes with them: it would double the time."""
    heavy = "{'torch._dynamo', 'triton', 'sympy'}"
    done = run_python(f"import sys, torch, dl_norm; print(*{heavy} & set(sys.modules))")
    assert done.stdout.strip() == "", done.stderr
