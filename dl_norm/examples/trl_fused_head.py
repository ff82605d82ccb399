"""TRL's trainer with the loss in the place of the model's head: no logits of all tokens.

    pip install "dl-norm[trl]"
    python dl_norm/examples/trl_fused_head.py

A model of a few thousand parameters, made here, samples and learns on a CPU. TRL trains in bfloat16
where nothing is said and refuses to on a CPU: there, say use_cpu=True and bf16=False.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dl_norm.integrations.trl import DeltaLGRPOConfig, DeltaLGRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def make_model():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**small, **heads, **ids))


def make_tokenizer():
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def reward(completion_ids, **_):  # the share of tokens with an even id
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def main():
    with tempfile.TemporaryDirectory() as folder:
        args = DeltaLGRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            max_completion_length=16, num_generations=8, per_device_train_batch_size=16,
            max_steps=3, logging_steps=1, learning_rate=1e-2,
            alpha=0.75, fused_lm_head=True,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(28)]})
        trainer = DeltaLGRPOTrainer(
            make_model(), reward, args, train_dataset=prompts, processing_class=make_tokenizer()
        )
        trainer.train()
    for log in trainer.state.log_history[:-1]:
        print(f"reward {log['reward']:.3f}, mean length {log['completions/mean_length']:.1f}")


if __name__ == "__main__":
    main()
