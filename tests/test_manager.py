"""The manager against the reference backend, over real sockets: the main job, in both dialects."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from commsmgr.messages import Command, Result
from tests.world import MACHINE, WorldTestCase, quick, until


def echo(command: Command) -> Result:
    """Answer with the arguments."""
    return command.success(" ".join(command.args))


class MainJob(WorldTestCase):
    """Connect, beat, report, receive, answer; in the dialect of commsmgr and in the plain one."""

    async def _main_job(self, dialect: str) -> None:
        backend = await self.backend(dialects=[dialect])
        manager = self.manager(quick(backend, self.directory), handler=echo)
        status = await manager.connect()
        self.assertTrue(status.connected)
        await until(lambda: backend.connected(MACHINE) == dialect)
        answer = await manager.send_heartbeat()
        self.assertEqual(answer.status, "ok")
        await manager.send_inventory()
        await until(lambda: backend.ledger.inventory_of(MACHINE))
        command_id = backend.send_command(MACHINE, "echo", "", ("a", "b"))
        result = await backend.when_result(command_id)
        self.assertEqual((result.status, result.output), ("success", "a b"))
        await until(lambda: manager.status().queue.events == 0 and manager.status().queue.states == 0)
        await manager.disconnect()
        self.assertFalse(manager.status().running)

    def test_v1(self) -> Deferred[None]:
        """Everything works with a backend that speaks commsmgr.v1."""
        return Deferred.fromCoroutine(self._main_job("commsmgr.v1"))

    def test_plain(self) -> Deferred[None]:
        """Everything works with a plain backend."""
        return Deferred.fromCoroutine(self._main_job("plain"))

    async def test_again_after_disconnect(self) -> None:
        """A manager that was stopped starts again, and what it had accepted meanwhile is delivered."""
        backend = await self.backend(path=f"{self.directory}/backend.sqlite")
        manager = self.manager(quick(backend, self.directory))
        await manager.connect()
        command_id = backend.send_command(MACHINE, "ask")
        command = await manager.commands().get()
        await backend.stopService()
        await manager.send_result(command.success("late"))
        await manager.disconnect()
        await backend.startService()
        manager = self.manager(quick(backend, self.directory))
        waiting = backend.when("result")
        await manager.connect()
        await waiting
        self.assertEqual(command_id, command.id)
