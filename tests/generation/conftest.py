"""Tiny random models of every family, what transformers answers with them, and engines over them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capstan.generation import Engine, Request, plan_for
from capstan.generation.attention import decoding
from capstan.generation.planning.batching import BlockShape, Length, shape_for
from capstan.generation.planning.placement import Tier, parse_wish
from capstan.generation.planning.planner import Planner
from capstan.generation.runtime import visits
from capstan.generation.runtime.block_schedule import BlockSchedule
from capstan.generation.runtime.recording import TAPES
from capstan.hardware import Device, Link, Machine

# The GPU tests also run where hypothesis is not installed.
collect_ignore_glob = [] if find_spec("hypothesis") else ["test_*_properties.py"]

VOCABULARY = 128
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 16}
_OPT = {key: size for key, size in _SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 96}
# Name → the transformers class, and what makes it tiny. Windows are shorter than most prompts below.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", _OPT | {"word_embed_proj_dim": 64}),
    "opt-350m-like": ("OPTConfig", _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    ),
    "llama": ("LlamaConfig", _HEADED),
    "qwen2": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _HEADED),
    "mistral": ("MistralConfig", _HEADED | {"sliding_window": 7}),
    "gemma": ("GemmaConfig", _HEADED),
    "gemma2": ("Gemma2Config", _HEADED | {"sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", _HEADED | {"sliding_window": 6, "query_pre_attn_scalar": 16}),
    "mixtral": ("MixtralConfig", _HEADED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        _HEADED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "phi3": ("Phi3Config", _GROUPED | {"original_max_position_embeddings": 256}),
    "gpt-neox": ("GPTNeoXConfig", _SIZES),
}
_PLACEMENTS = {
    "all-on-device": "weights=device cache=device",
    "weights-on-host": "weights=host cache=device",
    "weights-on-disk": "weights=disk cache=device",
    "cache-on-host": "weights=device cache=host attention=device",
    "cache-on-disk": "weights=device cache=disk attention=device",
    "host-attention": "weights=host cache=host attention=host",
    "host-attention-over-disk": "weights=host cache=disk attention=host",
    "activations-on-host": "weights=host cache=device activations=host",
    "activations-on-disk": "weights=host cache=device activations=disk",
    "mixed": "weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 activations=host",
}
# Slots in a batch, batches. Five sequences wait, so the last shape refills its slots again and again.
_SHAPES = {"one-batch": (5, 1), "several-batches": (2, 3), "refilled-slots": (1, 2)}


AMPLE: Mapping[Tier, int] = {"device": 100 << 20, "host": 100 << 20, "disk": 100 << 20}


@pytest.fixture(scope="session", params=_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family of models."""
    return request.param


@pytest.fixture(scope="session", params=_PLACEMENTS)
def place(request: pytest.FixtureRequest) -> list[str]:
    """A placement by hand, for `Engine.open`."""
    return [_PLACEMENTS[request.param]]


@pytest.fixture(params=_SHAPES)
def block(request: pytest.FixtureRequest, force_shape: Callable[..., None]) -> str:
    """Every job of the test gets a block of this shape."""
    slots, batches = _SHAPES[request.param]
    force_shape(slots=slots, batches=batches)
    return request.param


