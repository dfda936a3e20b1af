"""Requests that join and leave at any step, each against PyTorch run alone, without a cache and without a batch."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_tokenizer import CHARACTERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adalink.runtime import Deployment, Generation, Handle, Request, SamplingParams
from adalink.runtime.errors import QueueFullError, RequestError, RequestTimeoutError, UnknownTaskError
from adalink.runtime.generation import admission
from adalink.runtime.generation.row import Row
from adalink.runtime.generation.running_batch import RunningBatch
from adalink.runtime.ort.static_cache import StaticCacheDecodeState, StaticCacheEngine
from adalink.runtime.tasks.adapter_mapping import combine

TASKS = [None, "alpha", "beta", "prompted", "double"]
# Of one token, of one piece, and of many pieces.
PROMPTS = ["Q", "wheat", "crude oil, 1987", "a bank raised its rates again in the spring"]


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 4 for character in text]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "STEP_TOKENS", 6)
    monkeypatch.setattr(admission, "IDLE_TOKENS", 12)
    monkeypatch.setattr(admission, "PASS_TOKENS", 8)


@pytest.fixture
def three_slots(llama: Any) -> Iterator[Deployment]:
    with Deployment.open(llama.folder, threads=1, slots=3, context=64) as opened:
        yield opened


class Watch:
    """A logits processor that changes nothing; tells at which of its row's steps it is."""

    def __init__(self, at: int, then: Any) -> None:
        self.calls, self.at, self.then = 0, at, then

    def __call__(self, scores: Any, sequence: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.then()


def submit_at(
    deployment: Deployment, requests: list[tuple[int, Request]], handles: list[Handle] | None = None
) -> list[Handle]:
    """Submit requests, in the order of their steps, while another row runs; ``handles`` has them as they are made."""
    handles = [] if handles is None else handles
    step = 0

    def tick(scores: Any, sequence: Any) -> None:
        nonlocal step
        handles.extend(deployment.submit(request) for at, request in requests if at == step)
        step += 1

    last = max(at for at, _ in requests)
    sampling = SamplingParams(suppress_tokens=[2], base_defaults=False)
    driver = Request("The", max_new_tokens=last + 2, processors=[tick], sampling=sampling)
    deployment.submit(driver).result(60)
    assert len(handles) == len(requests)
    return handles


DRAWN = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from(PROMPTS),
        st.sampled_from(TASKS),
        st.integers(1, 14),
        st.sampled_from([None, 3, 8]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("cached", [False, True])
def test_each_request_is_as_if_it_were_alone(llama: Any, small_pieces: None, cached: bool) -> None:
    """Whatever joins, leaves, and is cancelled; with three slots, so that some wait."""

    @cache
    def alone(prompt: str, task: str | None, budget: int) -> list[int]:
        return llama.greedy(encode(prompt), task, budget)  # type: ignore[no-any-return]

    size = 1 << 20 if cached else 0
    with Deployment.open(llama.folder, threads=1, slots=3, context=64, prefix_cache_bytes=size) as opened:

        @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(DRAWN)
        def check(drawn: list[tuple[int, str, str | None, int, int | None]]) -> None:
            requests, handles = [], list[Handle]()
            for number, (at, prompt, task, budget, cancel_at) in enumerate(sorted(drawn, key=lambda row: row[0])):
                watch = Watch(cancel_at or 0, lambda number=number: handles[number].cancel())
                requests.append((at, Request(prompt, task=task, max_new_tokens=budget, processors=[watch])))
            submit_at(opened, requests, handles)
            for (_, request), handle in zip(requests, handles, strict=True):
                result, expected = handle.result(60), alone(request.prompt, request.task, request.max_new_tokens)  # type: ignore[arg-type]
                tokens = list(result.token_ids)
                if result.finish_reason == "cancelled":
                    assert tokens == expected[: len(tokens)]
                else:
                    assert tokens == expected
                assert result.text == "".join(piece.text for piece in handle)

        check()
        assert opened._generator.scheduler.running == opened._generator.scheduler.waiting == 0


@pytest.mark.parametrize("fault", ["adopt", "extend", "drop", "tasks"])
def test_faults_would_show(
    llama: Any, three_slots: Deployment, small_pieces: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Planted: a row in another's place, a piece that is lost, a cache that stays behind, tasks in another order."""
    requests = [
        (0, Request(PROMPTS[2], task="alpha", max_new_tokens=8)),
        (1, Request(PROMPTS[3], task="beta", max_new_tokens=12)),
        (2, Request(PROMPTS[1], max_new_tokens=12)),
    ]
    expected = [llama.greedy(encode(r.prompt), r.task, r.max_new_tokens) for _, r in requests]  # type: ignore[arg-type]
    assert [list(handle.result(60).token_ids) for handle in submit_at(three_slots, requests)] == expected
    if fault == "adopt":
        adopt = StaticCacheDecodeState.adopt

        def turned(self: StaticCacheDecodeState, state: StaticCacheDecodeState) -> None:
            state._cache[:] = state._cache[:, :, ::-1]
            adopt(self, state)

        monkeypatch.setattr(StaticCacheDecodeState, "adopt", turned)
    elif fault == "extend":
        extend = StaticCacheDecodeState.extend

        def late(self: StaticCacheDecodeState, feeds: Any, start: int, stop: int) -> None:
            extend(self, feeds, start, stop)
            self._lengths[0] = max(1, stop - 1)

        monkeypatch.setattr(StaticCacheDecodeState, "extend", late)
    elif fault == "drop":
        drop = StaticCacheDecodeState.drop

        def left_behind(self: StaticCacheDecodeState, row: int) -> None:
            before = self._cache[:, row].copy()
            drop(self, row)
            self._cache[:, row] = before

        monkeypatch.setattr(StaticCacheDecodeState, "drop", left_behind)
    else:

        def turned_round(self: RunningBatch) -> Any:
            return self._embedder.for_decoding(combine([row.generated_tasks for row in self.rows[::-1]]))

        monkeypatch.setattr(RunningBatch, "_mapping", turned_round)
    requests += [(3, Request(PROMPTS[1], task="alpha", max_new_tokens=12))]
    expected += [llama.greedy(encode(PROMPTS[1]), "alpha", 12)]
    assert [list(handle.result(60).token_ids) for handle in submit_at(three_slots, requests)] != expected


def test_prompts_read_alone_share_memory_until_the_batch_is_idle(
    llama: Any, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[StaticCacheDecodeState]] = []
    plain = StaticCacheEngine.open_slots

    def counted(engine: StaticCacheEngine, slots: int, capacity: int) -> StaticCacheDecodeState:
        state = plain(engine, slots, capacity)
        made.append(weakref.ref(state))
        return state

    long, longer = "crude oil, 1987", "crude oil, 1987, and then wheat"
    with Deployment.open(llama.folder, threads=1) as opened:
        alone = [opened.generate([text], max_new_tokens=4, sampling=ENDLESS)[0] for text in (long, longer)]
        monkeypatch.setattr(StaticCacheEngine, "open_slots", counted)
        # One after the other: the second begins when the first has been read.
        handles = submit_at(
            opened,
            [
                (at, Request(text, max_new_tokens=4, sampling=ENDLESS))
                for at, text in ((1, long), (9, long), (17, longer))
            ],
        )
        texts = [handle.result(60) for handle in handles]
    assert texts == [alone[0], alone[0], alone[1]]
    assert len(made) == 3  # the batch, the first prompt's and the larger one's: the second used the first's
    gc.collect()
    assert not any(reference() for reference in made)


def test_the_seed_belongs_to_the_request(llama: Any, three_slots: Deployment) -> None:
    """Alone, in a batch, joining late: the same text. Another choice: another text."""
    request = Request("wheat", task="alpha", max_new_tokens=10, sampling=SamplingParams(1.5, seed=7))
    alone = three_slots.submit(request).result(60)
    others = [(0, Request("oil", max_new_tokens=9)), (2, request), (3, request)]
    assert [handle.result(60) for handle in submit_at(three_slots, others)][1:] == [alone, alone]
    generated = three_slots.generate(["oil", "wheat"], tasks="alpha", max_new_tokens=10, sampling=request.sampling)
    as_choice = Request("wheat", task="alpha", max_new_tokens=10, sampling=request.sampling, choice=1)
    assert three_slots.submit(as_choice).result(60) == generated[1] != alone


def test_text_comes_as_it_is_made(three_slots: Deployment) -> None:
    handle = three_slots.submit(Request("wheat", max_new_tokens=12))
    pieces = list(handle)
    result = handle.result()
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == result.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == result.token_ids


def test_in_an_event_loop(three_slots: Deployment) -> None:
    async def read(request: Request) -> str:
        return "".join([piece.text async for piece in three_slots.submit(request)])

    async def both() -> list[str]:
        requests = [Request("wheat", max_new_tokens=12), Request("oil", task="beta", max_new_tokens=9)]
        return list(await asyncio.gather(*map(read, requests)))

    expected = three_slots.generate(["wheat"], max_new_tokens=12) + three_slots.generate(
        ["oil"], tasks="beta", max_new_tokens=9
    )
    assert asyncio.run(both()) == [result.text for result in expected]


def test_a_listener_that_fails_stops_nobody(three_slots: Deployment) -> None:
    """An event loop is closed while its requests run: those of others go on, and so do its own."""
    expected = three_slots.generate(["oil"], max_new_tokens=30, sampling=ENDLESS)[0]
    handles = [
        three_slots.submit(Request("oil", max_new_tokens=30, sampling=ENDLESS, processors=[slow])) for _ in range(2)
    ]

    def broken() -> None:
        raise RuntimeError("Event loop is closed")

    handles[0].listen(broken)
    assert [handle.result(60) for handle in handles] == [expected, expected]


ENDLESS = SamplingParams(suppress_tokens=[2], base_defaults=False)


def slow(_: Any, __: Any) -> None:
    time.sleep(0.01)


def test_cancelling_frees_the_slot(three_slots: Deployment) -> None:
    """Three rows hold all slots; a fourth waits, and gets the place of the one that is cancelled."""
    running = [
        three_slots.submit(Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow])) for _ in range(3)
    ]
    waiting = three_slots.submit(Request("wheat", max_new_tokens=3))
    given_up = three_slots.submit(Request("wheat", max_new_tokens=3))
    given_up.cancel()
    next(running[1])
    assert not waiting.is_done
    running[1].cancel()
    assert waiting.result(60) == three_slots.generate(["wheat"], max_new_tokens=3)[0]
    cut = running[1].result(60)
    assert cut.finish_reason == "cancelled"
    assert 0 < len(cut.token_ids) < 50
    assert given_up.result(60) == Generation("", (), "cancelled", 5)
    assert {len(handle.result(60).token_ids) for handle in (running[0], running[2])} == {50}


@pytest.mark.parametrize("ending", ["whole", "streamed", "cancelled", "awaited"])
def test_ended_requests_wait_for_no_garbage_collector(three_slots: Deployment, ending: str) -> None:
    request = Request("oil", task="alpha", max_new_tokens=4, sampling=ENDLESS)
    gc.collect()
    gc.disable()
    try:
        handles = [three_slots.submit(request) for _ in range(9)]
        if ending == "cancelled":
            handles[0].cancel()
        for handle in handles:
            if ending == "streamed":
                assert list(handle)
            elif ending == "awaited":
                asyncio.run(_read(handle))
            handle.result(60)
        three_slots.generate(["oil"], max_new_tokens=1)  # the scheduler's thread has let the others go
        left = [weakref.ref(handle) for handle in handles]
        del handle, handles
        assert [reference() for reference in left] == [None] * 9
        assert sum(type(thing) is Row for thing in gc.get_objects()) <= 1  # the last one's, as its thread ends
    finally:
        gc.enable()


async def _read(handle: Handle) -> list[Any]:
    return [piece async for piece in handle]


def test_deadlines_count_waiting(three_slots: Deployment) -> None:
    running = [
        three_slots.submit(Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow])) for _ in range(3)
    ]
    late = three_slots.submit(Request("wheat", max_new_tokens=3, timeout=0.05))
    with pytest.raises(RequestTimeoutError, match="its time ended after 0 tokens"):
        late.result(60)
    running[0].cancel()
    short = Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow], timeout=0.2)
    with pytest.raises(RequestTimeoutError, match=r"its time ended after [1-9]"):
        three_slots.submit(short).result(60)
    with pytest.raises(TimeoutError, match="has not ended after"):
        running[1].result(0.001)


