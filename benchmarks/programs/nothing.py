"""``twistd -y``: an application that does nothing, with nothing imported but Twisted's own."""

from twisted.application.service import Application

application = Application("nothing")
