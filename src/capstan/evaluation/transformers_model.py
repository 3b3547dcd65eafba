"""Any causal language model that transformers can load from a folder, evaluated in batches.

Prompts that begin alike share the computation of that beginning; the rest goes in batches of similar length.
Log-probabilities come from the raw logits, also at temperature 0 (HELM's own client gives 0.0 there).
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capstan.errors import DeviceError, InputError, require_extra
from capstan.evaluation.chat import templated
from capstan.evaluation.models import (
    Completion,
    Limits,
    Pair,
    Request,
    Result,
    Scored,
    Token,
    num_tokens_after,
)
from capstan.evaluation.shared_prefixes import Group, groups_of
from capstan.evaluation.token_texts import (
    GrowingText,
    Pieces,
    after_special,
    cut_at_stops,
    num_covering,
    pieces_of,
)
from capstan.evaluation.tokenizer_only import read_tokenizer

_BATCH_TOKENS = 4096
_LARGEST_BATCH = 64
_FALLBACK_LENGTH = 1024


def folder_identity(folder: Path) -> str:
    """A digest of a model folder: config and tokenizer by content, weights by name, size and time."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def limits_of(config: Any, tokenizer: Any) -> Limits:
    """What a model takes; its beginning-of-text or end-of-text token stands before texts that are scored."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = int(
        getattr(text, "max_position_embeddings", None)
        or getattr(text, "n_positions", None)
        or _FALLBACK_LENGTH
    )
    # Prompts are counted without the special tokens that the tokenizer adds: room is left for those.
    longest -= int(tokenizer.num_special_tokens_to_add())
    prefix = tokenizer.bos_token or tokenizer.eos_token or ""
    return Limits(
        max_sequence_length=longest - 1 if prefix else longest,
        max_request_length=longest,
        prefix_token=prefix,
    )


def wants_special(text: str, prefix: str) -> bool:
    """Whether a text is asked with the special tokens that the model wants: not where it begins with them."""
    return not (prefix and text.startswith(prefix))


def special_encoded(tokenizer: Any, text: str, prefix: str) -> list[int]:
    """A text's token ids with the special ones that the model wants, once."""
    return list(tokenizer(text, add_special_tokens=wants_special(text, prefix))["input_ids"])


def num_wanted(pieces: Pieces, encode: Callable[[str], Sequence[int]], pair: Pair) -> int:
    """How many of the last tokens are scored: those that say a continuation, or that it adds to a context."""
    count = max(num_covering(pieces.texts, pair.continuation), num_tokens_after(encode, *pair))
    return max(0, min(count, len(pieces.ids) - 1))


