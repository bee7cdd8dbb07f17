"""The work queue: one pass per job at a time, many requests make one pass, trouble waits longer."""

from __future__ import annotations

import asyncio

from finetune_operator.errors import ClusterUnavailableError, ConflictError
from finetune_operator.work_queue import WorkQueue

KEY, OTHER = ("ns", "one"), ("ns", "two")


def run(test):
    async def within_time():
        await asyncio.wait_for(test(), 10)

    asyncio.run(within_time())


def test_requests_while_a_pass_runs_make_one_more_pass():
    async def test():
        passes, begun, gate, done = [], asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def look(key):
            passes.append(key)
            if len(passes) == 1:
                begun.set()
                await gate.wait()
            else:
                done.set()

        queue = WorkQueue(look, min_interval=0)
        queue.request(KEY)
        await begun.wait()
        for _ in range(50):
            queue.request(KEY)
        gate.set()
        await done.wait()
        await queue.close()
        assert passes == [KEY, KEY]

    run(test)


def test_two_jobs_do_not_wait_for_each_other_but_one_job_does_for_itself():
    async def test():
        running, seen, both = set(), [], asyncio.Event()

        async def look(key):
            assert key not in running
            running.add(key)
            seen.append(set(running))
            if running == {KEY, OTHER}:
                both.set()
            await both.wait()
            running.discard(key)

        queue = WorkQueue(look, min_interval=0)
        queue.request(KEY)
        queue.request(OTHER)
        await both.wait()
        await queue.close()

    run(test)


def test_a_pass_says_when_it_wants_the_next():
    async def test():
        passes, done = [], asyncio.Event()

        async def look(key):
            passes.append(key)
            if len(passes) == 3:
                done.set()
                return None
            return 0.01

        queue = WorkQueue(look, min_interval=0)
        queue.request(KEY)
        await done.wait()
        await queue.close()
        assert len(passes) == 3

    run(test)


def test_no_error_of_one_job_stops_the_queue():
    async def test():
        passes, done = [], asyncio.Event()
        errors = [ConflictError("changed"), ClusterUnavailableError("down"), ValueError("a bug")]

        async def look(key):
            passes.append(key)
            if key == OTHER:
                done.set()
            elif errors:
                raise errors.pop(0)

        queue = WorkQueue(look, min_interval=0)
        queue.request(KEY)
        while errors:
            await asyncio.sleep(0.01)
            queue.request(KEY)
        queue.request(OTHER)
        await done.wait()
        await queue.close()

    run(test)


def test_trouble_that_lasts_is_asked_about_ever_more_rarely():
    async def test():
        async def look(key):
            raise ClusterUnavailableError("down")

        queue = WorkQueue(look, min_interval=0)
        delays = []
        queue.request_in = lambda key, delay: delays.append(delay)
        for _ in range(9):
            queue.request(KEY)
            await asyncio.gather(*queue._tasks)
        await queue.close()
        assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    run(test)


def test_a_closed_queue_takes_nothing_and_leaves_nothing_running():
    async def test():
        started = asyncio.Event()

        async def look(key):
            started.set()
            await asyncio.Event().wait()

        queue = WorkQueue(look, min_interval=0)
        queue.request(KEY)
        await started.wait()
        await queue.close()
        queue.request(OTHER)
        queue.request_in(OTHER, 0)
        assert OTHER not in queue._entries

    run(test)