def test_a_full_queue_refuses(llama: Any) -> None:
    with Deployment.open(llama.folder, threads=1, slots=1, queue_limit=2) as opened:
        first = opened.submit(Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow]))
        next(first)
        waiting = [opened.submit(Request("oil", max_new_tokens=2)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            opened.submit(Request("oil", max_new_tokens=2))
        first.cancel()
        assert len({handle.result(60) for handle in waiting}) == 1


def test_tasks_take_turns(llama: Any) -> None:
    """Ten requests of one task came first; those of others do not wait for all of them."""
    ended: list[str | None] = []
    with Deployment.open(llama.folder, threads=1, slots=1) as opened:
        first = opened.submit(Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow]))
        next(first)

        def note(task: str | None) -> Watch:
            return Watch(1, lambda: ended.append(task))

        handles = [
            opened.submit(Request("oil", task=task, max_new_tokens=1, processors=[note(task)]))
            for task in ["alpha"] * 10 + ["beta", None]
        ]
        first.cancel()
        for handle in handles:
            handle.result(60)
    assert ended[:3] == ["alpha", "beta", None]
    assert len(ended) == 12


def test_what_fails_fails_alone(three_slots: Deployment) -> None:
    def broken(scores: Any, sequence: Any) -> None:
        raise KeyError("a bug of the caller's")

    def banned(scores: Any, sequence: Any) -> None:
        scores[:] = -np.inf

    requests = [
        (0, Request("oil", task="alpha", max_new_tokens=12)),
        (1, Request("oil", max_new_tokens=12, processors=[broken])),
        (2, Request("oil", max_new_tokens=12, processors=[banned])),
    ]
    good, raising, empty = submit_at(three_slots, requests)
    with pytest.raises(KeyError):
        raising.result(60)
    with pytest.raises(RequestError, match="ban every token"):
        list(empty)
    assert good.result(60) == three_slots.generate(["oil"], tasks="alpha", max_new_tokens=12)[0]


