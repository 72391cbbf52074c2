from __future__ import annotations

import asyncio
import threading

import pytest

from vixml_jax.serving.batching import Batcher, Full


def run(answer, scenario, **settings):
    """Runs a scenario with a started batcher; returns the scenario's result and the sizes of all batches."""
    sizes = []
    settings = {"max_batch": 8, "max_wait": 0.05, "max_queue": 100, **settings}

    async def framed():
        batcher = Batcher(answer, on_batch=sizes.append, **settings)
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(framed()), sizes


def doubled(queries):
    return [2 * query for query in queries]


def test_every_query_gets_its_own_answer():
    async def scenario(batcher):
        return await asyncio.gather(*(batcher.ask(i) for i in range(50)))

    answers, sizes = run(doubled, scenario)
    assert answers == [2 * i for i in range(50)]
    assert sum(sizes) == 50
    assert max(sizes) == 8
    assert len(sizes) == 7


def test_a_lone_query_waits_no_longer_than_allowed():
    async def scenario(batcher):
        start = asyncio.get_running_loop().time()
        assert await batcher.ask(1) == 2
        return asyncio.get_running_loop().time() - start

    seconds, sizes = run(doubled, scenario, max_wait=0.0)
    assert sizes == [1]
    assert seconds < 1


def test_a_full_queue_refuses_and_recovers():
    busy, release = threading.Event(), threading.Event()

    def slow(queries):
        busy.set()
        release.wait(10)
        return doubled(queries)

    async def scenario(batcher):
        first = asyncio.create_task(batcher.ask(0))
        while not busy.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.ask(i)) for i in range(1, 4)]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(Full):
            await batcher.ask(4)
        release.set()
        assert await asyncio.gather(first, *others) == [0, 2, 4, 6]
        return await batcher.ask(5)

    assert run(slow, scenario, max_batch=1, max_queue=3)[0] == 10


def test_a_failing_batch_does_not_end_the_service(caplog):
    def picky(queries):
        if "bad" in queries:
            raise ValueError("bad")
        return queries

    async def scenario(batcher):
        with pytest.raises(ValueError, match="bad"):
            await batcher.ask("bad")
        return await batcher.ask("good")

    assert run(picky, scenario)[0] == "good"
    assert "a batch of 1 queries failed" in caplog.text


def test_whoever_leaves_is_not_computed():
    seen = []

    def answer(queries):
        seen.extend(queries)
        return queries

    async def scenario(batcher):
        gone = asyncio.create_task(batcher.ask("gone"))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher.ask("here")

    assert run(answer, scenario)[0] == "here"
    assert seen == ["here"]


def test_stopping_refuses_what_waits():
    busy, release = threading.Event(), threading.Event()

    def slow(queries):
        busy.set()
        release.wait(10)
        return queries

    async def scenario():
        batcher = Batcher(slow, max_batch=1, max_wait=0, max_queue=9)
        batcher.start()
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(3)]
        while not busy.is_set():
            await asyncio.sleep(0.001)
        release.set()
        await batcher.stop()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(scenario())
    assert isinstance(results[0], (int, asyncio.CancelledError))
    assert all(isinstance(result, (Full, asyncio.CancelledError)) for result in results[1:])


def test_an_answer_that_is_no_batch_fails_its_queries_and_no_others(caplog):
    """The worker would end, and whoever asks later wait for ever."""

    def halves(queries):
        return doubled(queries)[: len(queries) // 2]

    async def scenario(batcher):
        for _ in range(2):
            with pytest.raises(ValueError, match="shorter"):
                await asyncio.wait_for(batcher.ask(1), 10)
        return True

    assert run(halves, scenario)[0]
    assert "a batch of 1 queries failed" in caplog.text
