"""Capstan as a model of lm-evaluation-harness: its own command, in which "capstan" is a model too.

    python -m capstan.generation.harness run --tasks my_task --include_path tasks \
        --model capstan --model_args pretrained=models/llama,device_memory=8GiB,weight_bits=4 --device cuda

All requests of a kind are one job, so the weights are streamed once for many of them. Texts become tokens as
they do for the harness's own Hugging Face model, so that scores agree.

lm-evaluation-harness finds models by name in a registry that other packages cannot reach before its command
line is read; hence this module, which alone imports it.

Source: lm-evaluation-harness 0.4, `api/model.py`.
"""

from collections.abc import Sequence
from typing import Any

from capstan.errors import InputError, UsageError, require_extra
from capstan.generation.engine import Engine
from capstan.generation.requests import Request

require_extra("harness", "lm_eval")

from lm_eval import utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # noqa: E402

# What Engine.open takes, as words of --model_args.
_OPTIONS = ("device", "device_memory", "host_memory", "disk", "weight_bits", "cache_bits")


@register_model("capstan")
class CapstanLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A model folder behind the harness's interface.

    Args:
        pretrained: a folder in Hugging Face format.
        max_length: tokens that a request may have; what is longer loses its beginning.
        max_gen_toks: new tokens where a task does not say how many.
        add_bos_token: whether texts begin with the beginning-of-text token; None leaves it to the tokenizer.
        options: those of `Engine.open`: device, device_memory, host_memory, disk, weight_bits, cache_bits.
            batch_size is accepted and means nothing: the engine plans its own.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise UsageError(f"{', '.join(unknown)}: --model_args knows only {', '.join(_OPTIONS)}.")
        if options.get("device") == "cuda:0":  # the harness's own default
            options["device"] = "cuda"
        given = {name: value for name, value in options.items() if value is not None}
        self.engine = Engine.open(pretrained, **given)
        self.tokenizer = self.engine.model.tokenizer
        if self.tokenizer is None:
            raise InputError(f"{pretrained} has no tokenizer, without which tasks cannot be asked.")
        context = self.engine.model.meta_model.max_positions or 2048
        self.max_length = min(int(max_length or context), context)
        self.max_gen_toks, self._add_bos = max_gen_toks, add_bos_token

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            begins = begin is not None and string.startswith(begin)
            add_special_tokens = False if begins else self._add_bos
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **how))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # --- what the harness asks ---------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        texts = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
        scores = self.engine.score(texts, likeliest=True)
        answers = []
        for (key, _, continuation), score in zip(requests, scores, strict=True):
            own = slice(len(score.logprobs) - len(continuation), None)
            answer = (sum(score.logprobs[own]), all(score.likeliest[own]))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                # A window's last token is only predicted, but the engine reads it too.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._request(str(index), *request.args) for index, request in enumerate(requests)]
        texts = {done.id: done.text for done in self.engine.generate(asked)}
        for request, each in zip(requests, asked, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, texts[each.id])
        return [texts[each.id] for each in asked]

    def _request(self, name: str, context: str, settings: dict[str, Any]) -> Request:
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        num_new = int(known["max_gen_toks"])
        if num_new >= self.max_length:
            raise UsageError(f"{num_new:,} new tokens leave no room for a prompt in {self.max_length:,}.")
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return Request(
            id=name,
            prompt=self.tok_encode(context)[-(self.max_length - num_new) :],
            max_tokens=num_new,
            temperature=float(known.get("temperature") or 0.0),
            top_p=float(known.get("top_p") or 1.0),
            top_k=int(known.get("top_k") or 0),
            stop=tuple(handle_stop_sequences(known.get("until"), eos=end)),
        )


def main() -> None:
    """lm-evaluation-harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Run as a program, this module is called __main__; imported by its name, it is registered once.
    main()