def test_an_engine_that_fails_fails_those_that_run(three_slots: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = three_slots.generate(["oil"], max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(StaticCacheDecodeState, "step", lambda self, embeds: 1 / 0)
        handles = [three_slots.submit(Request("oil", max_new_tokens=5, draft_tokens=0)) for _ in range(2)]
        for handle in handles:
            with pytest.raises(ZeroDivisionError):
                handle.result(60)
    assert three_slots.generate(["oil"], max_new_tokens=5) == expected


def test_closing_ends_requests(llama: Any) -> None:
    opened = Deployment.open(llama.folder, threads=1, slots=1)
    handles = [opened.submit(Request("oil", max_new_tokens=50, sampling=ENDLESS, processors=[slow])) for _ in range(3)]
    next(handles[0])
    opened.close()
    for handle in handles:
        with pytest.raises(RequestError, match="closed"):
            handle.result(60)
    with pytest.raises(RequestError, match="closed"):
        opened.submit(Request("oil"))


def test_a_task_replaced_under_way(llama: Any, three_slots: Deployment) -> None:
    """A request ends with the weights that it began with."""
    expected = three_slots.generate(["wheat"], tasks="alpha", max_new_tokens=20)[0]

    def replace() -> None:
        three_slots.remove_task("alpha")
        three_slots.add_task(llama.sources / "beta", "alpha")

    watch = Watch(4, replace)
    handle = three_slots.submit(Request("wheat", task="alpha", max_new_tokens=20, processors=[watch]))
    assert handle.result(60) == expected
    other = three_slots.generate(["wheat"], tasks="beta", max_new_tokens=20)
    assert three_slots.generate(["wheat"], tasks="alpha", max_new_tokens=20) == other != [expected]


def test_logprobs_are_pytorchs(llama: Any, three_slots: Deployment) -> None:
    sampling = SamplingParams(1.2, seed=3, repetition_penalty=1.3)  # neither counts in log probabilities
    request = Request("wheat", task="alpha", max_new_tokens=6, logprobs=4, sampling=sampling)
    handle = three_slots.submit(request)
    pieces, result = list(handle), handle.result()
    assert tuple(entry for piece in pieces for entry in piece.logprobs) == result.logprobs
    ids = encode("wheat")
    logits = llama.logits([*ids, *result.token_ids], "alpha")[len(ids) - 1 : -1]
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    assert len(result.logprobs) == len(result.token_ids) == 6
    for entry, token, row in zip(result.logprobs, result.token_ids, expected, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [other for other, _ in entry.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][:4], atol=1e-4)


def test_stop_tokens(llama: Any, three_slots: Deployment) -> None:
    texts = {prompt: llama.greedy(encode(prompt), "beta", 12) for prompt in PROMPTS}
    prompt, whole, stop = next(
        (prompt, whole, token)
        for prompt, whole in texts.items()
        for index, token in enumerate(whole)
        if index > 1 and token not in whole[:index]
    )
    result = three_slots.submit(Request(prompt, task="beta", max_new_tokens=12, stop_token_ids=[stop])).result(60)
    assert list(result.token_ids) == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"


def test_engines_without_slots_answer_closed_batches(llama: Any, t5: Any, tmp_path: Any) -> None:
    with Deployment.open(t5.folder, threads=1, slots=2) as opened:
        tasks = [None, "alpha", "beta", None, "alpha"]
        handles = [opened.submit(Request("wheat", task=task, max_new_tokens=6)) for task in tasks]
        for task, handle in zip(tasks, handles, strict=True):
            assert handle.result(60) == opened.generate(["wheat"], tasks=task, max_new_tokens=6)[0]


def test_the_next_turn_reads_only_what_is_new(llama: Any, resumed: list[int]) -> None:
    with Deployment.open(llama.folder, threads=1, prefix_cache_bytes=1 << 20) as opened:
        for task, is_kept in ((None, True), ("alpha", True), ("prompted", False)):
            resumed.clear()
            first = opened.generate(["wheat"], tasks=task, max_new_tokens=8)[0]
            turn = encode("wheat") + list(first.token_ids) + encode(" and oil")
            result = opened.submit(Request(turn, task=task, max_new_tokens=8)).result(60)
            assert list(result.token_ids) == llama.greedy(turn, task, 8)
            # The last token of a reply has not been run. What "prompted" generates is another function of its tokens.
            assert resumed == [5 + len(first.token_ids) - 1 if is_kept else 5]
            assert result.cached_tokens == resumed[0]


@pytest.mark.parametrize(
    ("request_", "wording"),
    [
        (Request(), "prompts is None"),
        (Request("a", messages=[{"role": "user", "content": "b"}]), "either prompts or messages"),
        (Request("a", max_new_tokens=62), "63 positions|65 positions"),
        (Request("a", logprobs=-1), "logprobs is -1"),
        (Request("a", logprobs=5000), "at most 1000"),
        (Request("a", timeout=0), "timeout is 0"),
        (Request("a", timeout=float("nan")), "timeout is nan"),
        (Request("a", stop_token_ids=[96]), "expected token ids from 0 to 95"),
        (Request("a", stop_token_ids=7), "expected a list of token ids"),  # type: ignore[arg-type]
        (Request("a", processors=[3]), "no function"),  # type: ignore[list-item]
        (Request("a", choice=-1), "choice is -1"),
        (Request(7), "expected a text or a list"),  # type: ignore[arg-type]
        ("wheat", "expected a Request"),
    ],
)
def test_bad_requests(three_slots: Deployment, request_: Any, wording: str) -> None:
    if request_ == Request("a", max_new_tokens=62):
        request_ = Request("abc", max_new_tokens=62)
    with pytest.raises(RequestError, match=wording):
        three_slots.submit(request_)


def test_an_unknown_task_and_a_narrow_context(llama: Any) -> None:
    with Deployment.open(llama.folder, threads=1, slots=1, context=16) as opened:
        with pytest.raises(UnknownTaskError):
            opened.submit(Request("wheat", task="gamma"))
        with pytest.raises(RequestError, match="would have 17 positions, the deployment was opened with context=16"):
            opened.submit(Request("wheat", max_new_tokens=12))
        assert len(opened.submit(Request("wheat", sampling=ENDLESS)).result(60).token_ids) == 11


def test_many_threads_get_their_own(llama: Any, three_slots: Deployment) -> None:
    cases = [(prompt, task) for prompt in PROMPTS[:3] for task in TASKS]
    expected = {case: llama.greedy(encode(case[0]), case[1], 10) for case in cases}
    wrong: list[Any] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(8):
            prompt, task = cases[rng.integers(len(cases))]
            found = three_slots.generate([prompt], tasks=task, max_new_tokens=10)[0]
            if list(found.token_ids) != expected[prompt, task]:
                wrong.append((prompt, task, found))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
