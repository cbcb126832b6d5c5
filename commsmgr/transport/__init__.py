"""
What opens sockets.

Both transports get their connections from ``dialer``. It lays one ``deadline`` over its ``layers``: TCP, perhaps a
``proxy`` (in the words of ``proxy_connect``), and TLS, where a ``gate`` waits for the check. What TLS asks for is in
``tls`` (the context, with the ``system_issuers``) and in ``peer`` (the check of a ``certificate``), and ``tls_reasons``
says why it failed.

HTTP is ``http``: one exchange is a ``call``, over a connection of the ``pool``, and ``http_head`` and ``body`` bound
what comes.

The WebSocket is ``websocket``, which connects again and again (by a ``connector``): one ``attempt`` has its
``handshake``, and what comes of it is a ``connection``, over autobahn's protocol, which is ``guarded``.

The answers to an upgrade and to a CONNECT are read by ``answer_head``.
"""
