"""What a request asks for: JSON in, typed values out, every field accounted for.

A field is read here, or it is in `neutral` with a value that asks for nothing, or the request is refused by the
field's name. Defaults are llama-server's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tightwad_agent.proxy.fields import BadField, Fields, shown, unsupported
from tightwad_agent.proxy.json_grammar import BadSchema, any_object, grammar_of
from tightwad_agent.proxy.messages import Message, messages_of
from tightwad_agent.proxy.neutral import NEUTRAL, is_number, only
from tightwad_agent.wire.verify import MAX_TOKENS, Sampling

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_N = 8
MAX_CHOICES = 64
"""Of one request: prompts times `n`."""
MAX_TOP = 20
MAX_BIASES = 2_048
MAX_BIAS = 1e6
MAX_INT = (1 << 31) - 1
BANNED = -MAX_BIAS
"""The bias of a token that must not be chosen."""
PING_S = 15.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What both endpoints share.

    `sampling` is without seed and bias. `seed` None: any. `max_tokens` None: to the end of the context. `n_probs` -1:
    no log probabilities, else so many alternatives per token. `bias`: by token id, or by text that is tokenized first.
    `speculation` false: without drafts, for comparison.
    `ping_s`: seconds of silence after which a stream gets a comment, 0 for never.
    """

    sampling: Sampling
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    n_probs: int = -1
    bias: tuple[tuple[int | str, float], ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    timings_per_token: bool = False
    speculation: bool = True
    ping_s: float = PING_S


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`/v1/chat/completions`. `continues`: the last message is the assistant's, and the answer goes on where it ends.
    `template_options` are handed to the template."""

    ask: Ask
    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    continues: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """`/v1/completions`: prompts as text or token ids; `echo`: each answer begins with its prompt."""

    ask: Ask
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False


# What both endpoints share


def _ask(fields: Fields, n_probs: int) -> Ask:
    n = _n(fields)
    streaming = _stream_options(fields)
    ping = fields.number("sse_ping_interval", PING_S, -1, 86_400)
    return Ask(
        sampling=_sampling(fields),
        seed=_seed(fields),
        max_tokens=_max_tokens(fields),
        stop=_stop(fields),
        n=n,
        n_probs=n_probs,
        bias=_bias(fields),
        ignore_eos=fields.flag("ignore_eos"),
        stream=fields.flag("stream"),
        include_usage=streaming,
        timings_per_token=fields.flag("timings_per_token"),
        speculation=fields.flag("speculation", default=True),
        ping_s=max(0.0, ping),
    )


def _sampling(fields: Fields) -> Sampling:
    usual = Sampling()
    grammar = _grammar(fields)
    top_k = fields.integer("top_k", -MAX_INT, MAX_INT)
    last_n = fields.integer("repeat_last_n", -1, MAX_INT)
    return Sampling(
        temperature=fields.number("temperature", usual.temperature, 0, 100),
        top_k=usual.top_k if top_k is None else max(0, top_k),
        top_p=fields.number("top_p", usual.top_p, 0, 1),
        min_p=fields.number("min_p", usual.min_p, 0, 1),
        repeat_penalty=fields.number("repeat_penalty", usual.repeat_penalty, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", usual.presence_penalty, -100, 100),
        frequency_penalty=fields.number("frequency_penalty", usual.frequency_penalty, -100, 100),
        repeat_last_n=usual.repeat_last_n if last_n is None else last_n,
        grammar=grammar,
    )


def _grammar(fields: Fields) -> str:
    """Of `response_format`, as OpenAI and llama-server have it; empty for any text."""
    value = fields.take("response_format")
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise fields.wrong("response_format", "an object", value)
    inner = Fields(value, "response_format.")
    kind = inner.take("type")
    if kind in (None, "text"):
        inner.refuse_rest({})
        return ""
    named, schema = inner.take("json_schema"), inner.take("schema")
    inner.refuse_rest({})
    if kind not in ("json_object", "json_schema"):
        raise inner.wrong("type", "text, json_object or json_schema", kind)
    if named is not None:
        if schema is not None:
            raise BadField(
                "`response_format.schema` and `response_format.json_schema` contradict each other",
                param="response_format.schema",
            )
        schema = _named_schema(inner, named)
    if schema is None:
        if kind == "json_schema":
            raise BadField("`response_format.json_schema` is missing", param="response_format.json_schema")
        return any_object()
    try:
        return grammar_of(schema)
    except BadSchema as exc:
        raise unsupported("response_format", f"cannot be held to by the verifier: {exc.message}") from None


def _named_schema(fields: Fields, value: Any) -> Any:
    if not isinstance(value, dict):
        raise fields.wrong("json_schema", "an object", value)
    inner = Fields(value, "response_format.json_schema.")
    schema = inner.take("schema")
    if schema is None:
        raise BadField("`response_format.json_schema.schema` is missing", param="response_format.json_schema.schema")
    inner.refuse_rest({"name": _text, "description": _text, "strict": only(True, False)})
    return schema


def _text(value: Any) -> bool:
    return isinstance(value, str)


_SEEDS = (1 << 32) - 1
"""libllama's seeds are 32 bits, and the last one means "random" there."""


def _seed(fields: Fields) -> int | None:
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    return None if seed in (None, -1) else seed


def seed_of(seed: int, index: int) -> int:
    """The seed of the `index`-th answer to one request."""
    return (seed + index) % _SEEDS


def _n(fields: Fields) -> int:
    n, alias = fields.integer("n", 1, MAX_N), fields.integer("n_cmpl", 1, MAX_N)
    if n is not None and alias is not None and n != alias:
        raise BadField("`n` and `n_cmpl` contradict each other", param="n_cmpl")
    n = n or alias or 1
    best_of = fields.integer("best_of", 1, MAX_INT)
    if best_of not in (None, n):
        raise unsupported("best_of", "other than `n` needs answers to be ranked, which the verifier does not do")
    return n


def _max_tokens(fields: Fields) -> int | None:
    names = ("max_tokens", "max_completion_tokens", "n_predict")
    given = {name: value for name in names if (value := fields.integer(name, -1, MAX_INT)) is not None}
    if 0 in given.values():
        name = next(name for name, value in given.items() if value == 0)
        raise BadField(f"`{name}` must be at least 1, or -1 for as many as there is room for", param=name)
    if len(set(given.values())) > 1:
        raise BadField(f"{' and '.join(f'`{n}`' for n in given)} contradict each other", param=list(given)[-1])
    limit = next(iter(given.values()), -1)
    return None if limit < 0 else limit


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise fields.wrong("stop", "text or a list of texts", value)
    if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in stops):
        raise BadField(f"`stop` takes {MAX_STOPS} texts of {MAX_STOP_CHARS} characters at most", param="stop")
    return tuple(dict.fromkeys(s for s in stops if s))


