"""What comes over the wire: request bodies of the OpenAI and Replicate APIs, validated once and strictly.

A field is known and used, or it is refused by name: nothing is accepted and ignored. Two reviewed lists make the exceptions:
LABELS change nothing about an answer, and NEUTRAL fields are fine as long as they ask for nothing.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from ownlm.errors import UserError
from ownlm.generate.grammar import ANY_OBJECT, Form
from ownlm.generate.sampling import MAX_TOP_LOGPROBS, Sampling
from ownlm.records import Message

MAX_PROMPTS = 256  # prompts of one request, times n
MAX_N = 64
MAX_STOPS = 16
MAX_PRIORITY = 1000
MAX_DEADLINE_S = 86_400.0

# Names a client may give its request. They reach nobody and change nothing.
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
# Features this server doesn't have, each with the values that don't ask for it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),  # says how to call tools, and there are none
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}

# What says how tokens are drawn, what is told of them, or who goes first: a search over beams heeds none of it.
UNSEARCHED = ("top_p", "top_k", "min_p", "typical_p", "priority", "deadline", "echo", "best_of", "top_logprobs")

Text = Annotated[str, StringConstraints(strict=True)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
TokenId = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]


class BadRequest(Exception):
    """A request that can't be served as it is: HTTP status, sentence, and the field it is about."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class Wire(BaseModel):
    """A request body."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    labels: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class WireMessage(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=content)


class StreamOptions(Wire):
    include_usage: Flag = False
    # Padding against eavesdroppers who count bytes; asking for none is fine.
    include_obfuscation: Literal[False] = False


class Choosing(Wire):
    """How tokens are chosen, in the names all these APIs share."""

    temperature: Temperature = 1.0
    top_p: Share = 1.0
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    typical_p: Share = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[Annotated[int, Field(ge=0)], Bias], Field(max_length=1024)] = Field(default_factory=dict)
    seed: Seed | None = None

    def choice(self) -> dict[str, Any]:
        """These fields, as `Sampling` has them."""
        given = {name: getattr(self, name) for name in Choosing.model_fields}
        return {**given, "logit_bias": tuple(self.logit_bias.items())}


class AnyText(Wire):
    type: Literal["text"]


class AnyJson(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    """`name` and `description` are for models that read them; every schema is kept to strictly."""

    name: Text
    description: Text = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonOfSchema(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Generation(Choosing):
    """What chat and completion requests share."""

    labels = LABELS
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: Text
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_N)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    response_format: Annotated[AnyText | AnyJson | JsonOfSchema, Field(discriminator="type")] = AnyText(type="text")
    guided_regex: Text | None = None  # these two as vLLM has them
    guided_grammar: Text | None = None
    use_beam_search: Flag = False  # as vLLM has it: over n beams, which all are given, best first
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0  # of that search
    priority: Annotated[int, Field(strict=True, ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = (
        0  # as vLLM has it: smaller goes first
    )
    deadline: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None  # seconds from now
    stream: Flag = False
    stream_options: StreamOptions = StreamOptions()

    def form(self) -> Form | None:
        """The form the answer must have. Raises UserError."""
        forms = [Form("regex", self.guided_regex)] if self.guided_regex is not None else []
        if self.guided_grammar is not None:
            forms.append(Form("grammar", self.guided_grammar))
        if isinstance(self.response_format, AnyJson):
            forms.append(Form("json_schema", ANY_OBJECT))
        elif isinstance(self.response_format, JsonOfSchema):
            forms.append(Form("json_schema", json.dumps(self.response_format.json_schema.schema_)))
        if len(forms) > 1:
            raise UserError("an answer has one form.", where="response_format")
        return forms[0] if forms else None

    @model_validator(mode="after")
    def _streams(self) -> "Generation":
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @model_validator(mode="after")
    def _searches(self) -> "Generation":
        if not self.use_beam_search:
            if "length_penalty" in self.model_fields_set:
                raise ValueError("length_penalty needs use_beam_search=true")
            return self
        if self.stream:
            raise ValueError("what a search over beams finds is known at its end only: use_beam_search takes no stream")
        fields = type(self).model_fields
        unheard = [name for name in UNSEARCHED if name in fields and getattr(self, name) != fields[name].default]
        if self.temperature not in {0, 1}:
            unheard.append("temperature")
        if unheard:
            raise ValueError(f"a search over beams goes without {', '.join(unheard)}")
        return self

    def settings(self, **more: Any) -> Sampling:
        """The sampler's settings."""
        fields = {
            **self.choice(),
            "n": self.n,
            "form": self.form(),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            **more,
        }
        if self.use_beam_search:
            fields["temperature"] = 0.0
            if self.n > 1:
                fields |= {"beams": self.n, "length_penalty": self.length_penalty}
        return Sampling(**fields)


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[WireMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit and differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def sampling(self) -> Sampling:
        return self.settings(max_tokens=self.max_completion_tokens or self.max_tokens, logprobs=self.top_logprobs or 0)


class CompletionRequest(Generation):
    """POST /v1/completions"""

    neutral = {name: values for name, values in NEUTRAL.items() if name != "best_of"}

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0)] = 16  # OpenAI's default
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_N)] | None = None
    echo: Flag = False
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "CompletionRequest":
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("n must be at most best_of")
        if self.use_beam_search and self.logprobs:
            raise ValueError("a search over beams tells no alternatives: logprobs=0 tells those of its tokens")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("which answers are best is known at the end only: best_of takes no stream")
        if len(self.prompts()) * (self.best_of or self.n) > MAX_PROMPTS:
            raise ValueError(f"prompts times n (or best_of) must be at most {MAX_PROMPTS}")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or tokens."""
        return each(self.prompt)

    def sampling(self) -> Sampling:
        return self.settings(
            max_tokens=self.max_tokens, best_of=self.best_of, echo=self.echo, logprobs=self.logprobs or 0
        )


class EmbeddingRequest(Wire):
    """POST /v1/embeddings"""

    labels = LABELS

    model: Text
    input: (
        Annotated[str, StringConstraints(strict=True, min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[str, StringConstraints(strict=True, min_length=1)]],
            Field(min_length=1, max_length=2048),
        ]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None

    def texts(self) -> list[str | list[int]]:
        """Every input, as text or tokens."""
        return each(self.input)


class LoadAdapter(Wire):
    """POST /v1/load_lora_adapter, as vLLM has it. `lora_path` is a reference, or a folder that PEFT wrote."""

    lora_name: Text
    lora_path: Text
    load_inplace: Flag = False  # it may take the place of one of that name


class UnloadAdapter(Wire):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lora_int_id": ()}

    lora_name: Text


class PredictionInput(Choosing):
    """The `input` of a Replicate prediction, with the names that language models have there.

    The prompt is asked as a user's message. With `prompt_template`, the text it makes of {prompt} and {system_prompt} is
    continued as it stands.
    """

    prompt: Text
    system_prompt: Text = ""
    prompt_template: Text | None = None
    max_tokens: Count | None = None
    max_new_tokens: Count | None = None
    stop_sequences: Text | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = ""

    @model_validator(mode="after")
    def _agrees(self) -> "PredictionInput":
        if self.max_tokens and self.max_new_tokens and self.max_tokens != self.max_new_tokens:
            raise ValueError("max_tokens and max_new_tokens are two names of one limit and differ")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template has no {prompt}")
        return self

    def question(self) -> str | list[Message]:
        """Raw text, or the messages to answer."""
        if self.prompt_template is not None:
            return self.prompt_template.replace("{system_prompt}", self.system_prompt).replace("{prompt}", self.prompt)
        system = [Message(role="system", content=self.system_prompt)] if self.system_prompt else []
        return [*system, Message(role="user", content=self.prompt)]

    def sampling(self) -> Sampling:
        stops = self.stop_sequences
        if isinstance(stops, str):  # Replicate's models take them separated by commas
            stops = [stop for stop in stops.split(",") if stop]
        return Sampling(
            max_tokens=self.max_tokens or self.max_new_tokens,
            **self.choice(),
            stop=tuple(stops),
        )


class PredictionRequest(Wire):
    """POST /v1/predictions and /v1/models/{owner}/{name}/predictions"""

    input: PredictionInput
    version: Text | None = None
    stream: Flag = False


W = TypeVar("W", bound=Wire)


def parse(cls: type[W], body: bytes) -> W:
    """The request in a body of JSON. Raises BadRequest with every fault, naming each field."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as fault:
        raise BadRequest(f"The body is not valid JSON: {fault}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest(f"The body must be a JSON object, not {type(data).__name__}.", code="invalid_json")
    faults: list[tuple[str, str]] = []
    fields: dict[str, Any] = {}
    for name, value in data.items():
        if name in cls.model_fields:
            if value is not None or cls.model_fields[name].is_required():
                fields[name] = value
        elif name in cls.neutral:
            if value is not None and value not in cls.neutral[name]:
                faults.append((name, f"{name} is not supported by this server: leave it out."))
        elif name not in cls.labels:
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            faults.append((name, f"Unknown field {name}.{f' Did you mean {near[0]}?' if near else ''}"))
    try:
        request = cls.model_validate(fields)
    except ValidationError as error:
        faults += [told(dict(fault)) for fault in error.errors(include_url=False, include_context=False)]
    if faults:
        messages = dict.fromkeys(message for _, message in faults)
        raise BadRequest(" ".join(list(messages)[:8]), param=faults[0][0] or None)
    return request


def each(value: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One text, one list of tokens, or several of either -> the list of them."""
    if isinstance(value, str):
        return [value]
    tokens = [item for item in value if isinstance(item, int)]
    return [tokens] if tokens else [item for item in value if not isinstance(item, int)]


def told(fault: Mapping[str, Any]) -> tuple[str, str]:
    """(field, sentence) of one of pydantic's errors."""
    # A union adds its members' names to the place; the field is what the client wrote.
    place = [str(step) for step in fault["loc"] if isinstance(step, int) or step.isidentifier()]
    path = "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in place).removeprefix(".")
    name = place[0] if place else ""
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return name, f"Unknown field {path}."
    if fault["type"] == "missing":
        return name, f"Missing field {path}."
    return name, f"{path}: {message}." if path else f"{message[:1].upper()}{message[1:]}."
