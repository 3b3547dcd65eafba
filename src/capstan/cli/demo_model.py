"""The demo's model: small, Llama-shaped, trained here and now on CPython's own documentation."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from capstan.storage import open_atomically

VOCABULARY = 2048
CONTEXT = 512
_WINDOW, _WINDOWS_PER_STEP, _STEPS, _SAVE_EVERY = 128, 16, 400, 50
_RATE = 3e-3
_END = "<|endoftext|>"
_PASSAGE = 500  # characters

OnStep = Callable[[int, int, float], None]


class Corpus(NamedTuple):
    """Texts to train on, and texts that the model never sees."""

    training: list[str]
    held_out: list[str]


def corpus() -> Corpus:
    """CPython's reference topics, every twelfth held out."""
    texts = [topics[name].strip() for name in sorted(topics)]
    return Corpus(
        training=[text for index, text in enumerate(texts) if index % 12],
        held_out=[text for index, text in enumerate(texts) if index % 12 == 0],
    )


def train(folder: Path, texts: list[str], on_step: OnStep) -> float:
    """Train into `folder` (Hugging Face format, 16 bits); returns the mean loss of the last steps.

    It takes some two minutes on two cores, and goes on from its last checkpoint after a kill.
    """
    tokenizer = _tokenizer(texts)
    tokens = torch.tensor(tokenizer(_END.join(texts))["input_ids"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(tokenizer.eos_token_id))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate_factor)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    saved = folder.with_name(f"{folder.name}.training.pt")
    losses = _restore(saved, parts)
    model.train()
    for step in range(len(losses), _STEPS):
        loss = model(input_ids=(batch := _batch(tokens, step)), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        on_step(step + 1, _STEPS, losses[-1])
        if (step + 1) % _SAVE_EVERY == 0:
            _save(saved, parts, losses)
    _publish(model, tokenizer, folder)
    saved.unlink(missing_ok=True)
    return sum(losses[-20:]) / 20


def _config(eos: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
    )


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, model_max_length=CONTEXT)


def _rate_factor(step: int) -> float:
    """Linear warm-up over 20 steps, then half a cosine down to a twentieth."""
    if step < 20:
        return (step + 1) / 20
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - 20) / (_STEPS - 20)))


def _batch(tokens: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - _WINDOW, (_WINDOWS_PER_STEP,), generator=generator)
    return torch.stack([tokens[start : start + _WINDOW] for start in starts.tolist()])


def _restore(saved: Path, parts: dict[str, Any]) -> list[float]:
    if not saved.exists():
        return []
    state = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return list(state["losses"])


def _save(saved: Path, parts: dict[str, Any], losses: list[float]) -> None:
    with open_atomically(saved) as file:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"losses": losses}, file)


def _publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under another name, then rename: a folder that exists is complete."""
    temporary = folder.with_name(f"{folder.name}.new")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


def write_prompts(path: Path, texts: list[str], count: int) -> None:
    """Beginnings of sentences from `texts` as a batch file, short and long mixed."""
    sentences = [line.strip() for text in texts for line in text.split("\n\n") if len(line) > 120]
    with path.open("w") as stream:
        for index in range(count):
            words = sentences[index % len(sentences)].split()[: 6 + index % 24]
            body = {"prompt": " ".join(words), "max_tokens": 48}
            stream.write(json.dumps({"custom_id": f"prompt-{index}", "body": body}) + "\n")


def write_scenario(folder: Path, texts: Sequence[str]) -> Path:
    """Passages of `texts` as a scenario whose probability is asked; returns its YAML file."""
    with (folder / "held-out.jsonl").open("w") as stream:
        for text in texts:
            for start in range(0, len(text) - _PASSAGE // 2, _PASSAGE):
                stream.write(json.dumps({"text": text[start : start + _PASSAGE]}) + "\n")
    path = folder / "held-out.yaml"
    path.write_text(
        "name: held-out\ndata: held-out.jsonl\ninput: '{text}'\nadapter: {method: language_modeling}\n"
    )
    return path


def write_choices(folder: Path, texts: Sequence[str]) -> Path:
    """Passages whose end is to be found among others' ends, as a scenario; returns its YAML file."""
    passages = [
        text[start : start + _PASSAGE] for text in texts for start in range(0, len(text) - _PASSAGE, _PASSAGE)
    ]
    half = _PASSAGE // 2
    with (folder / "continuations.jsonl").open("w") as stream:
        for at, passage in enumerate(passages):
            others = [passages[(at + step) % len(passages)] for step in range(4)]
            row = {
                "begin": passage[:half].strip(),
                "ends": [each[half:].strip() for each in others],
                "right": 0,
            }
            stream.write(json.dumps(row) + "\n")
    path = folder / "continuations.yaml"
    path.write_text(
        "name: continuations\ndata: continuations.jsonl\ninput: '{begin}'\nchoices: ends\nanswer: right\n"
        "adapter: {method: multiple_choice_separate_original, input_prefix: '', input_suffix: '', "
        "output_prefix: ''}\n"
    )
    return path