class TransformersModel:
    """A folder with a model, on one device, whole in memory.

    Args:
        folder: config, weights and tokenizer in Hugging Face format.
        device: "cpu" or "cuda".
        dtype: what to compute in; None for the checkpoint's own.
        batch_tokens: how many tokens a batch holds at most.
        shares_prefixes: whether beginnings that prompts share are computed once.

    Raises:
        InputError: the folder cannot be loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: Any = None,
        batch_tokens: int = _BATCH_TOKENS,
        shares_prefixes: bool = True,
    ) -> None:
        require_extra("generation", "torch", "transformers")
        from transformers import AutoModelForCausalLM

        self.folder = Path(folder)
        self.name = self.folder.name
        if not self.folder.is_dir():
            raise InputError(
                f"There is no folder {folder}. Name a folder with a model in Hugging Face format."
            )
        self.tokenizer = read_tokenizer(self.folder)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"transformers cannot load {folder}: {error}") from error
        try:
            self._model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise DeviceError(f"{folder} cannot be put on the device {device!r}: {error}") from error
        self._device, self._batch_tokens, self._shares_prefixes = device, batch_tokens, shares_prefixes
        self.limits = limits_of(model.config, self.tokenizer)
        self._stops = self._stop_tokens(model)

    def _stop_tokens(self, model: Any) -> frozenset[int]:
        stated = model.generation_config.eos_token_id
        stated = self.tokenizer.eos_token_id if stated is None else stated
        if stated is None:
            return frozenset()
        return frozenset(stated if isinstance(stated, list) else [stated])

    @property
    def identity(self) -> str:
        """The folder's digest and what it computes in."""
        return f"transformers/{folder_identity(self.folder)}/{self._model.dtype}"

    def encode(self, text: str) -> list[int]:
        """A text's token ids, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def token_text(self, token: int) -> str:
        """What a token says in the middle of a text; U+FFFD for part of a character."""
        return self.decode([token, token])[len(self.decode([token])) :]

    # --- scoring ------------------------------------------------------------------------------------------

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score continuations: the last tokens, those that say one or that it adds to its context."""
        wholes = [pair.context + pair.continuation for pair in pairs]
        prefix = self.limits.prefix_token
        prompts = [
            pieces_of(self.tokenizer, text, adds_special=wants_special(text, prefix)) for text in wholes
        ]
        counts = [num_wanted(prompt, self.encode, pair) for pair, prompt in zip(pairs, prompts, strict=True)]
        lead = [
            len(prompt.ids) - len(self.encode(text)) for prompt, text in zip(prompts, wholes, strict=True)
        ]
        yield from self._scored(prompts, counts, lead)

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Score every token of texts after their first one."""
        prompts = [pieces_of(self.tokenizer, text, adds_special=False) for text in texts]
        counts = [max(0, len(prompt.ids) - 1) for prompt in prompts]
        yield from self._scored(prompts, counts, [0] * len(prompts))

    def _whole(self, text: str) -> list[int]:
        return special_encoded(self.tokenizer, text, self.limits.prefix_token)

    def chat_text(self, messages: Sequence[dict[str, str]], *, continues: bool = False) -> str:
        """Messages by the tokenizer's chat template."""
        return templated(self.tokenizer, messages, continues=continues)

    def _scored(
        self, pieces: Sequence[Pieces], counts: Sequence[int], lead: Sequence[int]
    ) -> Iterator[tuple[int, Scored]]:
        """Scores of the last `counts[i]` tokens; the first `lead[i]` tokens are special and not shown."""
        import torch

        prompts = [each.ids for each in pieces]
        limits = [len(prompt) - count - 1 for prompt, count in zip(prompts, counts, strict=True)]
        for batch, prefix, cache in self._batches(prompts, limits):
            rows = [prompts[at][prefix:] for at in batch]
            keep = max(counts[at] for at in batch) + 1
            logits = self._forward(rows, prefix, cache, keep)  # (rows, keep, vocabulary), aligned at the end
            logprobs = logits.float().log_softmax(dim=-1)
            best = logits.argmax(dim=-1)
            for row, at in enumerate(batch):
                count, prompt = counts[at], prompts[at]
                ids = torch.tensor(prompt[len(prompt) - count :], device=logits.device)
                inside = logprobs[row, keep - 1 - count : keep - 1]
                values = inside.gather(1, ids[:, None])[:, 0].tolist() if count else []
                greedy = bool((best[row, keep - 1 - count : keep - 1] == ids).all()) if count else True
                logs = [0.0] * (len(prompt) - count) + values
                tokens = tuple(map(Token, pieces[at].texts, logs))
                yield at, Scored(tokens[lead[at] :], count, greedy)

    # --- generating ---------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        """Continue prompts, greedily or drawn; several completions of a request are rows of their own."""
        flat = [(at, copy) for at, request in enumerate(requests) for copy in range(request.num_completions)]
        prompts = [self._whole(requests[at].prompt) for at, _ in flat]
        parts: dict[int, dict[int, Completion]] = {}
        spent: dict[int, tuple[float, int]] = {}
        for batch, prefix, cache in self._batches(prompts, [len(prompt) - 1 for prompt in prompts]):
            start_s = time.perf_counter()
            done = self._continued(
                [prompts[at][prefix:] for at in batch],
                prefix,
                cache,
                [_Growing(self, prompts[at], requests[flat[at][0]], flat[at][1]) for at in batch],
            )
            seconds = time.perf_counter() - start_s
            for at, completion in zip(batch, done, strict=True):
                index, copy = flat[at]
                parts.setdefault(index, {})[copy] = completion
                spent[index] = (seconds, len(batch))
                if len(parts[index]) == requests[index].num_completions:
                    found = tuple(parts[index][each] for each in range(requests[index].num_completions))
                    yield (
                        index,
                        Result(completions=found, seconds=spent[index][0], batch_size=spent[index][1]),
                    )

    def _continued(
        self, rows: Sequence[list[int]], prefix: int, cache: Any, growing: Sequence["_Growing"]
    ) -> list[Completion]:
        import torch

        state = self._start(rows, prefix, cache)
        logits = state.step(None, 1)[:, -1].float()
        while True:
            chosen = [each.take(logits[at]) for at, each in enumerate(growing)]
            if all(each.reason for each in growing):
                return [each.completion() for each in growing]
            logits = state.step(torch.tensor(chosen, device=self._device)[:, None], 1)[:, -1].float()

    # --- batches ------------------------------------------------------------------------------------------

    def _batches(
        self, prompts: Sequence[list[int]], limits: Sequence[int]
    ) -> Iterator[tuple[list[int], int, Any]]:
        """Batches of prompts of similar length, with what they share computed once."""
        for prompt in prompts:
            if not prompt:
                raise InputError("A prompt has no tokens; give it at least one character.")
        if self._shares_prefixes:
            groups = groups_of(prompts, [max(0, limit) for limit in limits])
        else:
            groups = [Group(tuple(range(len(prompts))), 0)]
        loose = [at for group in groups if not group.prefix for at in group.indices]
        merged = [group for group in groups if group.prefix] + ([Group(tuple(loose), 0)] if loose else [])
        for group in merged:
            cache = self._prefix_cache(prompts[group.indices[0]][: group.prefix]) if group.prefix else None
            order = sorted(group.indices, key=lambda at: (-len(prompts[at]), at))
            start = 0
            while start < len(order):
                longest = len(prompts[order[start]])
                size = max(1, min(_LARGEST_BATCH, self._batch_tokens // longest))
                yield order[start : start + size], group.prefix, cache
                start += size

    def _prefix_cache(self, tokens: Sequence[int]) -> Any:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self._device)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _start(self, rows: Sequence[list[int]], prefix: int, cache: Any) -> "_Passes":
        return _Passes(self._model, rows, prefix, cache, self._device)

    def _forward(self, rows: Sequence[list[int]], prefix: int, cache: Any, keep: int) -> Any:
        return self._start(rows, prefix, cache).step(None, keep)


class _Passes:
    """Passes over one batch: its prompts, padded on the left, then a token a row."""

    def __init__(self, model: Any, rows: Sequence[list[int]], prefix: int, cache: Any, device: str) -> None:
        import copy

        import torch
        from transformers import DynamicCache

        self._model = model
        width = max(map(len, rows))
        padded = [[0] * (width - len(row)) + row for row in rows]
        present = [[1] * prefix + [0] * (width - len(row)) + [1] * len(row) for row in rows]
        self._ids = torch.tensor(padded, device=device)
        self._mask = torch.tensor(present, device=device)
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix:]
        if cache is None:
            self._cache = DynamicCache()
        else:
            self._cache = copy.deepcopy(cache)
            self._cache.batch_repeat_interleave(len(rows))

    def step(self, tokens: Any, keep: int) -> Any:
        """The logits of the last `keep` tokens after the prompts, or after one more token each."""
        import torch

        if tokens is not None:
            self._ids = tokens
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
            self._positions = self._positions[:, -1:] + 1
        with torch.inference_mode():
            return self._model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits


