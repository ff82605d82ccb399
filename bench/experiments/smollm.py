"""SmolLM2-135M-Instruct on one-digit products, asked for in ways that make lengths vary."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

MAX_TOKENS = 96  # of a response; the constant M
STYLES = (
    "",
    "Answer with the number only.",
    "Explain briefly, then give the answer.",
)


def quickstart():
    """ci/quickstart.py as a module: it has the model's loader and the scored task."""
    folder = Path(__file__).resolve().parents[2] / "ci"
    sys.path.append(str(folder))  # for the module that it imports by name
    try:
        spec = importlib.util.spec_from_file_location("ci_quickstart", folder / "quickstart.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


class Products:
    """The model, its prompts and the reward of a response."""

    max_tokens = MAX_TOKENS

    def __init__(self, folder: Path, prompts: int, seed: int, device: str):
        module = quickstart()
        self.model, self.tokenizer = module.load_model(folder)
        self.model.to(device).eval()
        self.task = module.Multiplication(size=prompts, seed=seed)
        self.device = device

    def prompt(self, index: int) -> Tensor:
        """(P,) token ids of one prompt."""
        question = f"{self.task.tasks[index]['question']} {STYLES[index % len(STYLES)]}".strip()
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, return_tensors="pt").input_ids[0].to(self.device)

    def sample(self, index: int, samples: int, seed: int) -> list[Tensor]:
        """Responses at temperature 1, (L,) token ids each, with the end mark where there is one."""
        torch.manual_seed(seed)
        prompt, end = self.prompt(index), self.tokenizer.eos_token_id
        rows = self.model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_TOKENS,
            num_return_sequences=samples, pad_token_id=end,
        )  # fmt: skip
        ended = [(row == end).nonzero() for row in rows[:, len(prompt) :]]
        return [
            row[: int(at[0]) + 1] if len(at) else row
            for row, at in zip(rows[:, len(prompt) :], ended, strict=True)
        ]

    def rewards(self, index: int, responses: list[Tensor]) -> list[float]:
        """1 where the last number of the response is the product, else 0."""
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        completions = [[{"content": text}] for text in texts]
        scores = self.task.reward(completions, [index] * len(texts))
        return [float(score == 1.0) for score in scores]
