"""Secrets stay out of what people read, and foreign text stays on its line."""

from __future__ import annotations

import json
import time
import tracemalloc
from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import ConfigError
from commsmgr.patterns import MARK
from commsmgr.redact import Redactor, clip, single_line

TOKEN = "eyJhbGciOi.J9+/abc=="

header_safe = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=8, max_size=40)


class RememberedSecretTests(SynchronousTestCase):
    """What is known to be a secret."""

    def test_json_stays_json(self) -> None:
        """A key that sounds like a secret, before what is none, does not make a text that is JSON another one."""
        redact = Redactor()
        for text in (
            '{"token": null, "secret": [], "password":true}',
            '{"kind": "token", "value": "of no interest"}',
            json.dumps(json.dumps({"credentials": [], "token": {}})),
        ):
            self.assertEqual(redact(text), text)
        for text in ('"password": nullable', "password={abc}", '["X-Token", "truth"]', "token=trueish"):
            self.assertIn("[redacted]", redact(text))

    def test_everywhere(self) -> None:
        """A remembered secret is replaced wherever it stands, also more than once and inside a word."""
        redact = Redactor()
        redact.secret(TOKEN)
        self.assertEqual(redact(f"x{TOKEN}y, {TOKEN}"), f"x{MARK}y, {MARK}")

    def test_spellings(self) -> None:
        """A secret is found in a repr, in JSON and percent-encoded in a URL, too."""
        redact = Redactor()
        secret = "pa\"ss\\wo'rd+é/=="
        redact.secret(secret)
        for spelled in (repr({"k": secret}), json.dumps([secret]), "v=" + quote(secret, safe="")):
            self.assertIn(MARK, redact(spelled))
            self.assertNotIn("wo", redact(spelled))

    def test_short(self) -> None:
        """What is shorter than 8 characters is no secret: ordinary words must not vanish."""
        redact = Redactor()
        redact.secret("seconds"[:7])
        redact.secret("")
        self.assertEqual(redact("three seconds"), "three seconds")

    def test_part_of_mark(self) -> None:
        """A secret that is part of the mark cannot be hidden by it and is ignored."""
        redact = Redactor()
        redact.secret("redacted")
        self.assertEqual(redact("redacted"), "redacted")

    def test_surrounding_blanks(self) -> None:
        """A token read with its newline is remembered without."""
        redact = Redactor()
        redact.secret("hunter2hunter2\n")
        self.assertEqual(redact("<hunter2hunter2>"), f"<{MARK}>")

    def test_surrogate(self) -> None:
        """A secret that no URL can bear is remembered all the same."""
        redact = Redactor()
        redact.secret("\ud800hunter2hunter2")
        self.assertEqual(redact("\ud800hunter2hunter2"), MARK)

    def test_latest_sixteen(self) -> None:
        """The latest 16 are kept, and using one again makes it late."""
        redact = Redactor()
        secrets = [f"token-number-{number:02}" for number in range(17)]
        for secret in secrets[:16]:
            redact.secret(secret)
        redact.secret(secrets[0])
        redact.secret(secrets[16])
        self.assertEqual(redact(secrets[0]), MARK)
        self.assertEqual(redact(secrets[1]), secrets[1])
        self.assertEqual({redact(secret) for secret in secrets[2:]}, {MARK})

    def test_longest_first(self) -> None:
        """A secret that begins with another one is replaced whole."""
        redact = Redactor()
        redact.secret("abcdefgh")
        redact.secret("abcdefghijkl")
        self.assertEqual(redact("abcdefghijkl abcdefgh"), f"{MARK} {MARK}")

    def test_hide_leaves_the_rest(self) -> None:
        """``hide`` replaces what is known and judges no form."""
        redact = Redactor(["x+"])
        redact.secret(TOKEN)
        self.assertEqual(redact.hide(f"password=a xxx {TOKEN}"), f"password=a xxx {MARK}")

    @settings(deadline=None)
    @given(header_safe, st.text(), st.text())
    def test_never_shows(self, secret: str, before: str, after: str) -> None:
        """Whatever stands around it, a secret that a header can bear does not come through."""
        redact = Redactor()
        redact.secret(secret)
        if secret in MARK or "[redacted" in secret or secret in before + MARK + after:
            return
        self.assertNotIn(secret, redact(before + secret + after))


