"""Chat session: a conversation with a deployment, turn by turn, that always fits the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalink.runtime.errors import RequestError
from adalink.runtime.generation.request import Request
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.known_tasks import split_name

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.generation.handle import Handle
    from adalink.runtime.tasks.task_changes import Reload

# Share of the model's positions that a reply can count on, unless it is limited to fewer tokens.
_REPLY_SHARE = 4


@dataclass(frozen=True)
class Turn:
    """A message that was sent, and its reply as it comes.

    Attributes:
        text: the user's message.
        handle: the reply.
        dropped: how many of the oldest turns were left out, because the conversation would not fit.
        limit: most tokens of the reply.
    """

    text: str
    handle: Handle
    dropped: int
    limit: int


class ChatSession:
    """A conversation; each turn is one request with all turns before it.

    Attributes:
        task: the task that answers; ``None`` for the base model.
        system: the system message; ``None`` for the template's own, if it has one.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        task: str | None = None,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: SamplingParams | None = None,
    ) -> None:
        """Begin an empty conversation.

        Args:
            deployment: an open deployment of a model with a chat template.
            task: see the attributes.
            system: likewise.
            max_new_tokens: most tokens of a reply.
            sampling: how tokens are chosen.

        Raises:
            UnknownTaskError: the task is not deployed.
            RequestError: the template takes no system message.
        """
        self._deployment, self._sampling, self._most = deployment, sampling, max_new_tokens
        self._turns: list[tuple[str, str]] = []
        self.task: str | None = None
        self.system: str | None = None
        self.use_task(task)
        self.use_system(system)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The messages and replies that the next turn sees."""
        return tuple(self._turns)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the deployed tasks."""
        return self._deployment.tasks

    def reload(self) -> Reload:
        """Take up tasks that have changed in the folder; see ``Deployment.reload``."""
        return self._deployment.reload()

    def use_task(self, name: str | None) -> None:
        """Let another task answer from now on; raises ``UnknownTaskError``."""
        if name is not None:
            self._deployment.load_task(name)
        self.task = name

    def use_system(self, text: str | None) -> None:
        """Set the system message from the next turn on; raises ``RequestError`` if the template takes none."""
        if text is not None:
            self._deployment.tokenizer.encode_messages(_messages(text, [], "Hello"))
        self.system = text

    def clear(self) -> None:
        """Forget all turns; task and system message stay."""
        self._turns.clear()

    def send(self, text: str) -> Turn:
        """Send a message. The conversation is as before until ``keep`` is called with the reply.

        Raises:
            RequestError: it does not fit the model even without the turns before it, or the template refuses it.
        """
        kept = list(self._turns)
        while True:
            messages = _messages(self.system, kept, text)
            fits = self._check(messages)
            try:
                fits(self._least)
                break
            except RequestError:
                if not kept:
                    raise
                del kept[0]
        limit = _largest(self._least, self._most, fits)
        request = Request(messages=messages, task=self.task, max_new_tokens=limit, sampling=self._sampling)
        return Turn(text, self._deployment.submit(request), len(self._turns) - len(kept), limit)

    def keep(self, turn: Turn, reply: str) -> None:
        """Add a turn and its reply to the conversation; turns that were dropped for it are forgotten.

        A turn without a reply is not kept: templates refuse an empty message.
        """
        if reply:
            self._turns = [*self._turns[turn.dropped :], (turn.text, reply)]

    @property
    def _least(self) -> int:
        """Tokens that a reply can count on."""
        limits = [limit for limit in (self._deployment.manifest.base.max_positions, self._capacity) if limit]
        return min([self._most, *(max(1, limit // _REPLY_SHARE) for limit in limits)])

    @property
    def _capacity(self) -> int | None:
        """Positions of a compiled engine; ``None`` if the model's own limit is the only one."""
        profile = self._deployment.profile
        return None if profile is None or self._deployment.manifest.base.kind != "decoder" else profile.capacity

    def _check(self, messages: list[dict[str, str]]) -> Callable[[int], None]:
        """What raises ``RequestError`` if a reply of so many tokens does not fit behind the conversation."""
        token_ids, capacity = self._deployment.tokenizer.encode_messages(messages), self._capacity
        name = None if self.task is None else split_name(self.task)[0]
        task = None if name is None else self._deployment.manifest.tasks.get(name)
        positions = len(token_ids) + (0 if task is None else task.prepended_positions)

        def check(tokens: int) -> None:
            self._deployment.check_prompt(token_ids, (), self.task, tokens)
            if capacity is not None and positions + tokens > capacity:
                raise RequestError(
                    f"the conversation has {positions} positions and the reply {tokens}, this engine takes {capacity}: "
                    "shorten the message, or ask for fewer new tokens"
                )

        return check


def _messages(system: str | None, turns: list[tuple[str, str]], text: str) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": text}]


def _largest(least: int, most: int, fits: Callable[[int], None]) -> int:
    """The largest number that fits, from ``least``, which does, to ``most``."""
    while least < most:
        middle = (least + most + 1) // 2
        try:
            fits(middle)
            least = middle
        except RequestError:
            most = middle - 1
    return least