@pytest.fixture(scope="session")
def family_config() -> Callable[..., Any]:
    """`family_config(name, **changes)`: the tiny config of a family, without special tokens."""

    def family_config(name: str, **changes: Any) -> Any:
        import transformers

        class_name, sizes = _CONFIGS[name]
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        return getattr(transformers, class_name)(**sizes | tokens | changes)

    return family_config


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_model(config)`: a folder with a random model of that config, the same for every run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def save_model(config: Any, *, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                # As initialised, every token follows itself and biases are 0: nothing could be mistaken.
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() > 1 else 0.02)
        model.to(dtype).save_pretrained(folder, **how)
        return folder

    return save_model


@pytest.fixture(scope="session")
def model_folder(family_config: Callable[..., Any], save_model: Callable[..., Path]) -> Callable[[str], Path]:
    """`model_folder(family)`: a folder with the tiny model of a family, made once."""
    return cache(lambda name: save_model(family_config(name)))


@pytest.fixture(scope="session")
def text_model(family_config: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    """A tiny Llama with a tokenizer of its own, whose every token but the special ones is readable text.

    `<s>` (0) begins every text, `</s>` (1) ends an answer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(
        [
            "a capstan lets a small crew haul a great anchor out of the sea",
            "the crew walks round and round and the rope comes in hand over hand",
            "one rope and eight bars make a small crew as strong as a great one",
        ],
        trainer,
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = save_model(
        family_config("llama", vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


class Reference:
    """What transformers computes, one sequence at a time, in float32 on the processor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], num_new: int, **settings: Any) -> list[int]:
        """The likeliest continuation."""
        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        best = torch.cat(output.logits).topk(2).values
        # Two orders of summation differ by about 1e-6 here. Where two tokens are nearly equal, either would
        # be right, so such a prompt would test nothing.
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "take other prompts: this one is a near tie"
        return output.sequences[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """The log-probabilities of every token after each of `tokens`: `[tokens, vocabulary]`."""
        logits = self.model(torch.tensor([tokens])).logits[0]
        return logits.float().log_softmax(dim=-1)


@pytest.fixture(scope="session")
def load_reference() -> Callable[[Path], Reference]:
    """`load_reference(folder)`: transformers over a folder, to be changed at will."""
    return Reference


@pytest.fixture(scope="session")
def open_reference(load_reference: Callable[[Path], Reference]) -> Callable[[Path], Reference]:
    """`open_reference(folder)`: transformers over a folder, loaded once."""
    return cache(load_reference)


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Five prompts of different lengths which end at different times."""
    generator = torch.Generator().manual_seed(7)
    return [
        Request(
            prompt=torch.randint(1, VOCABULARY, (num_prompt,), generator=generator).tolist(),
            max_tokens=num_new,
        )
        for num_prompt, num_new in ((5, 3), (17, 2), (9, 4), (12, 3), (3, 3))
    ]


@pytest.fixture(scope="session")
def expected(
    model_folder: Callable[[str], Path],
    open_reference: Callable[[Path], Reference],
    requests: list[Request],
) -> Callable[[str], list[list[int]]]:
    """`expected(family)`: the greedy answers of transformers to `requests`."""

    def expected(name: str) -> list[list[int]]:
        reference = open_reference(model_folder(name))
        return [reference.greedy(request.prompt, request.max_tokens) for request in requests]

    return cache(expected)


@pytest.fixture(scope="session")
def make_machine() -> Callable[..., Machine]:
    """`make_machine(kind)`: a machine whose rates are given, so that nothing is probed."""

    def make_machine(kind: str = "cpu") -> Machine:
        compute = {"matmul_flops_per_s": {"float32": 100e9}, "memory_bandwidth_bytes_per_s": 30e9}
        return Machine(
            name="test",
            cores=2,
            probed_at="2026-11-23",
            devices=(
                Device(name="device", kind=kind, memory_bytes=4 * 2**30, **compute),
                Device(name="host", kind="host", memory_bytes=8 * 2**30, **compute),
                Device(name="disk", kind="disk", memory_bytes=80 * 2**30, memory_bandwidth_bytes_per_s=1e9),
            ),
            links=(
                Link(source="host", target="device", bandwidth_bytes_per_s=10e9, latency_s=1e-5),
                Link(source="device", target="host", bandwidth_bytes_per_s=10e9, latency_s=1e-5),
                Link(source="disk", target="host", bandwidth_bytes_per_s=1e9, latency_s=1e-4),
                Link(source="host", target="disk", bandwidth_bytes_per_s=0.5e9, latency_s=1e-4),
            ),
        )

    return make_machine


@pytest.fixture(scope="session")
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine without an accelerator."""
    return make_machine("cpu")


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for scratch files."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
def open_engine(machine: Machine, scratch: Path) -> Callable[..., Engine]:
    """`open_engine(folder, **settings)`: an engine with ample memory, planned for one short sequence."""

    def open_engine(folder: Path, **settings: Any) -> Engine:
        defaults = {
            "machine": machine,
            "device": "cpu",
            "device_memory": "100MiB",
            "host_memory": "100MiB",
            "disk": scratch,
            "lengths": [Length(prompt=17, new=6)],
        }
        return Engine.open(folder, **defaults | settings)

    return open_engine


@pytest.fixture(scope="session")
def start_engine(
    model_folder: Callable[[str], Path], machine: Machine, scratch: Path
) -> Callable[..., Engine]:
    """`start_engine(family, place=..., budgets=..., lengths=...)`: an engine whose model was opened before.

    `Engine.open` finds out the same facts about the same model every time, which takes most of its time.
    """

    @cache
    def planner(name: str) -> Planner:
        return plan_for(model_folder(name), machine=machine, device="cpu")[0]

    def start_engine(
        name: str,
        *,
        place: Sequence[str] = (),
        budgets: Mapping[Tier, int] = AMPLE,
        lengths: Sequence[Length] = (Length(prompt=17, new=6),),
        share_prefixes: bool | None = None,
    ) -> Engine:
        asked = replace(
            planner(name), budgets=budgets, wish=parse_wish(place), shares_prefixes=share_prefixes
        )
        return Engine.start(asked, asked.plan(lengths), torch.device("cpu"), disk_folder=scratch)

    return start_engine


@pytest.fixture
def force_shape(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`force_shape(slots=2, batches=3)`: the planner considers no other block."""

    def force_shape(*, slots: int, batches: int, chunk_tokens: int = 20) -> None:
        def shapes(_: Planner, job: Any) -> Iterator[BlockShape]:
            yield shape_for(
                job.lengths, slots=slots, batches=batches, chunk_tokens=chunk_tokens, prefix=job.prefix
            )

        monkeypatch.setattr(Planner, "_shapes", shapes)

    return force_shape


@pytest.fixture
def force_ring(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`force_ring(3)`: engines opened from now on have room for three streamed layers."""
    solved = Planner._solved

    def force_ring(slots: int) -> None:
        def with_ring(*args: Any, **options: Any) -> Any:
            return solved(*args, **options | {"ring_slots": slots})

        monkeypatch.setattr(Planner, "_solved", with_ring)

    return force_ring


_LOOKING = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
)


def _leaves(result: Any) -> list[Any]:
    return [result] if isinstance(result, torch.Tensor) else tree_leaves(result)


def _is_memory_of(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


class OperationTape(TorchDispatchMode):
    """A tape for the processor: does the same operations again, on the same memory.

    Like a CUDA graph it knows nothing of what Python did between them, and refuses to look at values.
    """

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self._is_done = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKING:
            raise RuntimeError(f"{func} looks at values, which is not permitted while recording")
        result = func(*args, **(kwargs or {}))
        places = [leaf for leaf in _leaves(result) if isinstance(leaf, torch.Tensor)]
        # Memory stays where it is, so a view stays the same; but what may be a view is at times a copy.
        if not (func.is_view and all(_is_memory_of(args[0], place) for place in places)):
            self._operations.append((func, args, kwargs or {}, places))
        return result

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        if not self._is_done:  # it was done while it was recorded
            self._is_done = True
            return
        OperationTape.replays += 1
        for func, args, kwargs, places in self._operations:
            values = [leaf for leaf in _leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for place, value in zip(places, values, strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processor stops batches inside their attention, as accelerators do, so that this is seen without
    one. Gathers, for each time that one is resumed, how many were stopped."""
    counts: list[int] = []
    resume = BlockSchedule._resume

    def counted(self: BlockSchedule, passage: Any) -> None:
        counts.append(1 + len(self._stopped))
        resume(self, passage)

    monkeypatch.setattr(visits, "_OVERLAPPING", ("cuda", "cpu"))
    monkeypatch.setattr(BlockSchedule, "_resume", counted)
    return counts


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> type[OperationTape]:
    """The processor records visits and replays them, as accelerators do."""
    monkeypatch.setattr(OperationTape, "replays", 0)
    monkeypatch.setitem(TAPES, "cpu", lambda: OperationTape)
    monkeypatch.setattr(decoding, "_reads_in_place", lambda *_: False)  # in C, which such a tape cannot see
    return OperationTape


@pytest.fixture(scope="session")
def answers_of() -> Callable[..., list[list[int]]]:
    """`answers_of(engine, requests)`: the first answer's tokens to each request, in the order asked."""

    def answers_of(engine: Engine, requests: Sequence[Request], **settings: Any) -> list[list[int]]:
        done = {completion.id: completion for completion in engine.generate(requests, **settings)}
        return [list(done[str(index)].answers[0].tokens) for index in range(len(requests))]

    return answers_of


@pytest.fixture(scope="session")
def check_promises() -> Callable[[Engine], None]:
    """`check_promises(engine)`: the last job kept to its plan, byte by byte, and the plan to its budget."""

    def check_promises(engine: Engine) -> None:
        assert engine.trace is not None
        assert engine.trace.notes == ()
        assert engine.trace.traffic == engine.plan.traffic
        for tier, peak_bytes in engine.trace.peak_bytes.items():
            assert peak_bytes <= engine.plan.peak_bytes.get(tier, 0), tier
        for tier, peak_bytes in engine.plan.peak_bytes.items():
            assert peak_bytes <= engine.plan.budget_bytes[tier], tier

    return check_promises