class FormTests(SynchronousTestCase):
    """What looks like a secret."""

    def check_hidden(self, cases: dict[str, str]) -> None:
        redact = Redactor()
        for text, expected in cases.items():
            self.assertEqual(redact(text), expected, text)
            self.assertEqual(redact(expected), expected, f"twice: {text}")

    def test_authorization(self) -> None:
        """The value of an Authorization field goes, its name stays, however it is written down."""
        self.check_hidden(
            {
                "Authorization: Bearer abc.def": f"Authorization: {MARK}",
                "authorization: Basic dXNlcjpwYXNz rest": f"authorization: {MARK} rest",
                "Proxy-Authorization: NTLM abc": f"Proxy-Authorization: {MARK}",
                "Authorization: opaque": f"Authorization: {MARK}",
                'Authorization: Digest username="u", response="0f"': f"Authorization: {MARK}",
                '{"Authorization": "Bearer abc"}': f'{{"Authorization": "{MARK}"}}',
                "Headers({b'authorization': [b'Bearer abc']})": f"Headers({{b'authorization': [b'{MARK}']}})",
                "('Authorization', 'Basic YmFzaWM6')": f"('Authorization', '{MARK}')",
            }
        )

    def test_quick_look(self) -> None:
        """A text without any of the signs of an assignment is searched for a bearer token all the same."""
        redact = Redactor([r"\d{4}"])
        self.assertEqual(redact("authorization token Bearer abc 1234"), f"authorization token Bearer {MARK} {MARK}")

    def test_bearer(self) -> None:
        """A bearer token goes wherever it is named."""
        self.check_hidden(
            {
                "sent Bearer abc.def-123, then closed": f"sent Bearer {MARK}, then closed",
                "BEARER abc": f"BEARER {MARK}",
                '"bearer x"': f'"bearer {MARK}"',
            }
        )

    def test_assignments(self) -> None:
        """Values of passwords, tokens, secrets and keys go, as shells, URLs, Python, JSON and headers note them."""
        self.check_hidden(
            {
                "password=hunter2 user=me": f"password={MARK} user=me",
                "/x?access_token=abc&y=1": f"/x?access_token={MARK}&y=1",
                "Auth(token='a b', x=1)": f"Auth(token={MARK}, x=1)",
                'client_secret = "a \\" b" and': f"client_secret = {MARK} and",
                '{"refresh_token":"abc","x":1}': f'{{"refresh_token":{MARK},"x":1}}',
                "{'api_key': b'abc'}": f"{{'api_key': {MARK}}}",
                '"{\\"token\\": \\"abc\\", \\"x\\": 1}"': f'"{{\\"token\\": {MARK}, \\"x\\": 1}}"',
                "[(b'x-token', b'abc')]": f"[(b'x-token', {MARK})]",
                "X-Api-Key: abc": f"X-Api-Key: {MARK}",
                "passwd: abc": f"passwd: {MARK}",
                "passphrase=abc;pwd=def": f"passphrase={MARK};pwd={MARK}",
                "private_key=abc": f"private_key={MARK}",
                "credentials=abc": f"credentials={MARK}",
                'password="cut off': f"password={MARK}",
                "TOKEN=ABC": f"TOKEN={MARK}",
                '{"password": ["a", "b]"], "x": 1}': f'{{"password": {MARK}, "x": 1}}',
                '{"secret": {"a": {"b": "}c"}}, "x": 1}': f'{{"secret": {MARK}, "x": 1}}',
                '{\\"token\\": {\\"a\\": [\\"b\\"]}} x': f'{{\\"token\\": {MARK}}} x',
                "tokens: [a, token=[a, [b], c], d": f"tokens: [a, token={MARK}, d",
                '"password" => "abc", password => abc': f'"password" => {MARK}, password => {MARK}',
                "password := abc": f"password := {MARK}",
                "password=$'a b' x": f"password={MARK} x",
                "password='it''s' x": f"password={MARK} x",
                'password="""a\nb""" x': f"password={MARK} x",
                "X-Auth-Token: abc": f"X-Auth-Token: {MARK}",
                "access_token: abc": f"access_token: {MARK}",
            }
        )

    def test_url(self) -> None:
        """The password in a URL goes, the user stays."""
        self.check_hidden(
            {
                "http://me:hunter2@proxy:3128/x": f"http://me:{MARK}@proxy:3128/x",
                "http://proxy:3128/a@b": "http://proxy:3128/a@b",
            }
        )

    def test_prose(self) -> None:
        """Sentences of ours, and what an operator needs in order to repair things, stay as they are."""
        redact = Redactor()
        for text in (
            "No usable bearer token could be had. (look at [auth]: the file, the variable or the callable)",
            "code: auth.token: must be printable ASCII",
            "auth.token_file=/etc/agent/token cannot be read",
            'WWW-Authenticate: Bearer realm="x", error="invalid_token", error_description="expired"',
            "token == None",
            "the authorization was refused",
            "wss://backend.example:8443/ws?x=1",
            "key=17 keys=3 token_expires=5",
        ):
            self.assertEqual(redact(text), text)

    def test_operator_patterns(self) -> None:
        """What an operator's expression matches goes; a mark that is there already is not marked again."""
        redact = Redactor([r"\d{4}-\d{4}", "x+", r"[a-z]{8}"])
        shown = redact("card 1234-5678 xx.")
        self.assertEqual(shown, f"card {MARK} {MARK}.")
        self.assertEqual(redact(shown), shown)

    def test_wrong_pattern(self) -> None:
        """A wrong expression is named by its key."""
        error = self.assertRaises(ConfigError, Redactor, ["fine", "(oops"])
        self.assertEqual(error.key, "redaction.patterns[1]")
        self.assertIn("not a regular expression", str(error))

    def test_linear(self) -> None:
        """No text that a peer could think of makes redaction take more than linear time."""
        redact = Redactor()
        for piece in (
            "bearer ",
            "token",
            "authorization: ",
            'password="',
            "://a:",
            'token\\"=',
            "authorization:          ",
            "password='\\",
            "authorization: digest ",
            "secret=",
            'key\\"',
            "authorization: bearer ",
        ):
            started = time.process_time()
            redact(piece * (200_000 // len(piece)))
            # A quadratic expression takes minutes here.
            self.assertLess(time.process_time() - started, 2, piece)


class NameTests(SynchronousTestCase):
    """Names of fields."""

    def test_sensitive(self) -> None:
        """A name that has the name of a secret among its words marks its value, however the words are put together."""
        sensitive = Redactor().sensitive
        for name in (
            "token", "access_token", "Password", "client-secret", "api_key", "Authorization", "credentials",
            "dbPassword", "db_password", "APIKey", "apiKey", "x-api-key", "password2", "password_old", "token\n",
            "PRIVATE_KEY", "a.token.b",
        ):  # fmt: skip
            self.assertTrue(sensitive(name), name)
        for name in ("key", "message_id", "passed", "tokens", "passwordless", "tokenizer", "api", "key_api", "", "\n"):
            self.assertFalse(sensitive(name), name)

    def test_kept(self) -> None:
        """What is remembered of names is bounded, however many and however long they are."""
        redact = Redactor()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(30):
                self.assertTrue(redact.sensitive(f"token {number} " + "ab " * 30_000))
            for number in range(10_000):
                self.assertFalse(redact.sensitive(f"name{number}"))
            self.assertLess(tracemalloc.get_traced_memory()[0] - before, 1_000_000)
        finally:
            tracemalloc.stop()

    def test_configured(self) -> None:
        """The configured names take the place of the usual ones, in data and in texts alike."""
        redact = Redactor(keys=("Kennwort", "pin code"))
        self.assertTrue(redact.sensitive("altesKennwort") and redact.sensitive("pinCode"))
        self.assertFalse(redact.sensitive("password"))
        self.assertEqual(
            redact('{"kennwort": "x y", "password": "z"} pin_code=1234'),
            f'{{"kennwort": {MARK}, "password": "z"}} pin_code={MARK}',
        )
        self.assertEqual(Redactor(keys=("auth_token",))("auth_token: abc"), f"auth_token: {MARK}")


class DataTests(SynchronousTestCase):
    """Data as JSON has it."""

    def test_data(self) -> None:
        """Values of sensitive keys go at any depth, whatever they are, and secrets in any text; the rest is a copy."""
        redact = Redactor([r"\d{4}-\d{4}"])
        data = {
            "users": [{"name": "me", "db_password": "hunter2", "token": None, "secret": True, "passwd": ""}],
            "api_key": ["a", {"b": 1}],
            "pwd": 17,
            "note": "card 1234-5678, password=abc",
            "card 9999-9999": 1.5,
        }
        self.assertEqual(
            redact.data(data),
            {
                "users": [{"name": "me", "db_password": MARK, "token": None, "secret": True, "passwd": ""}],
                "api_key": MARK,
                "pwd": MARK,
                "note": f"card {MARK}, password={MARK}",
                f"card {MARK}": 1.5,
            },
        )
        self.assertEqual(data["api_key"], ["a", {"b": 1}])

    def test_keys_that_become_one(self) -> None:
        """No entry is lost when two keys look alike without their secrets."""
        self.assertEqual(Redactor([r"\d+"]).data({"1": "a", "2": "b"}), {MARK: "a", f"{MARK} (2)": "b"})

    @settings(deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["token", "a_password"]), inner)
            ),
        )
    )
    def test_twice(self, data: object) -> None:
        """What was redacted is not changed by redacting it again."""
        redact = Redactor([r"\d{4}", r"patient=\S+"])
        once = redact.data(data)
        self.assertEqual(redact.data(once), once)