class _Growing:
    """One answer as it grows."""

    def __init__(self, model: TransformersModel, prompt: Sequence[int], request: Request, copy: int) -> None:
        import torch

        self._model, self._request = model, request
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self.reason = ""
        before = after_special(prompt, model.tokenizer.all_special_ids)
        self._growing = GrowingText(model.decode, before)
        self._draw = None
        if request.temperature > 0:
            self._draw = torch.Generator().manual_seed(int(request.random or 0) * 1009 + copy)

    def take(self, logits: Any) -> int:
        """Choose the next token from a row of logits; an answer that is over repeats its last one."""
        import torch

        if self.reason:
            return self._tokens[-1] if self._tokens else 0
        logprobs = logits.log_softmax(dim=-1)
        if self._draw is None:
            token = int(logits.argmax())
        else:
            shares = (logits / self._request.temperature).softmax(dim=-1).cpu()
            token = int(torch.multinomial(shares, 1, generator=self._draw))
        if token in self._model._stops:
            self.reason = "endoftext"
            return token
        self._tokens.append(token)
        self._logprobs.append(float(logprobs[token]))
        self._growing.add(token)
        if any(stop in self._growing.text for stop in self._request.stop_sequences):
            self.reason = "stop"
        elif len(self._tokens) >= self._request.max_tokens:
            self.reason = "length"
        return token

    def completion(self) -> Completion:
        """The answer up to its first stop text, with the tokens that lie before it."""
        tokens = list(map(Token, self._growing.finished(), self._logprobs))
        return cut_at_stops(self._growing.text, tokens, self._request.stop_sequences, self.reason)
