"""A model as lm-evaluation-harness sees it. Imports `lm_eval`, so import this where it is needed.

What is conditioned on what is `TemplateLM`'s and that of lm_eval's own `hf` model, so that figures
compare with published ones:

- `loglikelihood(context, continuation)`: white space at the end of the context goes to the
  continuation. Scored are the tokens that the encoding of both together has beyond as many as the
  context has, given all tokens before them, BOS first where the tokenizer writes one. What is
  longer than the model's positions is cut at its beginning. An empty context is BOS (else EOS).
- `loglikelihood_rolling(text)`: every token of the encoding is scored once, in windows as long as
  the model's positions, given the tokens before it in its window; the first window begins with BOS
  (else EOS). Where the tokenizer writes BOS too, that second BOS is one of the tokens scored.
- `generate_until(context, options)`: the likeliest tokens after the context, which is cut at its
  beginning to leave room for `max_gen_toks`; up to a stop token or one of the `until` strings.

Shapes: b = batch, s = sequence, n = scored tokens of a batch, c = chunk of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track
from torch import Tensor

from qlora_builders.console import PlainConsole
from qlora_builders.data import Tokenizer
from qlora_builders.errors import QLoRAError
from qlora_builders.models import generate_batch
from qlora_builders.modules import CausalLM, log_probabilities

T = TypeVar("T")
_MAX_GEN_TOKS = 256  # lm_eval's own default
_SAMPLING = ("temperature", "top_k", "top_p")
# options that only say what is so anyway
_NO_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


class HarnessModel(TemplateLM):
    """For `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: in eval mode.
        batch_size: sequences per forward pass, the longest first: what does not fit into memory
            fails at once.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.max_length: int = model.spec.arch.max_position_embeddings
        self._model = model
        self._tok = tokenizer  # `tokenizer` would have to be transformers' own
        self._device = model.get_parameter("model.norm.weight").device

    # ---- tokens ---------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """
        Raises:
            QLoRAError: if the tokenizer names no EOS token.
        """
        if self._tok.eos_token_id is None:
            raise QLoRAError("the tokenizer names neither a BOS nor an EOS token to begin with")
        return self._tok.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self._tok.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a BOS that the text spells out is not doubled."""
        ids = self._tok.encode(string, add_special_tokens=False)
        before = [] if add_special_tokens is False else self._tok.special_tokens_around(ids)[0]
        return [*before, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without a generation prompt its last message is left open.

        Raises:
            DataError: if there is no chat template, or it refuses the messages.
        """
        text = self._tok.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        start = chat_history[-1]["content"].strip()
        return text[: text.rindex(start) + len(start)]

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval would tell caches of requests apart by; we keep none."""
        return type(self._tok).__name__

    # ---- likelihood -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is what greedy decoding gives).

        Requests with the same input run once: choices of one token after the same question do.

        Raises:
            QLoRAError: for a continuation without tokens, or with more than the model's positions.
        """
        inputs: dict[tuple[int, ...], list[int]] = {}  # tokens -> the requests they are for
        num_cut = 0
        for index, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise QLoRAError(
                    f"{texts!r}: the continuation has {len(continuation)} tokens; "
                    f"allowed: 1 to {self.max_length}"
                )
            tokens = [*context, *continuation][-(self.max_length + 1) : -1]
            num_cut += len(context) + len(continuation) > self.max_length + 1
            inputs.setdefault(tuple(tokens), []).append(index)
        self._warn_of(num_cut)
        results = [(0.0, False)] * len(requests)
        longest_first = sorted(inputs, key=len, reverse=True)
        for batch in self._batches(longest_first, "likelihoods", **kwargs):
            scored = [(row, index) for row, ids in enumerate(batch) for index in inputs[ids]]
            found = self._score(batch, [(row, requests[index][2]) for row, index in scored])
            for (_, index), result in zip(scored, found, strict=True):
                results[index] = result
        return results

    def _warn_of(self, num_cut: int) -> None:
        if num_cut:
            warnings.warn(
                f"{num_cut} requests are too long for the model's {self.max_length} positions; "
                "their beginnings were cut off",
                stacklevel=2,
            )

    def _batches(
        self, items: Sequence[T], what: str, disable_tqdm: bool = False
    ) -> Iterator[Sequence[T]]:
        console = PlainConsole(stderr=True)
        hidden = disable_tqdm or not console.is_terminal
        starts = range(0, len(items), self.batch_size)
        for start in track(starts, what, console=console, transient=True, disable=hidden):
            yield items[start : start + self.batch_size]

    @torch.no_grad()
    def _score(
        self, inputs: Sequence[Sequence[int]], continuations: Sequence[tuple[int, list[int]]]
    ) -> list[tuple[float, bool]]:
        """Of each (row of `inputs`, continuation); an input ends before its last token."""
        longest = max(map(len, inputs))
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in inputs]  # causal: none looks there
        hidden = self._model.model(torch.tensor(padded, device=self._device))  # [b, s, hidden]
        scored = [
            (row, len(inputs[row]) - len(tokens) + at, token)
            for row, tokens in continuations
            for at, token in enumerate(tokens)
        ]
        rows, positions, flat = (list(column) for column in zip(*scored, strict=True))
        targets = torch.tensor(flat, device=self._device)  # [n]
        log_p: list[Tensor] = []
        greedy: list[Tensor] = []
        start = 0
        for log_probs in log_probabilities(self._model.lm_head, hidden[rows, positions]):
            part = targets[start : start + len(log_probs)]  # [c], of log_probs [c, vocab]
            log_p.append(log_probs.gather(1, part[:, None])[:, 0])
            greedy.append(log_probs.argmax(1) == part)
            start += len(part)
        lengths = [len(tokens) for _, tokens in continuations]
        likelihoods = torch.cat(log_p).split(lengths)
        all_greedy = torch.cat(greedy).split(lengths)
        pairs = zip(likelihoods, all_greedy, strict=True)
        return [(p.double().sum().item(), bool(g.all())) for p, g in pairs]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ---- generation -----------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """
        Raises:
            QLoRAError: for an option that is not supported, or leaves no room for a prompt.
        """
        groups: dict[str, list[int]] = {}  # requests whose options are the same
        for index, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            until, options = _decoding(requests[indices[0]].args[1])
            room = self.max_length - options["max_new_tokens"]  # tokens that a prompt may have
            if room <= 0:
                raise QLoRAError(
                    f"max_gen_toks={options['max_new_tokens']} leaves no room for a prompt in the "
                    f"model's {self.max_length} positions; set a smaller one in the task's "
                    "generation_kwargs"
                )
            whole = {i: self.tok_encode(requests[i].args[0]) for i in indices}
            self._warn_of(sum(len(tokens) > room for tokens in whole.values()))
            prompts = {i: (ids or [self.prefix_token_id])[-room:] for i, ids in whole.items()}
            indices.sort(key=lambda i: len(prompts[i]), reverse=True)
            for batch in self._batches(indices, "answers", disable_tqdm):
                found = self._generate([prompts[i] for i in batch], until, options)
                for index, answer in zip(batch, found, strict=True):
                    answers[index] = answer
        return answers

    def _generate(
        self, prompts: Sequence[list[int]], until: Sequence[str], options: dict[str, Any]
    ) -> list[str]:
        """Texts before the first of `until`."""
        rows: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        # a token has at least a byte of text; special ones have none
        tail = 1 + max((len(stop.encode()) for stop in until), default=0)
        stop_ids = set(self._tok.stop_token_ids)
        for ids in (self._tok.encode(stop, add_special_tokens=False) for stop in until):
            if len(ids) == 1 and not self._tok.decode(ids):
                stop_ids.add(ids[0])
        for tokens in generate_batch(self._model, prompts, stop_token_ids=stop_ids, **options):
            for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if running[index] and token is not None:
                    row.append(token)
                    ending = self._tok.decode(row[-tail:])
                running[index] &= token is not None and not any(stop in ending for stop in until)
            if not any(running):
                break
        answers = [self._tok.decode(row) for row in rows]
        for stop in until:
            answers = [answer.partition(stop)[0] for answer in answers]
        return answers


def _decoding(options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(strings to stop at, options of `generate_batch`) from a task's generation_kwargs."""
    given: dict[str, Any] = {**normalize_gen_kwargs(options, _MAX_GEN_TOKS)}
    until = [stop for stop in given.pop("until") if stop]
    decoding = {"max_new_tokens": given.pop("max_gen_toks")}
    sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
    if sampling.get("top_k") == 0:  # transformers' way to say all
        del sampling["top_k"]
    if given.pop("do_sample"):
        decoding |= {"temperature": 1.0, **sampling}
    unknown = [name for name, value in given.items() if _NO_EFFECT.get(name) != value]
    if unknown:
        raise QLoRAError(
            f"generation_kwargs has {', '.join(unknown)}, which is not supported; supported: "
            f"until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
        )
    return until, decoding