class DocumentTests(SynchronousTestCase):
    """Outputs that are JSON, and remain so."""

    def test_json_stays_json(self) -> None:
        """Values of sensitive keys go, whatever they are and however deep; the rest, and the form, stay."""
        redactor = Redactor()
        for text, expected in (
            ('{"token": {"source": "file"}, "n": 1}', '{"token": "[redacted]", "n": 1}'),
            (
                '{"a": [{"password": 5, "b": "token=abc"}]}',
                '{"a": [{"password": "[redacted]", "b": "token=[redacted]"}]}',
            ),
            ('{\n  "secret": ["a"]\n}\n', '{\n  "secret": "[redacted]"\n}'),
        ):
            self.assertEqual(redactor.document(text), expected)
            self.assertEqual(redactor.document(expected), expected)

    def test_untouched(self) -> None:
        """Without a secret not a blank is changed."""
        for text in ('{"token": null,  "password": ""}', "[1,2 , 1e2]\n", '{"auth":{"source":"token_file"}}', "[]"):
            self.assertEqual(Redactor().document(text), text)

    def test_what_only_looks_like_it(self) -> None:
        """What is no JSON, or has a key twice, is a text like any other: no parser drops a secret unseen."""
        redactor = Redactor()
        for text in (
            '{"password": "x"',
            '{"password": "hunter2", "password": ""}',
            "[password=x]",
            "[" * 5000 + "token=x",
        ):
            self.assertEqual(redactor.document(text), redactor(text))
            self.assertIn("[redacted]", redactor.document(text))

    def test_patterns_and_secrets(self) -> None:
        """What an operator's pattern finds across a key and its value, and a remembered secret as a key, go too."""
        redactor = Redactor([r'"ssn": "\d+"'])
        redactor.secret("s3cret-token-value")
        shown = redactor.document('{"ssn": "123", "s3cret-token-value": 1}')
        self.assertNotIn("123", shown)
        self.assertNotIn("s3cret", shown)


class SingleLineTests(SynchronousTestCase):
    """Foreign text on one line."""

    def test_plain(self) -> None:
        """Printable text, of any script, is left alone."""
        self.assertEqual(single_line("naïve ☃ 日本語 \\n"), "naïve ☃ 日本語 \\n")

    def test_escapes(self) -> None:
        """What ends a line, steers a terminal or turns the writing round is made visible."""
        self.assertEqual(
            single_line("a\r\n\tb\x1b[31m\x9b\x00\x7f\u2028\u202e\ud800"),
            r"a\r\n\tb\x1b[31m\x9b\x00\x7f\u2028\u202e\ud800",
        )

    def test_limit(self) -> None:
        """What is cut off is counted."""
        self.assertEqual(single_line("a\nbcdef", limit=3), r"a\nb… (4 more characters)")
        self.assertEqual(clip("abc", 3), "abc")

    @settings(deadline=None)
    @given(st.text())
    def test_one_line(self, text: str) -> None:
        """Whatever the text, the outcome is one printable line that can be encoded."""
        line = single_line(text)
        self.assertTrue(line.isprintable())
        self.assertLessEqual(len(line.splitlines()), 1)
        line.encode("utf-8")
