"""The tiny transformer of the CountDown experiment: its model, sampling and warm start."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.experiments import countdown_task as task

MAX_TOKENS = 72  # of a response; the constant M


@dataclass(frozen=True)
class WarmStart:
    """Supervised training before the reinforcement learning; the same for every run."""

    steps: int = 1500
    batch: int = 64
    learning_rate: float = 2e-3
    more: float = 0.7  # probability of one more wrong attempt
    most: int = 5
    hidden: int = 128
    layers: int = 3
    held_out: int = 256
    seed: int = 0


def new_model(config: WarmStart) -> LlamaForCausalLM:
    """An untrained model."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.VOCABULARY,
            hidden_size=config.hidden,
            intermediate_size=2 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=task.END,
            pad_token_id=task.END,
        )
    )


def warm_start(folder: Path, config: WarmStart, device: str = "cpu") -> LlamaForCausalLM:
    """The supervised model, trained once and kept in ``folder``."""
    stamp = folder / "warm_start.json"
    if stamp.exists() and json.loads(stamp.read_text()) == asdict(config):
        return LlamaForCausalLM.from_pretrained(folder).to(device)
    model = new_model(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps)
    training, _ = task.split(config.held_out)
    source = random.Random(config.seed)
    bar = tqdm(range(config.steps), desc="warm start", mininterval=5)
    for _ in bar:
        chosen = source.sample(training, config.batch)
        responses = [task.trace(p, source, config.more, config.most) for p in chosen]
        tokens, mask = pad([p.prompt() for p in chosen], responses, device)
        loss = F.cross_entropy(
            model(input_ids=tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        loss = (loss * mask[:, 1:]).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    stamp.write_text(json.dumps(asdict(config), indent=1))
    return model


def pad(
    prompts: list[list[int]], responses: list[list[int]], device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(B, prompt + longest response) token ids, and 1 where a token is of a response."""
    longest = max(map(len, responses))
    tokens, mask = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        filler = longest - len(response)
        tokens.append(prompt + response + [task.END] * filler)
        mask.append([0] * len(prompt) + [1] * len(response) + [0] * filler)
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Tensor, end: int, max_tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Responses at temperature 1, with a cache. Prompts (B, P) are of one length, unpadded.

    Returns:
        token ids (B, T), their log-probs (B, T) and the mask (B, T); an end mark counts. A
        response that reaches ``max_tokens`` is cut there.
    """
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    cache, inputs = None, prompts
    tokens, log_probs, mask = [], [], []
    for _ in range(max_tokens):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        distribution = output.logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(distribution.exp(), 1, generator=generator)
        tokens.append(torch.where(alive, token[:, 0], end))
        log_probs.append(distribution.gather(1, token)[:, 0])
        mask.append(alive)
        alive = alive & (token[:, 0] != end)
        inputs = tokens[-1][:, None]
        if not alive.any():
            break
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), torch.stack(mask, 1).long()


def responses(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a sampled batch, cut at their lengths."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
