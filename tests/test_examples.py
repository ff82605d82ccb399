"""Every script of dl_norm/examples by the command in its docstring, on a CPU, as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "dl_norm" / "examples").glob("*.py"))


def output_of(name: str) -> str:
    """What the command in the docstring prints."""
    source = (ROOT / "dl_norm" / "examples" / f"{name}.py").read_text()
    ((program, arguments),) = re.findall(r"^    (python|torchrun) (.+)$", source, re.MULTILINE)
    module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a user has none
    done = subprocess.run(
        [sys.executable, *module, *arguments.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def numbers(pattern: str, output: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern, output)]
    assert found, output
    return found


def test_own_loop() -> None:
    """It learns: half of the first tokens are even by chance."""
    rewards = numbers(r"reward (\S+),", output_of("own_loop"))
    assert len(rewards) == 4 and rewards[-1] > 0.9


def test_packed() -> None:
    output = output_of("packed")
    ((packed, padded),) = re.findall(r"packed (\S+), padded (-?[\d.]+)\n", output)[-1:]
    assert float(packed) == pytest.approx(float(padded), abs=2e-7) and float(packed) != 0
    assert numbers(r"gradients: (\S+)", output)[0] < 1e-8


def test_own_surrogate() -> None:
    output = output_of("own_surrogate")
    assert numbers(r"autograd's: (\S+)", output)[0] < 1e-8
    assert numbers(r"saturated (\S+)%", output)[0] > 0
    assert "def soft_clip" in output


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
def test_fsdp2() -> None:
    output = output_of("fsdp2")
    assert "2 processes" in output  # gloo of PyTorch 2.10 writes there too
    assert numbers(r"gradient of one: (\S+)", output)[0] < 1e-7


def test_trl_fused_head() -> None:
    pytest.importorskip("trl")
    assert len(numbers(r"(?m)^reward (\S+), mean length", output_of("trl_fused_head"))) == 3


def test_every_example_is_here_and_short() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == {name.removeprefix("test_") for name in globals() if name[5:] in names}
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path.name
