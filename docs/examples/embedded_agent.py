"""
A small agent with commsmgr inside: it runs commands of the type ``disk`` and rejects all others.

    python docs/examples/embedded_agent.py URL [SPOOL-DIRECTORY]

The backend's bearer token stands in the environment variable AGENT_TOKEN. SIGTERM or Ctrl-C ends it in order.
"""

import os
import shutil
import sys

from twisted.application.service import MultiService
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from commsmgr import Command, Config, Manager, Result, Status
from commsmgr.config import Auth, Backend, Spool


async def run_command(command: Command) -> Result:
    """Answer one command. Whatever is raised here becomes an error result; waiting costs the others nothing."""
    if command.type != "disk":
        return command.rejected(f"this agent knows no {command.type!r}")
    path = command.args[0] if command.args else "/"
    usage = await deferToThread(shutil.disk_usage, path)  # it may block, so it does not run in the reactor's thread
    return command.success(f"{usage.free} of {usage.total} bytes are free on {path}")


def make_agent(url: str, spool: str) -> MultiService:
    """Return the agent: a tree of services, of which the manager is one."""
    settings = Config(
        backends=(Backend(url=url),),
        auth=Auth(token_env="AGENT_TOKEN" if "AGENT_TOKEN" in os.environ else ""),
        spool=Spool(path=spool),  # what must not be lost survives there, in a crash too
    )
    manager = Manager(settings, reactor=reactor, handler=run_command)
    agent = MultiService()
    manager.setServiceParent(agent)

    def connected(status: Status) -> None:
        print(f"connected as {status.machine_id}", flush=True)

    manager.when_connected().addCallbacks(connected, lambda failure: print(failure.getErrorMessage()))
    return agent


def main(url: str, spool: str = "agent-spool") -> None:
    """Run until a signal comes."""
    agent = make_agent(url, spool)
    reactor.callWhenRunning(agent.startService)
    reactor.addSystemEventTrigger("before", "shutdown", agent.stopService)  # waits for an orderly end
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