def _stream_options(fields: Fields) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise fields.wrong("stream_options", "an object", value)
    options = Fields(value, "stream_options.")
    usage = options.flag("include_usage")
    options.refuse_rest({"include_obfuscation": only(False)})
    return usage


def _bias(fields: Fields) -> tuple[tuple[int | str, float], ...]:
    """OpenAI's object of token ids; llama-server's pairs, and texts in place of ids."""
    value = fields.take("logit_bias")
    if value is None:
        return ()
    if isinstance(value, dict):
        pairs = [(int(k) if k.isascii() and k.isdigit() and len(k) < 10 else k, v) for k, v in value.items()]
    elif isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        pairs = [(key, bias) for key, bias in value]
    else:
        raise fields.wrong("logit_bias", "an object of token ids to numbers, or a list of pairs", value)
    if len(pairs) > MAX_BIASES:
        raise BadField(f"`logit_bias` takes {MAX_BIASES} tokens at most", param="logit_bias")
    return tuple(_one_bias(fields, key, bias) for key, bias in pairs)


def _one_bias(fields: Fields, key: Any, bias: Any) -> tuple[int | str, float]:
    if type(key) not in (int, str) or key == "" or (isinstance(key, str) and len(key) > MAX_STOP_CHARS):
        raise fields.wrong("logit_bias", "of token ids or short texts", key)
    if bias is False:
        return key, BANNED
    if not is_number(bias) or not abs(bias) <= MAX_BIAS:
        raise fields.wrong("logit_bias", f"of numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}, or false", bias)
    return key, float(bias)


# Chat


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Of `/v1/chat/completions` and `/apply-template`. Raises `BadField` or `Unsupported`."""
    fields = Fields(body)
    messages = messages_of(fields)
    continues = _continues(fields, messages)
    generation_prompt = fields.flag("add_generation_prompt", default=True)
    options = _template_options(fields)
    ask = _ask(fields, _chat_probs(fields))
    fields.refuse_rest({**NEUTRAL, "echo": only(False)})
    return ChatRequest(ask, messages, generation_prompt, continues, options)


def _chat_probs(fields: Fields) -> int:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP)
    n_probs = fields.integer("n_probs", 0, MAX_TOP)
    if wanted:
        return top if top is not None else n_probs or 0
    if top:
        raise BadField("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    return n_probs or -1


def _continues(fields: Fields, messages: tuple[Message, ...]) -> bool:
    """A last message of the assistant is continued, as llama-server does."""
    wanted = fields.take("continue_final_message")
    if wanted not in (None, False, True, "content"):
        raise unsupported("continue_final_message", f"cannot be {shown(wanted)} with the verifier")
    last = messages[-1].role == "assistant"
    if wanted and not last:
        raise BadField("`continue_final_message` needs a last message of the assistant", param="continue_final_message")
    if last and len(messages) > 1 and messages[-2].role == "assistant":
        raise BadField("`messages` must not end with two messages of the assistant", param="messages")
    return last


def _template_options(fields: Fields) -> dict[str, Any]:
    options = fields.take("chat_template_kwargs")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise fields.wrong("chat_template_kwargs", "an object", options)
    effort = fields.text("reasoning_effort")
    if effort == "none":
        return {**options, "enable_thinking": False}
    return {**options, "reasoning_effort": effort} if effort else dict(options)


# Completions


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Of `/v1/completions`. Raises `BadField` or `Unsupported`."""
    fields = Fields(body)
    prompts = _prompts(fields)
    echo = fields.flag("echo")
    logprobs, n_probs = fields.integer("logprobs", 0, MAX_TOP), fields.integer("n_probs", 0, MAX_TOP)
    wanted = logprobs if logprobs is not None else n_probs or -1
    if echo and wanted >= 0:
        raise unsupported("echo", "cannot go with `logprobs` on the verifier: the prompt's are not computed")
    ask = _ask(fields, wanted)
    fields.refuse_rest(NEUTRAL)
    return CompletionRequest(ask, prompts, echo)


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.take("prompt")
    if value is None:
        raise BadField("`prompt` is missing", param="prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        return (_prompt(fields, value),)
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
        raise fields.wrong("prompt", f"text, token ids, or a list of 1 to {MAX_CHOICES} of these", value)
    return tuple(_prompt(fields, one) for one in value)


def _prompt(fields: Fields, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) <= MAX_TOKENS and all(type(v) is int for v in value):
        return tuple(value)
    raise fields.wrong("prompt", "text, token ids, or a list of these", value)
