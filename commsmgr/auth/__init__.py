"""
The bearer token, as ``[auth]`` sets it: where it comes from, how it is renewed, and what a request is given.

Both transports ask :mod:`~commsmgr.auth.authorization`. That asks a provider (:mod:`~commsmgr.auth.providers`), whose
tokens :mod:`~commsmgr.auth.renewal` keeps where they cost something to get, lets :mod:`commsmgr.policy.tokens` decide
which token is shown, and has :mod:`~commsmgr.auth.accepted_tokens` keep over a restart which ones worked. What a token
is, as a value, says :mod:`commsmgr.bearer`.
"""
