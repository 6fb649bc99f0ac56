"""The poller against a real HTTP server: news wakes the owner; silence and nonsense change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession, ClientTimeout, web

from trimtab_operator.core.kube import Kind, Object, Ref
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob import progress
from trimtab_operator.finetunejob.board import ProgressBoard, Target
from trimtab_operator.finetunejob.progress import ProgressPoller
from trimtab_trainer.config import Progress, dump

OWNER = Ref("FineTuneJob", "team", "job")
TARGET = Target("pod-0", "one", "127.0.0.1")


def news(step: int) -> Progress:
    return Progress(step=step, total_steps=20, epoch="0.5", tokens_per_second=3, estimated_remaining_seconds=4)


class Pod:
    """A training pod's port; answers what `body` holds."""

    def __init__(self) -> None:
        self.body = dump(news(1))
        self.status = 200
        self.headers: dict[str, str] = {}
        self.silent = False

    async def handle(self, _: web.Request) -> web.Response:
        if self.silent:
            await asyncio.Event().wait()
        return web.Response(text=self.body, status=self.status, headers=self.headers)


@pytest.fixture
async def pod(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pod]:
    made = Pod()
    app = web.Application()
    app.router.add_get("/progress", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    monkeypatch.setattr(progress, "PROGRESS_PORT", runner.addresses[0][1])
    yield made
    await runner.cleanup()


@pytest.fixture
def board() -> ProgressBoard:
    made = ProgressBoard()
    made.watch(OWNER, [TARGET])
    return made


async def poll(board: ProgressBoard) -> list[Ref]:
    woken: list[Ref] = []
    async with ClientSession(timeout=ClientTimeout(total=0.5)) as session:
        await ProgressPoller(board, Settings()).poll(session, woken.append)
    return woken


async def test_news_is_kept_and_wakes_once(pod: Pod, board: ProgressBoard) -> None:
    assert await poll(board) == [OWNER]
    assert board.answers(OWNER) == {TARGET: news(1)}
    assert await poll(board) == []
    pod.body = dump(news(2))
    assert await poll(board) == [OWNER]


@pytest.mark.parametrize("body", ["", "[]", '{"step": "x"}', "x" * 200_000])
async def test_nonsense_changes_nothing(pod: Pod, board: ProgressBoard, body: str) -> None:
    await poll(board)
    pod.body = body
    assert await poll(board) == []
    assert board.answers(OWNER) == {TARGET: news(1)}


async def test_silence_errors_and_redirects_change_nothing(pod: Pod, board: ProgressBoard) -> None:
    pod.silent = True
    assert await poll(board) == []
    pod.silent, pod.status = False, 500
    assert await poll(board) == []
    pod.status, pod.headers = 302, {"Location": "http://169.254.169.254/"}
    assert await poll(board) == []
    board.watch(OWNER, [Target("pod-0", "one", "127.0.0.77")])
    assert await poll(board) == []
    board.watch(OWNER, [Target("pod-0", "one", "example.org")])
    assert await poll(board) == []
    assert board.answers(OWNER) == {}


async def test_next_attempts_pod_does_not_inherit(pod: Pod, board: ProgressBoard) -> None:
    await poll(board)
    board.watch(OWNER, [Target("pod-1", "one", "127.0.0.1")])
    assert board.answers(OWNER) == {}


async def test_runs_beside_the_loop_and_forgets_who_is_gone(pod: Pod, board: ProgressBoard) -> None:
    woken: asyncio.Queue[Ref] = asyncio.Queue()
    here: dict[str, Object] = {"job": {}}

    class Store:
        def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
            return here.get(name)

    poller = ProgressPoller(board, Settings(progress_poll_seconds=0.05))
    task = asyncio.create_task(poller.run(Store(), woken.put_nowait))  # type: ignore[arg-type]
    assert await woken.get() == OWNER
    here.clear()
    while board.owners():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_thousands_are_asked_one_after_the_other(pod: Pod, board: ProgressBoard) -> None:
    """Beyond the first 64, at most 50 a second."""
    owners = [Ref("FineTuneJob", "team", f"job-{number:03}") for number in range(100)]
    board.forget(OWNER)
    for owner in owners:
        board.watch(owner, [Target(f"pod-{owner.name}", "one", "127.0.0.1")])
    began = asyncio.get_running_loop().time()
    assert await poll(board) == owners
    assert asyncio.get_running_loop().time() - began > 0.9 * (100 - 64) / 50
